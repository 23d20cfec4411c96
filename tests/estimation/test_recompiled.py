"""A warning, once, where one call is compiled for the fifth time; none where it is another call."""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxbn

X = np.random.default_rng(0).normal(1.0, 2.0, (64, 3)).astype(np.float32)
MODEL = nn.BatchNorm(use_running_average=True)
VARIABLES = MODEL.init(jax.random.key(0), X)


def cut(sizes):
    return np.split(X[: sum(sizes)], np.cumsum(sizes)[:-1])


def estimate(batches, **options):
    return flaxbn.estimate_population_stats(MODEL, VARIABLES, batches, **options)


def test_batches_of_many_shapes():
    estimate(cut([2, 3, 4, 5]))
    with pytest.warns(
        UserWarning, match=r"call of BatchNorm five programs .* batches have come in as many shapes"
    ) as seen:
        estimate(cut([2, 3, 4, 5, 6]))
    assert [warning.filename for warning in seen] == [__file__]  # it points at who called
    estimate(cut([2, 3, 4, 5, 6, 7]))


@pytest.mark.parametrize(("first", "wrap"), [(1.0, lambda call: call), (11.0, functools.partial)])
def test_a_number_in_a_closure(first, wrap):
    def scaled(number):
        return wrap(lambda module, batch: module(number * batch))

    for number in range(4):
        estimate([X], call=scaled(first + number))
    with pytest.warns(UserWarning, match="closes over is part of the program"):
        estimate([X], call=scaled(first + 4))
    estimate([X], call=scaled(first + 5))


def test_what_is_compiled_once_is_not_counted():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(6):
            scale = jnp.float32(number + 1)
            estimate([X], call=lambda module, batch, scale=scale: module(scale * batch))
        for features in range(1, 7):  # another model each time
            model = nn.Sequential([nn.Dense(features), nn.BatchNorm(use_running_average=True)])
            flaxbn.estimate_population_stats(model, model.init(jax.random.key(0), X), [X])
