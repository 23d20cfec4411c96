"""Layers whose statistics are marked: taps inside of flaxbn, and nothing outside."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import train
from oracle import assert_same_statistics, merged

import flaxbn

X = np.random.default_rng(0).normal(2.0, 3.0, (48, 5, 4)).astype(np.float32)
EPSILON = 1e-5


class Marked(nn.Module):
    """A layer of somebody's own, with variables of its own and an axis of features that may be any."""

    axis: int = -1
    names: tuple = ("mu", "sigma2")
    keepdims: bool = False
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x, train=False, mask=None):
        axis = self.axis % x.ndim
        others = tuple(i for i in range(x.ndim) if i != axis)
        whole = tuple(n if i == axis else 1 for i, n in enumerate(x.shape))
        shape = whole if self.keepdims else (x.shape[axis],)
        mean = self.variable("batch_stats", self.names[0], jnp.zeros, shape, self.dtype)
        var = self.variable("batch_stats", self.names[1], jnp.ones, shape, self.dtype)
        used = mean.value, var.value
        if train:
            used = x.mean(others).reshape(shape), x.var(others).reshape(shape)
            mean.value, var.value = used
        else:
            used = flaxbn.mark(x, *used, axis=self.axis, mask=mask)
        m, v = (a.reshape(whole) for a in used)
        return (x - m) * jax.lax.rsqrt(v + EPSILON)


class Net(nn.Module):
    norm: object = Marked

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(self.norm(name="first")(nn.Dense(6)(x), train))
        return self.norm(name="second")(nn.Dense(3)(x), train)


def renamed(tree, names):
    return {key: {"mean": held[names[0]], "var": held[names[1]]} for key, held in tree.items()}


def of_training(model, variables, x, names):
    """What the layers store after a step of training: the statistics of the batch."""
    stored = model.apply(variables, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]
    return jax.tree.map(lambda a: np.asarray(a, np.float64), renamed(stored, names))


def normalize(x, mean, var):
    return (x - mean.reshape(1, 1, -1)) * jax.lax.rsqrt(var.reshape(1, 1, -1) + EPSILON)


@pytest.mark.parametrize(
    "norm",
    [Marked, lambda **o: Marked(names=("mean", "var"), **o), lambda **o: Marked(axis=1, keepdims=True, **o)],
    ids=["own names", "Flax's names", "another axis, rank of the input"],
)
def test_the_numbers_are_those_of_its_training_mode(norm):
    model = Net(norm)
    variables = jax.jit(model.init)(jax.random.key(0), X)
    names = norm(name=None).names
    found = flaxbn.apply(model, variables, X, statistics="batch")
    # Ten roundings of values of size 3.
    np.testing.assert_allclose(found, model.apply(variables, X, train=True, mutable=["batch_stats"])[0], atol=1e-5)
    parts = [X[:24], X[24:]]
    stats = flaxbn.estimate_population_stats(model, variables, parts)
    assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])
    by_part = [of_training(model, variables, x, names) for x in parts]
    for layer, held in renamed(stats, names).items():
        mean, var = merged([24, 24], *([part[layer][field] for part in by_part] for field in ("mean", "var")))
        assert_same_statistics(held, {"mean": mean, "var": var}, 4e-6)
    exact = flaxbn.estimate_population_stats(model, variables, X, batch_size=12, method="exact")
    assert_same_statistics(renamed(exact, names), of_training(model, variables, X, names), 4e-6)


def test_an_estimate_makes_evaluation_that_of_the_data(tmp_path):
    model = Net()
    variables = jax.jit(model.init)(jax.random.key(0), X)
    path = tmp_path / "model.zip"
    with pytest.raises(ValueError, match=r"those of 'first/mu,sigma2', 'second/mu,sigma2' were never estimated"):
        flaxbn.export_inference(model, variables, X[:8], path)
    moments = flaxbn.population_moments(model, variables, X, batch_size=48)
    variables["batch_stats"] = flaxbn.to_batch_stats(moments, variables["batch_stats"])
    expected = model.apply(variables, X, train=True, mutable=["batch_stats"])[0]
    np.testing.assert_allclose(flaxbn.apply(model, variables, X), expected, atol=1e-5)
    flaxbn.export_inference(model, variables, X[:8], path, moments=moments, platforms=("cpu",))
    np.testing.assert_allclose(flaxbn.load_inference(path)(X), expected, atol=1e-5)
    assert not flaxbn.diagnostics.diagnose(
        model, variables, X, lambda o, b: (o**2).mean((1, 2)), batch_size=16
    ).findings


def test_moments_stand_where_both_names_say():
    model = Marked()
    variables = model.init(jax.random.key(0), X)
    moments = flaxbn.population_moments(model, variables, iter([X]), only=lambda path: path == "mu,sigma2")
    assert set(moments) == {"mu,sigma2"}
    (record,) = flaxbn.diagnostics.compare(variables["batch_stats"], moments)
    assert record.layer == "mu,sigma2"
    plan = flaxbn.plan(model, variables, X, batch_size=16)
    assert [call.layer for call in plan.calls] == ["mu,sigma2"]


class Two(nn.Module):
    """Two pairs of statistics in one module."""

    @nn.compact
    def __call__(self, x):
        held = {
            n: self.variable("batch_stats", n, jnp.full, x.shape[-1:], float("v" in n))
            for n in ("m1", "v1", "m2", "v2")
        }
        x = normalize(x, *flaxbn.mark(x, held["m1"].value, held["v1"].value))
        return normalize(x + 1, *flaxbn.mark(x + 1, held["m2"].value, held["v2"].value))


def test_pairs_of_one_module_are_told_apart():
    found = flaxbn.estimate_population_stats(Two(), Two().init(jax.random.key(0), X), X, batch_size=48)
    exact = X.astype(np.float64).reshape(-1, 4)
    np.testing.assert_allclose(found["m1"], exact.mean(0), rtol=2e-6)
    np.testing.assert_allclose(found["v1"], exact.var(0), rtol=2e-6)
    np.testing.assert_allclose(found["m2"], np.ones(4), rtol=2e-6)
    np.testing.assert_allclose(found["v2"], np.ones(4), rtol=1e-5)  # var / (var + epsilon)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Marked(name="norm")(x), None


@pytest.mark.parametrize("how", ["scan", "vmap", "remat", "jit"])
def test_inside_of_transformations(how):
    class Lifted(nn.Module):
        @nn.compact
        def __call__(self, x):
            own = {"variable_axes": {"batch_stats": 0}, "split_rngs": {}}
            if how == "scan":
                return nn.scan(Step, **own, length=2)(name="norm")(x, None)[0]
            if how == "vmap":
                return nn.vmap(Marked, in_axes=1, out_axes=1, **own)(name="norm")(x)
            return {"remat": nn.remat, "jit": nn.jit}[how](Marked)(name="norm")(x)

    variables = Lifted().init(jax.random.key(0), X)
    found = jax.tree.leaves(flaxbn.estimate_population_stats(Lifted(), variables, X, batch_size=48))[0]
    exact = X.astype(np.float64)
    expected = {"scan": np.stack([exact.mean((0, 1)), np.zeros(4)]), "vmap": exact.mean(0)}.get(how, exact.mean((0, 1)))
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_masks_select_positions():
    mask = np.random.default_rng(1).random(X.shape[:2]) < 0.6
    model = Marked()
    call = lambda m, b: m(b[0], mask=b[1])  # noqa: E731
    found = flaxbn.estimate_population_stats(model, model.init(jax.random.key(0), X), [(X, mask)], call=call)
    exact = X[mask].astype(np.float64)
    np.testing.assert_allclose(found["mu"], exact.mean(0), rtol=2e-6)
    np.testing.assert_allclose(found["sigma2"], exact.var(0), rtol=2e-6)


def test_a_layer_that_synchronizes_does_so():
    class Synchronized(nn.Module):
        @nn.compact
        def __call__(self, x):
            held = [self.variable("batch_stats", n, jnp.ones, x.shape[-1:]) for n in ("mean", "var")]
            return normalize(x, *flaxbn.mark(x, *(a.value for a in held), axis_name="data"))

    variables = Synchronized().init(jax.random.key(0), X)
    parts = X.reshape(2, 24, 5, 4)
    found = jax.vmap(lambda x: flaxbn.apply(Synchronized(), variables, x, statistics="batch"), axis_name="data")(parts)
    exact = parts.astype(np.float64)
    expected = (exact - exact.mean((0, 1, 2))) / np.sqrt(exact.var((0, 1, 2)) + EPSILON)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_outside_it_is_the_identity_and_leaves_nothing():
    x, mean, var = jnp.ones((3, 4)), jnp.zeros(4, jnp.bfloat16), jnp.ones(4, jnp.float16)
    found = flaxbn.mark(x, mean, var)
    assert found[0] is mean
    assert found[1] is var
    program = jax.make_jaxpr(lambda m, v: flaxbn.mark(x, m, v))(mean, var)
    assert not program.jaxpr.eqns
    tangents = jax.jvp(lambda m: flaxbn.mark(x, m, var)[0], (mean,), (mean + 2,))[1]
    np.testing.assert_array_equal(tangents, np.full(4, 2))


def test_gradients_are_those_of_training():
    model = Net()
    variables = jax.jit(model.init)(jax.random.key(0), X)

    def by_mark(x):
        return jnp.sum(flaxbn.apply(model, variables, x, statistics="batch") ** 3)

    def in_training(x):
        return jnp.sum(model.apply(variables, x, train=True, mutable=["batch_stats"])[0] ** 3)

    # Sums of 720 cubes, whose parts cancel: gradients are of size 1, their parts of size 10.
    np.testing.assert_allclose(jax.grad(by_mark)(X), jax.grad(in_training)(X), atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")],
)
def test_what_is_computed_keeps_its_dtype(dtype, stored):
    model, x = Marked(dtype=stored), jnp.asarray(X, dtype)
    variables = model.init(jax.random.key(0), x)
    assert flaxbn.apply(model, variables, x, statistics="batch").dtype == model.apply(variables, x).dtype


def test_a_path_that_is_not_marked_is_named():
    model = Net()
    with pytest.warns(UserWarning, match=r"in 'first' \('mu', 'sigma2'\), 'second' \('mu', 'sigma2'\)"):
        flaxbn.apply(model, jax.jit(model.init)(jax.random.key(0), X), X, call=train)


def test_statistics_of_another_shape_are_an_error():
    with pytest.raises(
        ValueError, match=r"must have the shape \(4,\) of the feature axes \(2,\).*got \(5,\) and \(5,\)"
    ):
        flaxbn.mark(X, np.zeros(5), np.ones(5))
    with pytest.raises(ValueError, match=r"`mean` and `var` must have the shape.*got \(4,\) and \(1, 4\)"):
        flaxbn.mark(X, np.zeros(4), np.ones((1, 4)))
    with pytest.raises(ValueError, match=r"`mask` must have rank 3.*got a mask of shape \(48,\)"):
        flaxbn.mark(X, np.zeros(4), np.ones(4), mask=np.ones(48))


def test_one_value_per_channel_is_an_error_that_names_the_layer():
    model = Net()
    with pytest.raises(ValueError, match=r"Marked 'first' normalizes by batch statistics.*more than one value"):
        flaxbn.apply(model, jax.jit(model.init)(jax.random.key(0), X), X[:1, :1], statistics="batch")
