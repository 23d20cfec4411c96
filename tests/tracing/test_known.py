"""What a program's known arguments determine, the others left out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxbn
from flaxbn.models.linen import trace
from flaxbn.tracing.known import UNKNOWN, read_by_taps


class NormAndSum(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return flaxbn.BatchNorm(use_running_average=True, use_scale=False, use_bias=False, name="norm")(x), x.sum()


class NormLoop(nn.Module):
    reverse: bool

    @nn.compact
    def __call__(self, x):
        loop = nn.scan(NormAndSum, variable_axes={"batch_stats": 0}, length=3, reverse=self.reverse)
        return loop(name="loop")(x, None)


class TwoBranches(nn.Module):
    @nn.compact
    def __call__(self, x):
        a, b = NormAndSum(name="a"), NormAndSum(name="b")
        a(x), b(x)
        return nn.cond(x.sum() > 0, lambda m, x: a(x), lambda m, x: b(x), self, x)


def means(model, known):
    x = jnp.ones((4, 2))
    variables = model.init(jax.random.key(0), x)
    program = trace(model, variables, x, lambda m, x: m(x), None).program
    leaves, structure = jax.tree.flatten(variables)
    numbered = jax.tree.unflatten(structure, [np.arange(a.size, dtype=a.dtype).reshape(a.shape) for a in leaves])
    args = [
        a + 10 * i if known(path) else UNKNOWN
        for i, (path, a) in enumerate(jax.tree_util.tree_leaves_with_path(numbered))
    ]
    outputs, found = read_by_taps(program, [*args, UNKNOWN])
    assert all(output is UNKNOWN for output in outputs)
    return found


@pytest.mark.parametrize("reverse", [False, True])
def test_a_loop_reads_a_row_in_each_step(reverse):
    (found,) = means(NormLoop(reverse), lambda path: True)
    np.testing.assert_array_equal(found, np.arange(6).reshape(3, 2))


def test_all_branches_are_read_whatever_decides():
    found = means(TwoBranches(), lambda path: True)
    np.testing.assert_array_equal(found[:2], [[0, 1], [20, 21]])
    np.testing.assert_array_equal(np.sort(found[2:], 0), [[0, 1], [20, 21]])


def test_what_is_unknown_stays_so():
    found = means(TwoBranches(), lambda path: path[1].key == "a")
    assert sum(mean is UNKNOWN for mean in found) == 2
    assert means(NormLoop(False), lambda path: False) == [UNKNOWN]
