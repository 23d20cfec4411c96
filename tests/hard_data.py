"""Data on which a variance in one pass could fail, some of it built against the sample that gives the pivot."""

import numpy as np

from flaxbn.arithmetic.measure import sample

RATIOS = [0.0, 10.0, 1e3, 1e4]  # |mean| / std
ORDINARY = ["ordinary", "sorted", "outliers"]
AGAINST_THE_SAMPLE = ["the lattice apart", "zeros on the lattice"]
# In the 2-norm. Sums of float32 numbers of the size of the standard deviation, rounded a few times on their way, are
# good to 1e-7. With a pivot that is sqrt(15) standard deviations off, 15 of the 16 variances that they give are
# subtracted, and their errors are left.
KINDS = [*((kind, 1e-6) for kind in ORDINARY), *((kind, 4e-6) for kind in AGAINST_THE_SAMPLE)]


def lattice(shape):
    """The positions in the sample, channels coming last."""
    numbers = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)  # exact up to 2^24
    return np.isin(numbers, np.asarray(sample(numbers, range(len(shape) - 1))))


def hard_data(kind, ratio, shape, seed=0):
    """Of standard deviation 1 in each channel, channels coming last; or with zeros where the sample is taken."""
    x = np.random.default_rng(seed).normal(size=shape)
    axes = tuple(range(len(shape) - 1))
    if kind == "zeros on the lattice":
        return np.where(lattice(shape), 0, x + ratio).astype(np.float32)
    if kind == "sorted":
        x = np.sort(x.reshape(-1, shape[-1]), axis=0).reshape(shape)
    elif kind == "outliers":
        x.reshape(-1, shape[-1])[5::500] *= 100
    elif kind == "the lattice apart":
        x = 1e-3 * x + lattice(shape)
    return ((x - x.mean(axes)) / x.std(axes) + ratio).astype(np.float32)
