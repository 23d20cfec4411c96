"""The scripts under two processes: real ones, with a device each, against one process with two devices."""

import importlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import pytest
from oracle import assert_same_statistics

import flaxbn

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

data, estimate_large, processes, results, train_mnist, training = map(
    importlib.import_module, ("data", "estimate_large", "processes", "results", "train_mnist", "training")
)

SAME = 1e-5
"""What the same weights are after some steps with sums over devices in another order."""
ENDED = 60
"""Seconds within which the others end when one fails: a heartbeat of 30 s, and what jax needs to start."""


CACHE = tempfile.TemporaryDirectory()


def start(script, out, *given, devices, environment=None):
    environment = (
        os.environ
        | (environment or {})
        | {
            "PYTHONPATH": str(SCRIPTS.parent),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            # Most of the time is compilation, which the runs have in common.
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": CACHE.name,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    )
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


def model(out, name):
    return training.load_variables(out / "checkpoints" / name / "seed0" / "model")


def assert_same_weights(one, two):
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(a).max(), one, two)
    assert max(jax.tree.leaves(differences)) < SAME, differences


def files(out):
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.suffix in (".json", ".jsonl", ".png")}


class TestTrainMnist:
    OPTIONS = ("--epochs", 1, "--modes", "running", "population")

    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("processes")
        return folder, *run_both("train_mnist.py", folder, *cls.OPTIONS)

    @pytest.mark.parametrize("mode", ["running", "population"])
    def test_the_weights_are_those_of_one_process(self, run, mode):
        one, two = (model(run[0] / out, mode) for out in ("one", "two"))
        assert_same_weights(one["params"], two["params"])
        if mode == "running":
            assert_same_weights(one["batch_stats"], two["batch_stats"])

    def test_the_population_is_that_of_the_parts(self, run):
        """Each process estimates from every other image, in batches of half the size."""
        images = data.load("digits").train.images
        parts = [images[i::2] for i in range(2)]
        batches = [part[k :: -(-len(part) // 32)] for part in parts for k in range(-(-len(part) // 32))]
        variables = model(run[0] / "two", "population")
        found = flaxbn.estimate_population_stats(training.CNN(10, flaxbn.BatchNorm), variables, batches)
        assert_same_statistics(variables["batch_stats"], jax.device_get(found), SAME)

    def test_the_same_is_reported(self, run):
        one, two = (json.loads((run[0] / out / "summary.json").read_text()) for out in ("one", "two"))
        assert one["configuration"] == two["configuration"]
        for mode in ("running", "population"):
            # Sums in another order, and statistics of other batches, may decide an example or two of 299 otherwise.
            np.testing.assert_allclose(
                one["modes"][mode]["test_accuracy"], two["modes"][mode]["test_accuracy"], atol=0.01
            )
            np.testing.assert_allclose(
                one["modes"][mode]["validation_accuracy"], two["modes"][mode]["validation_accuracy"], atol=0.01
            )

    def test_only_the_first_process_speaks_and_writes(self, run):
        folder, whole, (first, second) = run
        assert "population  seed 0 epoch   1" in first[1]
        assert "population  seed 0 epoch   1" in whole
        assert "seed" not in second[1]
        assert files(folder / "one") == files(folder / "two")

    def test_resumed_by_two_processes(self, run):
        out = run[0] / "two"
        before = model(out, "population")
        ended = finish(start_two("train_mnist.py", out, *self.OPTIONS, "--resume"))
        assert [code for code, _, _ in ended] == [0, 0], [errors for _, _, errors in ended]
        assert "epoch   1" not in ended[0][1]  # nothing was trained again
        jax.tree.map(np.testing.assert_array_equal, model(out, "population"), before)

    @pytest.mark.parametrize("start", [start_two, start_two_by_slurm])
    def test_an_error_of_the_first_process_ends_the_other(self, run, start):
        begun = time.monotonic()
        (code, _, errors), (other_code, _, other_errors) = finish(
            start("train_mnist.py", run[0] / "two", *self.OPTIONS)
        )
        assert 0 not in (code, other_code)
        assert "holds a run. Continue it with --resume" in errors
        assert "Process [0] of 2 failed: its own output says why" in other_errors
        assert time.monotonic() - begun < ENDED

    def test_an_error_of_another_process_ends_the_first(self, tmp_path, data_dir):
        own = ("--data-dir", data_dir / "mnist"), ("--data-dir", tmp_path / "nowhere")
        (code, _, errors), (other_code, _, other_errors) = finish(
            start_two("train_mnist.py", tmp_path / "out", *self.OPTIONS, "--dataset", "mnist", own=own)
        )
        assert 0 not in (code, other_code)
        assert "Process [1] of 2 failed" in errors
        assert "--data-dir must be a folder that holds train-images" in other_errors
        assert not (tmp_path / "out").exists()

    def test_processes_with_other_options_do_not_train_together(self, tmp_path):
        own = ("--learning-rate", "0.1"), ("--learning-rate", "0.01")
        ended = finish(start_two("train_mnist.py", tmp_path / "out", *self.OPTIONS, own=own))
        for code, _, errors in ended:
            assert code != 0
            assert "must be given the same options, and the same number of devices: process [1] of 2 differs" in errors
        assert not (tmp_path / "out").exists()

    def test_a_folder_that_the_other_does_not_see(self, tmp_path):
        own = ("--out", tmp_path / "here"), ("--out", tmp_path / "there")
        for code, _, errors in finish(start_two("train_mnist.py", tmp_path / "out", *self.OPTIONS, own=own)):
            assert code != 0
            assert "--out must be a folder that all processes see: process [1] of 2 does not find" in errors


def test_train_domains(tmp_path):
    given = ("--epochs", 1, "--seeds", 1, "--variants", "mixed-domain", "turn-shared", "--weighting-samples", 600)
    run_both("train_domains.py", tmp_path, *given)
    for variant in ("mixed-domain", "turn-shared"):
        one, two = (model(tmp_path / out, variant) for out in ("one", "two"))
        assert_same_weights(one["params"], two["params"])
        assert_same_weights(one["batch_stats"]["running"], two["batch_stats"]["running"])
        # Batches of other examples: nearly the same.
        assert_same_statistics(two["batch_stats"]["domain"], one["batch_stats"]["domain"], 0.1)
    one, two = (json.loads((tmp_path / out / "summary.json").read_text()) for out in ("one", "two"))
    assert one["variants"].keys() == two["variants"].keys()
    assert two["weighting"].keys() >= {"balanced", "weighted", "unweighted"}
    assert files(tmp_path / "one") == files(tmp_path / "two")


class TestEstimateLarge:
    """MNIST as TFDS prepares it, read by grain."""

    SAMPLES = 1000

    @pytest.fixture(scope="class")
    @classmethod
    def saved(cls, tmp_path_factory):
        """A model with weights that nobody trained."""
        network = training.CNN(10, flaxbn.BatchNorm)
        images = np.zeros((2, 28, 28, 1), np.uint8)
        folder = tmp_path_factory.mktemp("large") / "model"
        training.save_model(folder, jax.jit(network.init)(jax.random.key(0), images))
        return folder

    @pytest.fixture(scope="class")
    @classmethod
    def given(cls, saved, data_dir):
        if not (data_dir / "tfds" / "mnist").is_dir():
            pytest.skip("no MNIST prepared by TFDS")
        sizes = ("--samples", cls.SAMPLES, "--part", 400, "--batch-size", 100)
        return "--model", saved, "--data-dir", data_dir / "tfds", *sizes

    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, tmp_path_factory, given):
        folder = tmp_path_factory.mktemp("runs")
        run_both("estimate_large.py", folder, *given)
        return folder

    def images(self, data_dir, config):
        """What the script reads, by itself: each image once, in the order of grain."""
        source = data.open_tfds("mnist", data_dir / "tfds")["train"]
        order = estimate_large.grain.MapDataset.range(len(source)).shuffle(seed=config.seed)
        return np.stack([source[order[i]]["image"] for i in range(self.SAMPLES)])

    def test_the_statistics_of_one_process_are_those_of_the_batches(self, run, data_dir, saved):
        images = self.images(data_dir, estimate_large.Config())
        batches = [
            images[a : min(a + 100, b)]
            for start in range(0, 1000, 400)
            for b in [min(start + 400, 1000)]
            for a in range(start, b, 100)
        ]
        network, variables = estimate_large.load_model(saved)
        expected = flaxbn.estimate_population_stats(network, variables, batches)
        found = training.load_variables(run / "one" / "checkpoints" / "model")
        assert_same_statistics(found["batch_stats"], jax.device_get(expected), SAME)
        jax.tree.map(np.testing.assert_array_equal, found["params"], variables["params"])

    def test_two_processes_read_the_same_images(self, run):
        """In other batches: the same only before the first normalization."""
        one, two = (
            training.load_variables(run / out / "checkpoints" / "model")["batch_stats"] for out in ("one", "two")
        )
        assert_same_statistics({"first": two["BatchNorm_0"]}, {"first": one["BatchNorm_0"]}, SAME)
        assert_same_statistics(two, one, 0.1)

    def test_killed_and_resumed_it_ends_with_the_same_statistics(self, run, given, tmp_path):
        given = *given[:-4], "--part", 100, "--batch-size", 100
        whole, killed = start("estimate_large.py", tmp_path / "whole", *given, devices=2), tmp_path / "killed"
        process = start("estimate_large.py", killed, *given, devices=2)
        while process.poll() is None and len(results.read_lines(killed / "metrics.jsonl")) < 4:
            time.sleep(0.02)
        process.kill()
        process.communicate()
        assert not (killed / "summary.json").exists()
        (code, _, errors), (resumed_code, output, resumed_errors) = finish(
            [whole, start("estimate_large.py", killed, *given, "--resume", devices=2)]
        )
        assert (code, resumed_code) == (0, 0), errors + resumed_errors
        assert " 100 images" not in output
        jax.tree.map(
            np.testing.assert_array_equal,
            training.load_variables(killed / "checkpoints" / "model"),
            training.load_variables(tmp_path / "whole" / "checkpoints" / "model"),
        )
        lines = results.read_lines(killed / "metrics.jsonl")
        assert [line["images"] for line in lines] == [*range(100, 1001, 100)]
        assert np.all(np.diff([line["seconds"] for line in lines]) > 0)

    def test_other_weights_are_not_mixed_with_earlier_ones(self, run, given, saved, tmp_path):
        """Where the model at the same place is another one, and where it is to be replaced."""
        out, other = tmp_path / "out", tmp_path / "model"
        shutil.copytree(run / "one", out)
        variables = training.load_variables(saved)
        variables["params"]["Conv_0"]["kernel"] = 2 * variables["params"]["Conv_0"]["kernel"]
        training.save_model(other, variables)
        given = (*given[:1], other, *given[2:])
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | {"model": str(other)}))
        code, _, errors = finish([start("estimate_large.py", out, *given, "--resume", devices=2)])[0]
        assert code != 0
        assert "--resume continues a run with the configuration it began with" in errors
        assert "--weights was" in errors
        workers = ("--workers", 1)
        code, _, errors = finish([start("estimate_large.py", out, *given, *workers, "--overwrite", devices=2)])[0]
        assert code == 0, errors
        first, second = (training.load_variables(folder / "checkpoints" / "model") for folder in (run / "one", out))
        jax.tree.map(np.testing.assert_array_equal, second["params"], variables["params"])
        found, before = (model["batch_stats"]["BatchNorm_0"] for model in (second, first))
        np.testing.assert_allclose(found["var"], 4 * before["var"], rtol=SAME)

    def test_a_model_that_one_process_does_not_find(self, given, saved, tmp_path):
        own = ("--model", saved), ("--model", tmp_path / "gone")
        ended = finish(start_two("estimate_large.py", tmp_path / "out", *given[2:], own=own))
        assert 0 not in [code for code, _, _ in ended]
        assert "Process [1] of 2 failed: its own output says why" in ended[0][2]
        assert "--model must be the folder of a saved model" in ended[1][2]


@pytest.mark.parametrize(
    ("size", "given", "channels"),
    [(4, (4, 4, 1), 1), (4, (4, 4, 1), 3), (4, (8, 12, 3), 3), (8, (5, 4, 1), 1)],
)
def test_images_are_cut_to_the_middle_square(size, given, channels):
    """Columns beside the square differ from those in it, and are not seen."""
    height, width, _ = given
    side = min(height, width)
    image = np.full(given, 200, np.uint8)
    image[(height - side) // 2 : (height + side) // 2, (width - side) // 2 : (width + side) // 2] = 7
    found = estimate_large.prepared({"image": image}, size=size, channels=channels)
    assert found.shape == (size, size, channels)
    assert found.dtype == np.uint8
    assert np.all(found == 7)


def test_images_of_too_many_channels():
    with pytest.raises(ValueError, match=r"takes images of 1 channels: got one of shape \(4, 4, 3\)"):
        estimate_large.prepared({"image": np.zeros((4, 4, 3), np.uint8)}, size=4, channels=1)


def test_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--model must be the folder of a saved model: got .*gone"):
        estimate_large.load_model(tmp_path / "gone")


def test_a_model_without_batch_normalization(tmp_path):
    training.save_model(tmp_path / "model", {"params": {"Dense_0": {"bias": np.zeros(10)}}})
    with pytest.raises(ValueError, match=r"--model must have batch normalization: .* has \['params'\]"):
        estimate_large.load_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "127.0.0.1:1"}, "got 127.0.0.1:1, None and None. Give all three, none, or only"),
        ({"num_processes": 2, "process_id": 0}, "got None, 2 and 0"),
        ({"coordinator": "auto", "num_processes": 2, "process_id": 0}, "got auto, 2 and 0"),
        ({"coordinator": "127.0.0.1:1", "num_processes": 2, "process_id": 2}, "--process-id must be .*: got 2 of 2"),
    ],
)
def test_bad_options(given, message):
    with pytest.raises(ValueError, match=message):
        train_mnist.Config(**given)


@pytest.mark.parametrize("given", [{}, {"coordinator": "auto"}])
def test_good_options(given):
    assert train_mnist.Config(**given).record() == train_mnist.Config().record()


def test_own_rows_are_a_part_of_what_is_evenly_spaced(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    parts = []
    for i in range(3):
        monkeypatch.setattr(jax, "process_index", lambda i=i: i)
        parts.append(processes.own_rows(100, 10))
    assert sorted(np.concatenate(parts)) == [*range(0, 100, 10)]
    assert [len(part) for part in parts] == [4, 3, 3]
