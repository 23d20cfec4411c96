"""A `state_dict` of PyTorch: its batch-norm layers, and their entries as arrays; torch itself is not needed."""

from collections.abc import Mapping
from typing import Any

import numpy as np

StateDict = Mapping[str, Any]


def entries_of(prefix: str, state_dict: StateDict) -> dict[str, np.ndarray]:
    """The entries of one torch layer, by their own names."""
    begin = f"{prefix}." if prefix else ""
    found = {key.removeprefix(begin): as_array(state_dict[key]) for key in state_dict if key.startswith(begin)}
    found = {key: value for key, value in found.items() if "." not in key}
    if not {"running_mean", "running_var"} <= set(found):
        known = ", ".join(repr(p.removesuffix(".")) for p in prefixes_in(state_dict))
        raise ValueError(
            f"A torch layer must have `running_mean` and `running_var`: '{prefix}' has "
            f"{sorted(found) or 'no entries'}. (With `track_running_stats=False` it keeps none: estimate them here.) "
            f"There are {known}."
        )
    return found


def prefixes_in(state_dict: StateDict) -> list[str]:
    """Those of the torch layers that keep running statistics, in their order, with the dot behind."""
    found = [key.removesuffix("running_mean") for key in state_dict if key.endswith("running_mean")]
    if not found:
        raise ValueError(
            f"`state_dict` must hold the `running_mean` of a batch-norm layer: got {len(state_dict)} entries, "
            f"{', '.join(map(repr, [*state_dict][:3]))}{', ...' if len(state_dict) > 3 else ''}. "
            "A checkpoint often keeps it under a key of its own, "
            "`checkpoint['model']` or `checkpoint['state_dict']`."
        )
    return found


def as_array(value: Any) -> np.ndarray:
    """A tensor of torch, or anything like an array, in host memory; bfloat16, which numpy has not, as float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if "bfloat16" in str(value.dtype) else value
    return np.asarray(value)
