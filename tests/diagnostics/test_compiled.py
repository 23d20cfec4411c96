"""Functions of batches with names: what they give, and how often they are compiled."""

import jax.numpy as jnp
import numpy as np
from compiled import programs

from flaxbn.diagnostics.compiled import compiled

X = np.arange(6, dtype=np.float32)


def counted(use_names):
    """Doubles x, or triples it where the first name is "b"."""
    traces = []

    def function(batch):
        traces.append(batch["name"])
        return (batch["x"] * (3 if use_names and batch["name"][0] == "b" else 2),)

    return compiled(function), traces


def batches(names):
    return [{"x": X + i, "name": [name, "c"]} for i, name in enumerate(names)]


def test_names_that_change_nothing_are_compiled_once():
    run, traces = counted(use_names=False)
    found = []
    texts = programs(lambda: found.extend(run(batch)[0] for batch in batches("abab")))
    assert len([text for text in texts if "multiply" in text]) == 1
    assert len(traces) == 4
    np.testing.assert_array_equal(found, [2 * (X + i) for i in range(4)])


def test_names_that_matter_do():
    run, _ = counted(use_names=True)
    found = [run(batch)[0] for batch in batches("abab")]
    np.testing.assert_array_equal(found, [factor * (X + i) for i, factor in enumerate((2, 3, 2, 3))])


def test_shapes_and_closed_over_arrays_are_told_apart():
    """Literals count by value, arrays are arguments, shapes are part of what is compiled."""
    for scale in (jnp.arange(6.0), jnp.arange(6.0) + 1):
        run = compiled(lambda batch, scale=scale: (batch["x"] * scale[: len(batch["x"])],))
        for size in (6, 3):
            np.testing.assert_allclose(run({"x": X[:size], "name": "a"})[0], X[:size] * scale[:size])


def test_batches_without_names_are_traced_once():
    run, traces = counted(use_names=False)
    for i in range(3):
        run({"x": X + i, "name": X})
    assert len(traces) == 1
