"""The layers for flax.nnx: those for Linen to the last bit, on the variables of `flax.nnx.BatchNorm`."""

import inspect
import pickle
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flaxbn
import flaxbn.nnx as ours

N, C = 12, 3
RNG = np.random.default_rng(0)
BATCHES = [(RNG.normal(size=(N, C)) * [1, 2, 0.5] + [0, 3, -100]).astype(np.float32) for _ in range(4)]
SCALE, BIAS = np.float32([1.5, 0.7, -1.0]), np.float32([0.2, -0.4, 1.0])
WEIGHTS = np.linspace(0.5, 2.0, N, dtype=np.float32) * (np.arange(N) % 5 > 0)
PLAIN, RENORM = ("BatchNorm", {}), ("BatchRenorm", {"r_max": 3.0, "d_max": 5.0})
DOMAINS = {"num_domains": 2}
CASES = {
    "plain": (*PLAIN, {}),
    "momentum": ("BatchNorm", {"momentum": 0.3, "epsilon": 1e-2}, {}),
    "bfloat16": ("BatchNorm", {"dtype": jnp.bfloat16}, {}),
    "reductions": ("BatchNorm", {"dtype": jnp.bfloat16, "force_float32_reductions": False}, {}),
    "fast": ("BatchNorm", {"use_fast_variance": True}, {}),
    "no affine": ("BatchNorm", {"use_scale": False, "use_bias": False}, {}),
    "activation": ("BatchNorm", {"activation": jax.nn.relu}, {}),
    "weights": (*PLAIN, {"mask": WEIGHTS}),
    "no update": (*PLAIN, {"update_running_average": False}),
    "evaluation": (*PLAIN, {"use_running_average": True}),
    "evaluation with update": (*PLAIN, {"use_running_average": True, "update_running_average": True}),
    "renorm": (*RENORM, {}),
    "renorm by schedule": ("BatchRenorm", {"r_max": lambda steps: 1 + steps, "d_max": lambda steps: steps}, {}),
    "domain": ("BatchNorm", DOMAINS, {"domain": 1}),
    "domains": ("BatchNorm", {**DOMAINS, "domain_affine": True}, {"domain": np.arange(N) % 2}),
    "ghost": ("BatchRenorm", {"virtual_batch_size": 4, "r_max": 3.0, "d_max": 5.0}, {"mask": WEIGHTS}),
    "debiased": ("BatchNorm", {**DOMAINS, "momentum": flaxbn.Debiased(0.9)}, {"domain": np.arange(N) % 2}),
    "renorm with domains": ("BatchRenorm", {**DOMAINS, "r_max": 3.0, "d_max": 5.0}, {"domain": np.arange(N) % 2}),
}


def same(found, expected):
    """Exactly the same numbers, in the same dtypes."""
    assert jax.tree.map(lambda a: (a.shape, a.dtype), found) == jax.tree.map(lambda a: (a.shape, a.dtype), expected)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.float64(a), np.float64(b)), found, expected)


def layer_with(stats=None, cls=nnx.BatchNorm, features=C, **options):
    """A layer whose stored statistics are `stats`."""
    layer = cls(features, rngs=nnx.Rngs(0), **options)
    if stats is not None:
        nnx.update(layer, {"mean": jnp.asarray(stats[0]), "var": jnp.asarray(stats[1])})
    return layer


def stored(layer):
    return np.asarray(layer.mean[...]), np.asarray(layer.var[...])


# ---- the arithmetic is that of the Linen layers


@pytest.mark.parametrize("case", CASES)
def test_updates_output_and_gradients_are_those_of_the_linen_layer(case):
    name, options, given = CASES[case]
    linen = getattr(flaxbn, name)(**options)
    layer = getattr(ours, name)(C, rngs=nnx.Rngs(0), **options)
    use = {"use_running_average": False} | given
    variables = linen.init(jax.random.key(0), BATCHES[0], **{**use, "use_running_average": True})
    for parameter, value in (("scale", SCALE), ("bias", BIAS)):
        if getattr(layer, parameter) is not None:
            own = variables["params"][parameter]
            variables["params"][parameter] = jnp.broadcast_to(value, own.shape)
            getattr(layer, parameter)[...] = jnp.broadcast_to(value, own.shape)

    def by_linen(params, stats, x):
        y, new = linen.apply({"params": params, "batch_stats": stats}, x, **use, mutable=["batch_stats"])
        return jnp.sum(jnp.float32(y) ** 2), (y, new.get("batch_stats", stats))

    def by_nnx(params, others, x):
        model = nnx.merge(graphdef, params, others, copy=True)
        y = model(x, **use)
        return jnp.sum(jnp.float32(y) ** 2), (y, nnx.state(model, nnx.BatchStat))

    expected, found = (jax.jit(jax.grad(f, (0, 2), has_aux=True)) for f in (by_linen, by_nnx))
    graphdef, params, others = nnx.split(layer, nnx.Param, ...)
    plain, stats = variables.get("params", {}), variables["batch_stats"]
    for x in BATCHES:
        wanted, (y, stats) = expected(plain, stats, x)
        got, (z, others) = found(params, others, x)
        same((z, nnx.to_pure_dict(others)), (y, dict(stats)))
        same((nnx.to_pure_dict(got[0]), got[1]), (dict(wanted[0]), wanted[1]))


def test_several_feature_axes():
    x = RNG.normal(size=(4, 3, 2, 5)).astype(np.float32)
    linen = flaxbn.BatchNorm(use_running_average=False, axis=(-1, 1))
    variables = linen.init(jax.random.key(0), x)
    layer = ours.BatchNorm((3, 5), axis=(-1, 1), rngs=nnx.Rngs(0))
    y, new = linen.apply(variables, x, mutable=["batch_stats"])
    same((layer(x), layer.mean[...]), (y, new["batch_stats"]["mean"]))


# ---- constructor and variables are those of the stock layer


def test_the_constructor_is_that_of_flax():
    theirs, own = (inspect.signature(cls.__init__).parameters for cls in (nnx.BatchNorm, ours.BatchNorm))
    assert [*own][: len(theirs)] == [*theirs]
    assert [own[name].kind for name in theirs] == [p.kind for p in theirs.values()]
    differing = {name for name, p in theirs.items() if p.default != own[name].default}
    assert differing <= {"use_fast_variance", "bias_init", "scale_init"}
    for name in ("bias_init", "scale_init"):
        args = jax.random.key(0), (3,), jnp.float32
        same(own[name].default(*args), theirs[name].default(*args))


@pytest.mark.parametrize("affine", [True, False])
def test_state_and_types_are_those_of_the_stock_layer(affine):
    options = {"use_scale": affine, "use_bias": affine, "rngs": nnx.Rngs(0)}
    theirs, own = nnx.state(nnx.BatchNorm(C, **options)), nnx.state(ours.BatchNorm(C, **options))
    assert jax.tree.structure(own) == jax.tree.structure(theirs)
    same(nnx.to_pure_dict(own), nnx.to_pure_dict(theirs))


def test_a_stock_state_loads_and_evaluates_alike():
    theirs = layer_with((np.float32([1, 2, 3]), np.float32([4, 5, 6])), scale_init=nnx.initializers.constant(2.0))
    theirs.eval()
    own = ours.BatchNorm(C, rngs=nnx.Rngs(1))
    nnx.update(own, nnx.state(theirs))
    merged = nnx.merge(nnx.graphdef(own), nnx.state(theirs))
    for layer in (own, merged):
        layer.eval()
        np.testing.assert_allclose(layer(BATCHES[0]), theirs(BATCHES[0]), rtol=2e-6, atol=1e-5)


def test_a_stock_state_loads_into_renormalization_which_keeps_its_steps():
    layer = ours.BatchRenorm(C, rngs=nnx.Rngs(0))
    layer(BATCHES[0])
    nnx.update(layer, nnx.state(layer_with((np.float32([1, 2, 3]), np.float32([4, 5, 6])))))
    assert (float(layer.steps[...]), layer.mean[...].tolist()) == (1.0, [1.0, 2.0, 3.0])


def test_an_orbax_checkpoint_of_the_stock_layer_loads(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    theirs = layer_with((np.float32([1, 2, 3]), np.float32([4, 5, 6])))
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "stock", nnx.to_pure_dict(nnx.state(theirs)))
        checkpointer.wait_until_finished()
        own = ours.BatchNorm(C, rngs=nnx.Rngs(1))
        restored = checkpointer.restore(tmp_path / "stock", nnx.to_pure_dict(nnx.state(own)))
    nnx.update(own, restored)
    same(stored(own), stored(theirs))


def test_metadata_is_kept():
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    layer = ours.BatchNorm(
        C,
        scale_init=nnx.with_partitioning(nnx.initializers.ones_init(), ("model",), mesh=mesh),
        bias_metadata={"note": "of the bias"},
        rngs=nnx.Rngs(0),
    )
    before = jax.tree.structure(nnx.state(layer))
    layer(BATCHES[0])
    assert jax.tree.structure(nnx.state(layer)) == before
    assert (layer.scale.out_sharding, layer.bias.note) == (("model",), "of the bias")


def test_statistics_are_as_wide_as_parameters():
    half, cplx = (ours.BatchNorm(C, param_dtype=dtype, rngs=nnx.Rngs(0)) for dtype in (jnp.float16, jnp.complex64))
    assert [v.dtype for v in (half.scale, half.mean, half.var)] == [jnp.float16, jnp.float32, jnp.float32]
    assert [v.dtype for v in (cplx.scale, cplx.mean, cplx.var)] == [jnp.complex64, jnp.complex64, jnp.float32]


def test_narrow_statistics_of_a_checkpoint_are_widened_by_the_first_update():
    layer = layer_with((jnp.ones(C, jnp.bfloat16), jnp.ones(C, jnp.bfloat16)), ours.BatchNorm)
    layer(BATCHES[0])
    assert (layer.mean.dtype, layer.var.dtype) == (jnp.float32, jnp.float32)


def test_the_layers_are_named_where_they_are_public():
    assert repr(ours.BatchNorm) == "<class 'flaxbn.nnx.BatchNorm'>"
    assert pickle.loads(pickle.dumps(ours.BatchRenorm)) is ours.BatchRenorm


def test_promotion_by_a_rule_of_ones_own():
    """The parameters are what the rule makes of them; the statistics stay as they are stored."""

    def doubled(arrays, dtype):
        x, mean, var, scale, bias = arrays
        return x, mean * jnp.nan, var, 2 * scale, bias

    layer = ours.BatchNorm(C, promote_dtype=doubled, use_running_average=True, rngs=nnx.Rngs(0))
    expected = ours.BatchNorm(C, use_running_average=True, scale_init=nnx.initializers.constant(2.0), rngs=nnx.Rngs(0))
    same(layer(BATCHES[0]), expected(BATCHES[0]))


# ---- traps of the stock layer


def test_evaluation_in_half_precision_does_not_round_the_statistics():
    mean, x = np.full(C, 100.5, np.float32), np.float32(100 + np.linspace(-1, 2, N * C).reshape(N, C))
    options = {"dtype": jnp.bfloat16, "use_running_average": True}
    theirs, own = (layer_with((mean, np.ones(C)), cls, **options) for cls in (nnx.BatchNorm, ours.BatchNorm))
    exact = (np.float64(x) - mean) / np.sqrt(1 + 1e-5)
    assert np.abs(np.float64(theirs(x)) - exact).max() > 0.2
    # The output is rounded once, to 8 bits.
    np.testing.assert_allclose(np.float64(own(x)), exact, rtol=2**-8, atol=1e-5)


def test_large_means_keep_their_variance():
    x = np.float32(1e4 + RNG.normal(size=(4096, C)))
    theirs, own = (layer_with(cls=cls, momentum=0.0) for cls in (nnx.BatchNorm, ours.BatchNorm))
    theirs(x), own(x)
    exact = np.float64(x).var(0)
    assert np.abs(theirs.var[...] / exact - 1).max() > 0.5
    # One rounding of the mean in 1e4, by that of the deviations about it.
    np.testing.assert_allclose(own.var[...], exact, rtol=1e-6)


def test_a_mask_of_examples_does_not_mask_channels():
    x, mask = BATCHES[0][:C], np.array([True, True, False])
    theirs, own = (layer_with(cls=cls, momentum=0.0) for cls in (nnx.BatchNorm, ours.BatchNorm))
    with np.errstate(all="ignore"):
        theirs(x, mask=jnp.asarray(mask))
    own(x, mask=mask)
    assert not np.allclose(theirs.mean[...], x[mask].mean(0), equal_nan=True)
    np.testing.assert_allclose(own.mean[...], np.float64(x[mask]).mean(0), rtol=1e-6)


def test_a_batch_that_is_masked_wholly_changes_nothing():
    theirs, own = (layer_with(cls=cls) for cls in (nnx.BatchNorm, ours.BatchNorm))
    before = stored(own)
    theirs(BATCHES[0], mask=jnp.zeros((N, 1), bool))
    y = own(BATCHES[0], mask=np.zeros(N, bool))
    assert np.isnan(theirs.mean[...]).all()
    same(stored(own), before)
    assert np.isfinite(y).all()


def test_a_batch_of_one_is_an_error():
    assert np.all(layer_with()(BATCHES[0][:1]) == 0)
    message = r"BatchNorm normalizes by batch statistics, which needs more than one value per channel: got .*\(1, 3\)"
    with pytest.raises(ValueError, match=message):
        ours.BatchNorm(C, rngs=nnx.Rngs(0))(BATCHES[0][:1])


def test_a_batch_with_nan_is_not_stored():
    x = BATCHES[0].copy()
    x[0, 0] = np.nan
    theirs, own = (layer_with(cls=cls) for cls in (nnx.BatchNorm, ours.BatchNorm))
    theirs(x), own(x)
    assert np.isnan(theirs.mean[...][0])
    assert (own.mean[...][0], own.var[...][0]) == (0, 1)
    assert np.isfinite(stored(own)).all()


def test_frozen_layers_stay_frozen_in_training():
    stats = np.float32([1, 2, 3]), np.float32([4, 5, 6])
    theirs, own = layer_with(stats, use_running_average=True), layer_with(stats, ours.BatchNorm, frozen=True)
    own.eval()
    evaluated = own(BATCHES[0])
    theirs.train(), own.train()
    theirs(BATCHES[0])
    outputs = [
        own(BATCHES[0]),
        own(BATCHES[0], use_running_average=False),
        own(BATCHES[0], update_running_average=True),
    ]
    assert not np.array_equal(theirs.mean[...], stats[0])
    same(stored(own), stats)
    same(outputs, [evaluated] * 3)


# ---- mode


class Net(nnx.Module):
    def __init__(self, rngs, cls=ours.BatchNorm, **options):
        self.dense = nnx.Linear(C, C, rngs=rngs)
        self.norm = cls(C, rngs=rngs, **options)

    def __call__(self, x):
        return self.norm(self.dense(x))


def test_train_eval_and_views_set_the_mode():
    model = Net(nnx.Rngs(0))
    assert model.norm.use_running_average is False
    model.eval()
    assert model.norm.use_running_average is True
    model.train()
    assert model.norm.use_running_average is False
    evaluated, frozen = nnx.view(model, use_running_average=True), nnx.view(model, frozen=True)
    evaluated(BATCHES[0]), frozen(BATCHES[0])
    same(stored(model.norm), (np.zeros(C, np.float32), np.ones(C, np.float32)))
    nnx.view(frozen, frozen=False)(BATCHES[0])
    assert np.any(model.norm.mean[...])  # views share their variables


def test_the_call_comes_before_the_layer():
    model = Net(nnx.Rngs(0), use_running_average=None)
    with pytest.raises(ValueError, match=r"must be given.*`model.train\(\)` or `model.eval\(\)`"):
        model(BATCHES[0])
    same(model.norm(BATCHES[0], True), ours.BatchNorm(C, use_running_average=True, rngs=nnx.Rngs(0))(BATCHES[0]))


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 9.0}, r"`momentum` must lie in \[0, 1\]: got 9.0"),
        ({"epsilon": -1.0}, "`epsilon` must not be negative"),
        ({"use_running_average": 3}, "`use_running_average` must be True, False or None: got 3"),
        ({"num_domains": 0}, "`num_domains` must be a positive integer"),
        ({"domain_affine": True}, "`domain_affine` needs `num_domains`"),
    ],
)
def test_constructor_values_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ours.BatchNorm(C, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("features", [0, 1.5, True, (3, 0), ()])
def test_numbers_of_features_are_checked(features):
    with pytest.raises(
        ValueError, match="`num_features` must be a positive integer, or one for each feature axis: got"
    ):
        ours.BatchNorm(features, rngs=nnx.Rngs(0))


def test_activation_and_bounds_are_checked():
    with pytest.raises(TypeError, match="`activation` must be a function of the output"):
        ours.BatchNorm(C, activation="relu", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`r_max` must be at least 1"):
        ours.BatchRenorm(C, r_max=0.5, rngs=nnx.Rngs(0))


def test_another_number_of_features_is_an_error():
    with pytest.raises(ValueError, match=r"x must have `num_features` features, \(3,\) along axis -1: got \(4,\)"):
        ours.BatchNorm(C, rngs=nnx.Rngs(0))(np.zeros((5, 4), np.float32))


def test_nnx_is_loaded_when_it_is_asked_for():
    program = "import sys, flaxbn; assert 'flax.nnx' not in sys.modules; flaxbn.nnx.BatchNorm"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_flax_tells_what_views_can_set():
    text = nnx.view_info(ours.BatchNorm(C, rngs=nnx.Rngs(0)))
    assert re.findall(r"^  (\w+): bool \| None = None$", text, re.MULTILINE) == ["use_running_average", "frozen"]
