"""Batches to look at: of arrays, of iterables, and the same examples shuffled."""

import dataclasses
import tracemalloc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MLP

import flaxbn
from flaxbn.diagnostics.diagnosis import diagnose
from flaxbn.diagnostics.noise import batch_noise
from flaxbn.diagnostics.sample import joined, reshuffled, some_batches

RNG = np.random.default_rng(0)
X = RNG.normal(3, 1, (136, 4)).astype(np.float32)
DATA = {"x": X + 2 * (np.arange(136) // 16 % 2)[:, None].astype(np.float32), "domain": np.arange(136) // 16 % 2}
MODEL = nn.BatchNorm(use_running_average=True)
VARIABLES = MODEL.init(jax.random.key(0), X)


def cut(arrays, size=16):
    return (jax.tree.map(lambda a, i=i: a[i : i + size], arrays) for i in range(0, 136, size))


def diagnosed(batches, **options):
    return diagnose(
        MODEL,
        VARIABLES,
        batches,
        lambda output, batch: output.sum(-1),
        call=lambda m, batch: m(batch["x"]),
        domain=lambda batch: batch["domain"],
        **options,
    )


def without_code(diagnosis):
    """The line that cures names `batch_size` where arrays were given."""
    return dataclasses.replace(diagnosis, findings=[dataclasses.replace(f, code="") for f in diagnosis.findings])


@pytest.mark.parametrize("form", [list, iter, lambda batches: jax.tree.map(jnp.asarray, [*batches])])
def test_an_iterable_is_diagnosed_as_its_arrays_are(form):
    """By domain as well; the last eight examples fill no batch."""
    assert set(diagnosed(DATA, batch_size=16).noise) == {0, 1}
    found, expected = diagnosed(form(cut(DATA))), diagnosed(DATA, batch_size=16)
    assert without_code(found) == without_code(expected)
    assert found.findings[0].code == expected.findings[0].code.replace(", batch_size=16", "")


@pytest.mark.parametrize("as_list", [False, True])
def test_what_was_just_estimated_has_no_drift(as_list):
    """Sorted by class: other batches of the same examples have other statistics behind the first layer."""
    x = RNG.normal(size=(128, 6)).astype(np.float32) + np.repeat(np.arange(8, dtype=np.float32), 16)[:, None]
    model = MLP((16, 16), outputs=2)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    batches, options = ([*np.split(x, 16)], {}) if as_list else (x, {"batch_size": 8})
    batch_stats = flaxbn.estimate_population_stats(model, variables, batches, **options)
    estimated = {**variables, "batch_stats": batch_stats}
    found = diagnose(model, estimated, batches, lambda output, batch: output.sum(-1), **options)
    assert max(record.rms_shift for record in found.drift) < 1e-5  # 0.014 where they are cut in another way
    assert "lagging average" not in [finding.trap for finding in found.findings]


def test_each_domain_is_shuffled_by_itself():
    found = diagnosed(DATA, batch_size=16)
    for label in (0, 1):
        alone = [batch["x"] for batch in some_batches(DATA, 16, 64) if batch["domain"][0] == label]
        assert found.shuffled[label] == batch_noise(MODEL, VARIABLES, reshuffled(alone))
        assert found.noise[label] == batch_noise(MODEL, VARIABLES, alone)


def test_the_noise_of_an_iterable():
    assert batch_noise(MODEL, VARIABLES, cut(X)) == batch_noise(MODEL, VARIABLES, X, batch_size=16)


def test_an_iterable_is_read_up_to_the_number_of_batches():
    batches = cut(DATA)
    diagnosed(batches, num_batches=4)
    assert len([*batches]) == 5


SORTED = np.concatenate([RNG.normal(c, 1, (16 * 20, 4)) for c in range(4)]).astype(np.float32)


@pytest.mark.parametrize("left_over", [0, 8])
def test_of_a_list_of_batches_some_are_drawn_from_all_over(left_over):
    """As of arrays: the first 16 of 80 batches, sorted by class, would all be of one."""
    x = np.concatenate([SORTED, SORTED[:left_over]])
    listed = [x[i : i + 16] for i in range(0, len(x), 16)]
    for given, expected in zip(some_batches(listed, None, 16), some_batches(x, 16, 16), strict=True):
        np.testing.assert_array_equal(given, expected)
    exact = {"mean": jnp.asarray(SORTED.mean(0)), "var": jnp.asarray(SORTED.var(0))}
    found = diagnose(MODEL, {**VARIABLES, "batch_stats": exact}, listed, lambda output, batch: output.sum(-1))
    assert [finding.trap for finding in found.findings] == ["non-i.i.d. batches"], str(found)


def test_of_an_iterator_the_first_batches_are_looked_at():
    chosen = some_batches(iter([SORTED[i : i + 16] for i in range(0, len(SORTED), 16)]), None, 16)
    np.testing.assert_array_equal(joined(chosen), SORTED[: 16 * 16])


def test_examples_for_the_checks_are_enough_where_batches_are_small():
    """One example cannot show that predictions depend on others; the first eight do."""
    stuck = nn.BatchNorm(use_running_average=False)
    images = RNG.normal(size=(32, 5, 4)).astype(np.float32)
    variables = stuck.init(jax.random.key(0), images)
    found = diagnose(stuck, variables, cut_one(images), lambda output, batch: output.sum((1, 2)))
    assert [finding.trap for finding in found.findings] == ["training mode at inference"]


def cut_one(images):
    return iter([images[i : i + 1] for i in range(len(images))])


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (DATA, TypeError, "must be an iterable of batches where `batch_size` is not given: got dict of arrays"),
        (X, TypeError, "must be an iterable of batches where `batch_size` is not given: got ndarray of arrays"),
        ((X, X), TypeError, "must be an iterable of batches where `batch_size` is not given: got tuple of arrays"),
        ([], ValueError, r"Two batches of one size are needed at least: got batches of \[\] samples"),
        ([X[:16], X[:8]], ValueError, r"Two batches of one size are needed at least: got batches of \[16, 8\] samples"),
        ([X[:0], X[:0]], ValueError, "must hold at least one sample: saw none"),
        ([X[:16], X[:8], X[:16]], ValueError, r"must be of one size.*smaller last one.*got \[8, 16\] samples"),
        ([X[:8], X[:8], X[:16]], ValueError, r"must be of one size.*got \[8, 16\] samples"),
        ([X[:16], X[:16], X[:8], X[:8]], ValueError, r"must be of one size.*got \[8, 16\] samples"),
    ],
)
@pytest.mark.parametrize("reader", [diagnosed, lambda batches: batch_noise(MODEL, VARIABLES, batches)])
def test_errors(reader, batches, error, message):
    with pytest.raises(error, match=message):
        reader(batches)


@pytest.mark.parametrize("size", [4, 16])
def test_batches_of_sequences_of_several_lengths(size):
    """Bucketed by length; drawn anew among those of one, with a class each they are found to be alike."""
    lengths = np.tile([5, 7, 9], 16)
    given = [RNG.normal(4 * (k // 3 % 2), 1, (size, length, 4)).astype(np.float32) for k, length in enumerate(lengths)]
    assert sorted(len(batch[0]) for batch in reshuffled(given)) == sorted(lengths)
    before, after = (sorted(np.concatenate([*map(np.ravel, batches)])) for batches in (given, reshuffled(given)))
    assert before == after
    exact = {"mean": np.full(4, 2, np.float32), "var": np.full(4, 5, np.float32)}
    found = diagnose(MODEL, {**VARIABLES, "batch_stats": exact}, given, lambda output, batch: output.sum((1, 2)))
    assert "non-i.i.d. batches" in {finding.trap for finding in found.findings}, str(found)


def test_shuffling_holds_one_copy_more():
    """Of 64 batches; the 65th is the one that is looked at."""
    batches = [np.zeros((16, 1000), np.float32) for _ in range(64)]
    tracemalloc.start()
    for _ in reshuffled(batches):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * sum(batch.nbytes for batch in batches)  # with room for what Python needs; it was 2


def test_shuffling_keeps_the_examples_and_the_sizes():
    chosen = some_batches(DATA, 16, 64)
    again = [*reshuffled(chosen)]
    assert [len(batch["x"]) for batch in again] == [16] * 8
    before, after = joined(chosen), joined(again)
    np.testing.assert_array_equal(np.sort(after["x"], 0), np.sort(before["x"], 0))
    rows = {tuple(x): domain for x, domain in zip(before["x"].tolist(), before["domain"].tolist())}
    assert all(rows[tuple(x)] == domain for x, domain in zip(after["x"].tolist(), after["domain"].tolist()))
    assert min(np.ptp(batch["domain"]) for batch in again) == 1  # each was of one domain
    assert [*map(np.ndarray.tolist, (b["x"] for b in reshuffled(chosen)))] == [b["x"].tolist() for b in again]
