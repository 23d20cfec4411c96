"""What is compiled is used again for what does the same, and for nothing else."""

import contextlib
import dataclasses
import functools
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxbn
from flaxbn.estimation.recent import Recent

N, BATCH = 64, 16
X = np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32)
METHODS = ("precise", "exact")


class Net(nn.Module):
    """Adds up what `offset` holds; its last layer is normalized."""

    offset: object = ()
    hidden: object = dataclasses.field(default=None, compare=False)

    @nn.compact
    def __call__(self, x):
        for number in self.offset:
            x = x + number
        x = nn.BatchNorm(use_running_average=True, use_bias=False, use_scale=False, name="first")(x)
        x = x if self.hidden is None else x * self.hidden[0]
        return nn.BatchNorm(use_running_average=True, name="last")(x)


VARIABLES = Net().init(jax.random.key(0), X[:2])


def estimate(model=None, method="precise", **options):
    options = {"batches": X, "batch_size": BATCH} | options
    return flaxbn.estimate_population_stats(model or Net(), VARIABLES, method=method, **options)


def assert_first(found, x):
    """The first layer receives `x`: its statistics do not depend on the batch size."""
    x = np.asarray(x, np.float64)
    np.testing.assert_allclose(found["first"]["mean"], x.mean(0), atol=1e-6 * np.abs(x).max())
    np.testing.assert_allclose(found["first"]["var"], x.var(0), rtol=1e-5)


@contextlib.contextmanager
def compilations(caplog):
    """Collects the names of what is compiled."""
    names = []
    caplog.clear()
    with jax.log_compiles():
        yield names
    messages = [record.getMessage() for record in caplog.records]
    names += [m.split(" with")[0] for m in messages if m.startswith("Compiling")]


def assert_compiled(caplog, expected, run):
    with compilations(caplog) as names:
        run()
    assert bool(names) == expected, names


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "offset", [[1, 2], (1, 2), [np.full((1, 3), 2.0, np.float32)], (np.float32(3.0), True)], ids=str
)
def test_models_that_are_equal_by_value_compile_once(caplog, method, offset):
    estimate(Net(offset), method)
    assert_compiled(caplog, False, lambda: estimate(Net(list(offset) if isinstance(offset, list) else offset), method))


@pytest.mark.parametrize("method", METHODS)
def test_a_field_of_nan_equals_itself(caplog, method):
    model = Net((), [1.0, float("nan")])
    estimate(model, method)
    assert_compiled(caplog, False, lambda: estimate(Net((), [1.0, float("nan")]), method))


@pytest.mark.parametrize("method", METHODS)
def test_a_list_that_changes_compiles_again(caplog, method):
    model = Net([1.0])
    assert_first(estimate(model, method), X + 1)
    model.offset.append(2.5)
    found = []
    assert_compiled(caplog, True, lambda: found.append(estimate(model, method)))
    assert_first(found[0], X + 3.5)


@pytest.mark.parametrize("method", METHODS)
def test_fields_that_equality_leaves_out_count(method):
    for factor in (1.0, 3.0):
        found = estimate(Net((), [factor]), method)
        np.testing.assert_allclose(found["last"]["var"], factor**2, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_equal_numbers_of_other_types_are_other_models(method):
    """For a bool, `x + True` is True, and `x + 1` is 1 or 2."""
    x = X > 0
    for one, expected in ((True, np.ones(3)), (1, 1 + x.mean(0))):
        found = estimate(Net((one,)), method, batches=x)
        np.testing.assert_allclose(found["first"]["mean"], expected, rtol=1e-6)


def fresh():
    return lambda m, b: m(b * 2)


def closing_over(number):
    return lambda m, b: m(b * number)


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_lambda_does_not_compile_again(caplog, method):
    estimate(method=method, call=fresh())
    assert_compiled(caplog, False, lambda: estimate(method=method, call=fresh()))


@pytest.mark.parametrize("method", METHODS)
def test_a_number_in_a_closure_is_part_of_the_program(caplog, method):
    for number, compiles in ((5.0, True), (6.0, True), (5.0, False)):
        found = []
        assert_compiled(
            caplog, compiles, lambda n=number, f=found: f.append(estimate(method=method, call=closing_over(n)))
        )
        assert_first(found[0], X.astype(np.float64) * number)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("inside", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_an_array_in_a_closure_is_an_argument(caplog, method, inside):
    def times(array):
        inner = inside(lambda b: b * array)
        return lambda m, b: m(inner(b))

    estimate(method=method, call=times(jnp.full((1, 3), 2.0)))
    call, found = times(jnp.full((1, 3), 3.0)), []
    assert_compiled(caplog, False, lambda: found.append(estimate(method=method, call=call)))
    assert_first(found[0], X.astype(np.float64) * 3)


@pytest.mark.parametrize("method", METHODS)
def test_an_array_in_a_closure_decides_which_entries_are_read(method):
    """Its values, not only its type, are then part of what is compiled."""

    class Rows(nn.Module):
        row: object

        @nn.compact
        def __call__(self, x):
            mean, var = (
                self.variable("batch_stats", name, jnp.ones, (2, 3)).value[self.row] for name in ("mean", "var")
            )
            norm = nn.BatchNorm(use_running_average=True, use_bias=False, use_scale=False)
            return norm.apply({"batch_stats": {"mean": mean, "var": var}}, x)

    for row in (0, 1):
        model = Rows(jnp.asarray(row))
        variables = model.init(jax.random.key(0), X)
        found = flaxbn.estimate_population_stats(model, variables, X, batch_size=BATCH, method=method, keep_unseen=True)
        np.testing.assert_allclose(found["var"][row], X.var(0), rtol=1e-5)
        np.testing.assert_array_equal(found["var"][1 - row], 1)


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_close_over_an_array(caplog, method):
    def weighted(table):
        return lambda b: table[(b[:, 0] > 0).astype(int)]

    for i, weights in enumerate(((1.0, 0.0), (0.0, 1.0), (1.0, 3.0))):
        table, found = jnp.asarray(weights), []
        call = weighted(table)
        assert_compiled(caplog, i == 0, lambda c=call, f=found: f.append(estimate(method=method, sample_weight=c)))
        w = np.asarray(weights)[(X[:, 0] > 0).astype(int)]
        np.testing.assert_allclose(found[0]["first"]["mean"], np.average(X, 0, w), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_large_arrays_that_a_call_makes(caplog, method):
    """They are not kept with what is compiled: they are made again, and nothing is compiled."""

    def shifted():
        return lambda m, b: m(b + jnp.sum(jnp.asarray(np.ones((2**19,), np.float32)) / 2**19))

    for i in range(2):
        found = []
        with compilations(caplog) as names:
            found.append(estimate(method=method, call=shifted()))
        assert_first(found[0], X + 1)
        assert i == 0 or not names


def test_arrays_of_a_closure_lie_anywhere(devices):
    """In a compiled function they go wherever it runs."""
    array = jax.device_put(np.full((1, 3), 2.0, np.float32), devices[1])
    variables = jax.device_put(VARIABLES, devices[0])
    for options in ({}, {"sharding": flaxbn.data_sharding()}):
        found = flaxbn.estimate_population_stats(
            Net(), variables, X, batch_size=BATCH, call=closing_over(array), **options
        )
        assert_first(found, X.astype(np.float64) * 2)


@pytest.mark.parametrize("by", ["global", "device"])
def test_arrays_of_a_closure_on_several_devices(devices, by):
    sharding, array = flaxbn.data_sharding(), jnp.full((1, 3), 2.0)
    found = estimate(call=closing_over(array), sharding=sharding, normalization_batch=by)
    assert_first(found, X.astype(np.float64) * 2)


class Augment:
    scale = 1.0

    def __call__(self, module, b):
        return module(b * self.scale)

    def run(self, module, b):
        return module(b * self.scale)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "make",
    [
        lambda a: a,
        lambda a: a.run,
        lambda a: functools.partial(a.run),
        lambda a: lambda m, b: m(b * a.scale),
        lambda a: functools.partial(lambda a, m, b: m(b * a.scale), a),
    ],
    ids=["callable object", "bound method", "partial of a bound method", "closure", "partial of an object"],
)
def test_what_a_call_holds_may_change(method, make):
    augment = Augment()
    call = make(augment)
    for scale in (1.0, 3.0, 1.0):
        augment.scale = scale
        assert_first(estimate(method=method, call=call), X.astype(np.float64) * scale)


@pytest.mark.parametrize("method", METHODS)
def test_an_interceptor_is_followed(method):
    def tripled(f, args, kwargs, context):
        return f(*(a * 3 for a in args), **kwargs) if isinstance(context.module, Net) else f(*args, **kwargs)

    assert_first(estimate(method=method), X)
    with nn.intercept_methods(tripled):
        assert_first(estimate(method=method), X.astype(np.float64) * 3)
    assert_first(estimate(method=method), X)


@pytest.mark.parametrize("method", METHODS)
def test_constants_in_the_memory_of_freed_ones(method):
    for i in range(8):
        array = jnp.full((1, 3), 1.0 + i)
        inner = jax.jit(lambda b, a=array: b * a)
        looped = jax.jit(lambda b, f=inner: jax.lax.scan(lambda y, _: (f(y), None), b, length=1)[0])
        assert_first(estimate(method=method, call=lambda m, b, f=looped: m(f(b))), X.astype(np.float64) * (1 + i))


def with_rule(times):
    found = jax.custom_jvp(times)
    found.defjvp(lambda primals, tangents: (times(primals[0]), times(tangents[0])))
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("inside", [lambda f: f, jax.jit, jax.checkpoint, with_rule])
def test_neither_model_nor_arrays_are_held(method, inside):
    class Config:
        pass

    def times(array):
        inner = inside(lambda b: b * array)
        return lambda m, b: m(inner(b))

    config, array = Config(), jnp.full((1, 3), 2.0)
    config.array = array
    model, batches = Net((), [1.0, config]), X + 0
    estimate(model, method, batches=batches, call=times(array))
    held = [weakref.ref(a) for a in (config, array, model, batches)]
    del config, array, model, batches
    gc.collect()
    assert [ref() for ref in held] == [None] * 4


@pytest.mark.parametrize("method", METHODS)
def test_threads(method):
    """Each with constants of its own, of which the numbers make other programs."""

    def run(i):
        call = closing_over(jnp.full((1, 3), 2.0 + i)) if i % 2 else closing_over(2.0 + i)
        return estimate(method=method, call=call)

    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(run, [0, 1, 2, 3] * 3)]
    for i, one in zip([0, 1, 2, 3] * 3, found):
        assert_first(one, X.astype(np.float64) * (2 + i))


def test_what_was_not_used_for_longest_goes():
    recent = Recent(2)
    for key in "ab":
        assert recent.put(key, key.upper()) == key.upper()
    assert recent.put("a", "another") == "A"
    recent.put("c", "C")
    assert [recent.get(key) for key in "abc"] == ["A", None, "C"]


def test_memory_does_not_grow_with_the_shapes_of_a_stream():
    """The moments of 256 batches of 20 000 channels take 61 MB."""
    model = nn.BatchNorm(use_running_average=True)
    variables = model.init(jax.random.key(0), np.zeros((1, 2, 20_000), np.float32))
    taken = []

    def stream():
        for length in range(2, 8):
            yield np.full((1, length, 20_000), length, np.float32)
            taken.append(sum(a.nbytes for a in jax.live_arrays()))

    start = sum(a.nbytes for a in jax.live_arrays())
    found = flaxbn.estimate_population_stats(model, variables, stream())
    assert max(taken) - start < 1.2 * 61.44e6
    values = np.repeat(np.arange(2, 8), np.arange(2, 8))
    np.testing.assert_allclose(found["mean"], values.mean(), rtol=1e-6)
    np.testing.assert_allclose(found["var"], values.var(), rtol=1e-6)


def test_shapes_that_call_other_layers():
    """More kinds of batches than there are buffers at a time."""

    class ByLength(nn.Module):
        @nn.compact
        def __call__(self, x):
            lengths = range(2, 9) if self.is_initializing() else [x.shape[1]]
            for length in lengths:
                y = nn.BatchNorm(use_running_average=True, name=f"norm_{length}")(x)
            return y

    model, rng = ByLength(), np.random.default_rng(0)
    batches = [rng.normal(size=(4, length, 3)).astype(np.float32) for length in [*range(2, 9)] * 3]
    variables = model.init(jax.random.key(0), batches[0])
    found = flaxbn.estimate_population_stats(model, variables, iter(batches))
    for length in range(2, 9):
        values = np.concatenate([b for b in batches if b.shape[1] == length]).reshape(-1, 3).astype(np.float64)
        np.testing.assert_allclose(found[f"norm_{length}"]["var"], values.var(0), rtol=1e-5)
