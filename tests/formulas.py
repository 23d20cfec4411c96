"""Batch normalization, its gradient and renormalization in float64 numpy, on inputs of shape (positions, channels)."""

import numpy as np

EPSILON = 1e-5


def wide(*arrays):
    return [
        None if a is None else np.asarray(a).astype(np.result_type(np.asarray(a).dtype, np.float64)) for a in arrays
    ]


def moments(x, weights=None):
    """Count, mean and biased variance over axis 0; positions of weight 0 take no part."""
    x, weights = wide(x, np.ones(len(x)) if weights is None else weights)
    weights = np.broadcast_to(weights if weights.ndim == x.ndim else weights[:, None], x.shape)
    x = np.where(weights > 0, x, 0)
    count = weights.sum(0)
    mean = (weights * x).sum(0) / count
    return count, mean, (weights * np.abs(x - mean) ** 2).sum(0) / count


def batch_norm(x, scale=1.0, bias=0.0, weights=None, statistics=None):
    """The output with the statistics of the batch, or with `statistics`, a pair of mean and variance."""
    x, scale, bias = wide(x, scale, bias)
    mean, var = moments(x, weights)[1:] if statistics is None else wide(*statistics)
    return (x - mean) / np.sqrt(var + EPSILON) * scale + bias


def batch_norm_gradient(x, scale, cotangent, weights=None, r=1.0, d=0.0):
    """The gradients of `sum(cotangent * batch_norm(x))` in x, scale and bias, by hand; r and d are constants."""
    x, scale, cotangent, weights = wide(x, scale, cotangent, np.ones(len(x)) if weights is None else weights)
    count, mean, var = moments(x, weights)
    share = weights[:, None] / count
    inverse = 1 / np.sqrt(var + EPSILON)
    standard = (x - mean) * inverse
    inner = cotangent * scale * r
    centered = inner - share * (inner.sum(0) + standard * (inner * standard).sum(0))
    return inverse * centered, (cotangent * (standard * r + d)).sum(0), cotangent.sum(0)


def assert_moments(found, expected, rounding=4e-7):
    """Errors of a few float32 roundings: of the values' spread, and of the mean, of which the variance sees the square.

    A mean is a float32 number, so it is off by up to `rounding * |mean|`; where means were rounded before a merge, the
    variance between them is off by twice the product of that with the standard deviation.
    """
    count, mean, var = expected
    std, off = np.sqrt(var), rounding * np.abs(mean)
    np.testing.assert_allclose(found.count, count, rtol=rounding)
    assert np.all(np.abs(found.mean - mean) <= rounding * std + off), (found.mean, mean)
    assert np.all(np.abs(found.var - var) <= 4 * rounding * var + 2 * std * off + off**2), (found.var, var)
