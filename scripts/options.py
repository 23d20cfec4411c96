"""The options that scripts share: where a run is kept, how it trains, and which processes take part in it."""

import dataclasses
import json
import pathlib
from typing import Any, Literal, Self

import optax
import results
from rich.console import Console

AUTO = "auto"
UNRECORDED = ("out", "resume", "overwrite", "coordinator", "num_processes", "process_id")


@dataclasses.dataclass(frozen=True)
class Run:
    """The options of every run that is kept in a folder."""

    out: pathlib.Path = pathlib.Path("runs/digits")
    """The folder of the results."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint; begin one where there is none."""
    overwrite: bool = False
    """Replace the run in --out."""

    def __post_init__(self) -> None:
        """Refuses what could only fail later."""
        if self.resume and self.overwrite:
            raise ValueError("--resume continues a run and --overwrite replaces it: got both. Leave one out.")

    def check_at_least(self, name: str, least: int) -> None:
        """Refuses a smaller value of an option, or one that is no number."""
        if not (value := getattr(self, name)) >= least:
            raise ValueError(f"{results.flag(name)} must be at least {least}: got {value}.")

    def check_names(self, name: str, known: dict[str, Any]) -> None:
        """Refuses an option that names nothing, or something twice."""
        value = getattr(self, name)
        if not value or len(set(value)) < len(value):
            raise ValueError(
                f"{results.flag(name)} must name at least one {name.removesuffix('s')}, each once: got {value}. There "
                f"are {[*known]}."
            )

    def record(self) -> dict[str, Any]:
        """What decides the outcome, as JSON gives it back."""
        fields = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return {name: fields[name] for name in fields if name not in UNRECORDED}

    def begin(self, **content: Any) -> list[dict[str, Any]]:
        """Makes the folder of the run ready, and returns the metrics that are there already.

        `content` is recorded as options are: a run with another one is not resumed.
        """
        return results.begin(self.out, self.record() | content, resume=self.resume, overwrite=self.overwrite)

    def report(self, name: str = "summary.json", **content: Any) -> None:
        """Writes what came out of the run, with the options and the versions that it came from."""
        results.write_json(self.out / name, {"configuration": self.record(), "versions": results.versions(), **content})

    def tell_where(self, console: Console, *names: str) -> None:
        """Says where the results are, as the last line of a run."""
        console.print(f"Results are in {self.out}: {', '.join(names)}.", soft_wrap=True, highlight=False)


@dataclasses.dataclass(frozen=True)
class Training(Run):
    """The options of every training."""

    epochs: int = 20
    """Passes over the training set."""
    batch_size: int = 64
    """Examples in a step, over all devices of all processes; rounded up to a multiple of their number."""
    learning_rate: float = 3e-3
    """Of Adam."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate goes on: down to zero, or as it began."""
    seeds: int = 1
    """Repetitions with other initial weights and another order, 0 to N - 1; means and spreads are reported."""

    def __post_init__(self) -> None:
        """Refuses what could only fail later."""
        super().__post_init__()
        for name, least in (("epochs", 1), ("batch_size", 2), ("seeds", 1)):
            self.check_at_least(name, least)
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"--learning-rate must be positive and finite: got {self.learning_rate}.")

    def with_whole_batches(self, parts: int, multiple_of: str, console: Console) -> Self:
        """These options with a batch size that `parts` divides; where it is another one, the console says so."""
        batch_size = whole_batches(self.batch_size, parts)
        if batch_size != self.batch_size:
            console.print(f"batch size {self.batch_size} -> {batch_size}, a multiple of {multiple_of}")
        return dataclasses.replace(self, batch_size=batch_size)

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Adam with a learning rate that goes as `schedule` says over so many steps."""
        rate = self.learning_rate
        return optax.adam(optax.cosine_decay_schedule(rate, steps) if self.schedule == "cosine" else rate)


@dataclasses.dataclass(frozen=True)
class Distributed(Run):
    """The options of a run in which several processes can take part."""

    coordinator: str | None = None
    """Where the first of several processes listens, HOST:PORT; auto: jax asks the cluster (Slurm, a TPU pod, MPI) for
    this and the next two. All processes see --out."""
    num_processes: int | None = None
    """How many processes take part, each with its own devices."""
    process_id: int | None = None
    """Which of them this is, from 0."""

    def __post_init__(self) -> None:
        """Refuses what could only fail later."""
        super().__post_init__()
        given = self.coordinator, self.num_processes, self.process_id
        if given in ((None, None, None), (AUTO, None, None)):
            return
        if None in given or self.coordinator == AUTO:
            raise ValueError(
                "--coordinator HOST:PORT, --num-processes and --process-id go together: got {}, {} and {}. Give all "
                "three, none, or only --coordinator auto.".format(*given)
            )
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"--process-id must be at least 0 and below --num-processes: got {self.process_id} of "
                f"{self.num_processes}."
            )


def whole_batches(batch_size: int, parts: int) -> int:
    """`batch_size`, rounded up to a multiple of `parts`."""
    return -(-batch_size // parts) * parts
