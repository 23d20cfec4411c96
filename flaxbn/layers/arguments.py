"""What a layer is made and called with, checked.

Options and the mode of a call, feature axes, masks and domain numbers mean the same whoever owns the variables.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Int

from flaxbn.arithmetic.renorm import Schedule


class Options(NamedTuple):
    """The fields of a layer that decide its arithmetic; they are described at `BatchNorm` and `BatchRenorm`.

    Attributes:
        label: what the layer is called in messages.
        r_max, d_max: the bounds of batch renormalization; None for plain batch normalization.
    """

    label: str
    axis: Any
    momentum: float | Schedule
    epsilon: float
    dtype: Any
    axis_name: Any
    axis_index_groups: Any
    use_fast_variance: bool
    force_float32_reductions: bool
    num_domains: int | None
    domain_affine: bool
    virtual_batch_size: int | None
    activation: Callable[[Array], Array] | None
    r_max: float | Schedule | None = None
    d_max: float | Schedule | None = None

    @property
    def counts_updates(self) -> bool:
        """Whether the layer stores the number of its updates, of which schedules are functions."""
        return self.r_max is not None or callable(self.momentum)

    def group_size(self, mode: "Mode") -> int | None:
        """How many examples normalize together in a call, where it is not all of them."""
        return self.virtual_batch_size if mode.normalizes_by_batch else None

    @property
    def accepts_single_value(self) -> bool:
        """Whether one value per channel has an output that depends on it.

        Its own statistics make it 0. With renormalization `d` takes it to what the running average makes of it, if
        `d` may be anything but 0 from the first update on.
        """
        return self.d_max is not None and not callable(self.d_max) and self.d_max > 0


class Mode(NamedTuple):
    """What a call is to do.

    Attributes:
        use_running_average: normalize by the running average, and not by the batch.
        update: update the running average with this batch.
        initializing: variables are being created: nothing is updated, and no mapped axis is asked for.
    """

    use_running_average: bool
    update: bool
    initializing: bool

    @property
    def normalizes_by_batch(self) -> bool:
        """Whether this is training: the output depends on the statistics of the batch, and is differentiated."""
        return not (self.use_running_average or self.initializing)

    @property
    def measures(self) -> bool:
        """Whether the statistics of the batch are needed."""
        return self.update or not self.use_running_average


def options_of(layer: Any, label: str) -> Options:
    """The options of a shell, whose fields have the same names; one without bounds does not renormalize."""
    return Options(label, **{name: getattr(layer, name) for name in Options._fields[1:] if hasattr(layer, name)})


_NUMBERS = int | float | np.number | np.bool_


def check_averaging(use_running_average: Any, momentum: Any, epsilon: Any) -> None:
    """The fields that decide what is averaged and divided by, where they are plain numbers: arrays pass.

    PyTorch and `flax.nnx` take the number of features first, and torch's momentum is one minus Flax's: as
    `use_running_average`, a number of features would be true for good.
    """
    if isinstance(use_running_average, _NUMBERS) and use_running_average not in (0, 1):
        raise ValueError(
            f"`use_running_average` must be True, False or None: got {use_running_average!r}. The number of features "
            "is no argument here, since it is that of the input."
        )
    if isinstance(momentum, _NUMBERS) and not 0 <= momentum <= 1:
        raise ValueError(
            f"`momentum` must lie in [0, 1]: got {momentum}. It is the weight of the old value: 0.9 where PyTorch has "
            "0.1."
        )
    if momentum is None or isinstance(momentum, str | type):
        raise TypeError(
            f"`momentum` must be a number in [0, 1], or a function of the number of updates: got {momentum!r}. What is "
            "None in PyTorch is `flaxbn.cumulative`; `flaxbn.Debiased` is given a number first."
        )
    if isinstance(epsilon, _NUMBERS) and not epsilon >= 0:
        raise ValueError(f"`epsilon` must not be negative: got {epsilon}.")


def check_activation(activation: Any) -> None:
    """The activation is a function; other libraries take names."""
    if activation is not None and not callable(activation):
        raise TypeError(
            f"`activation` must be a function of the output, such as `flax.linen.relu`: got {activation!r}."
        )


def check_domains(num_domains: Any, domain_affine: bool) -> None:
    """The fields of a layer with domains; without any, there is nothing to keep parameters for."""
    if num_domains is not None and (not isinstance(num_domains, int) or num_domains is True or num_domains < 1):
        raise ValueError(f"`num_domains` must be a positive integer: got {num_domains!r}.")
    if domain_affine and num_domains is None:
        raise ValueError("`domain_affine` needs `num_domains`: got none.")


def check_virtual_batch_size(virtual_batch_size: Any) -> None:
    """The size of ghost batches."""
    if virtual_batch_size is None:
        return
    if isinstance(virtual_batch_size, bool) or not hasattr(virtual_batch_size, "__index__") or virtual_batch_size < 1:
        raise ValueError(
            "`virtual_batch_size` must be a positive integer, the number of examples that normalize together, or None "
            f"for the whole batch: got {virtual_batch_size!r}."
        )


def check_bounds(r_max: Any, d_max: Any) -> None:
    """The bounds of renormalization, where they are numbers: what a schedule returns is not known before training."""
    for name, bound, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
        if isinstance(bound, _NUMBERS) and not bound >= least:
            raise ValueError(f"`{name}` must be at least {least}, or a schedule: got {bound}.")


def checked_features(num_features: Any) -> int | tuple[int, ...]:
    """The numbers of features, which must be positive integers."""
    numbers = tuple(num_features) if isinstance(num_features, Sequence) else (num_features,)
    if not numbers or any(isinstance(n, bool) or not hasattr(n, "__index__") or n < 1 for n in numbers):
        raise ValueError(
            f"`num_features` must be a positive integer, or one for each feature axis: got {num_features!r}."
        )
    numbers = tuple(int(n) for n in numbers)
    return numbers if isinstance(num_features, Sequence) else numbers[0]


def feature_axes(ndim: int, axis: int | Sequence[int]) -> tuple[int, ...]:
    """The feature axes of an input of rank `ndim`, not negative and in ascending order.

    Those are the axes of the channels, in the order in which statistics and parameters have them.

    Raises:
        ValueError: if an axis lies outside the rank, or two are the same.
    """
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -ndim <= a < ndim for a in axes):
        raise ValueError(f"`axis` must lie within the rank of the input: got axis {axis} for an input of rank {ndim}.")
    found = tuple(sorted({a % ndim for a in axes}))
    if len(found) != len(axes):
        raise ValueError(f"`axis` must name each axis once: got axis {axis} for an input of rank {ndim}.")
    return found


def position_weights(mask: ArrayLike, shape: tuple[int, ...], features: tuple[int, ...]) -> Array:
    """The weights in `mask`, of the rank of the input.

    Only two shapes are allowed: a mask (B,) that broadcast against an input (B, C) with B = C would mask channels, and
    nobody would be told.

    Args:
        mask: bool or float, of the rank of the input, each axis equal to that of it or 1; or, with one feature axis,
            of exactly its shape without that axis.
        shape: that of the input.
        features: its feature axes.

    Raises:
        ValueError: if the mask has another shape.
    """
    mask = jnp.asarray(mask)
    without_features = tuple(n for axis, n in enumerate(shape) if axis not in features)
    if len(features) == 1 and mask.shape == without_features:
        return jnp.expand_dims(mask, features)
    if mask.ndim == len(shape) and all(m in (1, n) for m, n in zip(mask.shape, shape)):
        return mask
    short = f" or exactly the shape {without_features}" if len(features) == 1 else ""
    ones = ", None" * (len(shape) - 1)
    raise ValueError(
        f"`mask` must have rank {len(shape)} (each axis equal to that of x or 1){short}: got a mask of shape "
        f"{mask.shape} for x of shape {shape}. To mask whole examples, pass `mask[:{ones}]`."
    )


def domain_of(
    domain: Any, num_domains: int | None, shape: tuple[int, ...], features: tuple[int, ...]
) -> Int[Array, "..."] | None:
    """The domain numbers of a call, a scalar or one for each example; what is out of range is `num_domains`.

    Args:
        domain: what the layer is called with: None, an int, or integers of shape () or (batch,).
        num_domains: that of the layer, None for one without domains.
        shape: that of the input.
        features: its feature axes.

    Returns:
        int32, or None for a layer without domains.

    Raises:
        ValueError: if a domain is missing, does not belong, has another shape or, as a Python or numpy number, is out
            of range. A traced number cannot be looked at: out of range it gives NaN.
        TypeError: if it is not of integers.
    """
    if num_domains is None:
        if domain is not None:
            raise ValueError("`domain` belongs to a layer with `num_domains`: got one without. Give it their number.")
        return None
    if domain is None:
        raise ValueError(f"`domain` must be given to a layer with `num_domains={num_domains}`: got none.")
    if isinstance(domain, int | np.integer | np.ndarray | list | tuple | str):
        _check_in_range(np.asarray(domain), num_domains)
    numbers = jnp.asarray(domain)
    if not jnp.issubdtype(numbers.dtype, jnp.integer):
        raise TypeError(f"`domain` must be of integers: got {numbers.dtype}.")
    if numbers.shape not in ((), shape[:1]) or (numbers.ndim and 0 in features):
        raise ValueError(
            f"`domain` must be a scalar, or have one number for each example along the leading axis of x, which is no "
            f"feature axis: got shape {numbers.shape} for x of shape {shape} with feature axes {features}."
        )
    return domain_numbers(numbers, num_domains)


def _check_in_range(domain: np.ndarray, num_domains: int) -> None:
    if not np.issubdtype(domain.dtype, np.integer):
        numbers = "numpy.array([number[n] for n in domain])" if domain.ndim else "number[domain]"
        raise TypeError(
            f"`domain` must be of integers: got {domain.dtype}. Number names by one list for training and evaluation, "
            f"`number = {{name: i for i, name in enumerate(names)}}`, and pass `{numbers}`."
            if domain.dtype.kind in "OSU"
            else f"`domain` must be of integers: got {domain.dtype}."
        )
    if not np.all((domain >= 0) & (domain < num_domains)):
        raise ValueError(
            f"`domain` must lie in [0, {num_domains}): got numbers from {np.min(domain)} to {np.max(domain)}."
            if domain.ndim
            else f"`domain` must lie in [0, {num_domains}): got {domain}."
        )


def domain_numbers(domain: Array, num_domains: int) -> Array:
    """Domain numbers with what is out of range moved to `num_domains`, where reading gives NaN and writing nothing.

    They are compared before they are made int32, in which 2**32 would be 0.
    """
    return jnp.where((domain >= 0) & (domain < num_domains), domain, num_domains).astype(jnp.int32)
