"""The scripts under two processes: real ones, with a device each, against one process with two devices."""

import importlib
import json
import sys
import time

import jax
import numpy as np
import pytest
from oracle import assert_same_statistics
from script_runs import SAME, SCRIPTS, assert_same_weights, files, finish, run_both, start_two, start_two_by_slurm

import flaxbn

sys.path.insert(0, str(SCRIPTS))

data, networks, processes, train_mnist, training = map(
    importlib.import_module, ("data", "networks", "processes", "train_mnist", "training")
)

ENDED = 60
"""Seconds within which the others end when one fails: a heartbeat of 30 s, and what jax needs to start."""


def model(out, name):
    return training.load_variables(out / "checkpoints" / name / "seed0" / "model")


@pytest.mark.processes
class TestTrainMnist:
    OPTIONS = ("--epochs", 1, "--seeds", 1, "--modes", "running", "population")

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
        found = flaxbn.estimate_population_stats(networks.CNN(10, flaxbn.BatchNorm), variables, batches)
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


@pytest.mark.processes
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
