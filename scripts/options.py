"""The options that scripts share: where a run is kept, and which processes take part in it."""

import dataclasses
import json
import pathlib
from typing import Any

import results

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
        if not (value := getattr(self, name)) >= least:
            raise ValueError(f"{results.flag(name)} must be at least {least}: got {value}.")

    def check_names(self, name: str, known: dict[str, Any]) -> None:
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
