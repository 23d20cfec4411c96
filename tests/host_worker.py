"""One of several processes that estimate together, started by tests/data/test_processes.py.

`host_worker.py PORT PROCESSES ID SCENARIO` prints a line of JSON for each thing that happens. The scenario "healthy" is
all cases in turn; "kill precise 1" ends process 1 in the middle of a precise pass.
"""

import json
import os
import signal
import sys
import time

import jax
import numpy as np
from models import MLP

import flaxbn

SAMPLES, BATCH = 96, 12
X = (np.random.default_rng(0).normal(size=(SAMPLES, 4)) + np.arange(SAMPLES)[:, None] / 24).astype(np.float32)


def results(processes):
    """The cases in which there is a result, and their methods; for more than two processes only those that differ."""
    cases = ("alternating", "unequal", "none", "few", "arrays") if processes == 2 else ("none", "few")
    precise = ("devices", "earlier") if processes == 2 else ()
    return [(case, "precise") for case in cases + precise] + [(case, "exact") for case in cases]


NET = MLP(norm=flaxbn.BatchNorm)


def make_variables():
    """The same in all processes."""
    return NET.init(jax.random.key(0), X[:2])


def given(case, processes):
    """The data of each process: batches, or in the case "arrays" an array."""
    batches = np.split(X, SAMPLES // BATCH)
    others = processes - 1
    if case == "arrays":
        return np.split(X, BATCH * np.arange(1, processes))  # the last has most
    if case == "unequal":
        return [batches[: len(batches) - others], *([batch] for batch in batches[len(batches) - others :])]
    if case == "none":
        return [[], *(batches[i::others] for i in range(others))]
    if case == "few":
        return [*(batches[1:][i::others] for i in range(others)), [batches[0][:3]]]
    if case == "empty":
        return [[]] * processes
    return [batches[i::processes] for i in range(processes)]


def estimate(case, method, processes, process, during=lambda step: None):
    """The statistics, or moments, as one process sees them; `during` is called before each batch is read."""
    data = given(case, processes)[process]
    options = {"method": method}
    if case == "arrays":
        options["batch_size"] = BATCH
    else:
        data = (during(step) or batch for step, batch in enumerate(data))
    if case == "devices":
        options |= {"sharding": flaxbn.data_sharding(), "normalization_batch": "device"}
    if case == "earlier":
        moments = flaxbn.population_moments(NET, VARIABLES, [X[:BATCH]])  # in each process
        moments = flaxbn.population_moments(NET, VARIABLES, data, earlier=moments)
        return flaxbn.to_batch_stats(moments, VARIABLES["batch_stats"])
    return flaxbn.estimate_population_stats(NET, VARIABLES, data, **options)


def tell(**happened):
    """One line for the test."""
    print(json.dumps(happened | {"time": time.time()}), flush=True)


def attempt(name, *args, **options):
    """Tells the result, or the error."""
    try:
        found = estimate(*args, **options)
    except Exception as error:
        tell(name=name, error=type(error).__name__, message=str(error))
        return
    tell(name=name, statistics=jax.tree.map(lambda a: np.asarray(a).tolist(), found))


def run_healthy(processes, process):
    """All cases in which nobody dies."""
    for case, method in results(processes):
        attempt(f"{case} {method}", case, method, processes, process)
    for method in ("precise", "exact"):
        attempt(f"raise {method}", "alternating", method, processes, process, disk_gone(process, method))
        attempt(f"empty {method}", "empty", method, processes, process)
        attempt(f"few {method} again", "few", method, processes, process)


def disk_gone(process, method):
    """What process 1 meets in its data."""

    def during(step):
        if process == 1 and step == 1:
            tell(name=f"raising {method}")
            raise OSError("disk gone")

    return during


def run_killed(method, victim, processes, process):
    """One dies in the middle of its data; the others are to end with its absence, here or in jax."""

    def during(step):
        if process == victim and step == 1:
            tell(name="killed")
            os.kill(os.getpid(), signal.SIGKILL)

    estimate("alternating", method, processes, process, during)
    tell(name="survived")


if __name__ == "__main__":
    port, processes, process = map(int, sys.argv[1:4])
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(
        f"127.0.0.1:{port}", processes, process, initialization_timeout=60, heartbeat_timeout_seconds=10
    )
    VARIABLES = make_variables()
    scenario, *arguments = sys.argv[4].split()
    if scenario == "healthy":
        run_healthy(processes, process)
    else:
        run_killed(arguments[0], int(arguments[1]), processes, process)
