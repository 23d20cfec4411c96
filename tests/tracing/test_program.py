"""Loops, branches and cells around layers, run with statistics chosen from outside, against float64."""

import jax
import numpy as np
import pytest
from models import (
    BATCHES,
    Branches,
    InsideWhile,
    Recurrent,
    Repeated,
    Scanned,
    X,
    dense_normalized,
    initialized,
    train,
)
from oracle import assert_same_statistics, by_training_mode, merged

import flaxbn


@pytest.mark.parametrize("how", ["loop", "broadcast", "carried"])
def test_calls_of_one_layer_are_merged_with_a_warning(how):
    model = Repeated(how)
    variables = initialized(Repeated("loop"))
    if how != "loop":
        variables = {k: {"layers": v} for k, v in variables.items()}
    path = ("block",) if how == "loop" else ("layers", "block")
    statistics = []
    for batch in BATCHES:
        x = batch.astype(np.float64)
        for _ in range(3):
            x, mean, var = dense_normalized(variables, x, path)
            statistics.append((len(batch), mean, var))
    name = "/".join((*path, "norm"))
    with pytest.warns(UserWarning, match=f"'{name}': called more than once"):
        found = flaxbn.estimate_population_stats(model, variables, BATCHES)
    for key in path:
        found = found[key]
    mean, var = merged(*zip(*statistics))
    assert_same_statistics(found["norm"], {"mean": mean, "var": var})


def test_recurrent_cells_merge_over_time():
    model = Recurrent()
    variables = initialized(model)
    statistics = []
    for batch in BATCHES:
        carry = np.zeros((len(batch), 6))
        for t in reversed(range(3)):
            carry = 0.5 * carry + batch[:, t].astype(np.float64)
            mean, var = carry.mean(0), carry.var(0)
            statistics.append((len(batch), mean, var))
            carry = (carry - mean) / np.sqrt(var + 1e-5)
    with pytest.warns(UserWarning, match="called more than once"):
        found = flaxbn.estimate_population_stats(model, variables, BATCHES)
    mean, var = merged(*zip(*statistics))
    assert_same_statistics(found["cell"]["norm"], {"mean": mean, "var": var})


def test_branches_count_only_what_they_are_given():
    model = Branches()
    variables = initialized(model)
    batches = [BATCHES[0] + 5, BATCHES[1] - 5, BATCHES[2] + 5]
    statistics = {"large": [], "small": [], "after": []}
    for batch in batches:
        x = batch.astype(np.float64)
        way = "large" if x.mean() > 1 else "small"
        x, mean, var = dense_normalized(variables, x if way == "large" else 2 * x, (way,))
        statistics[way].append((len(batch), mean, var))
        _, mean, var = dense_normalized(variables, x, ("after",))
        statistics["after"].append((len(batch), mean, var))
    found = flaxbn.estimate_population_stats(model, variables, batches)
    for key, values in statistics.items():
        mean, var = merged(*zip(*values))
        assert_same_statistics(found[key]["norm"], {"mean": mean, "var": var})


def test_a_branch_never_taken_saw_no_data():
    model = Branches()
    with pytest.raises(ValueError, match=r"must see data: 'small/norm' saw none.*only"):
        flaxbn.estimate_population_stats(model, initialized(model), [X + 5])


def test_a_layer_inside_while_is_an_error():
    model = InsideWhile()
    with pytest.raises(ValueError, match=r"must not lie inside `while`.*block/norm"):
        flaxbn.estimate_population_stats(model, initialized(model), BATCHES)


def test_layers_in_branches_are_left_out_by_their_names():
    model = Branches()
    variables, batches = initialized(model), [BATCHES[0] + 5, BATCHES[1] - 5]
    found = flaxbn.estimate_population_stats(model, variables, batches, only=lambda path: path.startswith("small"))
    _, mean, var = dense_normalized(variables, 2 * batches[1].astype(np.float64), ("small",))
    assert_same_statistics(found["small"]["norm"], {"mean": mean, "var": var})
    for name in ("large", "after"):
        jax.tree.map(np.testing.assert_array_equal, found[name], variables["batch_stats"][name])


def test_a_scan_from_its_end():
    model = Scanned(reverse=True)
    variables = initialized(model)
    found = flaxbn.estimate_population_stats(model, variables, BATCHES)
    assert_same_statistics(found, by_training_mode(model, variables, BATCHES, train))
