"""What leaves the device: moments packed into few arrays, and errors that name layer and batch."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxbn import Moments
from flaxbn.estimation.layer_moments import NotFiniteError, Pending, fetched, pack

RNG = np.random.default_rng(0)
SHAPES = [(2, 3), (), (4,)]


def moments(shape, is_complex):
    count, mean, var = RNG.normal(size=(3, *shape)).astype(np.float32)
    return Moments(count, (mean + 1j * var).astype(np.complex64) if is_complex else mean, var)


@pytest.mark.parametrize("is_complex", [[False] * 3, [True] * 3, [False, True, False]])
def test_what_is_packed_is_unpacked(is_complex):
    given = [moments(shape, c) for shape, c in zip(SHAPES, is_complex)]
    packed = jax.jit(pack)(given, jnp.array([-1, 7, 255]))
    assert len(packed) == 1 + any(is_complex)
    entries = [np.zeros(shape, int) for shape in SHAPES]
    (found,) = fetched([Pending(entries, range(3), packed, is_complex)])
    assert found.first_bad == [-1, 7, 255]
    for one, other in zip(found.moments, given, strict=True):
        for a, b in zip(one, other):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype


def test_the_error_goes_to_other_processes():
    error = NotFiniteError("block/norm", 3)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.layer) == (NotFiniteError, str(error), "block/norm")
