"""Classes that others wrote, once they are recognized: the numbers of Flax's own layer, whatever their habits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import KNOWN, RUN, Copied, Foreign, Net, Paired, Renorm, Running, Training, statistics, stock
from models import train
from oracle import assert_same_statistics, by_training_mode

import flaxbn

X = np.random.default_rng(0).normal(2.0, 3.0, (48, 4)).astype(np.float32)
BATCHES = [X[::3], X[1::3], X[2::3]]
PEER = Net(stock)
FRESH = jax.jit(PEER.init)(jax.random.key(0), X)["batch_stats"]


@pytest.fixture(autouse=True)
def _recognized():
    for cls, known in KNOWN.items():
        flaxbn.recognize(cls, **known)


def model_of(cls):
    """A model, its variables, and those of the same model with stock layers."""
    model = Net(RUN[cls])
    variables = jax.jit(model.init)(jax.random.key(1), X)
    return model, variables, {"params": variables["params"], "batch_stats": FRESH}


@pytest.mark.parametrize("cls", KNOWN)
def test_the_numbers_are_those_of_a_stock_layer(cls):
    model, variables, peer = model_of(cls)
    found = flaxbn.apply(model, variables, X, statistics="batch")
    # Ten roundings of values of size 3.
    np.testing.assert_allclose(found, flaxbn.apply(PEER, peer, X, statistics="batch"), atol=1e-5)
    np.testing.assert_allclose(found, model.apply(variables, X, train=True, mutable=["batch_stats"])[0], atol=1e-5)
    for method in ("precise", "exact"):
        options = {"batch_size": 16, "method": method}
        stats = flaxbn.estimate_population_stats(model, variables, X, **options)
        assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])
        expected = flaxbn.estimate_population_stats(PEER, peer, X, **options)
        assert_same_statistics(statistics(stats, cls), expected)
    estimated = {**variables, "batch_stats": stats}
    expected = PEER.apply({**peer, "batch_stats": expected}, X)
    np.testing.assert_allclose(model.apply(estimated, X), expected, atol=1e-5)
    np.testing.assert_allclose(flaxbn.apply(model, estimated, X), expected, atol=1e-5)


def test_precise_statistics_are_those_of_its_own_training_mode():
    model, variables, _ = model_of(Copied)
    found = flaxbn.estimate_population_stats(model, variables, BATCHES)
    # Its own variance, E[x^2] - E[x]^2, has lost half a digit.
    assert_same_statistics(found, by_training_mode(model, variables, BATCHES, train), 1e-5)


def test_other_variables_of_the_layer_are_handed_over_and_kept():
    model, variables, _ = model_of(Renorm)
    found = flaxbn.estimate_population_stats(model, variables, X, batch_size=16)
    assert {name: float(found["first"][name]) for name in ("r_max", "d_max", "steps")} == {
        "r_max": 3,
        "d_max": 5,
        "steps": 0,
    }


def test_training_arguments_of_the_call_do_not_matter():
    model, variables, _ = model_of(Training)
    found = flaxbn.apply(model, variables, X, statistics="batch", call=train)
    np.testing.assert_array_equal(found, flaxbn.apply(model, variables, X, statistics="batch"))


class Critic(nn.Module):
    renorm: bool

    @nn.compact
    def __call__(self, x, action, train=False):
        x = jnp.concatenate([x, action], -1)
        for i, units in enumerate((6, 5)):
            run = RUN[Renorm] if self.renorm else stock
            x = nn.relu(nn.Dense(units, name=f"dense_{i}")(run(x, train, f"norm_{i}")))
        return nn.Dense(1, name="out")(x)


class Critics(nn.Module):
    renorm: bool

    @nn.compact
    def __call__(self, batch, train=False):
        critics = nn.vmap(
            Critic,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True, "batch_stats": True},
            in_axes=None,
            out_axes=0,
            axis_size=2,
        )
        return critics(self.renorm, name="critics")(*batch, train)


def test_critics_side_by_side():
    model, peer, batch = Critics(True), Critics(False), (X[:, :3], X[:, 3:])
    variables = jax.jit(model.init)(jax.random.key(1), batch)
    fresh = jax.jit(peer.init)(jax.random.key(1), batch)["batch_stats"]
    stock_variables = {"params": variables["params"], "batch_stats": fresh}
    found = flaxbn.apply(model, variables, batch, statistics="batch")
    expected, _ = peer.apply(stock_variables, batch, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for method in ("precise", "exact"):
        stats, expected = (
            flaxbn.estimate_population_stats(m, v, batch, batch_size=16, method=method)["critics"]
            for m, v in ((model, variables), (peer, stock_variables))
        )
        assert_same_statistics(stats, expected)


def test_initial_statistics_are_not_exported_and_estimated_ones_are(tmp_path):
    model, variables, _ = model_of(Running)
    path = tmp_path / "model.zip"
    with pytest.raises(ValueError, match=r"those of 'first', 'second' were never estimated"):
        flaxbn.export_inference(model, variables, X[:8], path)
    with pytest.raises(ValueError, match=r"Running 'first' normalizes by the batch"):
        flaxbn.export_inference(model, variables, X[:8], path, call=train)
    moments = flaxbn.population_moments(model, variables, X, batch_size=16)
    stats = flaxbn.to_batch_stats(moments, variables["batch_stats"])
    flaxbn.export_inference(
        model, {**variables, "batch_stats": stats}, X[:8], path, moments=moments, platforms=("cpu",)
    )
    expected = model.apply({**variables, "batch_stats": stats}, X)
    np.testing.assert_allclose(flaxbn.load_inference(path)(X), expected, atol=1e-5)


def test_diagnose_names_a_layer_that_was_never_estimated():
    model, variables, _ = model_of(Running)
    found = flaxbn.diagnostics.diagnose(model, variables, X, lambda o, b: o.sum(-1), batch_size=16)
    assert ("never estimated", "first", 2) in [(f.trap, f.where, f.number) for f in found.findings]


def test_replicas_merge_by_the_names_of_the_class():
    held = {"mean": np.array([[0.0], [4.0]]), "var": np.ones((2, 1))}
    merged = flaxbn.merge_replicas({"norm": {f"batch_norm_running_{name}": a for name, a in held.items()}})["norm"]
    assert [a.tolist() for a in merged.values()] == [[2.0], [5.0]]


def test_a_mask_is_honoured():
    class MasksOut(Foreign):
        @nn.compact
        def __call__(self, x, mask=None, use_running_average=True):
            return self.normalize(x, not use_running_average)

    flaxbn.recognize(MasksOut)
    model, mask = MasksOut(), np.arange(48) % 3 > 0
    found = flaxbn.estimate_population_stats(
        model,
        model.init(jax.random.key(0), X),
        [(X, mask[:, None])],
        call=lambda m, b: m(b[0], mask=b[1]),
    )
    np.testing.assert_allclose(found["mean"], X[mask].astype(np.float64).mean(0), rtol=1e-6)


def test_a_subclass_that_calls_it_is_known_with_it():
    class Doubled(Copied):
        @nn.compact
        def __call__(self, x, use_running_average=None):
            return 2 * super().__call__(x, use_running_average)

    model = Doubled(use_running_average=True)
    found = flaxbn.apply(model, model.init(jax.random.key(0), X), X, statistics="batch")
    exact = X.astype(np.float64)
    np.testing.assert_allclose(found, 2 * (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-3), atol=1e-5)


def test_statistics_that_are_changed_on_the_way_are_named():
    class Halved(nn.Module):
        @nn.compact
        def __call__(self, x):
            halve = {"trans_in_fn": lambda held: jax.tree.map(lambda a: a / 2, held), "init": self.is_initializing()}
            x = nn.BatchNorm(use_running_average=True, name="stock")(x)
            return nn.map_variables(Copied, "batch_stats", **halve)(use_running_average=True, name="halved")(x)

    variables = Halved().init(jax.random.key(0), X)
    with pytest.warns(UserWarning, match="in 'halved"):
        flaxbn.apply(Halved(), variables, X, statistics="batch")


def test_what_is_recognized_later_is_seen_by_compiled_passes_and_by_jit():
    class Late(Foreign):
        @nn.compact
        def __call__(self, x, train=False):
            return self.normalize(x, train)

    jitted = nn.jit(Late)  # which jax traces once for calls that look alike

    class Jitted(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True, name="stock")(x)
            return jitted(name="late")(3 * x + 1)

    model = Jitted()
    variables = model.init(jax.random.key(0), X)

    def looks():
        stats = flaxbn.estimate_population_stats(model, variables, X, batch_size=48, keep_unseen=True)
        output = flaxbn.apply(model, variables, X, statistics="batch")
        return np.std(output, 0).max(), float(stats["late"]["var"][0])

    with pytest.warns(UserWarning, match="'late'"):
        np.testing.assert_allclose(looks(), (3.0, 1.0), rtol=1e-3)
    flaxbn.recognize(Late, evaluation={"train": False})
    np.testing.assert_allclose(looks(), (1.0, 9.0), rtol=1e-3)  # the epsilons cost a thousandth at most
    flaxbn.recognize(Late, None)
    np.testing.assert_allclose(looks(), (3.0, 1.0), rtol=1e-3)


def test_a_class_that_is_not_told_to_evaluate_is_an_error():
    class Stubborn(Foreign):
        @nn.compact
        def __call__(self, x, train=False, mode="train"):
            return self.normalize(x, mode == "train" or train)

    model = Stubborn()
    variables = model.init(jax.random.key(0), X)
    flaxbn.recognize(Stubborn, evaluation={"train": False})
    with pytest.raises(ValueError, match=r"Stubborn '\(the model itself\)' must not update its statistics in eval"):
        flaxbn.apply(model, variables, X, statistics="batch")
    flaxbn.recognize(Stubborn, evaluation={"use_running_average": True})
    with pytest.raises(ValueError, match=r"must have a field or an argument 'use_running_average'.*'train', 'mode'"):
        flaxbn.apply(model, variables, X, statistics="batch")


def test_statistics_of_another_shape_are_an_error():
    class Sideways(Foreign):
        axis: int = 0

        @nn.compact
        def __call__(self, x, use_running_average=True):
            return self.normalize(x, not use_running_average)

    flaxbn.recognize(Sideways)
    with pytest.raises(
        ValueError, match=r"statistics of Sideways .*\(48,\) of the feature axes \(0,\).*got \(4,\) and"
    ):
        flaxbn.apply(Sideways(), Sideways().init(jax.random.key(0), X), X, statistics="batch")


@pytest.mark.parametrize(
    ("error", "message", "args", "options"),
    [
        (TypeError, "must be a class of modules with a `__call__`.*got Paired", (Paired(),), {}),
        (TypeError, "must be a class of modules with a `__call__`.*got <class 'int'>", (int,), {}),
        (ValueError, "`kind` must be \"batch norm\", or None.*got 'layer norm'", (Paired, "layer norm"), {}),
        (TypeError, "`var` must be the name of a variable: got int", (Paired,), {"var": 3}),
        (ValueError, "must be two variables: got 'var' for both", (Paired,), {"mean": "var"}),
        (TypeError, "`evaluation` must map names .*got str", (Paired,), {"evaluation": "train"}),
    ],
)
def test_arguments_that_say_nothing_are_errors(error, message, args, options):
    with pytest.raises(error, match=message):
        flaxbn.recognize(*args, **options)
