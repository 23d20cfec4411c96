"""What exact statistics will cost, against bytes and operations counted by hand, and what is an error beforehand."""

import re

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from models import MLP, Block, Branches, Flattened, InsideWhile, Loop, Residual

import flaxbn

X = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)


def chain(dtype=None):
    """8 -> 4 -> 2 -> 3 features, a layer behind each."""
    return MLP((4, 2, 3), activation=same, dtype=dtype)


def same(x):
    return x


CHAIN = chain()
VARIABLES = jax.jit(CHAIN.init)(jax.random.key(0), X)


def shapes_of(model, x=X):
    """Variables of ones: no plan depends on their values."""
    return jax.tree.map(
        lambda a: jnp.ones(a.shape, a.dtype), jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(x))
    )


def plan(batches=X, model=CHAIN, variables=VARIABLES, **options):
    return flaxbn.plan(model, variables, batches, **options)


def live(planned):
    return [call.live_bytes for call in planned.calls]


@pytest.mark.usefixtures("cpu")
def test_calls_come_in_the_order_of_execution():
    planned = plan(batch_size=5)
    assert [(call.layer, call.call) for call in planned.calls] == [(f"BatchNorm_{i}", 1) for i in range(3)]
    assert (planned.batches, planned.samples) == (4, 20)


def test_calls_of_one_layer_are_numbered():
    model = models.Recurrent()
    planned = plan(models.X, model, shapes_of(model, models.X), batch_size=40)
    assert [(call.layer, call.call) for call in planned.calls] == [("cell/norm", i) for i in (1, 2, 3)]


@pytest.mark.parametrize("batches", [[X], [X[:9], X[9:18], X[18:]], list(X[:, None])])
def test_live_bytes_are_those_of_all_batches(batches):
    """After a layer lives its input, which waits for its statistics; after the last layer nothing does."""
    assert live(plan(batches)) == [20 * 4 * 4, 20 * 2 * 4, 0]


def test_half_precision_takes_half():
    x = X.astype(jnp.bfloat16)
    assert live(plan(x, chain(jnp.bfloat16), batch_size=5)) == [20 * 4 * 2, 20 * 2 * 2, 0]


def test_a_residual_connection_lives_beside_the_block():
    model = Residual()
    assert live(plan(X, model, shapes_of(model), batch_size=5)) == [20 * 4 * 4, 20 * (4 + 4) * 4, 0]


def test_data_lives_where_a_later_layer_needs_it():
    def call(module, batch):
        return module(batch["x"] + 0 * module(batch["x"]).sum(-1, keepdims=True) + batch["late"])

    planned = plan({"x": X, "late": X, "label": X}, call=call, batch_size=5)
    first = 20 * (4 + 8 + 8) * 4
    assert live(planned)[:3] == [first, first - 20 * 2 * 4, first - 20 * 4 * 4 + 20 * 3 * 4]


def test_only_the_layers_to_estimate_are_planned():
    planned = plan(batch_size=5, only=lambda path: path != "BatchNorm_1")
    assert [call.layer for call in planned.calls] == ["BatchNorm_0", "BatchNorm_2"]
    assert live(planned) == [20 * 4 * 4, 0]


def test_each_device_holds_its_share(devices):
    """Batches of 10 are padded to 16, of which each device holds 2."""
    planned = plan(batch_size=10, sharding=flaxbn.data_sharding())
    assert live(planned) == [2 * 2 * 4 * 4, 2 * 2 * 2 * 4, 0]
    assert len(devices) == 8


def test_one_pass_where_all_is_kept():
    planned = plan(batch_size=5)
    assert planned.passes == pytest.approx(1)
    assert [call.kept for call in planned.calls] == [True] * 3
    assert planned.peak_bytes == planned.largest_bytes == 320
    assert planned.memory_limit is None


def operations():
    """Of each part for a batch of five: products, and one for each element that a step reads."""

    def steps(number, features):
        """Each reads the values, and one row: the mean, the scale or a bias."""
        return number * (5 * features + features)

    first = 2 * 5 * 8 * 4 + steps(1, 4)
    second = steps(3, 4) + 2 * 5 * 4 * 2 + steps(1, 2)
    third = steps(3, 2) + 2 * 5 * 2 * 3 + steps(1, 3)
    return first, second, third


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize(
    ("limit", "kept", "parts"),
    [
        (320, [True, True, True], [1, 1, 1]),
        (319, [False, True, True], [2, 1, 1]),
        (160, [False, True, True], [2, 1, 1]),
        (159, [False, False, True], [3, 2, 1]),
        (1, [False, False, True], [3, 2, 1]),
    ],
)
def test_what_does_not_fit_is_computed_again(limit, kept, parts):
    planned = plan(batch_size=5, memory_limit=limit)
    assert [call.kept for call in planned.calls] == kept
    work = operations()
    assert planned.passes == pytest.approx(np.dot(work, parts) / sum(work))
    assert planned.peak_bytes == {320: 320, 319: 160, 160: 160, 159: 0, 1: 0}[limit]
    assert planned.largest_bytes == 320
    assert planned.memory_limit == limit


def test_passes_shrink_with_memory():
    passes = [plan(batch_size=5, memory_limit=limit).passes for limit in range(1, 400, 40)]
    assert passes == sorted(passes, reverse=True)
    assert passes[0] > 1.9 > passes[-1] == pytest.approx(1)


@pytest.mark.usefixtures("cpu")
def test_the_plan_is_a_table():
    lines = str(plan(batch_size=5, memory_limit=200)).splitlines()
    assert lines[0].startswith("exact statistics of 20 samples in 4 batches: 3 calls, ")
    assert lines[0].endswith("forward passes, 160 B kept at most (memory limit 200 B)")
    first, second, third = operations()
    again = f"{(2 * first + second) / (first + second + third):.2f}"
    assert [line.split() for line in lines[1:4]] == [
        ["layer", "call", "live", "values", "passes"],
        ["1", "BatchNorm_0", "1", "320", "B", "recomputed", f"{first / (first + second + third):.2f}"],
        ["2", "BatchNorm_1", "1", "160", "B", "kept", again],
    ]
    # Rows end in the same column, that of the passes.
    assert len({len(line) for line in lines[1:]}) == 1
    assert "no memory limit" in str(plan(batch_size=5))


def test_notebooks_show_the_same_table():
    shown = plan(batch_size=5, memory_limit=200)
    html = shown._repr_html_()
    assert html.startswith(f"<p>{str(shown).splitlines()[0]}</p><table>")
    cells = [re.findall(">([^<>]*)</td>", row) for row in html.split("<tr>")[2:]]
    assert [" ".join(row).split() for row in cells] == [line.split() for line in str(shown).splitlines()[2:]]


def test_sizes_are_printed_in_their_unit():
    assert "160.0 KiB kept at most" in str(plan([X] * 512))


@pytest.mark.usefixtures("cpu")
def test_a_sized_iterable_is_known_by_its_first_batch():
    class Loader:
        read = 0

        def __len__(self):
            return 4

        def __iter__(self):
            for i in range(4):
                self.read += 1
                yield X[5 * i : 5 * i + 5]

    loader = Loader()
    planned = plan(loader)
    assert planned == plan(batch_size=5)
    assert loader.read == 1


def test_the_number_of_samples_is_cut():
    assert plan(batch_size=5, num_samples=12).samples == 12
    assert plan([X[:8], X[8:16], X[16:]], num_samples=10).samples == 10
    assert live(plan([X[:8], X[8:16], X[16:]], num_samples=10)) == [10 * 4 * 4, 10 * 2 * 4, 0]


class Unread(np.ndarray):
    """Has a shape and a type, but no values."""

    def __getitem__(self, index):
        raise AssertionError("read")

    def __array__(self, *args, **kwargs):
        raise AssertionError("read")


@pytest.mark.parametrize(
    "options", [{"batch_size": 5}, {"batch_size": 5, "num_samples": 12}, {}, {"num_samples": 12}], ids=str
)
def test_no_data_is_read(options):
    x = X.view(Unread)
    planned = plan(x if "batch_size" in options else [x, x], **options)
    assert planned.samples == options.get("num_samples", 20 if "batch_size" in options else 40)


class Explosive:
    """A sized iterable that must not be read."""

    def __len__(self):
        return 3

    def __iter__(self):
        raise AssertionError("read")


def synchronized(module, x):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    return jax.shard_map(module, mesh=mesh, in_specs=P("data"), out_specs=P("data"))(x)


@pytest.mark.parametrize(
    ("message", "model", "options"),
    [
        (r"must not lie inside `while`.*block/norm", InsideWhile(), {}),
        (r"(large|small)/norm' must not lie inside a `cond`.*precise", Branches(), {}),
        (r"at most 512 calls: BatchNorm 'layers/block/norm'.*513 times", Loop(513), {}),
        (r"must run a batch-norm layer.*ran none", Block(), {"call": lambda m, x: x}),
        (r"batch axis.*'norm' has shape \(30, 6\).*`only`", Flattened(), {"sample_weight": lambda x: x[:, 0, 0]}),
        (r"batch axis.*'norm' has shape \(48, 6\).*`only`", Flattened(), {"sharding": flaxbn.data_sharding()}),
    ],
)
def test_errors_of_the_structure(message, model, options):
    x = models.X.view(Unread)
    variables = shapes_of(Loop(2) if isinstance(model, Loop) else model, models.X)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        plan(x, model, variables, batch_size=10, **options)


def test_a_layer_inside_shard_map_is_an_error(devices):
    with pytest.raises(ValueError, match=r"must not lie inside `shard_map`.*'BatchNorm_0'"):
        plan(X.view(Unread), call=synchronized, batch_size=10)
    assert len(devices) == 8


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"must be a flax.linen.Module: got function", {"model": lambda x: x}),
        (ValueError, r"must hold the collection 'batch_stats': got \['params'\]", {"variables": {"params": 1}}),
        (ValueError, r"'mean' and 'var' of a batch-norm layer", {"variables": {"batch_stats": {}}}),
        (ValueError, r"`only` must accept.*none of 'BatchNorm_0'", {"only": lambda path: False}),
        (ValueError, r"`memory_limit` must be a positive integer: got 0", {"memory_limit": 0}),
        (ValueError, r"`memory_limit` must be a positive integer: got 2.5", {"memory_limit": 2.5}),
        (ValueError, r"`num_samples` must be a positive integer: got 0", {"num_samples": 0}),
        (TypeError, r"whose length is unknown.*`batch_size`", {"batches": (1 / 0 for _ in range(3))}),
        (TypeError, r"got map, whose length is unknown", {"batches": map(Explosive, [1])}),
        (TypeError, r"pytree of arrays.*`batch_size` is given", {"batches": [X], "batch_size": 2}),
        (TypeError, r"iterable of batches.*ndarray.*pass `batch_size`", {"batches": X}),
        (ValueError, r"`batch_size` must be a positive integer: got 0", {"batches": X, "batch_size": 0}),
        (ValueError, r"`num_samples=30` samples: saw 20", {"batches": X, "batch_size": 5, "num_samples": 30}),
        (ValueError, r"`num_samples=30` samples: saw 20", {"batches": [X], "num_samples": 30}),
        (ValueError, r"at least one sample: saw none", {"batches": []}),
        (ValueError, r"at least one sample: saw none", {"batches": X[:0], "batch_size": 5}),
    ],
)
def test_errors_before_data_is_read(error, message, arguments):
    with pytest.raises(error, match=f"(?s){message}"):
        plan(**{"batches": Explosive(), **arguments})


def test_the_most_calls_that_are_unrolled():
    planned = plan(models.X, Loop(512), shapes_of(Loop(2), models.X), batch_size=40)
    assert len(planned.calls) == 512
