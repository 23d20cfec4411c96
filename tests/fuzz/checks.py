"""What is checked of a model: each tool against the reference.

`found` gives arrays by their names, `expected` the same and for each the size that its error is measured in.
"""

import pathlib
import tempfile
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from fuzz.data import CALLS
from fuzz.reference import at

import flaxbn

EPSILON = 1e-5
"""What layers add to a variance: below it, variances are as good as 0."""


@dataclass(frozen=True)
class Check:
    """A use of flaxbn; `case` is where it is used."""

    def warned_of(self, case, twice):
        """The names of layers of which it must warn; `twice` are those that are called more than once."""
        return ()

    def refused(self, case):
        """The message of the error that it must raise; None where it must not."""
        return None


@dataclass(frozen=True)
class Apply(Check):
    """The output, or the gradient, by statistics of the batch; or the output by those that are stored."""

    statistics: str = "batch"
    how: str = "jit"

    def found(self, case, model, variables):
        options = {"statistics": self.statistics, "call": CALLS.get(case.data.form)}

        def apply(params, x):
            given = {**variables, "params": params}
            return flaxbn.apply(model, given, case.data.formed(x, np.ones(len(x))), **options)

        return self._of(apply, case.data, variables)

    def expected(self, data, model, variables, reference):
        def run(params, x):
            if self.statistics == "running":
                return evaluated(model, {**variables, "params": params}, x)
            return reference.run(x, params)[0]

        return in_all(self._of(run, data, variables))

    def _of(self, run, data, variables):
        """The output of the first batch, or the gradients of a loss by the parameters and by what is added to it."""
        x, params = data.x[data.rows[0]], variables.get("params", {})
        if self.how == "vmap":  # a batch that is a lane has statistics of its own
            return {"output": jax.vmap(run, (None, 0))(params, np.stack([x, 2 * x[::-1]]))}
        if self.how == "sharded":
            x = jax.device_put(x[: len(x) // 8 * 8], flaxbn.data_sharding())
        if self.how != "gradient":
            return {"output": (run if self.how == "eager" else jax.jit(run))(params, x)}
        params = jax.tree.map(lambda a: a.astype(np.promote_types(a.dtype, x.real.dtype)), params)
        gradient = jax.grad(lambda given: _loss(run(given["params"], x + given["shift"])))
        return named(jax.jit(gradient)({"params": params, "shift": np.zeros(x.shape, x.real.dtype)}))

    def warned_of(self, case, twice):
        return case.unknown if self.statistics == "batch" else ()


@dataclass(frozen=True)
class Estimate(Check):
    """Precise statistics: those of all batches merged; or exact ones: those of the whole set as one batch."""

    method: str = "precise"
    sharded: bool = False
    memory_limit: int | None = None
    by_device: bool = False
    earlier: int = 0
    """So many batches are those of an earlier estimate, from which this one goes on."""

    def options(self, case):
        """The options of an estimate, but for those of the data."""
        options = {"method": self.method, "memory_limit": self.memory_limit}
        options |= {"sharding": flaxbn.data_sharding()} if self.sharded else {}
        options |= {"normalization_batch": "device"} if self.by_device else {}
        frozen = case.frozen
        return options | ({"only": lambda path: path.split("/")[-1] not in frozen} if frozen else {})

    def found(self, case, model, variables):
        batches, options = case.data.given()
        if self.memory_limit and (case.data.is_list or isinstance(case.data.batches, int)):
            own = {key: value for key, value in self.options(case).items() if key != "method"}
            plan = flaxbn.plan(model, variables, batches, **options, **own)
            assert plan.samples == sum(map(len, case.data.rows))
            assert plan.peak_bytes <= self.memory_limit
        options |= self.options(case)
        if self.earlier:
            first, batches = batches[: self.earlier], batches[self.earlier :]
            options["earlier"] = flaxbn.population_moments(model, variables, first, **options)
        moments = flaxbn.population_moments(model, variables, batches, **options)
        stats = flaxbn.to_batch_stats(moments, variables["batch_stats"])
        described = [jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (stats, variables["batch_stats"])]
        assert described[0] == described[1], f"`batch_stats` of another structure: {described}"
        return as_arrays(moments, case.wanted(variables))

    def expected(self, data, model, variables, reference):
        return seen(reference, data, self.rows(data))

    def rows(self, data):
        """The samples that normalize together."""
        if self.method == "exact":
            return [np.concatenate(data.rows)]
        return [part for rows in data.rows for part in np.split(rows, 8)] if self.by_device else data.rows

    def warned_of(self, case, twice):
        return twice

    def refused(self, case):
        sizes = {len(rows) for rows in case.data.rows}
        pads = self.sharded and any(size % jax.device_count() for size in sizes)
        unknown = case.has_merged and not self.by_device and (pads or case.data.weights is not None)
        return "the batch axis of each layer's input must be known" if unknown else None


@dataclass(frozen=True)
class Domains(Estimate):
    """Statistics of two domains: the data, and other data like them."""

    def found(self, case, model, variables):
        by_domain = {}
        for name, data in of_domains(case.data).items():
            by_domain[name], options = data.given()
        stats = flaxbn.domains.estimate(model, variables, by_domain, **options, **self.options(case))
        return {
            f"{name}, {key}": value
            for name, tree in stats.items()
            for key, value in as_arrays(tree, case.wanted(variables)).items()
        }

    def expected(self, data, model, variables, reference):
        return {
            f"{name}, {key}": value
            for name, own in of_domains(data).items()
            for key, value in seen(reference, own, self.rows(own)).items()
            if not key.startswith("count")
        }


@dataclass(frozen=True)
class Export(Check):
    """What an artifact predicts for other numbers of examples."""

    def found(self, case, model, variables):
        example, call = case.data.batch(np.arange(6)), CALLS.get(case.data.form)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "model.zip")
            flaxbn.export_inference(model, variables, example, path, call=call, platforms=(jax.default_backend(),))
            inference = flaxbn.load_inference(path)
        return {str(n): inference(case.data.batch(np.arange(n))) for n in (1, 7)}

    def expected(self, data, model, variables, reference):
        outputs = {str(n): evaluated(model, variables, data.x[:n]) for n in (1, 7)}
        return {name: (output, _size(output)) for name, output in outputs.items()}


def evaluated(model, variables, x):
    """The output in Flax's own evaluation; a scan that carries statistics must be able to write them."""
    return jax.jit(lambda variables, x: model.apply(variables, x, mutable=["batch_stats"])[0])(variables, x)


def of_domains(data):
    return {"one": data, "other": replace(data, seed=data.seed + 1)}


def seen(reference, data, rows):
    """What layers have seen in some batches, but for those that keep to what they have stored."""
    found = {}
    for path, layer in reference.statistics([data.counted(one) for one in rows]).items():
        if path[-1] in reference.frozen:
            continue
        name, size = "/".join(path), layer.var + EPSILON
        found |= {f"mean of {name}": (layer.mean, np.sqrt(size)), f"var of {name}": (layer.var, size)}
        count = layer.count * data.unit
        found[f"count of {name}"] = np.full(layer.mean.shape, count), count
    return found


def as_arrays(tree, paths):
    """Moments or statistics of some layers, as `seen` names them."""
    found = {}
    for path, names in paths.items():
        held = at(tree, path)
        moments = held if isinstance(held, flaxbn.Moments) else None
        mean, var = (held.mean, held.var) if moments else (held[name] for name in names)
        found |= {f"mean of {'/'.join(path)}": np.ravel(mean), f"var of {'/'.join(path)}": np.ravel(var)}
        if moments:
            found[f"count of {'/'.join(path)}"] = np.ravel(np.broadcast_to(held.count, np.shape(held.mean)))
    return found


def named(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def in_all(arrays):
    """Arrays whose errors are measured in the largest value of all: small ones are sums of larger ones."""
    size = max(map(_size, arrays.values()))
    return {name: (a, size) for name, a in arrays.items()}


def _size(a):
    return max(float(np.max(np.abs(np.asarray(a, np.complex128)))), EPSILON)


def _loss(output):
    wide = output.astype(jnp.promote_types(output.dtype, jnp.float32))
    return jnp.mean(jnp.abs(wide - 0.5) ** 2)
