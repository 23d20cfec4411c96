"""Trains one network on two data sets with the same classes, and compares ways to keep their statistics apart.

| variant             | a batch holds       | normalized in training | running average | scale and bias |
|---------------------|---------------------|------------------------|-----------------|----------------|
| mixed-shared        | half of each domain | together               | one             | shared         |
| mixed-domain        | half of each domain | each domain by itself  | one each        | shared         |
| mixed-domain-affine | half of each domain | each domain by itself  | one each        | one each       |
| turn-shared         | one domain, in turn | each domain by itself  | one             | shared         |
| turn-domain         | one domain, in turn | each domain by itself  | one each        | shared         |
| turn-domain-affine  | one domain, in turn | each domain by itself  | one each        | one each       |

Each is trained once for a seed and tested with three kinds of statistics: the running average that it kept
(`running`), the population of both domains together (`shared`; not where scale and bias are apart) and the population
of each (`domain`). A test is consistent if it normalizes as training did, together or each domain by itself; compare
table 5 of Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm". `turn-shared` and `turn-domain` differ only in the
running average, which training does not read. A training that diverges is told and marked, and the others go on; the
exit status is 3 then.

The weighting experiment estimates the statistics of the first domain, for `turn-shared`, from a sample in which some
classes are rare, with and without weights of inverse sampling probability, and compares them with those of all data.

    python scripts/train_domains.py
    python scripts/train_domains.py --datasets mnist usps --data-dir DIR --epochs 5
    python scripts/train_domains.py --datasets mnist mnist-blended --data-dir DIR --epochs 2
    python scripts/train_domains.py --datasets svhn mnist --data-dir DIR --network resnet20
"""

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import data
import divergence
import domain_data
import domain_results
import domain_statistics
import domain_variants
import flax.linen as nn
import jax
import networks
import numpy as np
import optax
import options
import processes
import training
import tyro
import weighting
from domain_data import domain_batches
from domain_variants import VARIANTS, Variant
from journal import Journal, keep_journal
from rich.console import Console
from training import accuracy, train_step

import flaxbn

WEIGHTED = "turn-shared"


@dataclasses.dataclass(frozen=True)
class Config(options.Distributed, options.Training):
    """Compares shared and per-domain statistics, in training and at the test, on two data sets of the same classes."""

    epochs: int = 15
    seeds: int = 3
    out: pathlib.Path = pathlib.Path("runs/domains")
    network: networks.Name = "cnn"
    """cnn: three convolutions. resnet20: nineteen, in blocks."""
    datasets: tuple[str, str] = ("digits", "digits-blended")
    """The two domains: digits (embedded), tfds:NAME, or the name of a folder of IDX files in --data-dir, mnist say;
    with -blended, blended into patches of photographs. An epoch goes once through the smaller one."""
    data_dir: pathlib.Path | None = None
    """Where the folders of IDX files are, or the data directory of TFDS."""
    variants: tuple[domain_variants.Name, ...] = tuple(VARIANTS)
    """The variants to train; the weighting experiment needs turn-shared."""
    weighting_samples: int = 10_000
    """Examples drawn, with replacement, for the weighting experiment."""
    imbalance: float = 20
    """How many times rarer the upper half of the classes is among them."""

    def __post_init__(self) -> None:
        """Refuses what could only fail later."""
        super().__post_init__()
        self.check_names("variants", VARIANTS)
        if len(set(self.datasets)) != 2:
            raise ValueError(f"--datasets must be two different ones: got {self.datasets}.")
        for name, least in (("weighting_samples", 2), ("imbalance", 1)):
            self.check_at_least(name, least)


def accuracies(variables: dict[str, Any], domains: dict[str, tuple], *, model: nn.Module) -> dict[str, float]:
    """The accuracy on each domain: its split and the batches of that."""
    return {
        name: accuracy(variables, split, batches, number, model=model)
        for number, (name, (split, batches)) in enumerate(domains.items())
    }


def configure() -> Config:
    """The command line."""
    return tyro.cli(Config, description=__doc__)


class Prepared(NamedTuple):
    """What all trainings of a run share."""

    domains: dict[str, data.Dataset]
    """The data sets by their names, as numpy arrays."""
    train: data.Split
    """The training sets end to end, on every device."""
    validation: dict[str, tuple[data.Split, Any]]
    """For each domain its validation set, on every device, and the batches of that."""
    test: dict[str, tuple[data.Split, Any]]
    """For each domain its test set, on every device, and the batches of that."""
    num_steps: int
    """The steps of an epoch."""
    optimizer: optax.GradientTransformation
    plain: nn.Module
    """The network that knows nothing of domains."""
    with_domains: dict[bool, nn.Module]
    """The network with statistics of each, by whether scale and bias are apart, too."""

    def trained(self, variant: Variant) -> nn.Module:
        """The network that is trained."""
        return self.with_domains[variant.domain_affine] if variant.separate else self.plain


def load(config: Config) -> dict[str, data.Dataset]:
    """The domains, on each process; refuses a batch size that they are too small for."""
    domains = processes.on_each(lambda: domain_data.load(config.datasets, config.data_dir))
    smallest = min(domain_data.sizes(domains))
    if config.batch_size > smallest:
        raise ValueError(f"--batch-size must be at most {smallest}, the smaller training set: got {config.batch_size}.")
    return domains


def prepare(config: Config, domains: dict[str, data.Dataset]) -> Prepared:
    """Brings the data to the devices, and makes the networks."""
    joined = data.Split(*map(np.concatenate, zip(*(dataset.train for dataset in domains.values()))))
    validation, test = (
        {name: training.to_evaluate(split, config.batch_size) for name, split in zip(domains, splits)}
        for splits in zip(*(dataset[1:] for dataset in domains.values()))
    )
    num_steps = min(domain_data.sizes(domains)) // config.batch_size * len(domains)
    network = functools.partial(networks.NETWORKS[config.network], domains[config.datasets[0]].num_classes)
    norm = functools.partial(flaxbn.BatchNorm, num_domains=len(domains))
    return Prepared(
        domains,
        processes.place(joined, processes.everywhere()),
        validation,
        test,
        num_steps,
        config.optimizer(config.epochs * num_steps),
        network(flaxbn.BatchNorm),
        {affine: network(functools.partial(norm, domain_affine=affine)) for affine in (False, True)},
    )


def train(config: Config, prepared: Prepared, run: training.Repetition, journal: Journal) -> training.State:
    """Trains one network as its variant says."""
    variant = VARIANTS[run.name]
    network = {"model": prepared.trained(variant), "optimizer": prepared.optimizer}
    domain = 0 if variant.separate else None
    state = training.initial_state(jax.random.key(run.seed), prepared.train.images[:2], domain, **network)

    def batches(epoch: int) -> Iterator[training.Batch]:
        sizes = domain_data.sizes(prepared.domains)
        cut = domain_batches(sizes, config.batch_size, mixed=variant.mixed, seed=run.seed, epoch=epoch)
        alike = processes.by_example() if variant.mixed else processes.everywhere()
        for index, numbers in cut:
            domain = processes.place(numbers, alike) if variant.separate else None
            yield training.Batch(processes.place(index, processes.by_example()), domain)

    def validate(variables: dict[str, Any]) -> dict[str, float]:
        variables = domain_statistics.for_domains(variables, config.datasets, separate=variant.separate)
        return accuracies(variables, prepared.validation, model=prepared.with_domains[variant.domain_affine])

    return training.fit(
        jax.device_put(state, processes.everywhere()),
        prepared.train,
        run,
        journal,
        epochs=config.epochs,
        num_steps=prepared.num_steps,
        batches=batches,
        step=functools.partial(train_step, **network, update=True),
        validate=validate,
    )


def test(config: Config, prepared: Prepared, run: training.Repetition, state: training.State) -> dict[str, Any]:
    """Tests a trained network with each kind of statistics, and saves it with all of them."""
    start, names, variant = time.perf_counter(), config.datasets, VARIANTS[run.name]
    model = prepared.with_domains[variant.domain_affine]
    running = domain_statistics.for_domains(jax.device_get(state.variables), names, separate=variant.separate)
    statistics = domain_statistics.of_tests(
        running,
        prepared.domains,
        model=model,
        plain=None if variant.domain_affine else prepared.plain,
        batch_size=config.batch_size,
    )
    first, second = flaxbn.domains.unstack(statistics["domain"], names).values()
    statistics = processes.place(statistics, processes.everywhere())
    outcome = {
        "variant": run.name,
        "test_accuracy": {
            kind: accuracies(flaxbn.domains.select(running, statistics, kind), prepared.test, model=model)
            for kind in statistics
        },
        "consistent": {kind: variant.consistent(kind) for kind in statistics},
        "layers": domain_results.distances(second, first),
        "seconds": time.perf_counter() - start,
    }
    training.save_model(run.folder / "model", {"params": state.params, "batch_stats": statistics})
    return outcome


def weigh(config: Config, prepared: Prepared, run: training.Repetition, state: training.State) -> dict[str, Any]:
    """The weighting experiment on a trained network."""
    name = config.datasets[0]
    return weighting.compare(
        prepared.plain,
        jax.device_get(state.variables),
        prepared.domains[name].train,
        prepared.test[name],
        imbalance=config.imbalance,
        num_samples=config.weighting_samples,
        seed=run.seed,
    )


def report(config: Config, journal: Journal, tests: list[Any], weightings: list[Any], console: Console) -> None:
    """Compares the variants: in the folder of the run, and on the terminal."""
    names, summary = config.datasets, domain_results.summarize(journal.lines, tests, journal.diverged)
    content = {"variants": summary}
    if weightings:
        content["weighting"] = domain_results.mean_and_spread(weightings)
    config.report(**content)
    domain_results.write_figure(config.out / "accuracy.png", summary, names)
    console.print(domain_results.table(summary, names))
    if domain_results.finished(summary):
        console.print(domain_results.distance_table(summary, names))
    if weightings:
        console.print(domain_results.weighting_table(content["weighting"], names[0]))
    config.tell_where(console, "accuracy.png", "summary.json", "metrics.jsonl", "checkpoints")


def main(config: Config, console: Console) -> int:
    """Trains, tests and compares the variants."""
    console.print(config)
    parts = math.lcm(jax.device_count(), len(config.datasets))
    config = config.with_whole_batches(parts, "the devices and the domains", console)
    domains = load(config)
    with processes.alone(config.out):
        lines = processes.begin(config)
        prepared = prepare(config, domains)
        runs, tests, weightings = training.repetitions(config, "variant", config.variants, VARIANTS), [], []
        total = len(runs) * config.epochs * prepared.num_steps
        with keep_journal(config.out, lines, console, total=total) as journal:
            for run, state in divergence.trained(runs, lambda run: train(config, prepared, run, journal), journal):
                tests.append(test(config, prepared, run, state))
                if run.name == WEIGHTED:
                    weightings.append(weigh(config, prepared, run, state))
        if processes.is_first():
            report(config, journal, tests, weightings, console)
    return divergence.DIVERGED if journal.diverged else 0


if __name__ == "__main__":
    processes.start(main, configure())
