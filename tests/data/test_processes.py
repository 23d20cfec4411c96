"""Several processes, each with its own part of the data. They are real ones, started once for all healthy cases."""

import contextlib
import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import host_worker
import jax
import numpy as np
import pytest
from host_worker import BATCH, NET, X, results
from jax.experimental import multihost_utils
from oracle import assert_same_statistics

import flaxbn
from flaxbn.data.processes import gather

VARIABLES = jax.jit(host_worker.make_variables)()
EVERYWHERE = 1e-5
"""What the same statistics are in any number of processes: sums of 96 float32 in another order, in two layers."""


class Process:
    """A worker, and what it told."""

    def __init__(self, folder, scenario, port, processes, process):
        self.log = folder / f"{process}.log"
        self.out = folder / f"{process}.out"
        root = str(pathlib.Path(flaxbn.__file__).parents[1])
        # The workers run on CPUs, whatever the tests run on, and see nothing of this process's devices.
        environment = {
            **os.environ,
            "PYTHONPATH": root,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        }
        command = [sys.executable, host_worker.__file__, str(port), str(processes), str(process), scenario]
        with self.log.open("w") as log, self.out.open("w") as out:
            self.running = subprocess.Popen(command, stdout=out, stderr=log, env=environment)
        self.ended = None

    def told(self):
        """Its lines by name; Gloo prints others."""
        lines = [json.loads(line) for line in self.out.read_text().splitlines() if line.startswith("{")]
        return {line["name"]: line for line in lines}


@contextlib.contextmanager
def started(folder, scenario, processes, timeout):
    """Workers that have ended, by themselves or after `timeout` seconds by force."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [Process(folder, scenario, port, processes, i) for i in range(processes)]
    try:
        deadline = time.monotonic() + timeout
        while any(worker.ended is None for worker in workers) and time.monotonic() < deadline:
            for worker in workers:
                if worker.ended is None and worker.running.poll() is not None:
                    worker.ended = time.time()
            time.sleep(0.1)
        yield workers
    finally:
        for worker in workers:
            worker.running.kill()
            worker.running.wait()


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """What each process told, by case, for a number of processes; run once for each number, even if that fails."""

    @functools.cache
    def run(processes):
        folder = tmp_path_factory.mktemp("healthy")
        with started(folder, "healthy", processes, timeout=150) as workers:
            logs = "\n".join(worker.log.read_text()[-2000:] for worker in workers)
            return [worker.told() for worker in workers], [worker.running.returncode for worker in workers], logs

    def told(processes):
        found, codes, logs = run(processes)
        assert codes == [0] * processes, logs
        return found

    return told


def arrays_of(tree):
    return jax.tree.map(np.asarray, tree, is_leaf=lambda value: isinstance(value, list))


def expected_of(case, method, processes):
    """The statistics of one process over the same batches."""
    parts = host_worker.given(case, processes)
    if case == "arrays":
        parts = [[part[k :: len(part) // BATCH] for k in range(len(part) // BATCH)] for part in parts]
    batches = [batch for part in parts for batch in part]
    if case == "devices":
        batches = [half for batch in batches for half in np.split(batch, 2)]
    if case == "earlier":
        batches = [X[:BATCH]] * processes + batches
    return jax.device_get(flaxbn.estimate_population_stats(NET, VARIABLES, batches, method=method))


@pytest.mark.parametrize(("processes", "case", "method"), [(n, *result) for n in (2, 4) for result in results(n)])
def test_processes_get_the_statistics_of_the_union(healthy, processes, case, method):
    found = [told[f"{case} {method}"]["statistics"] for told in healthy(processes)]
    assert all(other == found[0] for other in found), "not bitwise the same in all processes"
    assert_same_statistics(arrays_of(found[0]), expected_of(case, method, processes), EVERYWHERE)


both = pytest.mark.parametrize("method", ["precise", "exact"])
groups = pytest.mark.parametrize("processes", [2, 4])


@both
@groups
def test_where_one_process_raises_in_its_data_all_do(healthy, processes, method):
    """It raises its own error, at once; the others one that names it."""
    told = healthy(processes)
    raised = [process[f"raise {method}"] for process in told]
    assert (raised[1]["error"], raised[1]["message"]) == ("OSError", "disk gone")
    for error in raised[:1] + raised[2:]:
        assert error["error"] == "RuntimeError"
        assert f"process [1] of {processes} raised an error, which its own log shows" in error["message"]
    assert max(error["time"] for error in raised) - told[1][f"raising {method}"]["time"] < 15


@both
@groups
def test_no_data_in_any_process_is_an_error_in_all(healthy, processes, method):
    message = "The data must hold at least one sample: no process saw any."
    for told in healthy(processes):
        assert (told[f"empty {method}"]["error"], told[f"empty {method}"]["message"]) == ("ValueError", message)


@both
@groups
def test_processes_go_on_after_an_error_of_one(healthy, processes, method):
    for told in healthy(processes):
        assert told[f"few {method} again"]["statistics"] == told[f"few {method}"]["statistics"]


@pytest.mark.parametrize(("processes", "method", "victim"), [(2, "precise", 1), (3, "exact", 0)])
def test_where_one_process_is_killed_the_others_end(tmp_path, processes, method, victim):
    """Process 0 is also the coordinator. The heartbeat is missing after 10 s."""
    with started(tmp_path, f"kill {method} {victim}", processes, timeout=90) as workers:
        died = workers.pop(victim)
        assert died.running.returncode == -signal.SIGKILL
        for worker in workers:
            assert worker.ended is not None, f"still running:\n{worker.log.read_text()[-2000:]}"
            assert worker.running.returncode != 0
            assert worker.ended - died.told()["killed"]["time"] < 30
            assert "survived" not in worker.told()
            log = worker.log.read_text()
            assert "lost the others while statistics were merged" in log or "JAX distributed service" in log, log[
                -2000:
            ]


def test_others_that_are_lost_in_the_merge_are_an_error(monkeypatch):
    """What a process says where jax has not ended it before."""

    def broken(value):
        raise OSError("connection closed by peer")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", broken)
    with pytest.raises(RuntimeError, match=r"Process 0 of 2 lost the others.*start all processes again") as raised:
        gather(np.ones(2))
    assert isinstance(raised.value.__cause__, OSError)
