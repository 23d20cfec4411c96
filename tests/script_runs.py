"""The scripts in processes of their own: one, or two with a device each that train together."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"
SAME = 1e-5
"""What the same weights are after some steps with sums over devices in another order."""


def start(script, out, *given, devices=2, environment=None):
    """A script under way, with its output and its errors apart."""
    environment = os.environ | (environment or {})
    environment |= {
        "PYTHONPATH": str(SCRIPTS.parent),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        # Training is slow where it is not optimized, and the runs have in common what they compile.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "JAX_COMPILATION_CACHE_DIR": os.environ["FLAXBN_TESTS_CACHE"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, str(SCRIPTS / script), "--out", str(out), *map(str, given)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(started):
    """For each process its return code, its output and its errors."""
    told = [process.communicate(timeout=300) for process in started]
    return [(process.returncode, *streams) for process, streams in zip(started, told)]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_two(script, out, *given, own=((), ())):
    port = free_port()
    meet = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", 2, "--process-id")
    return [start(script, out, *given, *meet, i, *own[i], devices=1) for i in range(2)]


def start_two_by_slurm(script, out, *given):
    """As `srun --ntasks 2` does."""
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    slurm["JAX_COORDINATOR_PORT"] = str(free_port())
    tasks = [slurm | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    return [start(script, out, *given, "--coordinator", "auto", devices=1, environment=task) for task in tasks]


def run_both(script, folder, *given):
    """The outputs of one process in folder/one, and of two in folder/two."""
    (code, whole, errors) = finish([start(script, folder / "one", *given, devices=2)])[0]
    assert code == 0, errors
    both = finish(start_two(script, folder / "two", *given))
    assert [code for code, _, _ in both] == [0, 0], [errors for _, _, errors in both]
    return whole, both


def assert_same_weights(one, two):
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(a).max(), one, two)
    assert max(jax.tree.leaves(differences)) < SAME, differences


def files(out):
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.suffix in (".json", ".jsonl", ".png")}
