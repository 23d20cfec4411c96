"""Batch normalization for JAX without its traps.

Layers that replace Flax's, statistics of the data before inference, and everything that tells whether they are right:

    layer = flaxbn.BatchNorm(use_running_average=not train)
    logits = flaxbn.apply(model, variables, batch, statistics="batch")
    stats = flaxbn.estimate_population_stats(model, variables, images, batch_size=256)

`flaxbn.domains` keeps statistics for each of several datasets, `flaxbn.diagnostics` tells which trap a model is in,
`flaxbn.nnx` has the layers for flax.nnx, and `flaxbn.torch` reads statistics from PyTorch. What is named here and in
these modules is public, and stays where it is; the rooms behind it may be rearranged.
"""

import importlib
from typing import TYPE_CHECKING, Any

from flaxbn.arithmetic.averages import Debiased as Debiased
from flaxbn.arithmetic.averages import cumulative as cumulative
from flaxbn.arithmetic.measure import measure as measure
from flaxbn.arithmetic.moments import Moments as Moments
from flaxbn.arithmetic.moments import merge as merge
from flaxbn.arithmetic.moments import merge_across as merge_across
from flaxbn.arithmetic.normalize import ema as ema
from flaxbn.arithmetic.normalize import normalize as normalize
from flaxbn.arithmetic.renorm import correction as correction
from flaxbn.arithmetic.renorm import paper_d_max as paper_d_max
from flaxbn.arithmetic.renorm import paper_r_max as paper_r_max
from flaxbn.layers.linen import BatchNorm as BatchNorm
from flaxbn.layers.linen import BatchRenorm as BatchRenorm

if TYPE_CHECKING:
    from flaxbn import diagnostics as diagnostics
    from flaxbn import domains as domains
    from flaxbn import linen as linen
    from flaxbn import nnx as nnx
    from flaxbn import torch as torch
    from flaxbn.data.placement import data_sharding as data_sharding
    from flaxbn.data.progress import progress_bar as progress_bar
    from flaxbn.domains import weight_decay_mask as weight_decay_mask
    from flaxbn.estimation.exact.plan import Plan as Plan
    from flaxbn.estimation.exact.plan import plan as plan
    from flaxbn.estimation.population import blend as blend
    from flaxbn.estimation.population import estimate_population_stats as estimate_population_stats
    from flaxbn.estimation.population import to_batch_stats as to_batch_stats
    from flaxbn.estimation.population_moments import population_moments as population_moments
    from flaxbn.estimation.replicas import merge_replicas as merge_replicas
    from flaxbn.inference.export import export_inference as export_inference
    from flaxbn.inference.load import Inference as Inference
    from flaxbn.inference.load import load_inference as load_inference
    from flaxbn.models.apply import apply as apply
    from flaxbn.models.independence import BatchDependenceError as BatchDependenceError
    from flaxbn.models.independence import assert_batch_independent as assert_batch_independent
    from flaxbn.models.mark import mark as mark
    from flaxbn.models.recognized import recognize as recognize
    from flaxbn.models.steps import set_steps as set_steps
    from flaxbn.models.user_functions import CallError as CallError

__version__ = "1.0.0"

# What a training does not need is loaded when it is asked for: the layers add 15 ms to importing Flax, all of it 60.
_MODULES = ("diagnostics", "domains", "linen", "nnx", "torch")
_ROOMS = {
    "data_sharding": "data.placement",
    "progress_bar": "data.progress",
    "weight_decay_mask": "domains",
    "Plan": "estimation.exact.plan",
    "plan": "estimation.exact.plan",
    "blend": "estimation.population",
    "estimate_population_stats": "estimation.population",
    "to_batch_stats": "estimation.population",
    "population_moments": "estimation.population_moments",
    "merge_replicas": "estimation.replicas",
    "export_inference": "inference.export",
    "Inference": "inference.load",
    "load_inference": "inference.load",
    "apply": "models.apply",
    "BatchDependenceError": "models.independence",
    "assert_batch_independent": "models.independence",
    "mark": "models.mark",
    "recognize": "models.recognized",
    "CallError": "models.user_functions",
    "set_steps": "models.steps",
}


def _publish(name: str, value: Any) -> Any:
    """Makes a value print and be pickled as `flaxbn.<name>`, whatever room it is in.

    The price: `inspect.getsource` looks for classes here.
    """
    value.__module__ = "flaxbn"
    globals()[name] = value
    return value


_PUBLIC = [name for name, value in globals().items() if getattr(value, "__module__", "").startswith("flaxbn.")]
for _name in _PUBLIC:
    _publish(_name, globals()[_name])
del _name


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"flaxbn.{name}")
    if name in _ROOMS:
        return _publish(name, getattr(importlib.import_module(f"flaxbn.{_ROOMS[name]}"), name))
    more = ", ".join(f"`flaxbn.{module}`" for module in _MODULES)
    raise AttributeError(f"module 'flaxbn' has no attribute {name!r}; what is not here may be in {more}.")


def __dir__() -> list[str]:
    return sorted([*_PUBLIC, *_ROOMS, *_MODULES, "__version__"])
