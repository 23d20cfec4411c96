"""How many batches share a buffer, and how far the host runs ahead."""

import jax.numpy as jnp
import numpy as np
import pytest

from flaxbn.estimation.chunks import Ahead, batches_in_chunk, put, room


@pytest.mark.parametrize(("channels", "batches"), [(0, 256), (1, 256), (20_000, 256), (50_000, 111), (10**8, 1)])
def test_a_buffer_is_at_most_64_mib(channels, batches):
    assert batches_in_chunk(channels) == batches
    assert batches == 1 or 12 * channels * batches <= 2**26


def test_what_is_put_is_there_and_all_else_is_zero():
    like = {"a": jnp.ones(3), "b": jnp.ones((), jnp.int32)}
    buffer = put(room(like, 4), 2, {"a": jnp.arange(3.0), "b": jnp.int32(7)})
    np.testing.assert_array_equal(buffer["a"], [[0] * 3, [0] * 3, [0, 1, 2], [0] * 3])
    np.testing.assert_array_equal(buffer["b"], [0, 0, 7, 0])


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_the_host_waits_for_the_batch_so_many_before(batches):
    class Token:
        ready = False

        def block_until_ready(self):
            self.ready = True
            return self

    ahead, tokens = Ahead(batches), [Token() for _ in range(5)]
    for i, token in enumerate(tokens, 1):
        ahead.started(token)
        assert [t.ready for t in tokens] == [k < i - batches for k in range(5)]
