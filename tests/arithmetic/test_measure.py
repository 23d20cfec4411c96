"""The pivot of one pass, and what is measured about it, against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import moments
from hard_data import KINDS, RATIOS, hard_data
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flaxbn import measure
from flaxbn.arithmetic.groups import Sharing
from flaxbn.arithmetic.measure import SUMS, measure_deviations, sample

SHAPES = [(64, 16, 16, 4), (4096, 16)]


def share_of(x, axes):
    return sample(x, axes).size / x.size


def error(found, expected):
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("kind", "tolerance"), KINDS)
def test_no_data_spoils_the_variance(shape, ratio, kind, tolerance):
    x = hard_data(kind, ratio, shape)
    found = jax.jit(lambda x: measure(x, range(x.ndim - 1)))(x)
    count, mean, var = moments(x.reshape(-1, shape[-1]))
    np.testing.assert_array_equal(found.count, count)
    assert error(found.var, var) <= tolerance
    assert np.all(np.abs(found.mean - mean) <= tolerance * np.sqrt(var) + 6e-8 * np.abs(mean))  # half a last place


@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bound_of_the_pivot(kind, shape):
    x = hard_data(kind, 10.0, shape)
    share = share_of(x, tuple(range(len(shape) - 1)))
    assert share == 1 / 16
    pivot, *_ = measure_deviations(x, Sharing(tuple(range(len(shape) - 1))))
    _, mean, var = moments(x.reshape(-1, shape[-1]))
    ratio = (mean - pivot) ** 2 / var / ((1 - share) / share)
    assert np.all(ratio <= 1 + 1e-5)  # roundings of a float32 pivot
    if kind == "the lattice apart":
        assert np.all(ratio > 0.99)  # no better bound holds


@pytest.mark.parametrize(
    ("shape", "taken"),
    [
        ((128, 32, 32, 64), (8, 32, 32, 64)),
        ((64, 7, 7, 512), (8, 4, 7, 512)),
        ((24, 32, 32, 64), (24, 8, 8, 64)),
        ((4096, 64), (256, 64)),
        ((1000, 128), (63, 128)),
        ((60, 256, 32), (60, 16, 32)),
        ((1020, 2, 2, 64), (255, 1, 1, 64)),
        ((4, 16, 16, 16, 16), (4, 4, 8, 8, 16)),
    ],
)
def test_examples_are_thinned_as_far_as_they_fit_on_all_devices(devices, shape, taken):
    """Which are eight: what is thinned of a batch split over them stays a batch that can be."""
    x = jnp.zeros(shape)
    assert len(devices) == jax.device_count()
    assert sample(x, range(len(shape) - 1)).shape == taken


@pytest.mark.parametrize("shape", [(255, 512), (16, 8, 8, 32), (1, 128, 128, 1)])
def test_few_values_or_positions_are_all_taken(shape):
    x = jnp.zeros(shape)
    assert sample(x, range(len(shape) - 1)) is x


def test_feature_axes_in_front():
    x = np.moveaxis(hard_data("ordinary", 1e4, (64, 16, 16, 4)), -1, 1)
    assert sample(x, (0, 2, 3)).shape[1] == 4
    found = measure(x, (0, 2, 3))
    assert error(found.var, moments(np.moveaxis(x, 1, -1).reshape(-1, 4))[2]) <= 1e-6


def names(jaxpr):
    """The names that `checkpoint_name` gave, and the shapes of what it gave them to."""
    found = [(e.params["name"], e.outvars[0].aval.shape) for e in jaxpr.eqns if e.primitive.name == "name"]
    inner = [v for e in jaxpr.eqns for v in e.params.values() if hasattr(v, "jaxpr")]
    return found + [pair for closed in inner for pair in names(closed.jaxpr)]


def passes(f, x):
    """How many reductions read an array of the size of x."""
    equations = jax.make_jaxpr(f)(x).jaxpr.eqns
    return sum(e.primitive.name == "reduce_sum" and e.invars[0].aval.size == x.size for e in equations)


def test_what_is_named_has_one_value_for_each_channel():
    x = jnp.zeros((4096, 16))
    found = names(jax.make_jaxpr(lambda x: measure_deviations(x, Sharing((0,))))(x).jaxpr)
    assert {name for name, _ in found} == {SUMS}
    assert {shape for _, shape in found} == {(16,)}


def test_one_pass_without_weights_two_with():
    """Both sums of the second pass read the same deviations."""
    x = jnp.zeros((4096, 16))
    assert passes(lambda x: measure_deviations(x, Sharing((0,))), x) == 2
    weights = jnp.ones((4096, 1))
    assert passes(lambda x: measure_deviations(x, Sharing((0,)), weights=weights), x) == 3
    assert passes(lambda x: measure_deviations(x, Sharing((0,)), fast=True), x) == 2


def test_weights_of_one_and_domains_of_one_give_the_same():
    x = hard_data("outliers", 1e3, (4096, 16))
    expected = moments(x)[2]
    weighted = measure(x, (0,), weights=jnp.ones((4096, 1)))
    _, of_domain, *_ = measure_deviations(x, Sharing((0,), jnp.zeros(4096, jnp.int32), 1))
    for var in (weighted.var, of_domain.var[0]):
        assert error(var, expected) <= 1e-6  # as in one pass


MESH = {"i": 4, "j": 2}
SPLITS = [
    (shape, spec)
    for shape in [(64, 16, 16, 4), (40, 14, 14, 16), (4096, 16), (1000, 80)]
    for spec in [P(None), P("i"), P(None, "i"), P("i", None, "j"), P("i", None, None, "j")]
    if len(spec) <= len(shape) and all(axis is None or n % MESH[axis] == 0 for axis, n in zip(spec, shape))
]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("shape", "spec"), SPLITS)
def test_values_split_over_devices(devices, kind, shape, spec):
    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(kind, kind), devices=devices)
    x = hard_data("ordinary", 1e4, shape)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda x: measure(x, range(x.ndim - 1)))(jax.device_put(x, NamedSharding(mesh, spec)))
    assert error(found.var, moments(x.reshape(-1, shape[-1]))[2]) <= 1e-6


def test_a_batch_split_over_devices_is_sampled_where_it_lies(devices):
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,), devices=devices)
    for shape in [(64, 16, 16, 4), (4096, 16)]:
        x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P("i")))
        text = jax.jit(lambda x: measure(x, range(x.ndim - 1))).lower(x).compile().as_text()
        assert "all-reduce" in text
        assert not any(kind in text for kind in ("all-gather", "collective-permute", "all-to-all"))


def test_members_sample_their_own_part(devices):
    x = hard_data("outliers", 1e3, (4096, 16))
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,), devices=devices)

    def member(x):
        pivot, deviations, *_ = measure_deviations(x, Sharing((0,)), axis_name="i")
        return pivot + deviations.mean, deviations.var

    mean, var = jax.jit(jax.shard_map(member, mesh=mesh, in_specs=P("i"), out_specs=P()))(x)
    assert error(var, moments(x)[2]) <= 1e-6
    np.testing.assert_allclose(mean, moments(x)[1], rtol=6e-8)
