"""Trainings that diverge: they end at once, are told and marked, and the others go on."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from journal import Journal

DIVERGED = 3
"""The exit status of a script of which a training diverged; the others went well and are reported."""


class DivergenceError(ArithmeticError):
    """A training whose loss or weights are not finite any more, and the `epoch` in which that was seen."""

    def __init__(self, name: str, seed: int, epoch: int) -> None:
        super().__init__(
            f"{name}, seed {seed}: diverged in epoch {epoch}, where the loss or the weights were no finite numbers any "
            "more. It is left out from here on. A smaller --learning-rate may help."
        )
        self.epoch = epoch


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every number of a tree is finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def trained(runs: Iterable[Any], train: Callable[[Any], Any], journal: Journal) -> Iterator[tuple[Any, Any]]:
    """Each `training.Repetition` with its state at the end, but for those that diverge.

    These are told, and noted in the journal.
    """
    for run in runs:
        journal.describe(f"{run.name}, seed {run.seed}, compiling")
        try:
            state = train(run)
        except DivergenceError as error:
            note(journal, error, **run.record)
        else:
            journal.describe(f"{run.name}, seed {run.seed}, test")
            yield run, state


def note(journal: Journal, error: DivergenceError, **record: Any) -> None:
    """Tells that a training diverged, and notes it in the journal."""
    journal.diverged.append({**record, "epoch": error.epoch})
    journal.console.print(f"{error}", markup=False, soft_wrap=True)
