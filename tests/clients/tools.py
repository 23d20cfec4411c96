"""Every tool of the library on one model, against the model's own training mode in float64.

A difference of statistics is one of the mean, in standard deviations by which the layer divides, or a relative one of
the variance; one of outputs is in root mean squares of the output. The largest counts.
"""

import contextlib
import pathlib
import tempfile
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict

import flaxbn
from flaxbn import diagnostics, domains

EPSILON = 1e-5
PARTS = 3


class Client:
    """A model with data, how it is evaluated and trained, and what its training mode gives in float64.

    Attributes:
        model, variables: as every tool takes them.
        data: a tree of arrays, whose samples make three equal batches.
        call: `(module, batch) -> output` for evaluation, as every tool takes it.
        trained: `(variables, batch) -> (output, batch_stats)`, a step of training in float64, dropout off.
        evaluated: `(variables, batch) -> output`, evaluation in float64.
        momentum: that of the layers.
        names: those of mean and variance.
        positions: `batch -> number`, how many positions count in a layer, up to a factor.
        calls: how often a batch-norm layer is called.
    """

    def __init__(
        self,
        model: Any,
        variables: Any,
        data: Any,
        *,
        call: Callable[[Any, Any], Any],
        trained: Callable[[Any, Any], Any],
        evaluated: Callable[[Any, Any], Any],
        momentum: float,
        calls: int,
        names: tuple[str, str] = ("mean", "var"),
        positions: Callable[[Any], float] = lambda batch: 1.0,
    ) -> None:
        self.model, self.variables, self.data, self.call = model, variables, data, call
        self.trained, self.evaluated = jax.jit(trained), jax.jit(evaluated)
        self.momentum, self.names, self.calls, self.positions = momentum, names, calls, positions
        self.size = len(jax.tree.leaves(data)[0]) // PARTS
        self.estimates: dict[str, Any] = {}

    @property
    def batches(self) -> list[Any]:
        """The batches of an estimate."""
        return [jax.tree.map(lambda a, k=k: a[k::PARTS], self.data) for k in range(PARTS)]

    @property
    def consecutive(self) -> list[Any]:
        """The batches of a training."""
        rows = [slice(k * self.size, (k + 1) * self.size) for k in range(PARTS)]
        return [jax.tree.map(lambda a, r=r: a[r], self.data) for r in rows]

    def estimated(self, method: str) -> Any:
        """What an estimate returns, the same every time."""
        if method not in self.estimates:
            self.estimates[method] = flaxbn.estimate_population_stats(
                self.model, self.variables, self.data, call=self.call, batch_size=self.size, method=method
            )
        return self.estimates[method]

    def estimated_variables(self) -> Any:
        return domains.select(self.variables, {"": self.estimated("exact")}, "")

    # ---- the truth

    def step(self, batch: Any) -> tuple[Any, dict[str, Any]]:
        """The output and the statistics of a batch in training, in float64."""
        with jax.enable_x64(True):
            variables = wide(self.variables)
            output, after = jax.device_get(self.trained(variables, wide(batch)))
            before = flat(jax.device_get(stored(variables)), self.names)
        return output, {
            layer: tuple((new - self.momentum * old) / (1 - self.momentum) for new, old in zip(pair, before[layer]))
            for layer, pair in flat(after, self.names).items()
        }

    @cached_property
    def whole(self) -> tuple[Any, dict[str, Any]]:
        return self.step(self.data)

    def population(self, batches: list[Any], steps: list[Any]) -> dict[str, tuple[Any, Any]]:
        """The merged statistics of batches, of which `steps` are what `step` returns."""
        return merged([statistics for _, statistics in steps], [self.positions(batch) for batch in batches])

    @cached_property
    def steps(self) -> list[tuple[Any, dict[str, Any]]]:
        return [self.step(batch) for batch in self.batches]

    @cached_property
    def steps_in_order(self) -> list[tuple[Any, dict[str, Any]]]:
        return [self.step(batch) for batch in self.consecutive]


def wide(tree: Any) -> Any:
    """In float64."""

    def widened(a: Any) -> Any:
        if isinstance(a, jax.Array) and jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            return a
        a = np.asarray(a)
        return jax.numpy.asarray(a.astype(np.float64)) if a.dtype == np.float32 else jax.numpy.asarray(a)

    return jax.tree.map(widened, tree)


def stored(variables: Any) -> Any:
    return nnx.filter_state(variables, nnx.BatchStat) if isinstance(variables, nnx.State) else variables["batch_stats"]


def flat(batch_stats: Any, names: tuple[str, str]) -> dict[str, tuple[Any, Any]]:
    """Mean and variance of each layer by its path."""
    if isinstance(batch_stats, nnx.State):
        batch_stats = nnx.to_pure_dict(batch_stats)
    leaves = flatten_dict(dict(batch_stats))
    return {
        "/".join(map(str, path[:-1])): tuple(np.asarray(leaves[*path[:-1], name], np.float64) for name in names)
        for path in leaves
        if path[-1] == names[0]
    }


def zeros(batch_stats: Any, names: tuple[str, str]) -> Any:
    """Statistics of 0, and all else that is stored as it is."""

    def emptied(path: Any, leaf: Any) -> Any:
        own = any(getattr(key, "key", None) in names for key in path)
        return jax.numpy.zeros_like(leaf) if own else leaf

    return jax.tree_util.tree_map_with_path(emptied, batch_stats)


def of_statistics(found: dict[str, Any], expected: dict[str, Any]) -> float:
    assert found.keys() == expected.keys(), (found.keys(), expected.keys())
    differences = []
    for layer, (mean, var) in expected.items():
        variance = var + EPSILON
        assert found[layer][0].shape == mean.shape
        differences += [np.abs(found[layer][0] - mean) / np.sqrt(variance), np.abs(found[layer][1] - var) / variance]
    return float(max(a.max() for a in differences))


def of_outputs(found: Any, expected: Any) -> float:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    differences = []
    for one, other in pairs:
        other = np.asarray(other, np.float64)
        size = np.sqrt(np.square(other).mean()) or 1.0
        differences.append(np.abs(np.asarray(one, np.float64) - other).max() / size)
    return float(max(differences))


def loss_of(output: Any, batch: Any) -> Any:
    """A number for each example, of all outputs."""
    del batch
    return sum((a**2).reshape(len(a), -1).mean(1) for a in jax.tree.leaves(output))


def merged(steps: list[Any], weights: list[Any]) -> dict[str, tuple[Any, Any]]:
    """The statistics of several batches by the law of total variance."""
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    found = {}
    for layer in steps[0]:
        means, variances = (np.stack([step[layer][i] for step in steps]) for i in (0, 1))
        mean = np.tensordot(shares, means, 1)
        found[layer] = mean, np.tensordot(shares, variances + (means - mean) ** 2, 1)
    return found


# ---- the tools


def apply(client: Client) -> float:
    """Statistics of the batch: the output of training, without dropout."""

    @jax.jit
    def run(variables: Any, batch: Any) -> Any:
        return flaxbn.apply(client.model, variables, batch, statistics="batch", call=client.call)

    found = run(client.variables, client.batches[0])
    return of_outputs(found, client.steps[0][0])


def precise(client: Client) -> float:
    expected = client.population(client.batches, client.steps)
    return of_statistics(flat(client.estimated("precise"), client.names), expected)


def exact(client: Client) -> float:
    """The statistics of one batch that holds everything."""
    return of_statistics(flat(client.estimated("exact"), client.names), client.whole[1])


def moments(client: Client) -> float:
    """Those of parts, merged and put into statistics."""
    parts = [
        flaxbn.population_moments(client.model, client.variables, [batch], call=client.call) for batch in client.batches
    ]
    found = flaxbn.to_batch_stats(flaxbn.merge(*parts), stored(client.variables))
    expected = client.population(client.batches, client.steps)
    return of_statistics(flat(found, client.names), expected)


def plan(client: Client) -> float:
    """The number of calls of layers: what is missing or too much."""
    found = flaxbn.plan(client.model, client.variables, client.data, call=client.call, batch_size=client.size)
    return abs(len(found.calls) - client.calls)


def of_domains(client: Client) -> float:
    """The data are one domain, and in the order of a training the other."""
    order = np.arange(PARTS * client.size).reshape(PARTS, client.size).T.reshape(-1)
    data = {"one": client.data, "other": jax.tree.map(lambda a: a[order], client.data)}
    found = domains.estimate(client.model, client.variables, data, call=client.call, batch_size=client.size)
    expected = {
        "one": client.population(client.batches, client.steps),
        "other": client.population(client.consecutive, client.steps_in_order),
    }
    return max(of_statistics(flat(found[name], client.names), expected[name]) for name in data)


def compare(client: Client) -> float:
    """How far initial statistics, 0 and 1, lie from the data."""
    population = flaxbn.population_moments(
        client.model, client.variables, client.data, call=client.call, batch_size=client.size
    )
    rows = diagnostics.rows_of(client.model, client.variables, client.batches[0], call=client.call)
    found = diagnostics.compare(stored(client.variables), population, rows=rows)
    initial = flat(stored(client.variables), client.names)
    shifts = []
    for layer, (mean, var) in client.population(client.batches, client.steps).items():
        squares = np.square(mean - initial[layer][0]) / (var + EPSILON)
        shifts += list(np.sqrt(np.atleast_2d(squares).mean(-1)))
    return of_sorted([drift.rms_shift for drift in found], shifts)


def of_sorted(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected), (found, expected)
    pairs = zip(sorted(found), sorted(expected), strict=True)
    return max(abs(one - other) / max(other, 1) for one, other in pairs)


def batch_noise(client: Client) -> float:
    """How far the means of the batches of a training lie from those of all."""
    found = diagnostics.batch_noise(
        client.model, client.variables, client.data, call=client.call, batch_size=client.size
    )
    population = client.population(client.consecutive, client.steps_in_order)
    expected = []
    for layer, (mean, var) in population.items():
        squares = np.mean([np.square(step[layer][0] - mean) / (var + EPSILON) for _, step in client.steps_in_order], 0)
        expected += list(np.sqrt(PARTS / (PARTS - 1) * np.atleast_2d(squares).mean(-1)))
    return of_sorted([record.mean for record in found], expected)


def gap(client: Client) -> float:
    """The losses by the statistics of batches, and by those of all."""
    found = diagnostics.gap(
        client.model,
        client.estimated_variables(),
        client.data,
        loss_of,
        call=client.call,
        batch_size=client.size,
    )
    (found,) = found.values()
    by_batch = np.mean([loss_of(output, None) for output, _ in client.steps_in_order])
    by_all = np.mean(loss_of(client.whole[0], None))
    return max(abs(found.batch / by_batch - 1), abs(found.stored / by_all - 1))


def diagnose(client: Client) -> float:
    """Initial statistics are found, and after an estimate they are none: how many of the two are not so."""
    wrong = 0
    for variables, initial in ((client.variables, True), (client.estimated_variables(), False)):
        found = diagnostics.diagnose(
            client.model, variables, client.data, loss_of, call=client.call, batch_size=client.size
        )
        traps = {finding.trap for finding in found.findings}
        wrong += ("never estimated" in traps) is not initial
        wrong += bool(traps & {"not finite", "training mode at inference", "lagging average"})
    return wrong


def independent(client: Client) -> float:
    """Evaluation passes the check."""
    with evaluation(client) as (model, variables):
        flaxbn.assert_batch_independent(model, variables, client.batches[0], call=client.call)
    return 0.0


def export(client: Client) -> float:
    """What is exported predicts as the model does in its own evaluation, in float64."""
    with tempfile.TemporaryDirectory() as folder, evaluation(client) as (model, variables):
        path = pathlib.Path(folder, "model.zip")
        flaxbn.export_inference(model, variables, client.batches[0], path, call=client.call, platforms=("cpu",))
        found = flaxbn.load_inference(path)(client.data)
    with jax.enable_x64(True):
        expected = jax.device_get(client.evaluated(wide(variables), wide(client.data)))
    return of_outputs(found, expected)


@contextlib.contextmanager
def evaluation(client: Client) -> Any:
    """The model in evaluation, with estimated statistics."""
    variables = client.estimated_variables()
    if isinstance(variables, nnx.State):
        model = nnx.merge(client.model, variables, copy=True)
        model.eval()
        yield nnx.split(model)
    else:
        yield client.model, variables


def flax_itself(client: Client) -> tuple[float, float]:
    """No tool: output and statistics of a batch in the model's own training mode in float32.

    What was stored before is 0, so that nothing cancels.
    """
    variables = domains.select(client.variables, {"": zeros(stored(client.variables), client.names)}, "")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Explicitly requested dtype float64")  # by a model that says so
        output, after = jax.device_get(client.trained(variables, client.batches[0]))
    share = 1 - client.momentum
    found = {layer: (mean / share, var / share) for layer, (mean, var) in flat(after, client.names).items()}
    expected = client.steps[0]
    return of_outputs(output, expected[0]), of_statistics(found, expected[1])


TOOLS: dict[str, Callable[[Client], float]] = {
    "apply": apply,
    "precise": precise,
    "exact": exact,
    "moments": moments,
    "plan": plan,
    "domains": of_domains,
    "compare": compare,
    "batch_noise": batch_noise,
    "gap": gap,
    "diagnose": diagnose,
    "independent": independent,
    "export": export,
}
