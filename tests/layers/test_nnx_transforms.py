"""The layers for flax.nnx under nnx's transformations, modes and kinds of variables, against the layer by itself."""

import contextlib

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import flaxbn.nnx as ours

N, C = 12, 3
X = (np.random.default_rng(0).normal(size=(2, N, C)) * [1, 2, 0.5] + [0, 3, -4]).astype(np.float32)
LAYERS = [ours.BatchNorm, ours.BatchRenorm]
ROUNDING = 2e-6
"""A few roundings of float32, of numbers of the size of the output: another program adds up in another order."""

either = pytest.mark.parametrize("cls", LAYERS)


def layer(cls=ours.BatchNorm, **options):
    if cls is ours.BatchRenorm:
        options |= {"r_max": 3.0, "d_max": 5.0}
    return cls(C, rngs=nnx.Rngs(0), **options)


def stats(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def close(found, expected, tolerance=ROUNDING):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, expected)


def by_hand(cls, xs=X, times=1, **given):
    """The last output and the statistics after batches, without any transformation."""
    model = layer(cls)
    for x in [*xs] * times:
        y = model(x, **given)
    return y, stats(model)


@pytest.mark.parametrize("graph", [True, False])
@either
def test_jit_updates_the_layer(cls, graph):
    model = layer(cls)
    step = nnx.jit(lambda model, x: model(x), graph=graph)
    for x in X:
        y = step(model, x)
    close((y, stats(model)), by_hand(cls))


@either
def test_gradients_are_those_of_the_function_of_the_state(cls):
    model = layer(cls)
    found = nnx.grad(lambda model, x: jnp.sum(model(x) ** 3))(model, X[0])
    graphdef, params, others = nnx.split(layer(cls), nnx.Param, ...)
    expected = jax.grad(lambda params: jnp.sum(nnx.merge(graphdef, params, others, copy=True)(X[0]) ** 3))(params)
    close(nnx.to_pure_dict(found), nnx.to_pure_dict(expected))
    close(stats(model), by_hand(cls, X[:1])[1])


@either
def test_no_gradient_flows_through_what_is_stored(cls):
    def stored(x):
        model = layer(cls)
        model(x)
        return jnp.sum(model.mean[...]) + jnp.sum(model.var[...])

    assert not np.any(jax.grad(stored)(X[0]))


@either
def test_remat(cls):
    def loss(model, x, call):
        return jnp.sum(call(model, x) ** 3)

    plain, kept = layer(cls), layer(cls)
    expected = nnx.grad(lambda model, x: loss(model, x, lambda m, x: m(x)))(plain, X[0])
    found = nnx.grad(lambda model, x: loss(model, x, nnx.remat(lambda m, x: m(x))))(kept, X[0])
    close(nnx.to_pure_dict(found), nnx.to_pure_dict(expected))
    close(stats(kept), stats(plain))


@either
def test_scan_over_batches_carries_the_statistics(cls):
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def steps(model, x):
        return model, model(x)

    model = layer(cls)
    _, y = steps(model, X)
    close((y[-1], stats(model)), by_hand(cls))


@nnx.vmap(in_axes=(0, None), out_axes=0)
def several(rngs, cls):
    return cls(C, rngs=rngs, **({} if cls is ours.BatchNorm else {"r_max": 3.0, "d_max": 5.0}))


def stacked(cls):
    return nnx.split_rngs(splits=2)(lambda rngs: several(rngs, cls))(nnx.Rngs(0))


@either
def test_scan_over_layers_and_vmap_over_members_have_statistics_of_their_own(cls):
    scanned, mapped = stacked(cls), stacked(cls)
    y = nnx.scan(lambda x, member: member(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(X[0], scanned)
    first, second = layer(cls), layer(cls)
    close(y, second(first(X[0])))
    close(stats(scanned), jax.tree.map(lambda *a: jnp.stack(a), stats(first), stats(second)))
    z = nnx.vmap(lambda member, x: member(x))(mapped, X)
    members = [by_hand(cls, x[None]) for x in X]
    close((z, stats(mapped)), jax.tree.map(lambda *a: jnp.stack(a), *members))


@either
def test_vmap_with_shared_statistics_over_an_axis_with_a_name(cls):
    """All members get the statistics of all their batches, in training and in what is stored."""
    options = {} if cls is ours.BatchNorm else {"r_max": 3.0, "d_max": 5.0}
    model = cls(C, axis_name="members", rngs=nnx.Rngs(0), **options)
    graphdef, state = nnx.split(model)

    def member(x):
        copy = nnx.merge(graphdef, state, copy=True)
        return copy(x), stats(copy)

    y, found = jax.vmap(member, axis_name="members")(X)
    expected, stored = by_hand(cls, X.reshape(1, 2 * N, C))
    close((y.reshape(2 * N, C), jax.tree.map(lambda a: a[0], found)), (expected, stored))


@either
def test_cond(cls):
    def run(model, x, use):
        return nnx.cond(use, lambda model, x: model(x), lambda model, x: x, model, x)

    taken, passed = layer(cls), layer(cls)
    y = nnx.jit(run)(taken, X[0], True)
    nnx.jit(run)(passed, X[0], False)
    close((y, stats(taken)), by_hand(cls, X[:1]))
    close(stats(passed), stats(layer(cls)))


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_devices_with_unequal_masks_share_statistics_by_weight(how, devices):
    """Flax's layer averages the means of the devices, whatever they count."""
    mask = np.ones((2, N), bool)
    mask[0, 2:] = False
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:2])

    def run(model):
        graphdef, state = nnx.split(model)

        def member(x, mask):
            copy = nnx.merge(graphdef, state, copy=True)
            copy(x, mask=mask)
            return copy.mean[...], copy.var[...]

        if how == "pmap":
            return jax.pmap(member, axis_name="data", devices=devices[:2])(X, mask[..., None])
        split = PartitionSpec("data")
        whole = jax.shard_map(member, mesh=mesh, in_specs=split, out_specs=PartitionSpec(), check_vma=False)
        return jax.tree.map(lambda a: a[None], jax.jit(whole)(X.reshape(-1, C), mask.reshape(-1, 1)))

    own, theirs = (
        run(cls(C, momentum=0.0, axis_name="data", rngs=nnx.Rngs(0))) for cls in (ours.BatchNorm, nnx.BatchNorm)
    )
    kept = np.float64(X.reshape(-1, C)[mask.ravel()])
    close((own[0][0], own[1][0]), (kept.mean(0), kept.var(0)), tolerance=1e-5)
    assert np.abs(theirs[0][0] - kept.mean(0)).max() > 0.1


@pytest.mark.parametrize("kind", ["ref", "hijax"])
@pytest.mark.parametrize("graph", [True, False])
@either
def test_kinds_of_variables_and_graph_modes(cls, kind, graph):
    """Not hijax variables under `nnx.jit`, where Flax itself cannot change them."""
    compile_step = nnx.jit if kind == "ref" else lambda step: step
    with contextlib.ExitStack() as stack:
        stack.callback(flax.config.update, "nnx_graph_mode", flax.config.nnx_graph_mode)
        flax.config.update("nnx_graph_mode", graph)
        with nnx.var_defaults(**{kind: True}):
            model = layer(cls)
        compile_step(lambda model, x: model(x))(model, X[0])
        y = model(X[1])
        close((y, jax.tree.map(np.asarray, stats(model))), by_hand(cls))
        model.eval()
        compile_step(lambda model, x: model(x))(model, X[0])
        close(jax.tree.map(np.asarray, stats(model)), by_hand(cls)[1])
