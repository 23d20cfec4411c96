"""The training script end to end, in processes of its own, and what its data loader accepts and refuses."""

import dataclasses
import functools
import gzip
import importlib
import importlib.util
import io
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from rich.console import Console
from script_runs import SCRIPTS, finish, start

import flaxbn

sys.path.insert(0, str(SCRIPTS))

data, divergence, independence, journal, mode_results = map(
    importlib.import_module, ("data", "divergence", "independence", "journal", "mode_results")
)
networks, results, tfds_sets, train_mnist, training = map(
    importlib.import_module, ("networks", "results", "tfds_sets", "train_mnist", "training")
)

MODES = ["none", "running", "unestimated", "population"]


def begin_training(out, *options):
    return start("train_mnist.py", out, *options)


def train(out, *options):
    ((code, output, errors),) = finish([begin_training(out, *options)])
    return code, output + errors


def restore(path):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute())


def leaves(tree, path=()):
    if isinstance(tree, dict):
        return {p: leaf for key, child in tree.items() for p, leaf in leaves(child, (*path, key)).items()}
    return {path: np.asarray(tree)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of all modes, which the tests below look at."""
    out = tmp_path_factory.mktemp("scripts") / "run"
    code, output = train(out, "--epochs", 2, "--batch-size", 63, "--estimate-samples", 500, "--seeds", 2)
    assert code == 0, output
    return out, output


@pytest.mark.processes
class TestRun:
    def test_the_configuration_is_printed_first_and_the_table_last(self, run):
        _, output = run
        assert output.startswith("Config(")
        assert "batch size 63 -> 64, a multiple of the 2 devices" in output
        assert output.index("worst") > output.index("population  seed 1 epoch   2")

    def test_the_last_line_says_where_the_results_are(self, run):
        out, output = run
        assert f"Results are in {out}: accuracy.png, summary.json, metrics.jsonl, checkpoints.\n" in output

    def test_summary(self, run):
        out, _ = run
        summary = json.loads((out / "summary.json").read_text())
        assert summary["configuration"]["batch_size"] == 64
        assert {"python", "jax", "flax", "flaxbn", "devices"} <= summary["versions"].keys()
        assert list(summary["modes"]) == MODES
        for mode, outcome in summary["modes"].items():
            assert 0 <= outcome["test_accuracy"] <= 1
            assert len(outcome["validation_accuracy"]) == len(outcome["train_accuracy"]) == 2
            assert outcome["seconds"] > 0
            assert [check["independent"] for check in outcome["batch_independence"]] == [True, True]
            assert outcome["exported"] == (mode != "unestimated")
        assert any(outcome["seed_spread"]["test_accuracy"] > 0 for outcome in summary["modes"].values())

    def test_only_the_test_tells_unestimated_and_population_apart(self, run):
        modes = json.loads((run[0] / "summary.json").read_text())["modes"]
        unestimated, population = modes["unestimated"], modes["population"]
        assert unestimated["validation_accuracy"] == population["validation_accuracy"]
        assert unestimated["train_accuracy"] == population["train_accuracy"]
        assert population["test_accuracy"] > unestimated["test_accuracy"] + 0.2

    def test_checkpoints(self, run):
        models = {mode: restore(run[0] / "checkpoints" / mode / "seed0" / "model") for mode in MODES}
        assert not leaves(models["none"].get("batch_stats") or {})
        stored = {mode: leaves(models[mode]["batch_stats"]) for mode in MODES[1:]}
        initial = {path: float(path[-1] == "var") for path in stored["unestimated"]}
        assert all(np.all(stored["unestimated"][path] == value) for path, value in initial.items())
        assert all(np.any(stored["running"][path] != value) for path, value in initial.items())
        assert all(np.any(stored["population"][path] != value) for path, value in initial.items())
        for path, leaf in leaves(models["population"]["params"]).items():
            np.testing.assert_array_equal(leaf, leaves(models["unestimated"]["params"])[path])

    def test_all_but_unestimated_are_exported(self, run):
        out, output = run
        assert re.search(r"unestimated, seed 1: not exported\. .*'BatchNorm_0', .* were never estimated", output)
        exported = {path.parent.parent.name for path in out.glob("checkpoints/*/seed1/inference.zip")}
        assert exported == set(MODES) - {"unestimated"}
        folder, images = out / "checkpoints" / "population" / "seed0", data.load("digits").test.images[:5]
        inference = flaxbn.load_inference(folder / "inference.zip")
        model = networks.CNN(10, flaxbn.BatchNorm)
        expected = model.apply(restore(folder / "model"), images)
        np.testing.assert_allclose(inference(images), expected, rtol=1e-4, atol=1e-4)
        assert [layer["count"] for layer in inference.metadata["statistics"].values()] == [500 * 16, 500 * 4, 500 * 4]

    def test_metrics_and_figure(self, run):
        lines = results.read_lines(run[0] / "metrics.jsonl")
        order = [(mode, seed, epoch) for mode in MODES for seed in (0, 1) for epoch in (1, 2)]
        assert [(line["mode"], line["seed"], line["epoch"]) for line in lines] == order
        assert (run[0] / "accuracy.png").read_bytes().startswith(b"\x89PNG")

    def test_a_run_is_not_replaced_without_a_word(self, run):
        with pytest.raises(FileExistsError, match=r"holds a run\. Continue it with --resume, replace it with --over"):
            begin(run[0], train_mnist.Config())

    def test_resume_with_another_configuration_names_what_differs(self, run):
        config = train_mnist.Config(epochs=2, estimate_samples=500, seeds=2, resume=True)
        with pytest.raises(ValueError, match=r"run, --epochs was 2, is 3\. Give the same options"):
            begin(run[0], dataclasses.replace(config, epochs=3))
        assert len(begin(run[0], config)) == 16


@pytest.mark.processes
def test_a_training_that_diverges_is_told_and_marked_and_not_exported(tmp_path):
    options = ("--learning-rate", 1e30, "--epochs", 1, "--seeds", 1, "--modes", "none")
    code, output = train(tmp_path / "run", *options)
    assert code == 3, output
    assert "none, seed 0: diverged in epoch 1, where the loss or the weights were no finite numbers" in output
    assert "none diverged: seed 0 in epoch 1" in output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["modes"] == {"none": {"diverged": {"0": 1}}}
    assert (tmp_path / "run" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "run" / "checkpoints" / "none" / "seed0").iterdir()} == {"state"}


def test_after_a_training_that_diverges_the_others_go_on(tmp_path):
    runs = [training.Repetition("mode", name, 0, tmp_path, 8) for name in ("none", "running", "population")]

    def diverging(run):
        if run.name == "running":
            raise divergence.DivergenceError(run.name, run.seed, 7)
        return run.name

    with journal.keep_journal(tmp_path, [], Console(quiet=True), total=1) as kept:
        found = list(divergence.trained(runs, diverging, kept))
    assert found == [(runs[0], "none"), (runs[2], "population")]
    assert kept.diverged == [{"mode": "running", "seed": 0, "epoch": 7}]


@pytest.mark.parametrize(("steps", "looked_at"), [(250, 100), (90, 90)])
def test_divergence_is_seen_within_a_hundred_steps(tmp_path, steps, looked_at):
    """In a long epoch, and at the end of a short one."""
    taken = []

    def step(state, split, index, domain, augmentation):
        taken.append(index)
        return state, np.int32(1), np.float32(np.nan if len(taken) > 5 else 1)

    state = training.State({"w": np.zeros(2, np.float32)}, {}, ())
    run = training.Repetition("mode", "none", 3, tmp_path, 8)
    options = {"epochs": 2, "num_steps": steps, "batches": lambda epoch: [training.Batch(np.arange(2))] * steps}
    with journal.keep_journal(tmp_path, [], Console(quiet=True), total=1) as kept:
        fit = functools.partial(training.fit, state, None, run, kept, step=step, validate=None, **options)
        with pytest.raises(divergence.DivergenceError, match="none, seed 3: diverged in epoch 1, where"):
            fit()
    assert len(taken) == looked_at
    assert kept.lines == []


def test_seeds_that_diverged_count_for_no_mean():
    lines = [
        {"mode": "none", "seed": seed, "train_accuracy": a, "validation_accuracy": a, "seconds": 1}
        for seed, a in ((0, 0.5), (0, 0.7), (1, 0.1))
    ]
    tests = [{"mode": "none", "test_accuracy": 0.6, "batch_independence": {}, "exported": True, "seconds": 2}]
    diverged = [{"mode": "none", "seed": 1, "epoch": 2}, {"mode": "running", "seed": 0, "epoch": 1}]
    summary = mode_results.summarize(lines, tests, diverged)
    assert summary["none"]["validation_accuracy"] == [0.5, 0.7]
    assert (summary["none"]["seeds"], summary["none"]["diverged"]) == (1, {1: 2})
    assert summary["running"] == {"diverged": {0: 1}}
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(mode_results.table(summary))
    text = console.export_text()
    assert "±" not in text
    assert re.search(r"running +│ +diverged", text)
    assert "none diverged: seed 1 in epoch 2" in text


HOLD = """
import pathlib, sys, time
sys.path.insert(0, sys.argv[1])
import results
with results.held(pathlib.Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(300)
"""


def test_one_run_at_a_time_in_a_folder_until_it_dies(tmp_path):
    """Killed, it leaves a file behind, which locks nothing."""
    command = [sys.executable, "-c", HOLD, str(SCRIPTS), str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS.parent)}
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert other.stdout.readline() == "held\n"
        for script in (train_mnist, *map(importlib.import_module, ("train_domains", "batch_sizes"))):
            config = script.Config(out=tmp_path / "run", overwrite=True)
            with pytest.raises(BlockingIOError, match=r"one run at a time: another process is at work in .*run\. Wait"):
                script.main(config, Console(quiet=True))
    finally:
        other.kill()
        other.communicate()
    assert (tmp_path / "run" / ".lock").exists()
    for _ in range(2):
        with results.held(tmp_path / "run"):
            pass


def test_a_folder_that_holds_no_run_gets_no_lock(tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(FileExistsError, match="holds something else"), results.held(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_the_bar_says_from_the_beginning_what_is_done(tmp_path):
    screen = io.StringIO()
    with journal.keep_journal(tmp_path, [], Console(file=screen, force_terminal=True), total=10):
        pass
    assert "compiling" in screen.getvalue()


class Network:
    """Keeps the programs that it is run by."""

    def __init__(self):
        self.programs = []

    def apply(self, variables, images):
        product = functools.partial(jax.numpy.matmul, variables)
        self.programs.append(str(jax.make_jaxpr(product)(images)))
        return product(images)


def test_independence_is_compared_at_the_highest_precision():
    network, images = Network(), np.ones((5, 3, 3), np.float32)
    found = independence.compare(np.eye(3, dtype=np.float32)[None], images, model=network)
    assert found == {"independent": True, "max_difference": 0, "tolerance": independence.TOLERANCE, "examples": 5}
    assert len(network.programs) == 2
    assert all("precision=(Precision.HIGHEST, Precision.HIGHEST)" in text for text in network.programs)


def begin(out, config):
    return dataclasses.replace(config, out=out).begin()


@pytest.mark.processes
def test_killed_and_resumed_it_ends_with_the_same_bits(tmp_path):
    options = ("--epochs", 5, "--seeds", 1, "--modes", "running", "population", "--norm", "renorm")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = begin_training(whole, *options)
    process = begin_training(killed, *options)
    while process.poll() is None and len(results.read_lines(killed / "metrics.jsonl")) < 9:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "summary.json").exists()
    saved = {
        int(path.name) for path in (killed / "checkpoints/population/seed0/state").iterdir() if path.name.isdigit()
    }
    assert saved & {2, 3, 4}

    code, output = train(killed, *options, "--resume")
    assert code == 0, output
    assert "running     seed 0" not in output
    ((code, _, errors),) = finish([reference])
    assert code == 0, errors

    for mode in ("running", "population"):
        expected, actual = (leaves(restore(out / "checkpoints" / mode / "seed0" / "model")) for out in (whole, killed))
        assert expected.keys() == actual.keys()
        for path in expected:
            np.testing.assert_array_equal(actual[path], expected[path], err_msg=str(path))
    first, second = (json.loads((out / "summary.json").read_text())["modes"] for out in (whole, killed))
    for mode, outcome in first.items():
        for key in ("test_accuracy", "train_accuracy", "validation_accuracy", "seed_spread"):
            assert outcome[key] == second[mode][key]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1: got 0"),
        ({"estimate_samples": 1}, "--estimate-samples must be at least 2: got 1"),
        ({"learning_rate": math.nan}, "--learning-rate must be positive and finite: got nan"),
        ({"modes": ("none", "none")}, "--modes must name at least one mode, each once"),
        ({"resume": True, "overwrite": True}, "got both. Leave one out"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        train_mnist.Config(**options)


def test_options_too_large_for_the_data(tmp_path):
    config = train_mnist.Config(batch_size=4096, out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"--batch-size must be at most 1249, the training ex.*: got 4096"):
        train_mnist.main(config, Console(quiet=True))
    assert not config.out.exists()


def test_options_win_over_the_preset(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_mnist.py", "--epochs", "7", "--preset", "article"])
    config = train_mnist.configure()
    assert (config.learning_rate, config.epochs) == (0.1, 7)


def test_a_folder_that_holds_no_run_is_left_alone(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileExistsError, match="holds something else"):
        begin(tmp_path, train_mnist.Config(overwrite=True))
    assert (tmp_path / "checkpoints").is_dir()


def test_overwrite_begins_anew(tmp_path):
    begin(tmp_path, train_mnist.Config(epochs=3))
    (tmp_path / "checkpoints" / "running").mkdir(parents=True)
    results.write_lines(tmp_path / "metrics.jsonl", [{"epoch": 1}])
    assert begin(tmp_path, train_mnist.Config(epochs=4, overwrite=True)) == []
    assert {path.name for path in tmp_path.iterdir()} == {"config.json"}
    assert json.loads((tmp_path / "config.json").read_text())["epochs"] == 4


def test_every_example_counts_once():
    batches = training.evaluation_batches(10, 4)
    assert [len(index) for index, _ in batches] == [4, 4, 4]
    assert sorted(np.concatenate([index[counted] for index, counted in batches])) == list(range(10))


def test_spread_is_the_root_mean_square_change():
    assert mode_results.epoch_to_epoch_spread([0.5, 0.9, 0.6]) == pytest.approx(math.sqrt((0.4**2 + 0.3**2) / 2))
    assert mode_results.epoch_to_epoch_spread([0.5]) is None


def test_a_file_is_replaced_only_when_complete(tmp_path):
    path = tmp_path / "metrics.jsonl"
    results.write_lines(path, [{"epoch": 1}])
    with pytest.raises(TypeError):
        results.write_lines(path, [{"epoch": 2}, {"epoch": object()}])
    assert results.read_lines(path) == [{"epoch": 1}]


def write_idx(path, array, *, magic=None, cut=0):
    content = (magic or bytes((0, 0, 8, array.ndim))) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    content = content[: len(content) - cut]
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def idx_folder(tmp_path):
    """Thirty training and seven test images, 5x4, raw and gzip mixed."""
    rng = np.random.default_rng(0)
    for part, size, ending in (("train", 30, ".gz"), ("t10k", 7, "")):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{ending}", rng.integers(0, 256, (size, 5, 4), np.uint8))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{ending}", rng.integers(0, 3, size, np.uint8))
    return tmp_path


class TestData:
    def test_digits(self):
        first, second = data.load("digits"), data.load("digits")
        assert [len(split.labels) for split in first] == [1249, 249, 299]
        assert first.train.images.dtype == np.uint8
        assert first.num_classes == 10
        everything = {image.tobytes() for split in first for image in split.images}
        assert sum(len({image.tobytes() for image in split.images}) for split in first) == len(everything)
        for a, b in zip(first, second):
            np.testing.assert_array_equal(a.images, b.images)
            np.testing.assert_array_equal(a.labels, b.labels)

    def test_idx(self, idx_folder):
        loaded = data.load("anything", idx_folder)
        assert [split.images.shape for split in loaded] == [(25, 5, 4, 1), (5, 5, 4, 1), (7, 5, 4, 1)]
        images = data.read_idx(idx_folder / "train-images-idx3-ubyte.gz", rank=3)
        labels = data.read_idx(idx_folder / "train-labels-idx1-ubyte.gz", rank=1)
        pairs = {(image.tobytes(), int(label)) for image, label in zip(images, labels)}
        seen = {(i.tobytes(), int(n)) for split in loaded[:2] for i, n in zip(split.images, split.labels)}
        assert seen == pairs

    def test_idx_without_a_folder(self):
        with pytest.raises(ValueError, match=r"got no --data-dir\. .* --dataset digits, .* --dataset tfds:mnist"):
            data.load("mnist")

    def test_idx_file_missing(self, idx_folder):
        (idx_folder / "t10k-labels-idx1-ubyte").unlink()
        with pytest.raises(FileNotFoundError, match="must be a folder that holds t10k-labels-idx1-ubyte"):
            data.load("mnist", idx_folder)

    @pytest.mark.parametrize("magic", [b"\x00\x00\x0d\x03", b"\x00\x00\x08\x01", b"PK\x03\x04"])
    def test_idx_of_another_kind(self, idx_folder, magic):
        write_idx(idx_folder / "t10k-images-idx3-ubyte", np.zeros((7, 5, 4), np.uint8), magic=magic)
        with pytest.raises(ValueError, match=f"begins with the bytes 00000803: got {magic.hex()}"):
            data.load("mnist", idx_folder)

    @pytest.mark.parametrize("cut", [1, 138, 150, 156])
    def test_idx_truncated(self, idx_folder, cut):
        write_idx(idx_folder / "t10k-images-idx3-ubyte", np.zeros((7, 5, 4), np.uint8), cut=cut)
        with pytest.raises(ValueError, match=r"truncated|got an empty file"):
            data.load("mnist", idx_folder)

    def test_gzip_truncated(self, idx_folder):
        path = idx_folder / "train-images-idx3-ubyte.gz"
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match="must be a whole gzip file"):
            data.load("mnist", idx_folder)

    def test_idx_counts_differ(self, idx_folder):
        write_idx(idx_folder / "t10k-labels-idx1-ubyte", np.zeros(6, np.uint8))
        with pytest.raises(ValueError, match=r"Every image must have a label.* got 7 images and 6 labels"):
            data.load("mnist", idx_folder)

    def test_idx_shapes_differ(self, idx_folder):
        write_idx(idx_folder / "t10k-images-idx3-ubyte", np.zeros((7, 5, 5), np.uint8))
        with pytest.raises(ValueError, match=r"one shape .* got \(5, 4, 1\) and \(5, 5, 1\)"):
            data.load("mnist", idx_folder)

    @pytest.mark.parametrize(("name", "sizes"), [("mnist", [50_000, 10_000, 10_000]), ("usps", [6_076, 1_215, 2_007])])
    def test_real_idx(self, data_dir, name, sizes):
        assert [len(split.labels) for split in data.load(name, data_dir / name)] == sizes


class TestTFDS:
    def test_missing_package_is_named(self, monkeypatch, tmp_path):
        _hide(monkeypatch, "tensorflow_datasets")
        with pytest.raises(ModuleNotFoundError, match=r"the package tensorflow-datasets.* or use --dataset digits"):
            data.load("tfds:mnist", tmp_path)

    def test_unprepared_is_an_error_at_once(self, monkeypatch, tmp_path):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorflow_datasets" or None)
        monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)  # its own answer takes minutes
        with pytest.raises(FileNotFoundError, match=r"not prepared in .*TensorFlow, which is not .* --data-dir"):
            data.load("tfds:mnist", tmp_path)

    def test_no_network_is_an_error_at_once(self, monkeypatch, tmp_path):
        def refuse(*args, **options):
            raise OSError("no route to host")

        monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
        monkeypatch.setattr(tfds_sets.socket, "create_connection", refuse)
        with pytest.raises(ConnectionError, match=r"needs a network: no route to host\. Prepare it on a machine"):
            data.load("tfds:mnist", tmp_path)

    def test_prepared_as_tfrecord(self, monkeypatch, tmp_path):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
        folder = tmp_path / "mnist" / "3.0.1"
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").write_text('{"fileFormat": "tfrecord"}')
        with pytest.raises(ValueError, match=r"must be prepared as array_record.* got \['tfrecord'\]"):
            data.load("tfds:mnist", tmp_path)

    @pytest.mark.filterwarnings("ignore")
    def test_prepared(self, data_dir, monkeypatch):
        tfds = pytest.importorskip("tensorflow_datasets")
        if not (data_dir / "tfds" / "mnist").is_dir():
            pytest.skip(f"no TFDS data in {data_dir}")
        whole = tfds.data_source("mnist", data_dir=data_dir / "tfds", download=False)
        short = {part: _First(source, 90) for part, source in whole.items()}
        monkeypatch.setattr(tfds, "data_source", lambda *args, **options: short)
        loaded = data.load("tfds:mnist", data_dir / "tfds")
        assert [split.images.shape for split in loaded] == [(75, 28, 28, 1), (15, 28, 28, 1), (90, 28, 28, 1)]
        idx = data.load("mnist", data_dir / "mnist")
        known = dict(zip((image.tobytes() for image in idx.test.images), idx.test.labels))
        assert all(known[image.tobytes()] == label for image, label in zip(*loaded.test))


class _First:
    """The first elements of a data source."""

    def __init__(self, source, size):
        self.dataset_info = source.dataset_info
        self._source, self._size = source, size

    def __iter__(self):
        return (self._source[i] for i in range(self._size))


def _hide(monkeypatch, hidden):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == hidden else find(name))


@pytest.mark.processes
def test_the_network_in_nnx_is_estimated_and_exported(tmp_path):
    """The same pages of results as with Linen; what they say of each mode is the same."""
    out = tmp_path / "run"
    options = ("--api", "nnx", "--epochs", 2, "--seeds", 1, "--modes", "population")
    code, output = train(out, *options)
    assert code == 0, output
    modes = json.loads((out / "summary.json").read_text())["modes"]
    assert modes["population"]["exported"]
    assert all(check["independent"] for outcome in modes.values() for check in outcome["batch_independence"])
    assert modes["population"]["test_accuracy"] > 0.8  # of ten classes, after 44 steps
