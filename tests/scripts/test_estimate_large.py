"""Statistics of a data set larger than memory, in one process and in two: MNIST as TFDS prepares it, read by grain."""

import importlib
import json
import shutil
import sys
import time

import jax
import numpy as np
import pytest
from oracle import assert_same_statistics
from script_runs import SAME, SCRIPTS, finish, run_both, start, start_two

import flaxbn

sys.path.insert(0, str(SCRIPTS))

data, estimate_large, networks, results, tfds_sets, training = map(
    importlib.import_module, ("data", "estimate_large", "networks", "results", "tfds_sets", "training")
)


@pytest.mark.processes
class TestEstimateLarge:
    SAMPLES = 1000

    @pytest.fixture(scope="class")
    @classmethod
    def saved(cls, tmp_path_factory):
        """A model with weights that nobody trained."""
        network = networks.CNN(10, flaxbn.BatchNorm)
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
        source = tfds_sets.open_tfds("mnist", data_dir / "tfds")["train"]
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
