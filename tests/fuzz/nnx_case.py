"""A case of flax.nnx: what flaxbn finds of a random model, against the model in training mode."""

import warnings
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx
from fuzz.case import TOLERANCE, described, error_of
from fuzz.checks import EPSILON, in_all
from fuzz.data import CALLS, Data, draw_data
from fuzz.nnx_nodes import HEADER, NnxWriter, build_nnx, draw_parts
from oracle import merged

import flaxbn


@dataclass(frozen=True)
class NnxCase:
    """A random model of nnx, data, and what is checked of it: "apply", "precise" or "exact"."""

    parts: tuple
    data: Data
    check: str

    @property
    def code(self):
        return NnxWriter().model(self.parts)

    def script(self):
        """A script that runs the case."""
        imports = "from fuzz.data import Data\nfrom fuzz.nnx_case import NnxCase\n"
        return f"{HEADER}{imports}\n\n{self.code}\n\n\n{self!r}.run(Net(nnx.Rngs(0)))\n"

    def run(self, model=None):
        """Raises unless flaxbn does what it should; `model` stands in the place of the one that is written here."""
        with jax.enable_x64(self.data.dtype == "float64"):
            model = model or build_nnx(self.code)
            trained = build_nnx(
                self.code.replace("flaxbn.nnx.BatchNorm", "nnx.BatchNorm").replace(
                    "flaxbn.nnx.BatchRenorm", "nnx.BatchNorm"
                )
            )
            _fill([model, trained])
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = self._found(model)
            expected = self._expected(trained)
        assert set(found) == set(expected), f"found {sorted(found)}, not {sorted(expected)}"
        if not max(error_of(found[name], *expected[name]) for name in expected) <= TOLERANCE[self.data.dtype]:
            raise AssertionError(described(found, expected, TOLERANCE[self.data.dtype]))

    def _found(self, model):
        split, before = nnx.split(model), jax.device_get(nnx.to_pure_dict(nnx.state(model)))
        if self.check == "apply":
            batch = self.data.batch(self.data.rows[0])
            found = {"output": flaxbn.apply(*split, batch, statistics="batch", call=CALLS.get(self.data.form))}
        else:
            batches, options = self.data.given()
            stats = flaxbn.estimate_population_stats(*split, batches, method=self.check, **options)
            nnx.update(nnx.clone(model), stats)
            found = _named(stats)
        after = jax.device_get(nnx.to_pure_dict(nnx.state(model)))
        assert jax.tree.all(jax.tree.map(np.array_equal, before, after)), "the model is another one afterwards"
        return found

    def _expected(self, model):
        model.train()
        if self.check == "apply":
            return in_all({"output": _run(model, self.data.x[self.data.rows[0]])[0]})
        rows = [np.concatenate(self.data.rows)] if self.check == "exact" else self.data.rows
        counted = [self.data.counted(one) for one in rows]
        found = [_named(_run(model, x)[1]) for x in counted]
        expected = {}
        for name in (name for name in found[0] if name.endswith("['mean']")):
            other = name.replace("['mean']", "['var']")
            mean, var = merged(*zip(*[(len(x), one[name], one[other]) for x, one in zip(counted, found)]))
            expected |= {name: (mean, np.sqrt(var + EPSILON)), other: (var, var + EPSILON)}
        return expected


def _run(model, x):
    """The output in training mode, and what is stored of the batch."""

    def run(graphdef, state, x):
        model = nnx.merge(graphdef, state, copy=True)
        return model(x), nnx.state(model, nnx.BatchStat)

    return jax.jit(run, static_argnums=0)(*nnx.split(model), x)


def _named(stats):
    """Statistics by their paths, but for the number of steps."""
    paths = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(stats))[0]
    return {jax.tree_util.keystr(path): a for path, a in paths if "steps" not in jax.tree_util.keystr(path)}


def _fill(models):
    """The same random numbers in both, layers that keep no memory, and statistics as wide as the data may be."""
    for model in models:
        rng = np.random.default_rng(8)
        for _, module in nnx.iter_modules(model):
            if hasattr(module, "momentum"):
                module.momentum, module.use_fast_variance = 0.0, False
                scale, bias, mean = (rng.normal(size=module.scale.shape) for _ in range(3))
                wide = jax.dtypes.canonicalize_dtype(np.float64)
                for held, value in ((module.scale, 1 + 0.2 * scale), (module.bias, 0.3 * bias)):
                    held.set_value(value.astype(np.float32))
                for held, value in ((module.mean, 0.3 * mean), (module.var, 0.5 + mean**2)):
                    held.set_value(value.astype(wide))


def draw_nnx_case(draw):
    """A case of nnx, in single or double precision."""
    check, shape = draw.one_of(["apply", "precise", "precise", "exact"]), draw.one_of([(5,), (4, 3), (4, 4, 3)])
    dtype = draw.one_of(["float32", "float64"])
    smallest = 1 if check == "exact" else 4
    data = draw_data(draw.rng, shape, dtype, smallest=smallest, weighted=check != "apply")
    return NnxCase(draw_parts(draw, shape[-1], len(shape) - 1), data, check)
