"""Statistics and affine parameters of batch-norm layers from a PyTorch `state_dict`; torch itself is not needed.

    names = flaxbn.torch.propose(model, variables, images[:1], state_dict)  # print it, and look at it
    variables = flaxbn.torch.load(variables, state_dict, names.confirm())

What is called what, and what differs:

| torch | Flax |
| --- | --- |
| `running_mean`, `running_var` | `mean`, `var` of `batch_stats` |
| `weight`, `bias` | `scale`, `bias` |
| `num_batches_tracked` | `steps`, where a layer counts them |
| `momentum=0.1`, the weight of the new value | `momentum=0.9`, the weight of the old value |
| `eps=1e-5` | `epsilon=1e-5` |
| channels first | channels last: statistics are per channel, so nothing is transposed |
| `running_var` averages variances that divide by n - 1 | variances divide by n |
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from flaxbn.data.batches import abstract
from flaxbn.data.state_dict import StateDict, as_array, entries_of, prefixes_in
from flaxbn.layers.names import layer_name, layer_path
from flaxbn.models.arguments import Model, open_model, random_keys, takes_model
from flaxbn.models.batch_stats import with_wide_statistics
from flaxbn.models.entries import read_layers
from flaxbn.models.layer_leaves import AFFINE, LayerLeaves
from flaxbn.models.linen import Call, trace
from flaxbn.models.places import Path

Prefix = str | Sequence[str] | None
Names = Mapping[str, Prefix] | Callable[[str], Prefix]
_STATISTICS = {"mean": "running_mean", "var": "running_var"}
_AFFINE = dict(zip(AFFINE, (("weight", 1.0), ("bias", 0.0))))


@dataclass(frozen=True)
class Proposal:
    """Which torch layer may belong to which layer here: a guess, by order and number of channels, to be looked at.

    `print` shows it, with how many torch layers of as many channels there are: where there is one, it must be that.

    Attributes:
        names: for each layer, by its path, the prefix in the `state_dict`, or None where none of its size was left.
        channels: the number of channels of each.
        alike: how many torch layers have as many.

    Examples:
        >>> import flax.linen as nn, flaxbn, jax, numpy as np
        >>> model = nn.Sequential([nn.BatchNorm(use_running_average=True)])
        >>> variables = model.init(jax.random.key(0), np.ones((2, 3)))
        >>> state_dict = {"bn1.running_mean": np.zeros(3), "bn1.running_var": np.ones(3)}
        >>> print(flaxbn.torch.propose(model, variables, np.ones((2, 3)), state_dict))
        layer     channels  torch
        layers_0         3  bn1    the only one of 3
    """

    names: dict[str, str | None]
    channels: dict[str, int]
    alike: dict[str, int]

    def confirm(self) -> dict[str, str]:
        """The names, for `load`, once you have looked at them.

        Raises:
            ValueError: if a layer has none.
        """
        without = [layer for layer, prefix in self.names.items() if prefix is None]
        if without:
            raise ValueError(
                f"Each layer needs a torch layer of as many channels: {', '.join(map(repr, without))} found none. "
                "Write the names by hand; None for a layer that is to stay as it is."
            )
        return {layer: prefix for layer, prefix in self.names.items() if prefix is not None}

    def __str__(self) -> str:
        """A line for each layer."""
        first, second = max(map(len, ("layer", *self.names))), max(len(str(name)) for name in self.names.values())
        lines = [f"{'layer':{first}}  channels  torch"]
        for layer, prefix in self.names.items():
            size, alike = self.channels[layer], self.alike[layer]
            which = f"the only one of {size}" if alike == 1 else f"one of {alike} of {size}"
            lines.append(f"{layer:{first}}  {size:8}  {prefix!s:{second}}  {which if alike else 'none left'}")
        return "\n".join(lines)


@takes_model
def propose(model: Model, variables: Any, batch: Any, state_dict: StateDict, *, call: Call | None = None) -> Proposal:
    """Which torch layer may belong to which layer: in the order in which they run, the next one of as many channels.

    Those of torch come as the `state_dict` has them, which is the order in which they were made, not always that in
    which they run: look at the result before `confirm()`.

    Args:
        model: the model; for one of flax.nnx, `*nnx.split(model)` stands in the place of `model, variables`.
        variables: its variables.
        batch: what it takes, by which it is traced; shapes are enough (`jax.ShapeDtypeStruct`).
        state_dict: of the torch model, or of a part of it: a mapping of tensors or arrays.
        call: how the model is run for evaluation, `(module, batch) -> output`; by default `module(batch)`.

    Raises:
        ValueError: if either has no batch-norm layer.

    Examples:
        >>> import flax.linen as nn, flaxbn, jax, numpy as np
        >>> model = nn.BatchNorm(use_running_average=True)
        >>> variables = model.init(jax.random.key(0), np.ones((2, 3)))
        >>> state_dict = {"bn.running_mean": np.zeros(3), "bn.running_var": np.ones(3)}
        >>> flaxbn.torch.propose(model, variables, np.ones((2, 3)), state_dict).names
        {'': 'bn'}
    """
    held = LayerLeaves(variables)
    there = {prefix: as_array(state_dict[f"{prefix}running_mean"]).shape[0] for prefix in prefixes_in(state_dict)}
    sizes = {layer: held.shape(layer)[-1] for layer in _in_order(model, variables, batch, call) if layer in held.layers}
    left = dict(there)
    names: dict[str, str | None] = {}
    for layer, size in sizes.items():
        prefix = next((prefix for prefix, other in left.items() if other == size), None)
        names[layer] = None
        if prefix is not None:
            del left[prefix]
            names[layer] = prefix.removesuffix(".")
    alike = {layer: [*there.values()].count(size) for layer, size in sizes.items()}
    return Proposal(names, sizes, alike)


def _in_order(model: Model, variables: Any, batch: Any, call: Call | None) -> list[str]:
    """The layers as they run."""
    model, variables = open_model(model, variables)
    variables = with_wide_statistics(variables)
    batch = jax.tree.map(abstract, batch)
    program = trace(model, variables, batch, call, random_keys(model, variables, None)).program
    others = len(jax.tree.leaves((batch, random_keys(model, variables, None))))
    reading = read_layers(program, variables, others)
    ran = (reading.layers.layer_of(entries) for entries in reading.entries if entries is not None)
    return [layer_path(path) for path in dict.fromkeys(ran)]


def load(
    variables: Any,
    state_dict: StateDict,
    names: Names,
    *,
    counts: int | Mapping[str, int] | None = None,
) -> Any:
    """Variables whose batch-norm layers hold the statistics and affine parameters of a torch model.

    In evaluation they then put out what torch puts out. Training goes on from them: `momentum` is here the weight of
    the old value, so torch's 0.1 is 0.9.

    torch normalizes a batch by the variance that divides by n, the number of values per channel, and averages in
    `running_var` the one that divides by n - 1. Evaluation is the same without doing anything about it. `counts` gives
    the variance that Flax would have averaged, `running_var (n - 1) / n`, which matters where n is small.

    Args:
        variables: of a Linen model, with `batch_stats` and maybe `params`; or the state of an nnx model. Read only.
        state_dict: of the torch model: a mapping of tensors or arrays. Of BatchNorm1d, 2d, 3d and SyncBatchNorm alike.
        names: for each layer, by its path ("block_1/BatchNorm_0"), the prefix of its entries in the `state_dict`
            ("layer1.0.bn1"); a mapping, or a function of the path. None leaves a layer as it is. Several prefixes are
            stacked along the leading axis, for layers inside `nn.scan` or with `num_domains`.
        counts: the number of values per channel in a batch of the torch training (batch x height x width), one for all
            layers or by path; None takes the variances as they are.

    Returns:
        Variables of the same structure, containers, dtypes and places; all else is as it was.

    Raises:
        ValueError: if a layer has no name, a name no entries, or shapes differ; a torch layer keeps no running
            statistics, or is named twice; an affine parameter would be lost; or a count is less than 2.

    Examples:
        >>> import flax.linen as nn, flaxbn, jax, numpy as np
        >>> model = nn.BatchNorm(use_running_average=True)
        >>> variables = model.init(jax.random.key(0), np.ones((2, 1)))
        >>> state_dict = {
        ...     "bn.weight": np.float32([2]),
        ...     "bn.bias": np.float32([1]),
        ...     "bn.running_mean": np.float32([3]),
        ...     "bn.running_var": np.float32([4]),
        ... }
        >>> variables = flaxbn.torch.load(variables, state_dict, {"": "bn"})
        >>> model.apply(variables, np.float32([[5]])).round(1).item()  # (5 - 3) / 2 * 2 + 1
        3.0
    """
    held = LayerLeaves(variables)
    wanted = _named(held, names)
    unknown = sorted(set(counts) - set(held.layers)) if isinstance(counts, Mapping) else []
    if unknown:
        raise ValueError(f"`counts` must be by the paths of layers, {sorted(held.layers)}: got {unknown} besides.")
    new: dict[Path, np.ndarray] = {}
    for layer, prefixes in wanted.items():
        for path, value in _of_layer(held, layer, prefixes, state_dict, _count_of(counts, layer)):
            shape = held.leaves[path].shape
            if value.shape != shape:
                raise ValueError(
                    f"{_called(layer)} and torch's '{', '.join(prefixes)}' must have as many "
                    f"channels: got {value.shape} for the {path[-1]} of shape {shape}. `flaxbn.torch.propose` lists "
                    "what fits; several prefixes for one layer are stacked along its leading axis."
                )
            new[path] = value
    return held.replaced(new)


def _named(held: LayerLeaves, names: Names) -> dict[str, list[str]]:
    """The prefixes of each layer that is to be loaded; each is for one layer only."""
    if isinstance(names, Proposal):
        raise TypeError("A proposal is a guess: print it, look at it, and give `names.confirm()`.")
    if isinstance(names, Mapping):
        lost = sorted(set(held.layers) ^ set(names))
        if lost:
            raise ValueError(
                f"`names` must name each layer, and no other: got {sorted(names)} for the layers "
                f"{sorted(held.layers)}. Name None for a layer that is to stay as it is."
            )
    found = {layer: names(layer) if callable(names) else names[layer] for layer in held.layers}
    listed = {layer: [p] if isinstance(p, str) else [*p] for layer, p in found.items() if p is not None}
    given = [prefix for prefixes in listed.values() for prefix in prefixes]
    twice = sorted({prefix for prefix in given if given.count(prefix) > 1})
    if twice:
        raise ValueError(f"Each torch layer belongs to one layer: {', '.join(map(repr, twice))} is named twice.")
    return listed


def _of_layer(
    held: LayerLeaves, layer: str, prefixes: Sequence[str], state_dict: StateDict, count: int | None
) -> Iterator[tuple[Path, np.ndarray]]:
    """What a layer gets: leaf by leaf, stacked where there are several prefixes."""
    own = [entries_of(prefix, state_dict) for prefix in prefixes]

    def stacked(values: Sequence[np.ndarray]) -> np.ndarray:
        return values[0] if len(held.shape(layer)) == 1 else np.stack(values).reshape(len(values), -1)

    for name, theirs in _STATISTICS.items():
        value = stacked([entries[theirs] for entries in own])
        yield held.path(layer, name), value * (count - 1) / count if count and name == "var" else value
    for name, (theirs, neutral) in _AFFINE.items():
        values = [entries.get(theirs, np.full_like(entries["running_mean"], neutral)) for entries in own]
        leaf = held.leaves.get(held.path(layer, name))
        is_shared = leaf is not None and np.ndim(leaf) < len(held.shape(layer))  # by domains
        if leaf is not None and not (is_shared and any(np.any(value != values[0]) for value in values)):
            yield held.path(layer, name), values[0] if is_shared else stacked(values)
        elif leaf is not None or any(np.any(value != neutral) for value in values):
            raise ValueError(
                f"Nothing may be lost: there is no place in {_called(layer)} for the {theirs} of torch's "
                f"{', '.join(map(repr, prefixes))}. Build it with `use_{name}=True`, and with `domain_affine=True` "
                "where domains differ in it."
            )
    steps = held.leaves.get(held.path(layer, "steps"))
    if steps is not None:
        tracked = [np.asarray(entries.get("num_batches_tracked", 0)) for entries in own]
        yield held.path(layer, "steps"), np.stack(tracked) if np.ndim(steps) else np.max(tracked)


def _count_of(counts: int | Mapping[str, int] | None, layer: str) -> int | None:
    count = counts.get(layer) if isinstance(counts, Mapping) else counts
    if count is not None and count < 2:
        raise ValueError(f"`counts` must be 2 or more, values per channel: got {count} for {_called(layer)}.")
    return count


def _called(layer: str) -> str:
    return f"'{layer_name([layer] if layer else [])}'"
