"""What is right: Flax's own training mode, whose layers store the statistics of the batch."""

import functools
from collections import Counter
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from fuzz.layers import Foreign
from fuzz.writer import Writer, build, stored_name
from oracle import merged

NAMES = [("mean", "var"), ("mu", "s2")]
CARRIED = 'variable_broadcast="params", variable_carry="batch_stats"', 'variable_broadcast=["params", "batch_stats"]'


def filled(code, x):
    """Variables of the model of some code, of the size and the dtypes that they have after some training."""
    model = build(code.replace(*CARRIED))()  # Flax's scan does not create what it carries
    rng = np.random.default_rng(8)

    def fill(path, a):
        name, normal = path[-1].key, rng.normal(size=a.shape)
        if name in ("mean", "mu"):
            value = 0.3 * normal + (0.2j if np.iscomplexobj(x) else 0)
            return value.astype(np.promote_types(a.dtype, x.dtype))
        if name in ("var", "s2"):
            return rng.uniform(0.5, 2.0, a.shape).astype(np.promote_types(a.dtype, x.real.dtype))
        if name == "kernel":
            normal /= np.sqrt(np.prod(a.shape[:-1]))
        return (rng.uniform(0.5, 1.5, a.shape) if name in ("scale", "gain") else 0.3 * normal).astype(a.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(fill, shapes)


def layers(batch_stats, path=()):
    """For each layer, by its path, the names of its mean and variance."""
    found = {}
    for key, held in batch_stats.items():
        names = [pair for pair in NAMES if hasattr(held, "keys") and set(pair) <= set(held)]
        if names:
            found[(*path, key)] = names[0]
        elif hasattr(held, "keys"):
            found |= layers(held, (*path, key))
    return found


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


class Reference:
    """A model in training mode, written so that each call of a layer is a layer of its own."""

    def __init__(self, nodes, variables, frozen=(), dtype=None):
        self.code = Writer(reference=True, frozen=frozen, dtype=dtype).model(nodes)
        self.run = jax.jit(functools.partial(self._run, build(self.code)(), variables))
        self.frozen, self._paths = frozen, set()

    def _run(self, model, variables, x, params=None):
        """The output on a batch, the statistics that are stored afterwards, and how many positions layers have."""
        positions = {}

        def note(call, args, kwargs, context):
            layer = context.module
            if context.method_name == "__call__" and isinstance(layer, nn.BatchNorm | Foreign):
                channels = np.prod([args[0].shape[axis] for axis in np.ravel(layer.axis)])
                share = kwargs["mask"].sum() / kwargs["mask"].size if "mask" in kwargs else 1
                lanes = getattr(layer, "axis_name", None)
                members = 1 if lanes is None else jax.lax.psum(1, lanes)
                positions["/".join(layer.path)] = share * members * args[0].size / channels
            return call(*args, **kwargs)

        variables = variables if params is None else {**variables, "params": params}
        shapes = jax.eval_shape(functools.partial(model.init, train=True), jax.random.key(0), x)
        own = jax.tree_util.tree_map_with_path(
            lambda path, _: at(variables, [stored_name(entry.key) for entry in path]), shapes
        )
        with nn.intercept_methods(note):
            output, after = model.apply(own, x, train=True, mutable=["batch_stats"])
        return output, after["batch_stats"], positions

    def called_twice(self):
        """The layers of the model, by their paths, that are called more than once."""
        counts = Counter(tuple(map(stored_name, path)) for path in self._paths)
        return [path for path, count in counts.items() if count > 1]

    def statistics(self, batches):
        """For each layer of the model what it has seen in some batches, by its path."""
        found = {}
        for x in batches:
            _, stored, positions = jax.device_get(self.run(x))
            for path, names in layers(stored).items():
                self._paths.add(path)
                mean, var = (np.ravel(at(stored, path)[name]) for name in names)
                one = positions["/".join(path)], mean, var
                found.setdefault(tuple(map(stored_name, path)), []).append(one)
        return {path: Seen.of(calls) for path, calls in found.items()}


class Seen(NamedTuple):
    """The moments of what a layer has seen, in float64.

    Attributes:
        count: how many positions.
        mean, var: of each channel.
    """

    count: float
    mean: np.ndarray
    var: np.ndarray

    @classmethod
    def of(cls, calls):
        counts, means, variances = zip(*calls)
        mean, var = merged_complex(counts, means, variances)
        return cls(float(sum(counts)), mean, var)


def merged_complex(counts, means, variances):
    """As `merged` of the oracle, of complex means too: the variance is that of both parts."""
    means = np.asarray(means)
    real, var = merged(counts, means.real, variances)
    if not np.iscomplexobj(means):
        return real, var
    imaginary, more = merged(counts, means.imag, np.zeros_like(variances))
    return real + 1j * imaginary, var + more
