"""Which entries of stored statistics belong together, in records of diagnostics and in refusals, wherever they lie."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MaskedLayer

import flaxbn
from flaxbn import diagnostics
from flaxbn.models.rows import Row, never_estimated

RNG = np.random.default_rng(0)
X = (RNG.normal(3, 1, (128, 3, 4)) * [1, 2, 3, 4] + np.arange(3)[:, None]).astype(np.float32)
DOMAIN = np.arange(128) % 2
BATCH = 16
EPSILON = 1e-5


class Layer(nn.Module):
    """One layer; `options` are its fields."""

    options: tuple = ()
    domains: bool = False

    @nn.compact
    def __call__(self, batch):
        norm = flaxbn.BatchNorm(use_running_average=True, name="norm", **dict(self.options))
        return norm(batch["x"], domain=batch["domain"]) if self.domains else norm(batch["x"])


class Members(nn.Module):
    """A layer for each of the three places of axis 1, whose statistics are stacked along `place`."""

    place: int = 0
    options: tuple = ()
    domains: bool = False

    @nn.compact
    def __call__(self, batch):
        axes = {"params": self.place, "batch_stats": self.place}
        mapped = nn.vmap(
            lambda module, x: flaxbn.BatchNorm(
                use_running_average=True, name="norm", parent=module, **dict(self.options)
            )(x, domain=batch["domain"] if self.domains else None),
            in_axes=1,
            out_axes=1,
            variable_axes=axes,
            split_rngs={"params": True},
        )
        return mapped(self, batch["x"])


class Steps(nn.Module):
    """Three layers behind each other in a scan; from the second on the input is normalized."""

    place: int = 0
    options: tuple = ()

    @nn.compact
    def __call__(self, batch):
        def step(module, x, _):
            return nn.BatchNorm(use_running_average=True, name="norm", parent=module, **dict(self.options))(x), None

        axes = {"params": self.place, "batch_stats": self.place}
        return nn.scan(step, variable_axes=axes, split_rngs={"params": True}, length=3)(self, batch["x"], None)[0]


def normalized(x, axes):
    x = np.asarray(x, np.float64)
    batches = x.reshape(-1, BATCH, *x.shape[1:])
    over = tuple(a + 1 for a in axes)
    mean, var = batches.mean(over, keepdims=True), batches.var(over, keepdims=True)
    return ((batches - mean) / np.sqrt(var + EPSILON)).reshape(x.shape)


def steps_of(x, axes):
    """What each step of `Steps` receives, batches being normalized by themselves."""
    second = normalized(x, axes)
    return [(x, axes), (second, axes), (normalized(second, axes), axes)]


def members_of(x):
    return [(x[:, i], (0,)) for i in range(3)]


EACH = (("axis", (1, 2)),)
FIRST = (("axis", 1),)
TWO = (("num_domains", 2),)
DATA = {"x": X, "domain": DOMAIN}

# A model, the shape of what it stores, and by name what reaches each row with the axes that it reduces.
CASES = [
    (Layer(), (4,), {"norm": (X, (0, 1))}),
    (Layer(FIRST), (3,), {"norm": (X, (0, 2))}),
    (Layer(EACH), (3, 4), {"norm": (X, (0,))}),
    (Layer(TWO, True), (2, 4), {f"norm[{d}]": (X[d == DOMAIN], (0, 1)) for d in (0, 1)}),
    (Layer((*EACH, *TWO), True), (2, 3, 4), {f"norm[{d}]": (X[d == DOMAIN], (0,)) for d in (0, 1)}),
    (Members(0), (3, 4), {f"norm[{i}]": member for i, member in enumerate(members_of(X))}),
    (Members(1), (4, 3), {f"norm[:, {i}]": member for i, member in enumerate(members_of(X))}),
    (Steps(0), (3, 4), {f"norm[{i}]": step for i, step in enumerate(steps_of(X, (0, 1)))}),
    (Steps(-1), (4, 3), {f"norm[:, {i}]": step for i, step in enumerate(steps_of(X, (0, 1)))}),
    (Steps(1, EACH), (3, 3, 4), {f"norm[:, {i}]": step for i, step in enumerate(steps_of(X, (0,)))}),
    (
        Members(1, TWO, True),
        (2, 3, 4),
        {f"norm[{d}, {i}]": (X[d == DOMAIN, i], (0,)) for d in (0, 1) for i in range(3)},
    ),
]
IDS = [f"{type(model).__name__}-{'x'.join(map(str, shape))}-{i}" for i, (model, shape, _) in enumerate(CASES)]


def stored_as(shape):
    return {"mean": RNG.normal(3, 1, shape).astype(np.float32), "var": RNG.uniform(1, 9, shape).astype(np.float32)}


def channels(kept, name, shape):
    """The stored statistics of a row, by its name as numpy would read it."""
    index = name.partition("[")[2].rstrip("]")
    return eval(f"a[{index}]" if index else "a", {"a": kept}).ravel()


@pytest.fixture(scope="module", params=CASES, ids=IDS)
def case(request):
    model, shape, rows = request.param
    variables = jax.jit(model.init)(jax.random.key(0), DATA)
    assert variables["batch_stats"]["norm"]["mean"].shape == shape
    return model, {**variables, "batch_stats": {"norm": stored_as(shape)}}, rows


def losses(output, batch):
    return output.reshape(len(batch["x"]), -1).sum(1)


def assert_drift(records, batch_stats, rows):
    assert [record.layer for record in records] == list(rows)
    for record, (name, (x, axes)) in zip(records, rows.items()):
        x = np.asarray(x, np.float64)
        std = np.sqrt(x.var(axes) + EPSILON).ravel()
        mean, var = (channels(batch_stats["norm"][field], name, x.shape) for field in ("mean", "var"))
        assert record.channels == std.size
        assert record.count == np.prod([x.shape[a] for a in axes])
        # Moments are float32; two normalizations of unit variance, a hundred rounding errors, where means are 0 ten.
        shift = np.abs(mean - x.mean(axes).ravel()) / std
        np.testing.assert_allclose(record.rms_shift, np.sqrt(np.mean(shift**2)), rtol=1e-5, atol=1e-6)
        ratio = np.abs(np.log((var + EPSILON) / std**2))
        np.testing.assert_allclose(record.rms_log_ratio, np.sqrt(np.mean(ratio**2)), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(record.shift.worst, shift.max(), rtol=1e-5, atol=1e-6)


def test_drift(case):
    model, variables, rows = case
    population = flaxbn.population_moments(model, variables, batches(), method="precise")
    found = diagnostics.compare(variables["batch_stats"], population, rows=diagnostics.rows_of(model, variables, DATA))
    assert_drift(found, variables["batch_stats"], rows)


def test_noise(case):
    """Of the mean: root mean square over batches and channels, those of a row and no others."""
    model, variables, rows = case
    found = diagnostics.batch_noise(model, variables, DATA, batch_size=BATCH)
    assert [record.layer for record in found] == list(rows)
    for record, (x, axes) in zip(found, rows.values()):
        x = np.asarray(x, np.float64)
        each = x.reshape(8, -1, *x.shape[1:]).mean(tuple(a + 1 for a in axes))
        squares = (each - x.mean(axes)) ** 2 / (x.var(axes) + EPSILON)
        # Behind a normalization next to no noise is left, and that is rounding.
        np.testing.assert_allclose(record.mean, np.sqrt(8 / 7 * squares.mean()), rtol=1e-4, atol=1e-6)


def batches():
    return [jax.tree.map(lambda a, i=i: a[i : i + BATCH], DATA) for i in range(0, 128, BATCH)]


def at(kept, name, mean, var):
    """Statistics with one row replaced."""
    index = name.partition("[")[2].rstrip("]")
    kept = {field: np.array(a) for field, a in kept.items()}
    for field, value in (("mean", mean), ("var", var)):
        exec(f"a[{index or '...'}] = value", {"a": kept[field], "value": value})
    return kept


def test_diagnosis_and_what_was_never_estimated(case, tmp_path):
    """The last row, as `init` leaves it, is named by `diagnose`, and by the export, which refuses it."""
    model, variables, rows = case
    name = list(rows)[-1]
    variables = {**variables, "batch_stats": {"norm": at(variables["batch_stats"]["norm"], name, 0.0, 1.0)}}
    found = diagnostics.diagnose(model, variables, DATA, losses, batch_size=BATCH)
    assert_drift(found.drift, variables["batch_stats"], rows)
    assert [record.layer for record in found.noise[None]] == list(rows)
    (finding,) = [finding for finding in found.findings if finding.trap == "never estimated"]
    assert (finding.where, finding.number) == (name, 1)
    assert f"in 1 of {len(rows)} {'rows of statistics' if '[' in name else 'layers'}." in finding.evidence
    layer, bracket, place = name.partition("[")
    expected = f"those of '{layer}'" + (f" (at [{place})" if bracket else "") + " were never estimated"
    with pytest.raises(ValueError, match=re.escape(expected)):
        flaxbn.export_inference(model, variables, DATA, tmp_path / "model.zip", platforms=("cpu",))


def test_channels_that_happen_to_be_initial_are_no_row(tmp_path):
    """One of three rows of an image, with a mean and a variance for each pixel: its layer was estimated."""
    model = Layer(EACH)
    kept = stored_as((3, 4))
    kept["mean"][1], kept["var"][1] = 0, 1
    variables = {**jax.jit(model.init)(jax.random.key(0), DATA), "batch_stats": {"norm": kept}}
    found = diagnostics.diagnose(model, variables, DATA, losses, batch_size=BATCH)
    assert "never estimated" not in {finding.trap for finding in found.findings}
    flaxbn.export_inference(model, variables, {"x": X}, tmp_path / "model.zip", platforms=("cpu",))


class Many(nn.Module):
    """Layers behind each other, each with statistics for each of twenty domains."""

    layers: int

    @nn.compact
    def __call__(self, batch):
        x = batch["x"]
        for i in range(self.layers):
            norm = flaxbn.BatchNorm(use_running_average=True, num_domains=20, name=f"norm_{i}")
            x = norm(x, domain=batch["domain"])
        return x


def test_rows_of_many_layers():
    data = {"x": X[:20, 0], "domain": np.arange(20)}
    variables = jax.tree.map(
        lambda a: np.zeros(a.shape, a.dtype), jax.eval_shape(Many(30).init, jax.random.key(0), data)
    )
    found = diagnostics.rows_of(Many(30), variables, data)
    assert set(found) == {(f"norm_{i}",) for i in range(30)}
    for (name,), rows in found.items():
        assert [row.name for row in rows] == [f"{name}[{d}]" for d in range(20)]
        np.testing.assert_array_equal([row.channels for row in rows], np.arange(80).reshape(20, 4))


def test_a_row_that_two_layers_share():
    """Statistics that the model puts together from two places."""

    def joined(collections):
        first, second = (collections["batch_stats"][name] for name in ("first", "second"))
        return {"batch_stats": jax.tree.map(lambda *parts: jnp.concatenate(parts), first, second)}

    class Joined(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = nn.map_variables(nn.BatchNorm, "batch_stats", trans_in_fn=joined)
            return norm(use_running_average=True, use_scale=False, use_bias=False, name="norm")(x)

    half = {"mean": np.zeros(2, np.float32), "var": np.ones(2, np.float32)}
    variables = {"batch_stats": {"norm": {"first": half, "second": half}}}
    found = diagnostics.rows_of(Joined(), variables, X)
    assert set(found) == {("norm", "first"), ("norm", "second")}
    for rows in found.values():
        np.testing.assert_array_equal([row.channels for row in rows], [[0, 1]])


def test_rows_are_compared_by_identity():
    """Their channels are an array, which has no one truth."""
    variables = jax.jit(Layer(TWO, True).init)(jax.random.key(0), DATA)
    found, again = (diagnostics.rows_of(Layer(TWO, True), variables, DATA) for _ in range(2))
    assert found == found
    assert found != again
    assert [(row.path, row.label, row.name) for row in found[("norm",)]] == [
        (("norm",), "0", "norm[0]"),
        (("norm",), "1", "norm[1]"),
    ]


@pytest.mark.parametrize(("field", "value"), [("mean", 0.1), ("var", 1.1), ("var", np.nan)])
def test_one_channel_that_is_not_initial_is_enough(field, value):
    kept = {"mean": np.zeros(4), "var": np.ones(4)}
    rows = {("norm",): [Row(("norm",), "", np.arange(4))]}
    assert [row.name for row in never_estimated({"norm": kept}, rows)] == ["norm"]
    kept[field][2] = value
    assert never_estimated({"norm": kept}, rows) == []


def test_a_domain_without_data_is_left_out_where_domains_are_not_the_first_axis():
    model = Members(0, TWO, True)
    data = {"x": X, "domain": np.zeros(128, int)}
    variables = jax.jit(model.init)(jax.random.key(0), data)
    found = diagnostics.diagnose(model, variables, data, losses, batch_size=BATCH)
    assert [record.layer for record in found.drift] == [f"norm[{i}, 0]" for i in range(3)]


def test_layers_that_are_called_twice_or_shared_are_rows_once():
    class CalledTwice(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = nn.BatchNorm(use_running_average=True, name="norm")
            return norm(norm(x))

    variables = CalledTwice().init(jax.random.key(0), X)
    ((path, rows),) = diagnostics.rows_of(CalledTwice(), variables, X).items()
    assert (path, [row.name for row in rows]) == (("norm",), ["norm"])
    np.testing.assert_array_equal(rows[0].channels, range(4))


def test_without_rows_the_last_axis_holds_channels():
    """The form of domains, and of what scan and vmap stack along axis 0."""
    moments = flaxbn.Moments(*(np.ones((2, 3, 4), np.float32) for _ in range(3)))
    kept = {"norm": {"mean": np.ones((2, 3, 4)), "var": np.ones((2, 3, 4))}}
    records = diagnostics.compare(kept, {"norm": moments})
    assert [record.layer for record in records] == [f"norm[{i}, {j}]" for i in range(2) for j in range(3)]
    assert {record.channels for record in records} == {4}
    scalar = flaxbn.Moments(*np.float32([9, 3, 4]))
    (record,) = diagnostics.compare({"norm": {"mean": np.float32(1), "var": np.float32(4)}}, {"norm": scalar})
    assert (record.layer, record.channels) == ("norm", 1)
    np.testing.assert_allclose(record.rms_shift, 1, rtol=1e-5)


def masked(hidden):
    """`diagnose`, channel `hidden[k]` being hidden in batch k; and the batches, as numpy masks them."""
    mask = np.ones((128, 4), bool)
    for k, channel in enumerate(hidden):
        mask[k * BATCH : (k + 1) * BATCH, channel] = False
    batch = {"x": X[:, 0], "mask": mask}
    variables = jax.jit(MaskedLayer().init)(jax.random.key(0), batch)
    exact = {"mean": np.full(4, 3, np.float32), "var": X[:, 0].var(0)}
    variables = {**variables, "batch_stats": {"norm": exact}}
    found = diagnostics.diagnose(MaskedLayer(), variables, batch, losses, batch_size=BATCH, num_batches=8)
    return found, np.ma.array(X[:, 0], np.float64, mask=~mask).reshape(8, BATCH, 4)


def test_a_channel_without_data_is_left_out():
    found, batches = masked([1] * 8)
    assert (found.drift[0].layer, found.drift[0].channels) == ("norm", 3)
    kept = batches[..., [0, 2, 3]].reshape(-1, 3)
    # Moments are float32: a hundred rounding errors.
    expected = np.max(np.abs(kept.mean(0) - 3) / np.sqrt(kept.var(0) + EPSILON))
    np.testing.assert_allclose(found.drift[0].shift.worst, expected, rtol=1e-5)


def test_channels_that_some_batches_lack():
    """Each channel has the errors, and the noise, of the batches that have it."""
    found, batches = masked([0, 1, 2, 3] * 2)
    (drift,), (noise,) = found.drift, found.noise[None]
    deviations = batches.mean(1) - batches.mean((0, 1))
    squares = (deviations**2).sum(0) / (6 - 1) / (batches.var((0, 1)) + EPSILON)
    assert (drift.channels, noise.batches) == (4, 6)
    # Moments are float32: differences of means of 3, a hundred rounding errors.
    np.testing.assert_allclose(noise.mean, np.sqrt(squares.mean()), rtol=1e-5)
    np.testing.assert_allclose(drift.shift_error, np.sqrt(np.mean(squares / 6)), rtol=1e-5)


def test_a_channel_that_one_batch_alone_has():
    """It says nothing of noise, and its error is that of its count."""
    found, batches = masked([1] * 7)
    without, _ = masked([1] * 8)
    np.testing.assert_allclose(found.noise[None][0].mean, without.noise[None][0].mean, rtol=1e-6)  # in float32
    squares = np.array([found.drift[0].shift_error, without.drift[0].shift_error]) ** 2 * [4, 3]
    share = 1 - EPSILON / (batches[7, :, 1].var() + EPSILON)
    np.testing.assert_allclose(squares[0] - squares[1], share / BATCH, rtol=1e-5)  # in float32


def test_rows_that_cannot_be_those_of_the_moments():
    """One domain without data, domains being the last axis: no record would be right."""
    count = np.repeat(np.float32([[5, 0]]), 4, 0)
    moments = {"norm": flaxbn.Moments(count, np.zeros((4, 2), np.float32), np.ones((4, 2), np.float32))}
    kept = {"norm": {"mean": np.zeros((4, 2)), "var": np.ones((4, 2))}}
    message = r"have seen data in all of its channels, or in none: 'norm', of shape \(4, 2\), has.*rows_of\(model"
    with pytest.raises(ValueError, match=message):
        diagnostics.compare(kept, moments)
    with pytest.raises(ValueError, match=message):
        diagnostics.compare(kept, moments, rows={})


def test_statistics_of_no_batch_norm_layer():
    variables = nn.Dense(2).init(jax.random.key(0), X)
    assert diagnostics.rows_of(nn.Dense(2), variables, X) == {}
