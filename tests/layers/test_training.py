"""What training keeps for the backward pass, and that every transformation goes through its checkpoint."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import EPSILON, batch_norm, batch_norm_gradient, moments, wide
from hard_data import KINDS, RATIOS, hard_data
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flaxbn import BatchNorm, BatchRenorm

KEY = jax.random.key(0)
SHAPE, C = (64, 16, 16, 4), 4  # large enough that the pivot is a sample's mean
SCALE, BIAS = np.float32([1.5, 0.7, -1.0, 2.0]), np.float32([0.2, -0.4, 1.0, 0.0])
RUNNING = np.float32([0.5, -1.0, 2.0, 0.1]), np.float32([4.0, 0.25, 1.5, 1.0])


def data(ratio=0.0, seed=0, kind="ordinary"):
    return hard_data(kind, ratio, SHAPE, seed)


def variables(**stats):
    return {"params": {"scale": SCALE, "bias": BIAS}, "batch_stats": {"mean": RUNNING[0], "var": RUNNING[1], **stats}}


def output(layer, x, scale=SCALE, bias=BIAS, **kwargs):
    held = {**variables(), "params": {"scale": scale, "bias": bias}}
    return layer.apply(held, x, use_running_average=False, mutable=["batch_stats"], **kwargs)[0]


def flat(x):
    return np.asarray(x).reshape(-1, x.shape[-1])


def assert_close(found, expected, tolerance):
    """Relative to the largest: sums over all positions partly cancel."""
    found, expected = wide(found, expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def saved_arrays(f, *arguments):
    _, pullback = jax.vjp(f, *arguments)
    return list({id(leaf): leaf for leaf in jax.tree.leaves(pullback)}.values())


def saved_bytes(f, *arguments):
    return sum(leaf.nbytes for leaf in saved_arrays(f, *arguments))


def equations(jaxpr):
    """All equations of a jaxpr, those inside of others too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from equations(getattr(value, "jaxpr", value))


# ---- numbers


def both(layer, x, cotangent):
    y, pull = jax.vjp(functools.partial(output, layer), x, SCALE, BIAS)
    return y, pull(cotangent)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("kind", "tolerance"), KINDS)
def test_output_and_gradients_are_those_of_float64(ratio, kind, tolerance):
    x, cotangent = data(ratio, kind=kind), data(seed=1)
    y, gradients = jax.jit(functools.partial(both, BatchNorm()))(x, cotangent)
    expected = batch_norm_gradient(flat(x), SCALE, flat(cotangent))
    for one, other in zip((flat(y), flat(gradients[0])), (batch_norm(flat(x), SCALE, BIAS), expected[0])):
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)
    # Sums of 16 384 terms that cancel, down to a hundredth of the sum of their sizes.
    sizes = np.abs(flat(cotangent)).sum(0).max()
    assert np.abs(gradients[1] - expected[1]).max() <= tolerance * sizes
    assert np.abs(gradients[2] - expected[2]).max() <= tolerance * sizes


def test_half_precision_is_cast_once():
    """Of two casts autodiff would round both cotangents, and their sum: 2.4e-3 against 1.7e-3."""
    x, cotangent = jnp.asarray(data(1.0), jnp.bfloat16), jnp.asarray(data(seed=1), jnp.bfloat16)
    _, (found, *_) = jax.jit(functools.partial(both, BatchNorm(dtype=jnp.bfloat16)))(x, cotangent)
    expected = batch_norm_gradient(flat(np.float64(x)), SCALE, flat(np.float64(cotangent)))[0]
    assert found.dtype == jnp.bfloat16
    # Rounded once: to half a place of 8 bits, 2^-9 at most and about 0.6 of that in the mean square.
    error = np.linalg.norm(flat(np.float64(found)) - expected) / np.linalg.norm(expected)
    assert error < 1.8e-3


# ---- what is kept


@pytest.mark.parametrize(("dtype", "share"), [(jnp.float32, 0.5), (jnp.bfloat16, 0.25)])
@pytest.mark.parametrize("layer", [BatchNorm, BatchRenorm])
def test_the_backward_pass_is_handed_the_input_and_sums(layer, dtype, share):
    x = jnp.asarray(data(), dtype)
    ours = functools.partial(output, layer(dtype=dtype))
    theirs = functools.partial(output, nn.BatchNorm(dtype=dtype))
    large = [leaf for leaf in saved_arrays(ours, x) if leaf.size >= x.size]
    assert [(leaf.shape, leaf.dtype) for leaf in large] == [(x.shape, dtype)]
    # What is left has one value for each channel, 16 384 times less.
    assert saved_bytes(ours, x) <= (share + 1e-3) * saved_bytes(theirs, x)


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (BatchNorm(), {"mask": np.arange(64)[:, None, None, None] % 3 > 0}),
        (BatchNorm(), {"mask": np.random.default_rng(0).random((64, 16, 16, 1), np.float32)}),
        (BatchNorm(use_fast_variance=True), {}),
        (BatchNorm(use_scale=False), {}),
        (BatchNorm(activation=nn.relu), {}),
        (BatchRenorm(r_max=1.5, d_max=0.5), {}),
    ],
)
def test_nothing_else_of_full_size_is_kept(layer, options):
    x = jnp.asarray(data())
    assert sum(leaf.nbytes for leaf in saved_arrays(lambda x: output(layer, x, **options), x)) < 1.3 * x.nbytes
    assert sum(leaf.size >= x.size for leaf in saved_arrays(lambda x: output(layer, x, **options), x)) == 1


def test_nothing_else_of_full_size_is_kept_with_domains():
    x, domain = jnp.asarray(data()), jnp.arange(64) % 3
    layer = BatchNorm(num_domains=3, use_running_average=False)
    held = layer.init(KEY, x, domain=domain)
    kept = saved_arrays(lambda x: layer.apply(held, x, domain=domain, mutable=["batch_stats"])[0], x)
    assert sum(leaf.size >= x.size for leaf in kept) == 1


@pytest.mark.parametrize("layer", [BatchNorm(), BatchRenorm(), BatchNorm(activation=nn.relu)])
def test_sums_are_not_computed_again(layer):
    x = jnp.asarray(data())
    traced = jax.make_jaxpr(functools.partial(both, layer))(x, x)
    sizes = [e.invars[0].aval.size for e in equations(traced.jaxpr) if e.primitive.name == "reduce_sum"]
    assert sum(size == x.size for size in sizes) == 4  # two for the statistics, and two for the gradients


# ---- activation


@pytest.mark.parametrize("function", [nn.relu, nn.silu, jnp.abs])
@pytest.mark.parametrize("layer", [BatchNorm, BatchRenorm])
def test_an_activation_is_a_function_of_the_output(function, layer):
    x, cotangent = data(2.0), data(seed=1)
    y, pull = jax.vjp(lambda x: output(layer(activation=function), x), x)
    z, other = jax.vjp(lambda x: function(output(layer(), x)), x)
    # The same operations, fused otherwise.
    assert_close(y, z, 1e-6)
    assert_close(pull(cotangent)[0], other(cotangent)[0], 2e-6)
    for own, apart in ((layer(activation=function), lambda y: y), (layer(), function)):
        held = {**variables(), "params": {"scale": SCALE, "bias": BIAS}}
        assert_close(apart(own.apply(held, x, use_running_average=True)), function(evaluated(x)), 1e-6)


def evaluated(x):
    return jnp.asarray(batch_norm(flat(x), SCALE, BIAS, statistics=RUNNING).reshape(x.shape), jnp.float32)


def test_an_activation_in_half_precision_sees_the_output():
    x = jnp.asarray(data(), jnp.bfloat16)
    found = output(BatchNorm(dtype=jnp.bfloat16, activation=jnp.exp2), x)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, jnp.exp2(output(BatchNorm(dtype=jnp.bfloat16), x)))


def test_an_activation_may_have_a_parameter():
    x, cotangent = data(), data(seed=1)

    def loss(slope):
        layer = BatchNorm(activation=lambda y: jnp.where(y > 0, y, slope * y))
        return jnp.sum(output(layer, x) * cotangent)

    y = batch_norm(flat(x), SCALE, BIAS)
    negative = np.where(y > 0, 0, y) * flat(cotangent)
    # A sum of terms that cancel; some of y near 0 may have either sign, and add next to nothing.
    assert abs(jax.jit(jax.grad(loss))(0.1) - negative.sum()) <= 1e-6 * np.abs(negative).sum()


@pytest.mark.parametrize("name", ["relu", 1])
def test_an_activation_that_is_no_function_is_an_error(name):
    with pytest.raises(TypeError, match=f"`activation` must be a function of the output.*: got {name!r}"):
        BatchNorm(activation=name)


class Block(nn.Module):
    norm: type = BatchNorm
    inside: bool = False

    @nn.compact
    def __call__(self, x, _):
        x = nn.Conv(C, (3, 3), use_bias=False)(x)
        if self.inside:
            return self.norm(use_running_average=False, activation=nn.relu)(x), None
        return nn.relu(self.norm(use_running_average=False)(x)), None


def compiled_step(block, x):
    model = nn.scan(Block, length=8, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})(*block)
    held = model.init(KEY, x, None)

    def step(params, x):
        def forward(params):
            (y, _), new = model.apply({**held, "params": params}, x, None, mutable=["batch_stats"])
            return y, new

        y, pull, new = jax.vjp(forward, params, has_aux=True)
        return pull(jnp.ones_like(y)), new

    return jax.jit(step), held["params"]


def test_blocks_in_a_scan_need_less_memory():
    x = jnp.asarray(data())

    def temporaries(*block):
        step, params = compiled_step(block, x)
        return step.lower(params, x).compile().memory_analysis().temp_size_in_bytes

    theirs = temporaries(nn.BatchNorm, False)
    assert temporaries(BatchNorm, False) <= 0.8 * theirs  # x - mean is not kept
    assert temporaries(BatchNorm, True) <= 0.7 * theirs  # nor is what relu needs


# ---- transformations


def test_forward_mode():
    x, tangent = data(10.0), data(seed=3)
    _, found = jax.jvp(jax.jit(functools.partial(output, BatchNorm())), (x,), (tangent,))
    step, (x, tangent) = 1e-5, wide(flat(x), flat(tangent))
    ahead, behind = (batch_norm(x + s * tangent, SCALE, BIAS) for s in (step, -step))
    assert_close(flat(found), (ahead - behind) / (2 * step), 1e-6)


@pytest.mark.parametrize("layer", [BatchNorm(), BatchRenorm(r_max=1, d_max=0), BatchNorm(activation=jnp.tanh)])
@pytest.mark.parametrize("masked", [False, True])
def test_jvp_of_the_gradient_is_its_difference_quotient(layer, masked):
    mask = np.arange(64)[:, None, None, None] % 3 > 0 if masked else None
    x, cotangent, tangent = (jnp.asarray(data(r, seed=k)) for r, k in ((1.0, 0), (0.0, 1), (0.0, 2)))

    def gradient(x):
        return jax.vjp(lambda x: output(layer, x, mask=mask), x)[1](cotangent)[0]

    _, found = jax.jit(lambda x: jax.jvp(gradient, (x,), (tangent,)))(x)
    step = 1e-4
    with jax.enable_x64(True):
        ahead, behind = (
            jax.jit(gradient_in_64(layer, mask, cotangent))(np.float64(x) + s * np.float64(tangent))
            for s in (step, -step)
        )
    # Central differences in float64: step^2 times third derivatives of size 1.
    assert_close(found, (np.asarray(ahead) - np.asarray(behind)) / (2 * step), 2e-5)


def gradient_in_64(layer, mask, cotangent):
    cotangent = np.float64(cotangent)

    def gradient(x):
        return jax.vjp(lambda x: output(layer, x, np.float64(SCALE), np.float64(BIAS), mask=mask), x)[1](cotangent)[0]

    return gradient


def test_vmap_of_the_gradient():
    x = np.stack([data(), data(1e3, seed=5)])
    cotangent = data(seed=1)
    found = jax.jit(jax.vmap(lambda x: both(BatchNorm(), x, cotangent)[1][0]))(x)
    for k in range(2):
        assert_close(flat(found[k]), batch_norm_gradient(flat(x[k]), SCALE, flat(cotangent))[0], 1e-6)


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.everything_saveable])
def test_an_outer_checkpoint(policy):
    x, cotangent = data(10.0), data(seed=1)
    f = jax.checkpoint(functools.partial(output, BatchNorm()), policy=policy)
    found = jax.jit(lambda x: jax.vjp(f, x)[1](cotangent)[0])(x)
    assert_close(flat(found), batch_norm_gradient(flat(x), SCALE, flat(cotangent))[0], 1e-6)


def test_scan_keeps_the_carries_alone():
    """Of each step one array of full size: its input."""
    x = jnp.asarray(data())

    def run(x):
        return jax.lax.scan(lambda x, _: (output(BatchNorm(), x) + x, None), x, length=3)[0]

    assert saved_bytes(run, x) < 3.01 * x.nbytes
    found = jax.jit(jax.grad(lambda x: jnp.sum(run(x) * x[::-1])))(x)
    unrolled = jax.jit(
        jax.grad(lambda x: jnp.sum(functools.reduce(lambda y, _: output(BatchNorm(), y) + y, range(3), x) * x[::-1]))
    )(x)
    assert_close(found, unrolled, 1e-5)  # roundings of three steps, each in another order


def test_complex_gradients():
    x = (data(1.0) + 1j * data(2.0, seed=1)).astype(np.complex64)
    cotangent = (data(seed=2) - 1j * data(seed=3)).astype(np.complex64)
    held = {"params": {"scale": SCALE, "bias": BIAS}, "batch_stats": {"mean": RUNNING[0] + 0j, "var": RUNNING[1]}}

    def loss(parts):
        x = parts[0] + 1j * parts[1]
        y = BatchNorm().apply(held, x, use_running_average=False, mutable=["batch_stats"])[0]
        return jnp.sum(y.real * cotangent.real + y.imag * cotangent.imag)

    found = jax.jit(jax.grad(loss))((x.real, x.imag))
    values, cotangent = wide(flat(x), flat(cotangent))
    _, mean, var = moments(values)
    inverse, n = SCALE / np.sqrt(var + EPSILON), len(values)
    standard = (values - mean) / np.sqrt(var + EPSILON)
    inner = (cotangent * standard.conj()).real.sum(0) / n
    expected = inverse * (cotangent - cotangent.mean(0) - standard * inner)
    assert_close(flat(found[0]) + 1j * flat(found[1]), expected, 1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("i"), P("i", None, None, "j"), P(None, "i", "j")])
def test_sharded_jit(devices, kind, spec):
    mesh = jax.make_mesh((4, 2), ("i", "j"), axis_types=(kind, kind), devices=devices)
    x, cotangent = data(1e3), data(seed=1)
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, spec)
        given = (jax.device_put(a, split) for a in (x, cotangent))
        channels = NamedSharding(mesh, P(*spec[3:]))  # with Explicit axes, as the channels of x
        params = [jax.device_put(a, channels) for a in (SCALE, BIAS, *RUNNING)]

        @jax.jit
        def step(x, cotangent, scale, bias, mean, var):
            held = {"batch_stats": {"mean": mean, "var": var}}

            def f(x, scale, bias):
                own = BatchNorm(use_running_average=False)
                return own.apply({**held, "params": {"scale": scale, "bias": bias}}, x, mutable=["batch_stats"])

            y, pull, new = jax.vjp(f, x, scale, bias, has_aux=True)
            return y, pull(cotangent), new["batch_stats"]["var"]

        y, gradients, var = step(*given, *params)
        assert y.sharding.is_equivalent_to(split, y.ndim)
    expected = batch_norm(flat(x), SCALE, BIAS), *batch_norm_gradient(flat(x), SCALE, flat(cotangent))
    assert_close(flat(y), expected[0], 1e-6)
    assert_close(flat(gradients[0]), expected[1], 1e-6)
    sizes = np.abs(cotangent).sum()
    for one, other in zip(gradients[1:], expected[2:]):
        assert np.abs(one - other).max() <= 1e-6 * sizes  # sums that cancel
    np.testing.assert_allclose(var, 0.99 * RUNNING[1] + 0.01 * moments(flat(x))[2], rtol=1e-6)


@pytest.mark.parametrize("layer", [BatchNorm, BatchRenorm])
@pytest.mark.parametrize("mapped", ["shard_map", "pmap", "vmap"])
def test_members_share_the_pivot_s_and_the_sums_psum(devices, layer, mapped):
    x, cotangent = data(1e3), data(seed=1)
    own = layer(axis_name="i", **({"r_max": 1.5, "d_max": 1e3} if layer is BatchRenorm else {}))

    def member(x, cotangent):
        return jax.vjp(lambda x: output(own, x), x)[1](cotangent)[0]

    split = [a.reshape(4, 16, 16, 16, C) for a in (x, cotangent)]
    if mapped == "shard_map":
        mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,), devices=devices[:4])
        found = jax.jit(jax.shard_map(member, mesh=mesh, in_specs=P("i"), out_specs=P("i")))(x, cotangent)
    else:
        found = (jax.pmap if mapped == "pmap" else jax.vmap)(member, axis_name="i")(*split)
    inverse = np.sqrt(moments(flat(x))[2] + EPSILON)
    r = np.clip(inverse / np.sqrt(RUNNING[1] + EPSILON), 1 / 1.5, 1.5) if layer is BatchRenorm else 1.0
    expected = batch_norm_gradient(flat(x), SCALE, flat(cotangent), r=r)[0]
    assert_close(np.asarray(found).reshape(-1, C), expected, 1e-6)


def test_groups_of_members(devices):
    x, cotangent = data(1e3), data(seed=1)
    layer = BatchNorm(axis_name="i", axis_index_groups=[[0, 3], [1, 2]])

    def member(x, cotangent):
        return jax.vjp(lambda x: output(layer, x), x)[1](cotangent)[0]

    x, cotangent = (a.reshape(4, 16 * 16 * 16, C) for a in (x, cotangent))
    found = np.asarray(jax.pmap(member, axis_name="i", devices=devices[:4])(x, cotangent))
    for group in ([0, 3], [1, 2]):
        expected = batch_norm_gradient(flat(x[group]), SCALE, flat(cotangent[group]))[0]
        assert_close(flat(found[group]), expected, 1e-6)


def test_what_is_not_a_number_stays_in_its_domain():
    x, domain = data(), np.arange(64) % 3
    x[3, 0, 0, 1] = np.nan  # an example of domain 0
    layer = BatchNorm(num_domains=3, momentum=0.0, use_running_average=False)
    held = layer.init(KEY, x, domain=domain)

    def loss(x):
        y, new = layer.apply(held, x, domain=domain, mutable=["batch_stats"])
        return jnp.sum(y * data(seed=1)), (y, new["batch_stats"])

    gradient, (y, stats) = jax.jit(jax.grad(loss, has_aux=True))(x)
    clean = np.ones(x.shape, bool)
    clean[domain == 0, :, :, 1] = False
    for values in (gradient, y):
        np.testing.assert_array_equal(np.isfinite(values), clean)
    assert np.all(np.isfinite(stats["var"]))


@pytest.mark.parametrize("layer", [BatchNorm, BatchRenorm])
def test_evaluation_and_initialization_have_no_checkpoint(layer):
    x = data()
    evaluated = jax.make_jaxpr(lambda x: layer().apply(variables(), x, use_running_average=True))(x)
    initialized = jax.make_jaxpr(lambda x: layer().init_with_output(KEY, x, use_running_average=False))(x)
    trained = jax.make_jaxpr(lambda x: output(layer(), x))(x)
    traced = (evaluated, initialized, trained)
    names = [{e.primitive.name for e in equations(j.jaxpr)} for j in traced]
    assert [bool(found & {"checkpoint", "remat", "remat2"}) for found in names] == [False, False, True]


def test_a_schedule_sees_a_number_outside_of_jit():
    """As before there was a checkpoint: what depends on the steps alone is computed outside of it."""
    layer = BatchRenorm(r_max=lambda steps: 1.0 + float(steps), d_max=lambda steps: 2.0 if steps > 3 else 0.0)
    held = variables(steps=jnp.int32(5))
    y, _ = layer.apply(held, data(), use_running_average=False, mutable=["batch_stats"])
    assert np.all(np.isfinite(y))
