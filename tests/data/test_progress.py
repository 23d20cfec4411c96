"""Who waits is told how far it is: from 0 on, in ascending numbers, to the end; and a bar ends with the pass."""

import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest

import flaxbn
from flaxbn import diagnostics
from flaxbn.data.progress import Counter

X = np.random.default_rng(0).normal(1.0, 2.0, (640, 4)).astype(np.float32)
MODEL = nn.Sequential([nn.BatchNorm(use_running_average=True), nn.Dense(3), nn.BatchNorm(use_running_average=True)])
VARIABLES = jax.jit(MODEL.init)(jax.random.key(0), X[:2])


def loss(output, batch):
    return output.sum(-1)


@pytest.fixture
def seen():
    return []


@pytest.fixture
def progress(seen):
    return lambda done, total: seen.append((done, total))


def check(seen, total, *, known=True):
    """All of it was told, in ascending order; `total` from the first batch on where it is known."""
    assert seen[0][0] == 0
    assert seen[-1] == (total, total)
    counts = [done for done, _ in seen if done]
    assert counts == sorted(counts)
    assert {of for done, of in seen if 0 < done < total} <= {total if known else None}


@pytest.mark.parametrize("cores", [1, 3])
def test_a_precise_pass_over_arrays_tells_now_and_then(seen, progress, monkeypatch, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    wide = np.tile(X, (1, 1024))  # worth a thread
    model = nn.BatchNorm(use_running_average=True)
    variables = model.init(jax.random.key(0), wide[:2])
    found = flaxbn.estimate_population_stats(model, variables, wide, batch_size=8, progress=progress)
    check(seen, 80)
    assert 20 <= len(seen) <= 24 if cores == 1 else 7 <= len(seen) <= 10
    np.testing.assert_allclose(found["mean"], wide.astype(np.float64).mean(0), rtol=1e-6)


@pytest.mark.parametrize("batches", [np.split(X, 10), iter(np.split(X, 10))])
def test_a_stream_tells_after_each_group(seen, progress, batches):
    flaxbn.population_moments(MODEL, VARIABLES, batches, progress=progress)
    check(seen, 10, known=isinstance(batches, list))
    assert len(seen) >= 4


def test_an_exact_pass_counts_batches_times_calls(seen, progress):
    flaxbn.estimate_population_stats(MODEL, VARIABLES, np.split(X, 10), method="exact", progress=progress)
    check(seen, 20)


def test_domains_count_anew(seen, progress):
    data = {"a": X[:320], "b": X[320:]}
    flaxbn.domains.estimate(MODEL, VARIABLES, data, batch_size=32, progress=progress)
    begins = [i for i, (done, total) in enumerate(seen) if (done, total) == (0, None)]
    assert len(begins) == 2
    check(seen[: begins[1]], 10)
    check(seen[begins[1] :], 10)


def test_diagnostics(seen, progress):
    diagnostics.diagnose(MODEL, VARIABLES, X, loss, batch_size=32, progress=progress)
    assert seen[-1][0] in {
        60,
        80,
    }  # as they are, shuffled, the losses; and cut as an estimate does, where that is looked at
    check(seen, seen[-1][0], known=False)
    seen.clear()
    diagnostics.batch_noise(MODEL, VARIABLES, X, batch_size=32, progress=progress)
    check(seen, 20)
    seen.clear()
    diagnostics.gap(MODEL, VARIABLES, X, loss, batch_size=32, validation=X[:64], progress=progress)
    check(seen, 22, known=False)


def test_without_anybody_who_looks_nothing_is_cut():
    assert not Counter().is_watched
    assert Counter(print).is_watched


def test_a_number_is_no_function():
    with pytest.raises(TypeError, match=r"must be a function of `\(done, total\)`: got bool"):
        flaxbn.estimate_population_stats(MODEL, VARIABLES, X, batch_size=32, progress=True)


BAR = """
import sys
from flaxbn.data.progress import counting, progress_bar
bar = progress_bar("images")
for total in (2, 4):
    try:
        with counting(bar) as counter:
            counter.expect(total)
            counter.add(3)
            if sys.argv[1] == "fails":
                raise OSError("gone")
            counter.add()
    except OSError as error:
        print(error, file=sys.stderr)
    print("after", file=sys.stderr)
"""


@pytest.mark.parametrize("ends", ["well", "fails"])
def test_a_bar_ends_with_the_pass(ends):
    """What is written next stands on a line of its own; and the bar may be used again."""
    found = subprocess.run([sys.executable, "-c", BAR, ends], capture_output=True, text=True, check=True)
    lines = [line.strip() for line in found.stderr.splitlines() if line.strip()]
    assert found.stdout == ""
    assert lines.count("after") == 2
    assert lines[-1] == "after"
    assert [line.split()[0] for line in lines if "/" in line] == ["images", "images"]
    assert ("4/4" in found.stderr) == (ends == "well")
