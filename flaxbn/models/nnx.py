"""An nnx model as what the rest of the library takes: a model that has `apply`, and variables in collections.

`nnx.split` makes of a model a graph definition, which is static, and a state. `NnxModel` holds the former and runs like
a Linen module; the state is cut into the collections `batch_stats`, `rngs` and `state`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import errors, nnx

from flaxbn.models.nnx_calls import looked_at
from flaxbn.models.nnx_layers import path_of, put_place


@dataclass(frozen=True)
class NnxModel:
    """The static half of an nnx model, with the part of `flax.linen.Module` that runs it.

    Attributes:
        graphdef: the graph definition.
        evaluates: whether it runs as after `model.eval()`, or in the mode in which it was split.
    """

    graphdef: Any
    evaluates: bool

    @property
    def cls(self) -> type:
        """The class of the model."""
        return _root(self.graphdef)

    def apply(
        self,
        variables: Mapping[str, Any],
        batch: Any,
        *,
        method: Callable[[Any, Any], Any],
        rngs: Mapping[str, Any] | None = None,
        mutable: Any = None,
    ) -> tuple[Any, dict[str, Any]]:
        """What `method(model, batch)` returns for a copy of the model, which it may change; and the copy's statistics.

        Args:
            variables: the collections that `open_nnx` returns.
            batch: what `method` takes.
            method: `(module, batch) -> output`.
            rngs: other random keys than those in `variables`, in the same form.
            mutable: not needed, since the model itself never changes.

        Raises:
            ValueError: if the state lacks variables of the model, or `method` changes another model.
        """
        del mutable
        keys = rngs or variables
        model = self._merged(variables["batch_stats"], variables["state"], keys["rngs"])
        try:
            return method(model, batch), {"batch_stats": nnx.state(model, nnx.BatchStat)}
        except errors.TraceContextError as error:
            raise ValueError(
                "`call` must change nothing but the model that it is given, which is a copy: it changes a variable of "
                "another one, such as the model that was split. Use the first argument: `call=lambda m, b: m(b)`."
            ) from error

    def check_dropout(self, variables: Mapping[str, Any], name: str) -> None:
        """A collection of random keys that no dropout layer of this model draws from is an error."""
        model = self._merged(*(variables[name] for name in ("batch_stats", "state", "rngs")))
        found = {m.rng_collection for _, m in nnx.iter_modules(model) if isinstance(m, nnx.Dropout)} | {"dropout"}
        if name not in found:
            raise ValueError(
                f"`rngs` of an nnx model must name the collections of its dropout layers, {sorted(found)}: got "
                f"'{name}'. Its other random keys it holds itself: `nnx.reseed(model, ...)` gives it others."
            )

    def parameters(self, variables: Mapping[str, Any]) -> Any:
        """Of the variables those that are trained."""
        return nnx.split_state(variables["state"], nnx.Param, ...)[0]

    def renormalizing(self, variables: Mapping[str, Any]) -> dict[tuple[str, ...], tuple[Any, Any]]:
        """The layers that renormalize, by their paths, with the bounds `r_max` and `d_max` that they have for it."""
        model = self._merged(*(variables[name] for name in ("batch_stats", "state", "rngs")))
        places = [(path_of(module), module) for _, module in nnx.iter_modules(model)]
        layers: dict[Any, Any] = {
            path: module for path, module in places if path is not None and hasattr(module, "r_max")
        }
        return {path: (module.r_max, module.d_max) for path, module in layers.items()}

    def _merged(self, *states: Any) -> Any:
        """A copy of the model, in evaluation mode if it is to be, whose layers know where they are."""
        try:
            model = nnx.merge(self.graphdef, *states, copy=True)
        except (KeyError, ValueError) as error:
            raise ValueError(
                "`variables` must be the whole state of the model, as `nnx.split(model)` returns it: pass "
                "`*nnx.split(model)`, without filters, or `nnx.merge_state` the parts."
            ) from error
        if self.evaluates:
            model.eval()
        layers = tuple(looked_at())
        for path, module in nnx.iter_modules(model):
            if isinstance(module, layers):
                put_place(module, path)
        return model


def open_nnx(graphdef: Any, state: Any, *, evaluates: bool) -> tuple[NnxModel, dict[str, Any]]:
    """What `nnx.split(model)` returned, as a model and its variables.

    Random keys are a collection of their own, so that each batch can be given others.

    Raises:
        TypeError: if it is not the split of a module.
    """
    root = _root(graphdef)
    if not issubclass(root, nnx.Module):
        raise TypeError(
            f"`model` must be split from an nnx.Module: got the parts of {_article(root)}. Split the model by itself: "
            "`*nnx.split(model)`; an optimizer is no part of it."
        )
    if not isinstance(state, nnx.State):
        raise TypeError(
            f"`variables` of an nnx model must be its nnx.State: got {type(state).__name__}. Pass `*nnx.split(model)` "
            "in the place of `model, variables`."
        )
    leaves = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    if any(isinstance(leaf, nnx.Variable) and (leaf.ref or leaf.hijax) for leaf in leaves):
        state = nnx.with_vars(state, ref=False, hijax=False)
    batch_stats, rngs, others = nnx.split_state(state, nnx.BatchStat, nnx.RngKey, ...)
    return NnxModel(graphdef, evaluates), {"batch_stats": batch_stats, "rngs": rngs, "state": others}


def _root(graphdef: Any) -> type:
    """The class of what was split."""
    kind = getattr(graphdef.nodes[0], "type", object) if graphdef.nodes else object
    return kind if isinstance(kind, type) else object


def _article(cls: type) -> str:
    return f"the class {cls.__name__}" if issubclass(cls, nnx.Pytree) else "a tree of several objects"
