"""The experiment on domains end to end, in processes of its own, and the parts it is made of."""

import importlib
import json
import math
import signal
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from rich.console import Console
from script_runs import SCRIPTS, finish, start

import flaxbn

sys.path.insert(0, str(SCRIPTS))

data, domain_data, domain_results, results, train_domains, training, weighting = map(
    importlib.import_module,
    ("data", "domain_data", "domain_results", "results", "train_domains", "training", "weighting"),
)

NAMES = ["digits", "digits-blended"]
VARIANTS = ["mixed-shared", "mixed-domain-affine", "turn-shared", "turn-domain"]
EPOCHS = 2
OPTIONS = ("--epochs", EPOCHS, "--seeds", 1, "--batch-size", 63, "--variants", *VARIANTS)


def train(out, *options):
    ((code, output, errors),) = finish([start("train_domains.py", out, *options)])
    return code, output + errors


def models(out):
    """The parameters and tested statistics of each variant."""
    with ocp.StandardCheckpointer() as checkpointer:
        return {
            variant: checkpointer.restore((out / "checkpoints" / variant / "seed0" / "model").absolute())
            for variant in VARIANTS
        }


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of most variants, which the tests below look at."""
    out = tmp_path_factory.mktemp("domains") / "run"
    code, output = train(out, *OPTIONS)
    assert code == 0, output
    return out, output


@pytest.mark.processes
class TestRun:
    def test_the_configuration_is_printed_first_and_the_tables_last(self, run):
        _, output = run
        assert output.startswith("Config(")
        assert "batch size 63 -> 64, a multiple of the devices and the domains" in output
        assert (
            output.index("turn-domain         seed 0") < output.index("test accuracy, mean") < output.index("unweigh")
        )

    def test_summary(self, run):
        summary = summary_of(run[0])
        assert summary["configuration"]["batch_size"] == 64
        assert {"python", "jax", "flaxbn", "devices"} <= summary["versions"].keys()
        assert list(summary["variants"]) == VARIANTS
        for variant, outcome in summary["variants"].items():
            kinds = {"running", "domain"} if variant == "mixed-domain-affine" else {"running", "shared", "domain"}
            assert outcome["test_accuracy"].keys() == outcome["consistent"].keys() == kinds
            for tree in (outcome, outcome["seed_spread"]):
                assert all(tree["test_accuracy"][kind].keys() == set(NAMES) for kind in kinds)
                assert {name: len(values) for name, values in tree["validation_accuracy"].items()} == dict.fromkeys(
                    NAMES, EPOCHS
                )
                assert len(tree["train_accuracy"]) == EPOCHS
            assert outcome["seconds"] > 0
            assert all(layer["var_factor"] > 1.01 for layer in outcome["layers"].values())

    def test_it_learns_both_domains(self, run):
        for outcome in summary_of(run[0])["variants"].values():
            assert outcome["test_accuracy"]["domain"]["digits"] > 0.9
            assert outcome["test_accuracy"]["domain"]["digits-blended"] > 0.6

    def test_weighting_recovers_the_balanced_statistics(self, run):
        outcome = summary_of(run[0])["weighting"]
        for layer, unweighted in outcome["unweighted"]["layers"].items():
            weighted = outcome["weighted"]["layers"][layer]
            assert weighted["mean_shift"] < unweighted["mean_shift"] / 2
            assert weighted["var_factor"] - 1 < (unweighted["var_factor"] - 1) / 2
        errors = {kind: 1 - outcome[kind]["test_accuracy"] for kind in ("balanced", "weighted")}
        assert abs(errors["weighted"] - errors["balanced"]) < 0.01

    def test_the_running_average_is_all_that_training_in_turn_alone_keeps_apart(self, run):
        variants = summary_of(run[0])["variants"]
        shared, separate = variants["turn-shared"], variants["turn-domain"]
        assert shared["train_accuracy"] == pytest.approx(separate["train_accuracy"], abs=1e-3)
        assert shared["validation_accuracy"] != separate["validation_accuracy"]
        stored = models(run[0])
        one, two = (stored[variant]["params"] for variant in ("turn-shared", "turn-domain"))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.01), one, two)

    def test_checkpoints_hold_the_statistics_of_every_test(self, run):
        for variant, variables in models(run[0]).items():
            statistics = variables["batch_stats"]
            for kind, batch_stats in statistics.items():
                for layer in batch_stats.values():
                    first, second = layer["mean"]
                    equal = kind == "shared" or (kind == "running" and variant.endswith("shared"))
                    assert np.array_equal(first, second) == equal
            scale = variables["params"]["BatchNorm_0"]["scale"]
            assert scale.shape == ((2, 16) if variant.endswith("affine") else (16,))

    @pytest.mark.parametrize("variant", ["mixed-domain-affine", "turn-domain"])
    def test_each_domain_is_trained_by_its_own_number(self, run, variant):
        statistics = models(run[0])[variant]["batch_stats"]
        running, population = (np.asarray(statistics[kind]["BatchNorm_0"]["mean"]) for kind in ("running", "domain"))
        assert np.all(np.any(running != 0, axis=1))
        towards = np.abs(running[:, None] - (1 - 0.99 ** _updates(variant)) * population).sum(-1)
        assert towards[0, 0] < towards[0, 1]
        assert towards[1, 1] < towards[1, 0]

    def test_metrics_and_figure(self, run):
        lines = results.read_lines(run[0] / "metrics.jsonl")
        order = [(variant, 0, epoch) for variant in VARIANTS for epoch in (1, 2)]
        assert [(line["variant"], line["seed"], line["epoch"]) for line in lines] == order
        assert (run[0] / "accuracy.png").read_bytes().startswith(b"\x89PNG")

    def test_killed_and_resumed_it_ends_with_the_same_bits(self, run, tmp_path):
        killed = tmp_path / "killed"
        process = start("train_domains.py", killed, *OPTIONS)
        while process.poll() is None and len(results.read_lines(killed / "metrics.jsonl")) < 3:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (killed / "summary.json").exists()

        code, output = train(killed, *OPTIONS, "--resume")
        assert code == 0, output
        assert "mixed-shared        seed 0" not in output
        jax.tree.map(np.testing.assert_array_equal, models(killed), models(run[0]))
        expected, actual = summary_of(run[0]), summary_of(killed)
        for outcome in (*expected["variants"].values(), *actual["variants"].values()):
            del outcome["seconds"]
        assert actual == expected


def _updates(variant):
    """How often a domain's running average was updated: 19 batches of each domain in an epoch, or 38 of both."""
    return EPOCHS * (19 if variant.startswith("turn") else 38)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1: got 0"),
        ({"variants": ("turn-shared", "turn-shared")}, "--variants must name at least one variant, each once"),
        ({"datasets": ("digits", "digits")}, r"--datasets must be two different ones: got \('digits', 'digits'\)"),
        ({"imbalance": math.nan}, "--imbalance must be at least 1: got nan"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        train_domains.Config(**options)


def test_too_large_a_batch(tmp_path):
    config = train_domains.Config(batch_size=4096, out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"--batch-size must be at most 1249, the smaller training set: got 4096"):
        train_domains.main(config, Console(quiet=True))
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("variant", "consistent"),
    [
        ("mixed-shared", {"running", "shared"}),
        ("mixed-domain", {"running", "domain"}),
        ("turn-shared", {"domain"}),
        ("turn-domain", {"running", "domain"}),
    ],
)
def test_consistent(variant, consistent):
    kinds = train_domains.VARIANTS[variant]
    assert {kind for kind in ("running", "shared", "domain") if kinds.consistent(kind)} == consistent


class TestBatches:
    SIZES = (13, 30)

    def batches(self, **options):
        return list(train_domains.domain_batches(self.SIZES, 4, **({"mixed": True, "seed": 0, "epoch": 1} | options)))

    @pytest.mark.parametrize("mixed", [True, False])
    def test_every_domain_gives_as_many_examples_each_once(self, mixed):
        batches = self.batches(mixed=mixed)
        assert len(batches) == 6
        index, domain = (np.stack(part) for part in zip(*[(i, np.broadcast_to(d, i.shape)) for i, d in batches]))
        np.testing.assert_array_equal(domain, index >= 13)
        assert np.unique(index).size == index.size
        assert index.max() < 43
        assert domain.sum() == 12

    def test_mixed_batches_have_half_of_each_and_others_one_in_turn(self):
        assert all(list(domain) == [0, 0, 1, 1] for _, domain in self.batches())
        assert [int(domain) for _, domain in self.batches(mixed=False)] == [0, 1, 0, 1, 0, 1]

    def test_domains_of_one_size_have_orders_of_their_own(self):
        batches = train_domains.domain_batches((16, 16), 4, mixed=True, seed=0, epoch=1)
        assert not all(np.array_equal(index[:2], index[2:] - 16) for index, _ in batches)

    def test_order_is_a_matter_of_seed_and_epoch(self):
        first = self.batches()
        for options, same in (({}, True), ({"seed": 1}, False), ({"epoch": 2}, False)):
            assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(first, self.batches(**options))) == same


def test_every_domain_is_tested_by_its_own_number():
    splits = [data.Split(np.zeros((5, 2, 2, 1), np.uint8), np.full(5, number)) for number in range(2)]
    batches = training.evaluation_batches(5, 4)
    domains = {name: (split, batches) for name, split in zip("ab", splits)}
    assert train_domains.accuracies({}, domains, model=_DomainReader()) == {"a": 1, "b": 1}


class _DomainReader(nn.Module):
    @nn.compact
    def __call__(self, images, domain):
        return jnp.broadcast_to(jax.nn.one_hot(domain, 2), (len(images), 2))


class TestData:
    def test_blended_is_the_absolute_difference_from_a_patch(self):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (20, 5, 4, 1), np.uint8)
        photographs = rng.integers(0, 256, (2, 7, 9, 3), np.uint8)
        blended = domain_data.blend(images, photographs, seed=3)
        assert blended.dtype == np.uint8
        patches = [p[y : y + 5, x : x + 4] for p in photographs.astype(int) for y in range(3) for x in range(6)]
        found = set()
        for image, result in zip(images.astype(int), blended):
            matches = [i for i, patch in enumerate(patches) if np.array_equal(result, np.abs(patch - image))]
            assert len(matches) == 1
            found.update(matches)
        assert len(found) > 10
        assert min(found) < 18 <= max(found)

    def test_blended_depends_on_the_seed_only(self):
        images, photographs = np.zeros((20, 8, 8, 1), np.uint8), domain_data.sample_photographs()
        first, again, other = (domain_data.blend(images, photographs, seed=seed) for seed in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)

    def test_digits_and_blended(self):
        plain, blended = domain_data.load(NAMES).values()
        for a, b in zip(plain, blended):
            assert a.images.shape == b.images.shape == (len(a.labels), 8, 8, 3)
            assert (a.images == a.images[..., :1]).all()
            assert not (b.images == b.images[..., :1]).all()
            np.testing.assert_array_equal(a.labels, b.labels)
        for a, b in zip(blended, domain_data.load(NAMES)["digits-blended"]):
            np.testing.assert_array_equal(a.images, b.images)

    def test_the_first_decides_the_size(self, monkeypatch):
        rng = np.random.default_rng(0)

        def square(size):
            images = np.repeat(np.repeat(rng.integers(0, 256, (4, 2, 2, 1)), size // 2, 1), size // 2, 2)
            split = data.Split(images.astype(np.uint8), np.arange(4, dtype=np.int32))
            return data.Dataset(split, split, split)

        sets = {"large": square(8), "small": square(4)}
        monkeypatch.setattr(domain_data.data, "load", lambda name, folder: sets[name])
        loaded = domain_data.load(["small", "large"])
        np.testing.assert_array_equal(loaded["small"].test.images, sets["small"].test.images)
        assert loaded["large"].test.images.shape == (4, 4, 4, 1)
        assert loaded["large"].test.images.dtype == np.uint8
        expected = sets["large"].test.images.reshape(4, 4, 2, 4, 2).mean((2, 4))
        inner = np.abs(loaded["large"].test.images[:, ::3, ::3, 0] - expected[:, ::3, ::3])
        assert inner.max() <= 0.25 * np.abs(np.diff(expected, axis=1)).max()

    def test_unknown_datasets(self, tmp_path):
        with pytest.raises(ValueError, match="fashion is read from a folder of IDX files: got no --data-dir"):
            domain_data.load(["digits", "fashion-blended"])
        with pytest.raises(FileNotFoundError, match=r"must be a folder that holds .*: got .*/fashion\."):
            domain_data.load(["digits", "fashion"], tmp_path)

    def test_other_classes(self, monkeypatch):
        def labelled(classes):
            split = data.Split(np.zeros((classes, 2, 2, 1), np.uint8), np.arange(classes, dtype=np.int32))
            return data.Dataset(split, split, split)

        sets = {"a": labelled(3), "b": labelled(4)}
        monkeypatch.setattr(domain_data.data, "load", lambda name, folder: sets[name])
        with pytest.raises(ValueError, match=r"must have the same classes: got {'a': 3, 'b': 4}"):
            domain_data.load(["a", "b"])

    def test_mnist_and_usps(self, data_dir):
        mnist, usps = domain_data.load(["usps", "mnist"], data_dir).values()
        assert {split.images.shape[1:] for split in (*mnist, *usps)} == {(16, 16, 1)}


class TestWeighting:
    def test_the_upper_half_of_the_classes_is_rarer(self):
        probability = weighting.sampling_probability(np.array([0, 1, 2, 3, 4, 0]), 20)
        np.testing.assert_allclose(probability, np.array([20, 20, 20, 1, 1, 20]) / 82)

    def test_weights_undo_the_sampling(self):
        """One layer on images whose values are their labels: its statistics are those of the labels."""
        labels = np.repeat(np.arange(4, dtype=np.int32), 250)
        split = data.Split(np.broadcast_to(labels[:, None, None, None], (1000, 2, 2, 1)), labels)
        model = _Norm()
        variables = model.init(jax.random.key(0), split.images[:2])
        estimates = weighting.estimates(model, variables, split, imbalance=20, num_samples=40_000, seed=0)
        mean = {kind: float(stats["BatchNorm_0"]["mean"][0]) for kind, stats in estimates.items()}
        assert mean["balanced"] == pytest.approx(1.5, abs=1e-5)
        assert mean["weighted"] == pytest.approx(1.5, abs=0.03)
        assert mean["unweighted"] == pytest.approx((0 + 1 + (2 + 3) / 20) / 2.1, abs=0.02)


class _Norm(nn.Module):
    @nn.compact
    def __call__(self, images, domain=None):
        return flaxbn.BatchNorm(use_running_average=True)(images.astype(np.float32), domain=domain)


def test_distances():
    one = {"norm": {"mean": np.array([1.0, 2.0]), "var": np.array([4.0, 1.0])}}
    other = {"norm": {"mean": np.array([2.0, 2.0]), "var": np.array([1.0, 4.0])}}
    found = domain_results.distances(one, other)["norm"]
    assert found == {"mean_shift": pytest.approx(0.5), "var_factor": pytest.approx(4)}
    assert domain_results.distances(one, one)["norm"] == {"mean_shift": 0, "var_factor": 1}


def test_summary_is_the_mean_over_seeds_by_epoch():
    lines = [
        {"train_accuracy": a, "validation_accuracy": {"x": a / 2}, "seconds": 1, "variant": "v"}
        for a in (0.1, 0.2, 0.3, 0.4)
    ]
    tests = [
        {"variant": "v", "test_accuracy": {"domain": {"x": a}}, "consistent": {}, "layers": {}, "seconds": 2}
        for a in (0.5, 0.7)
    ]
    outcome = domain_results.summarize(lines, tests)["v"]
    assert outcome["train_accuracy"] == pytest.approx([0.2, 0.3])
    assert outcome["validation_accuracy"]["x"] == pytest.approx([0.1, 0.15])
    assert outcome["seed_spread"]["train_accuracy"] == pytest.approx([0.1, 0.1])
    assert outcome["test_accuracy"]["domain"]["x"] == pytest.approx(0.6)
    assert outcome["seed_spread"]["test_accuracy"]["domain"]["x"] == pytest.approx(0.1)
    assert outcome["seconds"] == 4
