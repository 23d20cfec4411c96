"""Models as artifacts: what is written predicts like the model, and what would predict wrongly is not written."""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import os
import subprocess
import sys
import zipfile
from collections import namedtuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import programs
from flax.core import freeze
from models import Pair

import flaxbn

RNG = np.random.default_rng(0)
X = RNG.normal(1.0, 2.0, size=(12, 5)).astype(np.float32)
PLATFORMS = ("cpu",) if jax.default_backend() == "cpu" else ("cpu", "cuda", "tpu")
MODULE, METADATA = "model.jax_export", "metadata.json"


class Images(nn.Module):
    """Several inputs and outputs, and a domain for each example."""

    @nn.compact
    def __call__(self, batch, train=False):
        x = nn.Conv(3, (3, 3), strides=2)(batch["image"].astype(jnp.float32) / 255)
        x = flaxbn.BatchNorm(use_running_average=not train, num_domains=2, name="norm")(x, domain=batch["domain"])
        x = flaxbn.BatchRenorm(use_running_average=not train, name="renorm")(x)
        features = x.mean((1, 2)) + batch["more"][1]
        return {"features": features, "rest": (features.argmax(-1), [features[:, 0]], None)}


IMAGES = {
    "image": RNG.integers(0, 256, (12, 6, 6, 1), np.uint8),
    "domain": np.arange(12) % 2,
    "more": (X, X[:, :3].astype(np.float64)),
}


@functools.cache
def estimated(model):
    """Variables of a model of `Pair`, and the moments behind their statistics."""
    variables = model.init(jax.random.key(0), X)
    moments = flaxbn.population_moments(model, variables, X, batch_size=4)
    return {**variables, "batch_stats": flaxbn.to_batch_stats(moments, variables["batch_stats"])}, moments


@functools.cache
def estimated_images():
    variables = jax.jit(Images().init)(jax.random.key(0), IMAGES)
    moments = flaxbn.population_moments(Images(), variables, IMAGES, batch_size=12)
    return {**variables, "batch_stats": flaxbn.to_batch_stats(moments, variables["batch_stats"])}, moments


NET = Pair()
VARIABLES, MOMENTS = estimated(NET)


def export(path, *, model=NET, variables=VARIABLES, example=X, platforms=PLATFORMS, **options):
    flaxbn.export_inference(model, variables, example, path / "model.zip", platforms=platforms, **options)
    return path / "model.zip"


def assert_same_predictions(inference, model, variables, batch, call=lambda m, b: m(b)):
    apply = jax.jit(functools.partial(model.apply, method=call))
    for size in (1, 3, 7):
        part = jax.tree.map(lambda a, size=size: a[:size], batch)
        expected, found = apply(variables, part), inference(part)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """An artifact for all platforms, with moments."""
    path = tmp_path_factory.mktemp("artifact")
    return export(path, platforms=("cpu", "cuda", "tpu"), moments=MOMENTS)


@pytest.mark.parametrize("norm", [nn.BatchNorm, flaxbn.BatchNorm, flaxbn.BatchRenorm])
def test_predictions_are_those_of_the_model_at_any_batch_size(tmp_path, norm):
    model = Pair(norm)
    variables, _ = estimated(model)
    assert_same_predictions(
        flaxbn.load_inference(export(tmp_path, model=model, variables=variables)), model, variables, X
    )


def test_several_inputs_outputs_and_domains(tmp_path):
    variables, moments = estimated_images()
    path = export(tmp_path, model=Images(), variables=variables, example=IMAGES, moments=moments)
    inference = flaxbn.load_inference(path)
    assert_same_predictions(inference, Images(), variables, IMAGES)
    assert inference.metadata["statistics"] == {"norm": {"count": 6 * 9}, "renorm": {"count": 12 * 9}}
    assert inference.metadata["inputs"] == {
        "domain": {"shape": ["batch"], "dtype": "int32"},
        "image": {"shape": ["batch", 6, 6, 1], "dtype": "uint8"},
        "more/0": {"shape": ["batch", 5], "dtype": "float32"},
        "more/1": {"shape": ["batch", 3], "dtype": "float32"},
    }
    assert inference.metadata["outputs"] == {
        "features": {"shape": ["batch", 3], "dtype": "float32"},
        "rest/0": {"shape": ["batch"], "dtype": "int32"},
        "rest/1/0": {"shape": ["batch"], "dtype": "float32"},
    }


def test_a_call_of_its_own(tmp_path):
    def call(module, batch):
        return jax.nn.softmax(module(batch["x"]) * 2)

    path = export(tmp_path, example={"x": X}, call=call)
    assert_same_predictions(flaxbn.load_inference(path), NET, VARIABLES, {"x": X}, call)


def test_frozen_and_sharded_variables(tmp_path, devices):
    mesh = jax.sharding.Mesh(np.asarray(devices), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    variables = freeze(jax.device_put(VARIABLES, everywhere))
    path = export(tmp_path, variables=variables, moments=MOMENTS)
    assert_same_predictions(flaxbn.load_inference(path), NET, VARIABLES, X)


class Counts(nn.Module):
    """No batch-norm layer; keeps a count in its variables, which an artifact does not have."""

    @nn.compact
    def __call__(self, x):
        calls = self.variable("cache", "calls", jnp.zeros, ())
        calls.value = calls.value + 1
        return nn.Dense(3)(x) * calls.value


def test_the_precision_of_the_check_is_not_exported(tmp_path):
    text = flaxbn.load_inference(export(tmp_path)).exported.mlir_module()
    assert "dot_general" in text
    assert "HIGHEST" not in text


def test_a_model_without_batch_norm_layers_has_no_statistics(tmp_path):
    variables = Counts().init(jax.random.key(0), X)
    inference = flaxbn.load_inference(export(tmp_path, model=Counts(), variables=variables))
    assert inference.metadata["statistics"] == {}
    np.testing.assert_allclose(inference(X), Counts().apply(variables, X, mutable=["cache"])[0], rtol=1e-5)


class NormScan(nn.Module):
    """Layers in a scan, whose statistics are rows of one array."""

    @nn.compact
    def __call__(self, x):
        def step(module, x, _):
            return nn.BatchNorm(use_running_average=True, name="norm", parent=module)(x), None

        scan = nn.scan(step, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3)
        return scan(self, x, None)[0]


def test_layers_in_a_scan(tmp_path):
    variables = NormScan().init(jax.random.key(0), X)
    variables["batch_stats"] = flaxbn.estimate_population_stats(NormScan(), variables, X, batch_size=6)
    path = export(tmp_path, model=NormScan(), variables=variables)
    assert_same_predictions(flaxbn.load_inference(path), NormScan(), variables, X)
    stats = variables["batch_stats"]["norm"]
    variables["batch_stats"]["norm"] = {k: a.at[1].set(float(k == "var")) for k, a in stats.items()}
    with pytest.raises(ValueError, match=r"'norm' \(at \[1\]\) were never estimated"):
        export(tmp_path, model=NormScan(), variables=variables)


class TestMetadata:
    def test_contents(self, artifact):
        metadata = json.loads(zipfile.ZipFile(artifact).read(METADATA))
        assert metadata == flaxbn.load_inference(artifact).metadata
        versions = metadata.pop("versions")
        assert set(versions) == {"flaxbn", "jax", "jaxlib", "flax", "python"}
        assert versions["jax"] == jax.__version__
        assert metadata == {
            "format_version": 1,
            "platforms": ["cpu", "cuda", "tpu"],
            "inputs": {"": {"shape": ["batch", 5], "dtype": "float32"}},
            "outputs": {"": {"shape": ["batch", 4], "dtype": "float32"}},
            "statistics": {"first": {"count": 12}, "second": {"count": 12}},
        }

    def test_without_moments_the_origin_is_unknown(self, tmp_path):
        statistics = flaxbn.load_inference(export(tmp_path)).metadata["statistics"]
        assert statistics == {"first": {"count": None}, "second": {"count": None}}

    def test_moments_of_some_layers_only(self, tmp_path):
        statistics = flaxbn.load_inference(export(tmp_path, moments={"first": MOMENTS["first"]})).metadata["statistics"]
        assert statistics == {"first": {"count": 12}, "second": {"count": None}}

    def test_counts_of_domains_that_differ(self, tmp_path):
        example = {**IMAGES, "domain": np.arange(12) % 3 // 2}
        variables, _ = estimated_images()
        moments = flaxbn.population_moments(Images(), variables, example, batch_size=12)
        variables = {**variables, "batch_stats": flaxbn.to_batch_stats(moments, variables["batch_stats"])}
        path = export(tmp_path, model=Images(), variables=variables, example=example, moments=moments)
        assert flaxbn.load_inference(path).metadata["statistics"]["norm"] == {"count": [8 * 9, 4 * 9]}

    def test_layers_that_do_not_run_are_not_listed(self, tmp_path):
        path = export(tmp_path, call=lambda m, x: x + 1)
        assert flaxbn.load_inference(path).metadata["statistics"] == {}

    def test_the_same_model_gives_the_same_bytes(self, artifact, tmp_path):
        again = export(tmp_path, platforms=("cpu", "cuda", "tpu"), moments=MOMENTS)
        assert again.read_bytes() == artifact.read_bytes()
        assert {member.date_time for member in zipfile.ZipFile(again).infolist()} == {(1980, 1, 1, 0, 0, 0)}

    def test_no_source_paths(self, artifact):
        before = jax.config.jax_traceback_in_locations_limit
        assert b".py" not in zipfile.ZipFile(artifact).read(MODULE)
        assert before == jax.config.jax_traceback_in_locations_limit > 0


def with_statistics(**changed):
    return {**VARIABLES, "batch_stats": {**VARIABLES["batch_stats"], **changed}}


class AddsOne(nn.BatchNorm):
    """Runs the layer that it is."""

    def __call__(self, x, **options):
        return super().__call__(x + 1, **options)


class Stuck(nn.Module):
    """One layer is in training mode, whatever is asked for."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name="first")(x)
        return nn.BatchNorm(use_running_average=False, name="second")(x)


INITIAL = {"mean": jnp.zeros(4), "var": jnp.ones(4)}


class TestRefusals:
    """Nothing is written, and the message has the cure."""

    @pytest.fixture(autouse=True)
    @staticmethod
    def nothing_is_written(tmp_path):
        yield
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("norm", [nn.BatchNorm, flaxbn.BatchNorm, flaxbn.BatchRenorm, AddsOne])
    def test_training_mode(self, tmp_path, norm):
        model = Pair(norm)
        message = (
            rf"evaluation mode: {norm.__name__} 'first' normalizes by the batch.*m\(b, train=False\).*estimate_pop"
        )
        with pytest.raises(ValueError, match=message):
            export(tmp_path, model=model, variables=estimated(model)[0], call=lambda m, x: m(x, train=True))

    def test_a_single_layer_stuck_in_training_mode(self, tmp_path):
        with pytest.raises(ValueError, match="evaluation mode: BatchNorm 'second' normalizes by the batch"):
            export(tmp_path, model=Stuck(), variables=Stuck().init(jax.random.key(0), X))

    def test_an_update_in_evaluation(self, tmp_path):
        model = flaxbn.BatchNorm(use_running_average=True)
        with pytest.raises(ValueError, match=r"BatchNorm '\(the model itself\)' updates its running average"):
            export(
                tmp_path,
                model=model,
                variables=model.init(jax.random.key(0), X),
                call=lambda m, x: m(x, update_running_average=True),
            )

    def test_dropout(self, tmp_path):
        model = nn.Dropout(0.5)
        with pytest.raises(ValueError, match=r"Dropout '\(the model itself\)' drops values at random"):
            export(tmp_path, model=model, variables={}, call=lambda m, x: m(x, deterministic=False))

    def test_all_layers_never_estimated(self, tmp_path):
        variables = NET.init(jax.random.key(0), X)
        message = r"those of 'first', 'second' were never estimated.*mean 0 and var.*flaxbn.estimate_population_stats"
        with pytest.raises(ValueError, match=message):
            export(tmp_path, variables=variables)

    def test_one_layer_never_estimated(self, tmp_path):
        with pytest.raises(ValueError, match="those of 'second' were never estimated"):
            export(tmp_path, variables=with_statistics(second=INITIAL))
        with pytest.raises(ValueError, match="those of 'second' were never estimated"):
            export(tmp_path, variables=with_statistics(second=INITIAL), moments={"first": MOMENTS["first"]})

    def test_one_domain_never_estimated(self, tmp_path):
        variables, _ = estimated_images()
        norm = variables["batch_stats"]["norm"]
        norm = {"mean": norm["mean"].at[1].set(0), "var": norm["var"].at[1].set(1)}
        variables = {**variables, "batch_stats": {**variables["batch_stats"], "norm": norm}}
        with pytest.raises(ValueError, match=r"those of 'norm' \(at \[1\]\) were never estimated.*every domain"):
            export(tmp_path, model=Images(), variables=variables, example=IMAGES)

    @pytest.mark.parametrize(
        ("changed", "names"),
        [
            ({"batch_stats": {"second": {"var": np.inf}}}, "'batch_stats/second/var' hold"),
            ({"params": {"Dense_0": {"kernel": np.nan}}}, "'params/Dense_0/kernel' hold"),
            (
                {"batch_stats": {"first": {"mean": -np.inf}}, "params": {"Dense_0": {"bias": np.nan}}},
                "'batch_stats/first/mean', 'params/Dense_0/bias' hold",
            ),
        ],
    )
    def test_what_is_not_finite(self, tmp_path, changed, names):
        """A single value of an array, in any dtype."""
        variables = jax.tree.map(np.array, VARIABLES)
        for collection, layers in changed.items():
            for layer, leaves in layers.items():
                for name, value in leaves.items():
                    leaf = variables[collection][layer][name].astype(jnp.bfloat16)
                    leaf.flat[-1] = value
                    variables[collection][layer][name] = leaf
        with pytest.raises(ValueError, match=rf"must be finite: {names} NaN or infinity.*a smaller learning rate"):
            export(tmp_path, variables=variables)

    def test_of_many_arrays_that_are_not_finite_some_are_named(self, tmp_path):
        layers = {f"layer{i}": {"kernel": np.full(2, np.nan, np.float32)} for i in range(10)}
        with pytest.raises(ValueError, match="'params/layer7/kernel' and 2 more hold NaN"):
            export(tmp_path, variables={**VARIABLES, "params": layers})

    def test_no_stored_statistics(self, tmp_path):
        with pytest.raises(ValueError, match="BatchNorm 'second' has no stored statistics"):
            export(tmp_path, variables={**VARIABLES, "batch_stats": {"first": VARIABLES["batch_stats"]["first"]}})

    def test_predictions_that_depend_on_the_batch(self, tmp_path):
        with pytest.raises(ValueError, match="what BatchNorm 'second' receives changes with the other examples"):
            export(tmp_path, model=Pair(mix=lambda x: x - x.mean(0, keepdims=True)))
        with pytest.raises(ValueError, match="output 0 of `call`"):
            export(tmp_path, call=lambda m, x: m(x) / m(x).std(0, keepdims=True))

    def test_moments_of_other_statistics(self, tmp_path):
        other = jax.tree.map(lambda a: a * 2, MOMENTS["second"])
        message = r"`moments` must be those.*not in 'second'\..*flaxbn.to_batch_stats"
        with pytest.raises(ValueError, match=message):
            export(tmp_path, moments={**MOMENTS, "second": other})

    def test_moments_of_another_model(self, tmp_path):
        with pytest.raises(ValueError, match=r"`moments` must be a tree of Moments.*at 'third'"):
            export(tmp_path, moments={"third": MOMENTS["first"]})

    def test_a_model_that_needs_to_know_the_batch_size(self, tmp_path):
        def call(module, x):
            return module(x) + np.zeros((len(x), 1), np.float32)

        with pytest.raises(TypeError, match=r"raised while exporting for cpu.* with a batch of any size"):
            export(tmp_path, call=call)

    @pytest.mark.parametrize(
        ("error", "message", "options"),
        [
            (TypeError, "must be a flax.linen.Module: got function", {"model": lambda x: x}),
            (ValueError, r"`example` must hold at least two examples.*got 1\.", {"example": X[:1]}),
            (ValueError, r"common leading sample axis: got \(12, 5\), \(11, 5\)", {"example": (X, X[1:])}),
            (ValueError, r"some of cpu, cuda, rocm, tpu.*got \('gpu',\).*are \"cuda\"", {"platforms": ("gpu",)}),
            (ValueError, r"in a tuple: got 'cpu'", {"platforms": "cpu"}),
            (ValueError, r"some of cpu, .*got \(\)", {"platforms": ()}),
            (ValueError, r"`example` must be an array, or arrays in .*got FrozenDict\.", {"example": freeze({"x": X})}),
            (ValueError, r"`example` must .*string keys.*got dict with the keys \[0\]", {"example": [{0: X}]}),
            (
                ValueError,
                r"What `call` returns must be an array, or .*got Pair\..*in `call`",
                {"call": lambda m, x: (x, namedtuple("Pair", "a b")(m(x), x))},
            ),
        ],
    )
    def test_arguments(self, tmp_path, error, message, options):
        with pytest.raises(error, match=message):
            export(tmp_path, **options)

    def test_traced_arguments(self, tmp_path):
        with pytest.raises(TypeError, match="`variables` must be concrete arrays"):
            jax.eval_shape(lambda v: export(tmp_path, variables=v), VARIABLES)

    def test_flatbuffers_missing(self, tmp_path, monkeypatch):
        _hide(monkeypatch, "flatbuffers")
        with pytest.raises(ModuleNotFoundError, match=r"pip install flatbuffers.*flaxbn with its extra, `export`"):
            export(tmp_path)
        with pytest.raises(ModuleNotFoundError, match="pip install flatbuffers"):
            flaxbn.load_inference(tmp_path / "model.zip")


def _hide(monkeypatch, hidden):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == hidden else find(name))


def test_estimated_statistics_of_0_and_1_are_told_by_their_moments(tmp_path):
    """Mean 0 and variance 1 may be those of data; the moments tell."""
    model, x = nn.BatchNorm(use_running_average=True), np.repeat(np.float32([[-1], [1]]), 3, 0)
    variables = model.init(jax.random.key(0), x)
    moments = flaxbn.population_moments(model, variables, x, batch_size=6)
    with pytest.raises(ValueError, match="never estimated"):
        export(tmp_path, model=model, variables=variables, example=x)
    path = export(tmp_path, model=model, variables=variables, example=x, moments=moments)
    assert flaxbn.load_inference(path).metadata["statistics"] == {"": {"count": 6}}


def test_other_variables_may_be_infinite(tmp_path):
    """A mask that is added to logits, say."""
    mask = np.float32([[0, -np.inf]])
    variables = {"constants": {"mask": mask}, **nn.Dense(2).init(jax.random.key(0), X)}

    def call(module, x):
        return module(x) + module.variables["constants"]["mask"]

    path = export(tmp_path, model=nn.Dense(2), variables=variables, call=call)
    assert np.all(flaxbn.load_inference(path)(X)[:, 1] == -np.inf)


def test_layers_that_do_not_run_need_no_statistics(tmp_path):
    variables = {**VARIABLES, "batch_stats": {**VARIABLES["batch_stats"], "unused": INITIAL}}
    path = export(tmp_path, variables=variables)
    assert_same_predictions(flaxbn.load_inference(path), NET, VARIABLES, X)


class TestWriting:
    def test_an_export_that_is_refused_leaves_the_old_file(self, tmp_path):
        path = export(tmp_path)
        before = path.read_bytes()
        with pytest.raises(ValueError, match="never estimated"):
            export(tmp_path, variables=with_statistics(second=INITIAL))
        assert path.read_bytes() == before

    def test_a_file_is_replaced_at_one_stroke(self, tmp_path):
        """Whoever reads the old file still has it."""
        path = export(tmp_path)
        before = path.read_bytes()
        with path.open("rb") as old:
            export(tmp_path, variables=with_statistics(second={"mean": jnp.ones(4), "var": jnp.ones(4)}))
            assert old.read() == before
        assert path.read_bytes() != before

    def test_an_export_that_fails_in_writing_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "model.zip"
        path.write_bytes(b"old")

        def fail(file):
            raise OSError("no space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(OSError, match="no space left"):
                export(tmp_path)
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("model.zip", b"old")]

    def test_variables_are_left_alone(self, tmp_path):
        before = jax.tree.map(np.array, VARIABLES)
        export(tmp_path)
        jax.tree.map(np.testing.assert_array_equal, VARIABLES, before)


def rewritten(artifact, path, *, module=None, metadata=None, **fields):
    """A copy of an artifact with other contents, whose checksums are those of the contents."""
    members = zipfile.ZipFile(artifact)
    module = members.read(MODULE) if module is None else module
    known = json.loads(members.read(METADATA)) | fields
    with zipfile.ZipFile(path / "model.zip", "w") as archive:
        archive.writestr(MODULE, module)
        archive.writestr(METADATA, json.dumps(known) if metadata is None else metadata)
    return path / "model.zip"


class TestReading:
    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"model\.zip"):
            flaxbn.load_inference(tmp_path / "model.zip")

    @pytest.mark.parametrize("content", [b"", b"junk" * 100, b"PK\x03\x04junk", b"\x80\x04K\x01."])
    def test_junk(self, tmp_path, content):
        path = tmp_path / "model.zip"
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"must be a zip archive.*of {len(content)} bytes, is none.*export it anew"
        ):
            flaxbn.load_inference(path)

    @pytest.mark.parametrize("part", [0.001, 0.1, 0.5, 0.9, 0.99, 0.9999])
    def test_truncation(self, artifact, tmp_path, part):
        content = artifact.read_bytes()
        path = tmp_path / "model.zip"
        path.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(ValueError, match=r"must be a zip archive.*cut off"):
            flaxbn.load_inference(path)

    def test_every_damaged_part_is_noticed(self, artifact, tmp_path):
        """A byte changed anywhere is an error, or was of no consequence."""
        content, expected = artifact.read_bytes(), flaxbn.load_inference(artifact)
        path = tmp_path / "model.zip"
        for place in range(0, len(content), len(content) // 97):
            damaged = bytearray(content)
            damaged[place] ^= 0xFF
            path.write_bytes(damaged)
            with contextlib.suppress(ValueError):
                found = flaxbn.load_inference(path)
                assert found.metadata == expected.metadata
                assert found.exported.mlir_module_serialized == expected.exported.mlir_module_serialized

    @pytest.mark.parametrize("name", [MODULE, METADATA])
    def test_a_missing_member(self, tmp_path, name):
        with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
            archive.writestr(name, "{}")
        with pytest.raises(ValueError, match=r"zip archive with model\.jax_export and metadata\.json"):
            flaxbn.load_inference(tmp_path / "model.zip")

    @pytest.mark.parametrize(
        "metadata",
        ["", "{", "[1]", "{}", "3", '{"format_version": 1}', '{"format_version": "1"}', "[" * 100_000, b"\xff"],
    )
    def test_metadata_that_are_none(self, artifact, tmp_path, metadata):
        with pytest.raises(ValueError, match=r"metadata\.json must be a JSON object with format_version, versions"):
            flaxbn.load_inference(rewritten(artifact, tmp_path, metadata=metadata))

    @pytest.mark.parametrize("fields", [{"format_version": 0}, {"format_version": True}, {"platforms": "cpu"}])
    def test_fields_of_another_type(self, artifact, tmp_path, fields):
        with pytest.raises(ValueError, match=r"metadata\.json must be a JSON object"):
            flaxbn.load_inference(rewritten(artifact, tmp_path, **fields))

    def test_a_later_format(self, artifact, tmp_path):
        with pytest.raises(ValueError, match=r"must be 1, the newest.*is 2\. Read it with a newer flaxbn"):
            flaxbn.load_inference(rewritten(artifact, tmp_path, metadata='{"format_version": 2}'))

    @pytest.mark.parametrize("name", [MODULE, METADATA])
    @pytest.mark.parametrize("part", [0.0, 0.5, 0.999])
    def test_a_changed_byte_of_a_member(self, artifact, tmp_path, name, part):
        """Either member is covered by the archive's own checksum; the module has no other one."""
        content = bytearray(artifact.read_bytes())
        member = zipfile.ZipFile(artifact).read(name)
        content[content.index(member) + int(len(member) * part)] ^= 1
        (tmp_path / "model.zip").write_bytes(content)
        with pytest.raises(ValueError, match=r"must be a zip archive.*damaged") as caught:
            flaxbn.load_inference(tmp_path / "model.zip")
        assert "CRC" in str(caught.value.__cause__)

    def test_fields_that_earlier_artifacts_have(self, artifact, tmp_path):
        inference = flaxbn.load_inference(rewritten(artifact, tmp_path, module_sha256="0" * 64))
        np.testing.assert_array_equal(inference(X), flaxbn.load_inference(artifact)(X))

    @pytest.mark.parametrize("module", [b"", b"junk" * 100])
    def test_a_module_that_jax_cannot_read(self, artifact, tmp_path, module):
        message = r"must be a module that this jax, .*written by jax 99\.1, is none.*install a jax near that version"
        with pytest.raises(ValueError, match=message) as caught:
            flaxbn.load_inference(rewritten(artifact, tmp_path, module=module, versions={"jax": "99.1"}))
        assert caught.value.__cause__ is not None

    def test_a_module_that_is_cut_off(self, artifact, tmp_path):
        module = zipfile.ZipFile(artifact).read(MODULE)
        with pytest.raises(ValueError, match="must be a module that this jax"):
            flaxbn.load_inference(rewritten(artifact, tmp_path, module=module[: len(module) // 2]))

    def test_a_calling_convention_of_a_later_jax(self, artifact, tmp_path):
        later = dataclasses.replace(flaxbn.load_inference(artifact).exported, calling_convention_version=99)
        with pytest.raises(ValueError, match="must be a module that this jax") as caught:
            flaxbn.load_inference(rewritten(artifact, tmp_path, module=bytes(later.serialize())))
        assert "got 99." in str(caught.value.__cause__)

    def test_a_program_of_a_later_jax(self, artifact, tmp_path):
        """Its envelope can be read, and the program within cannot."""
        later = dataclasses.replace(flaxbn.load_inference(artifact).exported, mlir_module_serialized=b"later")
        with pytest.raises(ValueError, match="must be a module that this jax") as caught:
            flaxbn.load_inference(rewritten(artifact, tmp_path, module=bytes(later.serialize())))
        assert "StableHLO" in str(caught.value.__cause__)

    def test_metadata_of_another_module(self, artifact, tmp_path):
        inputs = {"": {"shape": ["batch", 6], "dtype": "float32"}}
        with pytest.raises(ValueError, match=r"metadata\.json must describe the module beside it"):
            flaxbn.load_inference(rewritten(artifact, tmp_path, inputs=inputs))

    def test_another_platform(self, tmp_path):
        other = ("cuda",) if jax.default_backend() != "gpu" else ("tpu",)
        path = export(tmp_path, platforms=other)
        message = rf"model\.zip is for {other[0]}, and jax runs on {jax.default_backend()} here.*`platforms`"
        with pytest.raises(ValueError, match=message):
            flaxbn.load_inference(path)

    def test_64_bits(self, tmp_path):
        with jax.enable_x64(True):
            path = export(tmp_path, example=X.astype(np.float64))
            assert flaxbn.load_inference(path)(X.astype(np.float64)).dtype == np.float64
        with pytest.raises(ValueError, match=r"model\.zip has float64\. Turn them on, by `jax\.config\.update"):
            flaxbn.load_inference(path)

    def test_pickles_are_not_read(self, tmp_path):
        """An array file, which numpy would unpickle, is junk like any other."""
        np.save(tmp_path / "a.npy", np.array([print], object), allow_pickle=True)
        content = io.BytesIO((tmp_path / "a.npy").read_bytes())
        (tmp_path / "model.zip").write_bytes(content.getvalue())
        with pytest.raises(ValueError, match="must be a zip archive"):
            flaxbn.load_inference(tmp_path / "model.zip")


class TestCalling:
    @pytest.mark.parametrize(
        ("batch", "message"),
        [
            (X[0], r"float32\[batch,5\]; got float32\[5\].*x\[None\]"),
            (X[:0], r"at least 1.*got float32\[0,5\]"),
            (X[:, :4], r"got float32\[12,4\]"),
            (X.astype(np.int32), r"float32\[batch,5\]; got int32\[12,5\]. Convert the dtype"),
            (np.float32(1), r"got float32\[\]"),
            ({"x": X}, r"structure of the example that was exported, PyTreeDef\(\*\): got PyTreeDef\({'x': \*}\)"),
        ],
    )
    def test_another_batch(self, artifact, batch, message):
        with pytest.raises(ValueError, match=message):
            flaxbn.load_inference(artifact)(batch)

    def test_examples_of_different_number(self, tmp_path):
        inference = flaxbn.load_inference(export(tmp_path, example=(X, X), call=lambda m, xs: m(xs[0]) + m(xs[1])))
        with pytest.raises(ValueError, match=r"one number of examples.*got 0 float32\[12,5\], 1 float32\[11,5\]"):
            inference((X, X[1:]))

    def test_wide_arrays_are_converted_as_jax_does(self, artifact):
        inference = flaxbn.load_inference(artifact)
        np.testing.assert_array_equal(inference(X.astype(np.float64)), inference(X))

    def test_a_size_is_compiled_once(self, artifact):
        inference = flaxbn.load_inference(artifact)
        assert len(programs(lambda: [inference(X[:size]) for size in (3, 4)])) >= 2
        assert programs(lambda: [inference(X[:size]) for size in (3, 4)]) == []

    def test_in_a_compiled_function(self, artifact):
        inference = flaxbn.load_inference(artifact)
        found = jax.jit(lambda x: inference(x) * 2)(X)
        np.testing.assert_allclose(found, inference(X) * 2, rtol=1e-6)


SERVE = """
import sys, zipfile
import jax
import numpy as np
module = zipfile.ZipFile("model.zip").read("model.jax_export")
predict = jax.jit(jax.export.deserialize(bytearray(module)).call)
x = np.load("x.npy")
np.save("y.npy", np.concatenate([predict(x[:1]), predict(x[1:])]))
assert not {"flax", "flaxbn", "optax", "orbax", "jaxtyping"} & {name.partition(".")[0] for name in sys.modules}
"""

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"flax", "flaxbn", "optax", "orbax", "jaxtyping"}:
            raise ModuleNotFoundError(f"{name} is not to be imported", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run_blocked(code, folder):
    (folder / "block").mkdir(exist_ok=True)
    (folder / "block" / "sitecustomize.py").write_text(BLOCK)
    environment = os.environ | {"PYTHONPATH": str(folder / "block"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_serving_needs_neither_flax_nor_flaxbn(artifact, tmp_path):
    (tmp_path / "model.zip").write_bytes(artifact.read_bytes())
    np.save(tmp_path / "x.npy", X)
    for package in ("flax", "flaxbn"):
        assert "is not to be imported" in run_blocked(f"import {package}", tmp_path).stderr
    served = run_blocked(SERVE, tmp_path)
    assert served.returncode == 0, served.stderr
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), NET.apply(VARIABLES, X), rtol=1e-5, atol=1e-5)
