"""The statistics that a network for several domains is tested with: what it kept, those of all, those of each."""

from collections.abc import Sequence
from typing import Any

import data
import domain_data
import flax.linen as nn
import jax
import numpy as np
import processes
from training import evaluate

import flaxbn


def for_each(batch_stats: Any, names: Sequence[str]) -> Any:
    """The statistics of a plain model as those of a model with domains, the same for each."""
    return flaxbn.domains.stack(flaxbn.domains.replicate(batch_stats, names), names)


def for_domains(variables: dict[str, Any], names: Sequence[str], *, separate: bool) -> dict[str, Any]:
    """The variables of a model for the one with domains; `separate` says that it is that one."""
    return variables if separate else {**variables, "batch_stats": for_each(variables["batch_stats"], names)}


def of_tests(
    variables: dict[str, Any],
    domains: dict[str, data.Dataset],
    *,
    model: nn.Module,
    plain: nn.Module | None,
    batch_size: int,
) -> dict[str, Any]:
    """The `batch_stats` of each test: the running average, the population of all domains, and that of each.

    Args:
        variables: of `model`, with its running average.
        domains: the data sets, of which each gives as many training examples as the smallest one has.
        model: the network with domains.
        plain: the one without, for the statistics of all together; None where that does not have the same parameters.
        batch_size: examples in a batch of all processes.
    """
    names, population = [*domains], own_population(domains)

    def estimate(model: nn.Module, variables: dict[str, Any], batches: dict[str, np.ndarray]) -> Any:
        return flaxbn.estimate_population_stats(
            model,
            variables,
            batches,
            call=evaluate,
            batch_size=batch_size // jax.process_count(),
            sharding=flaxbn.data_sharding(),
        )

    found = {"running": variables["batch_stats"]}
    if plain is not None:
        by_domain = flaxbn.domains.unstack(variables["batch_stats"], names)
        template = flaxbn.domains.select(variables, by_domain, names[0])
        found["shared"] = for_each(estimate(plain, template, {"images": population["images"]}), names)
    return {**found, "domain": estimate(model, variables, population)}


def own_population(domains: dict[str, data.Dataset]) -> dict[str, np.ndarray]:
    """The part of this process of the images of all domains, of each as many, and the number of their domain."""
    size = min(domain_data.sizes(domains))
    own = processes.own_rows(len(domains) * size)
    return {
        "images": np.concatenate([dataset.train.images[:size] for dataset in domains.values()])[own],
        "domain": np.repeat(np.arange(len(domains), dtype=np.int32), size)[own],
    }
