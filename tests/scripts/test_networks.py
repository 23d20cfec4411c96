"""What the scripts train and on what: the networks, images with channels, tables by site, augmentation."""

import importlib
import sys

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from script_runs import SCRIPTS

import flaxbn

sys.path.insert(0, str(SCRIPTS))

augmentation, data, estimate_large, networks, train_mnist, training = map(
    importlib.import_module, ("augmentation", "data", "estimate_large", "networks", "train_mnist", "training")
)

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 9, 8, 3), np.uint8)


class TestNetworks:
    @pytest.mark.parametrize("network", networks.NETWORKS.values(), ids=networks.NETWORKS)
    def test_our_layer_and_that_of_flax_have_the_same_variables(self, network):
        made = [
            jax.eval_shape(network(10, norm).init, jax.random.key(0), IMAGES)
            for norm in (flaxbn.BatchNorm, nn.BatchNorm)
        ]
        assert made[0] == made[1]

    def test_resnet20_has_the_parameters_of_the_paper(self):
        variables = jax.eval_shape(networks.ResNet20(10, flaxbn.BatchNorm).init, jax.random.key(0), IMAGES)
        # He et al. 2016, table 6: 0.27 million, with shortcuts that have none. Here two are projected and normalized.
        shortcuts = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
        assert round(sum(p.size for p in jax.tree.leaves(variables["params"])) - shortcuts, -4) == 270_000

    def test_the_network_of_a_checkpoint(self, tmp_path):
        for network in networks.NETWORKS.values():
            made = jax.eval_shape(network(7, flaxbn.BatchNorm).init, jax.random.key(0), IMAGES)
            assert estimate_large.network_of(made["params"], tmp_path) == network(7, flaxbn.BatchNorm)
        with pytest.raises(ValueError, match=r"must be a network of scripts/networks\.py, cnn or resnet20: .* Dense_5"):
            estimate_large.network_of({"Dense_5": {}}, tmp_path)
        narrow = jax.eval_shape(networks.ResNet20(7, flaxbn.BatchNorm, 8).init, jax.random.key(0), IMAGES)
        with pytest.raises(ValueError, match="For layers of other names or sizes replace `load_model`"):
            estimate_large.network_of(narrow["params"], tmp_path)

    def test_nnx_has_the_cnn_only(self):
        with pytest.raises(ValueError, match="--api nnx has --network cnn only: got resnet20"):
            train_mnist.Config(api="nnx", network="resnet20")


class TestAugmentation:
    def test_each_image_is_a_cut_of_the_padded_one(self):
        found = np.asarray(augmentation.augment(jax.random.key(0), IMAGES))
        padded = np.pad(IMAGES, ((0, 0), (4, 4), (4, 4), (0, 0)))
        seen = set()
        for image, whole in zip(found, padded):
            cuts = {(i, j): whole[i : i + 9, j : j + 8] for i in range(9) for j in range(9)}
            places = [(*p, m) for p, cut in cuts.items() for m in (1, -1) if np.array_equal(cut[:, ::m], image)]
            assert len(places) == 1
            seen |= {*places}
        assert len({(i, j) for i, j, _ in seen}) > 1
        assert {m for *_, m in seen} == {1, -1}

    def test_a_step_trains_on_augmented_images(self):
        model, optimizer = networks.CNN(10, flaxbn.BatchNorm, ((4, 1),)), optax.sgd(0.1)
        split = data.Split(IMAGES, np.arange(6, dtype=np.int32))
        state = training.initial_state(jax.random.key(0), IMAGES, model=model, optimizer=optimizer)
        given = {"model": model, "optimizer": optimizer, "update": True}
        seeds = training.augmentation_seeds(2, seed=0, epoch=1)
        own = split._replace(images=np.asarray(augmentation.augment(jax.random.key(seeds[0]), IMAGES)))
        split, own = jax.device_put((split, own))
        steps = ((split, None, seeds[0]), (own,), (split, None, seeds[1]))
        augmented, by_hand, other = (
            float(training.train_step(state, images, np.arange(6), *rest, **given)[2]) for images, *rest in steps
        )
        assert augmented == pytest.approx(by_hand, rel=1e-5)  # the same images through another program
        assert other != pytest.approx(by_hand, rel=1e-3)


def test_images_with_channels(tmp_path):
    for part, images in (("train", np.concatenate([IMAGES, IMAGES])), ("t10k", IMAGES)):
        for name, array in (("images-idx4", images), ("labels-idx1", np.arange(len(images), dtype=np.uint8))):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes()
            (tmp_path / f"{part}-{name}-ubyte").write_bytes(header + array.tobytes())
    loaded = data.load("any", tmp_path)
    assert [split.images.shape for split in loaded] == [(10, 9, 8, 3), (2, 9, 8, 3), (6, 9, 8, 3)]
    np.testing.assert_array_equal(loaded.test.images, IMAGES)


@pytest.mark.parametrize(
    ("name", "sizes", "mean", "tolerance"),
    [
        (
            "cifar10",
            (12500, 2500, 5000),
            (0.4914, 0.4822, 0.4465),
            4e-3,
        ),  # of all 50 000, published; four standard errors
        ("svhn", (3667, 733, 1450), (0.4560, 0.4558, 0.4729), 1e-4),
    ],
)
def test_real_images_with_channels(data_dir, name, sizes, mean, tolerance):
    loaded = data.load(name, data_dir / name)
    assert tuple(len(split.labels) for split in loaded) == sizes
    images = np.concatenate([loaded.train.images, loaded.validation.images])
    np.testing.assert_allclose(images.mean((0, 1, 2)) / 255, mean, atol=tolerance)


class TestSites:
    TABLE = "site,a,b,y\nnorth,1,2.5,0\nsouth,,-3,1\nnorth,4,,2\n"

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
    def test_by_site(self, tmp_path, encoding):
        (tmp_path / "t.csv").write_text(self.TABLE, encoding)
        found = data.load_sites(tmp_path / "t.csv", ["b", "a"], label="y")
        assert [*found] == ["north", "south"]
        np.testing.assert_array_equal(found["north"].values, np.float32([[2.5, 1], [np.nan, 4]]))
        np.testing.assert_array_equal(found["north"].labels, np.int32([0, 2]))
        np.testing.assert_array_equal(found["south"].values, np.float32([[-3, np.nan]]))
        assert (found["south"].values.dtype, found["south"].labels.dtype) == (np.float32, np.int32)

    def test_a_column_that_is_not_there(self, tmp_path):
        (tmp_path / "t.csv").write_text(self.TABLE)
        message = r"must have the columns \['c', 'hospital'\]: got \['site', 'a', 'b', 'y'\]"
        with pytest.raises(ValueError, match=message):
            data.load_sites(tmp_path / "t.csv", ["a", "c"], label="y", site="hospital")

    @pytest.mark.parametrize("line", ["east,x,1,1", "east,1,1,", "east,1,1,0.5", "east,1"])
    def test_a_cell_that_is_no_number(self, tmp_path, line):
        (tmp_path / "t.csv").write_text(self.TABLE + line + "\n")
        with pytest.raises(ValueError, match=r"Line 5 of .* must hold numbers .* whole number in y"):
            data.load_sites(tmp_path / "t.csv", ["a", "b"], label="y")

    @pytest.mark.parametrize("line", ["east,1,1", "east,1,1,1,1"])
    def test_a_line_of_other_length(self, tmp_path, line):
        (tmp_path / "t.csv").write_text(f"site,y,a,b\n{line}\n")
        with pytest.raises(ValueError, match=r"Line 2 of .*: it has more cells or fewer than there are names"):
            data.load_sites(tmp_path / "t.csv", ["a", "b"], label="y")

    def test_four_hospitals(self, data_dir):
        found = data.load_sites(data_dir / "heart" / "heart.csv", ["age", "chol"], label="num")
        sizes = {name: (len(table.labels), int((table.labels > 0).sum())) for name, table in found.items()}
        assert sizes == {"cleveland": (303, 139), "hungary": (294, 106), "switzerland": (123, 115), "va": (200, 149)}
