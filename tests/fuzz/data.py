"""Random data: samples with weights, cut into batches, and given to an estimate in one of the forms that it takes."""

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Data:
    """Samples, sorted by class, so that batches in order are far from the whole.

    Attributes:
        seed: of the numbers.
        samples: how many.
        shape: of a sample.
        dtype: "float32", "bfloat16", "float64" or "complex64".
        batches: the batch size of arrays, or the sizes of the batches of a stream.
        form: what a batch is: "array", "dict" or "tuple"; with weights not an array.
        stream: how batches are given that are a stream: "list", "iter" or "generator"; or "device" for arrays of jax.
        num_samples: how many of them an estimate is to use; None for all.
        weights: None; "whole" numbers; "quarters" of them, where what has weight 0 is NaN.
    """

    seed: int
    samples: int
    shape: tuple
    dtype: str = "float32"
    batches: int | tuple = 16
    form: str = "array"
    stream: str = "list"
    weights: str | None = None
    num_samples: int | None = None

    @property
    def is_complex(self):
        return self.dtype.startswith("complex")

    @property
    def is_list(self):
        """Whether it is given as a list of batches."""
        return not isinstance(self.batches, int) and self.stream in ("list", "device")

    @property
    def wide(self):
        """The same data in double precision."""
        return dataclasses.replace(self, dtype="complex128" if self.is_complex else "float64")

    @functools.cached_property
    def _drawn(self):
        rng = np.random.default_rng(self.seed)
        size = (self.samples, *self.shape)
        x = rng.normal(size=size) + (1j * rng.normal(size=size) if self.is_complex else 0)
        x = x * rng.uniform(0.5, 2, self.shape[-1]) + rng.normal(size=self.shape[-1])
        x += (np.arange(self.samples) * 3 // self.samples).reshape(-1, *[1] * len(self.shape))
        kept = jnp.asarray(x, "bfloat16" if self.dtype == "bfloat16" else "complex64" if self.is_complex else "float32")
        return np.asarray(kept), rng.integers(0, 4, self.samples)

    @property
    def x(self):
        """The samples; all numbers are such that single precision holds them, so that wider data are the same."""
        return self._drawn[0].astype(jnp.dtype(self.dtype))

    @property
    def repeats(self):
        """How often each sample counts."""
        return np.ones(self.samples, int) if self.weights is None else self._drawn[1]

    @property
    def unit(self):
        """The weight of what counts once."""
        return 0.25 if self.weights == "quarters" else 1.0

    @property
    def rows(self):
        """For each batch its samples: of arrays those used are evenly spaced, of a stream they are the first."""
        used = self.samples if self.num_samples is None else self.num_samples
        if isinstance(self.batches, int):
            chosen, count = np.arange(used) * self.samples // used, -(-used // self.batches)
            return [chosen[k::count] for k in range(count)]
        parts = np.split(np.arange(self.samples), np.cumsum(self.batches)[:-1])
        return [part[part < used] for part in parts if part[0] < used]

    def counted(self, rows):
        """The samples of a batch, each as often as it counts, for a model that knows no weights."""
        return np.repeat(self.x[rows], self.repeats[rows], axis=0)

    def batch(self, rows):
        """Samples as an estimate takes them."""
        x, w = self.x[rows], (self.repeats[rows] * self.unit).astype(np.float32)
        if self.weights == "quarters":
            x = np.where((w > 0).reshape(-1, *[1] * len(self.shape)), x, np.array(np.nan, x.dtype))
        return self.formed(x, w)

    def formed(self, x, w):
        """Samples and their weights in the form of a batch."""
        return {"array": x, "dict": {"x": x, "w": w}, "tuple": (x, w)}[self.form]

    def given(self):
        """The data as `batches`, and the options that go with them."""
        options = {} if self.form == "array" else {"call": CALLS[self.form]}
        if self.weights is not None:
            options["sample_weight"] = WEIGHTS[self.form]
        options |= {} if self.num_samples is None else {"num_samples": self.num_samples}
        kinds = {"list": list, "iter": iter, "generator": lambda b: (one for one in b)}
        held = functools.partial(jax.tree.map, jnp.asarray) if self.stream == "device" else lambda batch: batch
        if isinstance(self.batches, int):
            return held(self.batch(np.arange(self.samples))), {"batch_size": self.batches, **options}
        parts = np.split(np.arange(self.samples), np.cumsum(self.batches)[:-1])
        return kinds.get(self.stream, list)([held(self.batch(rows)) for rows in parts]), options


CALLS = {"dict": lambda module, batch: module(batch["x"]), "tuple": lambda module, batch: module(batch[0])}
WEIGHTS = {"dict": lambda batch: batch["w"], "tuple": lambda batch: batch[1]}


def draw_data(rng, shape, dtype, *, smallest, weighted):
    """Data of 24 to 60 samples; of each batch at least `smallest` samples count.

    Where `weighted` they may have weights, or only some be used.
    """
    while True:
        samples = int(rng.integers(24, 61))
        batches = int(rng.integers(smallest, samples + 4))
        if rng.random() < 0.4:
            sizes = [batches] * (samples // batches) + [samples % batches]
            batches = tuple(int(size) for size in sizes if size)
        weights = str(rng.choice(["whole", "quarters"])) if weighted and rng.random() < 0.4 else None
        form = str(rng.choice(["dict", "tuple"] if weights else ["array", "dict", "tuple"]))
        stream = str(rng.choice(["list", "iter", "generator", "device"]))
        used = int(rng.integers(16, samples + 1)) if weighted and rng.random() < 0.2 else None
        data = Data(int(rng.integers(2**31)), samples, shape, dtype, batches, form, stream, weights, used)
        if smallest == 1 or min(np.count_nonzero(data.repeats[rows]) for rows in data.rows) >= smallest:
            return data
