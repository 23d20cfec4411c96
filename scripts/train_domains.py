"""Trains one CNN on two data sets with the same classes, and compares ways to keep their statistics apart.

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
running average, which training does not read.

The weighting experiment estimates the statistics of the first domain, for `turn-shared`, from a sample in which some
classes are rare, with and without weights of inverse sampling probability, and compares them with those of all data.

    python scripts/train_domains.py
    python scripts/train_domains.py --datasets mnist usps --data-dir DIR --epochs 5
    python scripts/train_domains.py --datasets mnist mnist-blended --data-dir DIR --epochs 2
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import data
import domain_data
import domain_results
import jax
import numpy as np
import options
import orbax.checkpoint as ocp
import processes
import results
import training
import tyro
import weighting
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import Progress
from training import CNN, accuracy, evaluate, evaluation_batches, train_step, training_batches

import flaxbn

WEIGHTED = "turn-shared"


class Variant(NamedTuple):
    mixed: bool
    separate: bool
    domain_affine: bool = False

    @property
    def training(self) -> Literal["shared", "domain"]:
        """What a batch is normalized by: a batch of one domain leaves no choice."""
        return "shared" if self.mixed and not self.separate else "domain"

    def consistent(self, test: Literal["running", "shared", "domain"]) -> bool:
        """Whether the test normalizes as training does."""
        kept = "domain" if self.separate else "shared"
        return self.training == (kept if test == "running" else test)


VARIANTS = {
    "mixed-shared": Variant(mixed=True, separate=False),
    "mixed-domain": Variant(mixed=True, separate=True),
    "mixed-domain-affine": Variant(mixed=True, separate=True, domain_affine=True),
    "turn-shared": Variant(mixed=False, separate=False),
    "turn-domain": Variant(mixed=False, separate=True),
    "turn-domain-affine": Variant(mixed=False, separate=True, domain_affine=True),
}
Name = Literal[
    "mixed-shared", "mixed-domain", "mixed-domain-affine", "turn-shared", "turn-domain", "turn-domain-affine"
]


@dataclasses.dataclass(frozen=True)
class Config(options.Distributed, training.Config):
    """Compares shared and per-domain statistics, in training and at the test, on two data sets of the same classes."""

    epochs: int = 15
    seeds: int = 3
    out: pathlib.Path = pathlib.Path("runs/domains")
    datasets: tuple[str, str] = ("digits", "digits-blended")
    """The two domains: digits (embedded), tfds:NAME, or the name of a folder of IDX files in --data-dir, mnist say;
    with -blended, blended into patches of photographs. An epoch goes once through the smaller one."""
    data_dir: pathlib.Path | None = None
    """Where the folders of IDX files are, or the data directory of TFDS."""
    variants: tuple[Name, ...] = tuple(VARIANTS)
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


def domain_batches(
    sizes: Sequence[int], batch_size: int, *, mixed: bool, seed: int, epoch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The batches of an epoch: indices into the domains laid end to end, and their domains, one number if it is one.

    Every domain gives as many examples as the smallest one has.
    """
    part = batch_size // len(sizes) if mixed else batch_size
    steps = min(sizes) // batch_size * (batch_size // part)
    begins = np.cumsum([0, *sizes])
    orders = [
        begins[domain] + training_batches(size, part, seed=seed, epoch=epoch, domain=domain)[:steps]
        for domain, size in enumerate(sizes)
    ]
    numbers = np.arange(len(sizes), dtype=np.int32)
    for parts in zip(*orders):
        if mixed:
            yield np.concatenate(parts), np.repeat(numbers, part)
        else:
            yield from zip(parts, numbers)


def for_each(batch_stats: Any, names: Sequence[str]) -> Any:
    """The statistics of a plain model as those of a model with domains, the same for each."""
    return flaxbn.domains.stack(flaxbn.domains.replicate(batch_stats, names), names)


def for_domains(variables: dict[str, Any], variant: Variant, names: Sequence[str]) -> dict[str, Any]:
    """The variables of a variant for the model with domains."""
    return variables if variant.separate else {**variables, "batch_stats": for_each(variables["batch_stats"], names)}


def accuracies(variables: dict[str, Any], domains: dict[str, tuple], *, model: CNN) -> dict[str, float]:
    """The accuracy on each domain: its split and the batches of that."""
    return {
        name: accuracy(variables, split, batches, number, model=model)
        for number, (name, (split, batches)) in enumerate(domains.items())
    }


def configure() -> Config:
    return tyro.cli(Config, description=__doc__)


def main(config: Config, console: Console) -> None:
    console.print(config)
    names = config.datasets
    batch_size = training.whole_batches(config.batch_size, math.lcm(jax.device_count(), len(names)))
    if batch_size != config.batch_size:
        console.print(f"batch size {config.batch_size} -> {batch_size}, a multiple of the devices and the domains")
        config = dataclasses.replace(config, batch_size=batch_size)
    by_example = processes.by_example()
    replicated = NamedSharding(by_example.mesh, PartitionSpec())

    loaded = processes.on_each(lambda: domain_data.load(names, config.data_dir))
    sizes = [len(dataset.train.labels) for dataset in loaded.values()]
    if batch_size > min(sizes):
        raise ValueError(f"--batch-size must be at most {min(sizes)}, the smaller training set: got {batch_size}.")
    lines = processes.begin(config)
    joined = data.Split(*map(np.concatenate, zip(*(dataset.train for dataset in loaded.values()))))
    train = processes.place(joined, replicated)
    validation, test = (
        {
            name: (
                processes.place(split, replicated),
                processes.place(evaluation_batches(len(split.labels), batch_size), by_example),
            )
            for name, split in zip(names, splits)
        }
        for splits in zip(*(dataset[1:] for dataset in loaded.values()))
    )
    own = processes.own_rows(len(names) * min(sizes))
    population = {
        "images": np.concatenate([dataset.train.images[: min(sizes)] for dataset in loaded.values()])[own],
        "domain": np.repeat(np.arange(len(names), dtype=np.int32), min(sizes))[own],
    }
    estimate = functools.partial(
        flaxbn.estimate_population_stats,
        call=evaluate,
        batch_size=batch_size // jax.process_count(),
        sharding=flaxbn.data_sharding(),
    )

    num_steps = min(sizes) // batch_size * len(names)
    optimizer = config.optimizer(config.epochs * num_steps)
    num_classes = loaded[names[0]].num_classes
    plain = CNN(num_classes, flaxbn.BatchNorm)
    with_domains = {
        affine: CNN(num_classes, functools.partial(flaxbn.BatchNorm, num_domains=len(names), domain_affine=affine))
        for affine in (False, True)
    }
    tests, weightings = [], []
    with Progress(console=console, disable=not console.is_terminal) as progress:
        runs = list(itertools.product(config.variants, range(config.seeds)))
        task = progress.add_task("", total=len(runs) * config.epochs * num_steps)
        for name, seed in runs:
            variant = VARIANTS[name]
            tested = with_domains[variant.domain_affine]
            model = tested if variant.separate else plain
            state = training.initial_state(
                jax.random.key(seed),
                train.images[:2],
                0 if variant.separate else None,
                model=model,
                optimizer=optimizer,
            )
            state = jax.device_put(state, replicated)
            folder = (config.out / "checkpoints" / name / f"seed{seed}").absolute()
            with training.checkpoint_manager(folder / "state") as checkpoints:
                state, done = training.restore(checkpoints, state)
                lines = results.until(lines, done, variant=name, seed=seed)
                progress.update(task, advance=done * num_steps)

                for epoch in range(done + 1, config.epochs + 1):
                    progress.update(task, description=f"{name}, seed {seed}, epoch {epoch}/{config.epochs}")
                    start, correct = time.perf_counter(), []
                    for batch, domain in domain_batches(sizes, batch_size, mixed=variant.mixed, seed=seed, epoch=epoch):
                        index = processes.place(batch, by_example)
                        domain = processes.place(domain, by_example if variant.mixed else replicated)
                        state, right = train_step(
                            state,
                            train,
                            index,
                            domain if variant.separate else None,
                            model=model,
                            optimizer=optimizer,
                            update=True,
                        )
                        correct.append(right)
                        progress.advance(task)
                    variables = for_domains(state.variables, variant, names)
                    line = {
                        "variant": name,
                        "seed": seed,
                        "epoch": epoch,
                        "train_accuracy": int(np.sum(jax.device_get(correct))) / (num_steps * batch_size),
                        "validation_accuracy": accuracies(variables, validation, model=tested),
                        "seconds": time.perf_counter() - start,
                    }
                    lines.append(line)
                    if processes.is_first():
                        results.write_lines(config.out / "metrics.jsonl", lines)
                    checkpoints.save(epoch, args=ocp.args.StandardSave(state))
                    console.print(
                        f"{name:19} seed {seed} epoch {epoch:3} train {line['train_accuracy']:.4f} validation "
                        + " ".join(f"{a:.4f}" for a in line["validation_accuracy"].values())
                        + f" {line['seconds']:6.1f} s"
                    )

            start, trained = time.perf_counter(), jax.device_get(state.variables)
            running = for_domains(trained, variant, names)
            statistics = {"running": running["batch_stats"]}
            if not variant.domain_affine:
                template = flaxbn.domains.select(
                    running, flaxbn.domains.unstack(running["batch_stats"], names), names[0]
                )
                together = estimate(plain, template, {"images": population["images"]})
                statistics["shared"] = for_each(together, names)
            statistics["domain"] = estimate(tested, running, population)
            first, second = flaxbn.domains.unstack(statistics["domain"], names).values()
            statistics = processes.place(statistics, replicated)
            tests.append(
                {
                    "variant": name,
                    "test_accuracy": {
                        kind: accuracies(flaxbn.domains.select(running, statistics, kind), test, model=tested)
                        for kind in statistics
                    },
                    "consistent": {kind: variant.consistent(kind) for kind in statistics},
                    "layers": domain_results.distances(second, first),
                    "seconds": time.perf_counter() - start,
                }
            )
            training.save_model(folder / "model", {"params": state.params, "batch_stats": statistics})
            if name == WEIGHTED:
                estimates = weighting.estimates(
                    plain,
                    trained,
                    loaded[names[0]].train,
                    imbalance=config.imbalance,
                    num_samples=config.weighting_samples,
                    seed=seed,
                )
                weightings.append(
                    {
                        kind: {
                            "test_accuracy": accuracy(
                                flaxbn.domains.select(trained, estimates, kind), *test[names[0]], model=plain
                            ),
                            "layers": domain_results.distances(estimates[kind], estimates["balanced"]),
                        }
                        for kind in estimates
                    }
                )

    if not processes.is_first():
        return
    summary = domain_results.summarize(lines, tests)
    top = {"configuration": config.record(), "versions": results.versions(), "variants": summary}
    if weightings:
        top["weighting"] = domain_results.mean_and_spread(weightings)
    results.write_json(config.out / "summary.json", top)
    domain_results.write_figure(config.out / "accuracy.png", summary, names)
    console.print(domain_results.table(summary, names))
    console.print(domain_results.distance_table(summary, names))
    if weightings:
        console.print(domain_results.weighting_table(top["weighting"], names[0]))


if __name__ == "__main__":
    processes.start(main, configure())
