"""The moments of each batch by itself."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxbn import batches as data
from flaxbn.observe import Call
from flaxbn.precise import Pass
from flaxbn.request import request
from flaxbn.results import Result, as_tree, by_path, fetched
from flaxbn.setting import Compiled, shapes_of


def batch_moments(
    model: nn.Module,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    call: Call | None = None,
    only: Callable[[str], bool] | None = None,
) -> Iterator[Any]:
    """For each batch the tree that `population_moments` gives for it alone; layers that it does not reach have count 0.

    The model is traced once for batches of one shape.
    """
    options = {"sample_weight": None, "sharding": None, "normalization_batch": "global", "rngs": None}
    asked = request(model, variables, call=call, only=only, **options)  # type: ignore[arg-type]
    passes = Compiled(Pass, asked.setting)
    for step, batch in enumerate(batches):
        source = passes[shapes_of(asked.variables, data.abstract(batch), asked.rngs, present=None)]
        one = jax.tree.map(lambda a: jnp.asarray(a)[None], batch)
        found = Result(source.entries, [step], *source.scan(asked.variables, asked.rngs, one, None, None, step))
        yield as_tree(by_path(fetched([found]), asked.layers), asked.wanted, keep_unseen=True)
