"""Files that want memory, time or more than they say: each is an error at once, whatever was packed into them."""

import io
import json
import os
import struct
import subprocess
import sys
import time
import zipfile

import flatbuffers
import flax.linen as nn
import jax
import numpy as np
import pytest

import flaxbn

MODULE, METADATA = "model.jax_export", "metadata.json"
AT_ONCE = 2.0
"""Seconds, of which a file takes hundredths; what is to be refused took minutes, or never ended."""


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """What an artifact holds."""
    path = tmp_path_factory.mktemp("hostile") / "model.zip"
    model, x = nn.Dense(2), np.float32([[1, 2, 3], [4, 5, 6]])
    flaxbn.export_inference(model, model.init(jax.random.key(0), x), x, path, platforms=(jax.default_backend(),))
    flaxbn.load_inference(path)
    return {name: zipfile.ZipFile(path).read(name) for name in (METADATA, MODULE)}


def packed(members, *, compression=zipfile.ZIP_STORED, more=(), **contents):
    archive = io.BytesIO()
    changed = {METADATA: contents.get("metadata"), MODULE: contents.get("module")}
    with zipfile.ZipFile(archive, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content if changed[name] is None else changed[name])
        for name in more:
            file.writestr(name, b"")
    return archive.getvalue()


def refused(path, content=None):
    """The message of the error that a file is, which comes soon, is short, and has nothing that a terminal obeys."""
    if content is not None:
        path.write_bytes(content)
    begun = time.perf_counter()
    with pytest.raises(ValueError, match="model") as caught:
        flaxbn.load_inference(path)
    assert time.perf_counter() - begun < AT_ONCE
    message = str(caught.value)
    assert len(message) < 1000
    assert message.isprintable()
    return message, caught.value.__cause__


class TestArchives:
    """What the directory of an archive says is not believed."""

    OTHERS = r"each once, neither compressed nor encrypted, and nothing else"

    @pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_compressed_members(self, members, tmp_path, compression):
        assert self.OTHERS in refused(tmp_path / "model.zip", packed(members, compression=compression))[0]

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    @pytest.mark.parametrize("more", [["x"], [MODULE], [METADATA], ["../model.jax_export"], map(str, range(1000))])
    def test_more_members(self, members, tmp_path, more):
        assert self.OTHERS in refused(tmp_path / "model.zip", packed(members, more=more))[0]

    def test_so_many_members_that_the_directory_is_not_read(self, members, tmp_path):
        message, cause = refused(tmp_path / "model.zip", packed(members, more=map(str, range(4000))))
        assert "must be a zip archive" in message
        assert "At most 131072 bytes can be read at once" in str(cause)

    @pytest.mark.parametrize(
        ("offset", "form", "value"),
        [(20, "<II", (0xFFFFFFF0, 0xFFFFFFF0)), (24, "<I", (0xFFFFFFF0,)), (8, "<H", (1,)), (10, "<H", (8,))],
        ids=["larger than the file", "lengths that differ", "encrypted", "compressed"],
    )
    def test_entries_that_lie(self, members, tmp_path, offset, form, value):
        content = bytearray(packed(members))
        struct.pack_into(form, content, content.rindex(b"PK\x01\x02") + offset, *value)
        assert self.OTHERS in refused(tmp_path / "model.zip", content)[0]

    def test_members_that_overlap(self, members, tmp_path):
        content = bytearray(packed(members))
        first, second = content.index(b"PK\x01\x02"), content.rindex(b"PK\x01\x02")
        content[second + 42 : second + 46] = content[first + 42 : first + 46]
        assert "must be a zip archive" in refused(tmp_path / "model.zip", content)[0]

    def test_an_archive_in_an_archive(self, members, tmp_path):
        content = packed(members, module=packed(members))
        assert "must be a module that this jax" in refused(tmp_path / "model.zip", content)[0]


class TestFiles:
    @pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "."])
    def test_devices_and_folders(self, path):
        if not os.path.exists(path):
            pytest.skip(f"no {path} here")
        with pytest.raises(ValueError, match=r"must be a file: .* is a folder, a pipe or a device\. Name the file"):
            flaxbn.load_inference(path)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
    def test_a_pipe_to_which_nobody_writes(self, tmp_path):
        os.mkfifo(tmp_path / "model")
        assert "must be a file" in refused(tmp_path / "model")[0]


class TestMetadata:
    @pytest.mark.parametrize(
        "fields",
        [
            {"versions": {"jax": "9" * 101}},
            {"versions": {"jax": "\x1b[2J"}},
            {"versions": {"jax": 9}},
            {"versions": []},
            {"platforms": ["x" * 101]},
            {"platforms": [["cpu"]]},
            {"format_version": 10**7},
        ],
    )
    def test_what_a_message_would_show(self, members, tmp_path, fields):
        metadata = json.dumps(json.loads(members[METADATA]) | fields)
        assert "must be a JSON object" in refused(tmp_path / "model.zip", packed(members, metadata=metadata))[0]

    def test_too_long(self, members, tmp_path):
        message, _ = refused(tmp_path / "model.zip", packed(members, metadata=b" " * (4 << 20) + members[METADATA]))
        assert f"must have at most 4194304 bytes: got {(4 << 20) + len(members[METADATA])}" in message

    @pytest.mark.parametrize("metadata", [b"[" * (4 << 20), b'{"format_version": ' + b"9" * 100_000 + b"}"])
    def test_deep_and_long_numbers(self, members, tmp_path, metadata):
        assert "must be a JSON object" in refused(tmp_path / "model.zip", packed(members, metadata=metadata))[0]

    def test_arrays_of_another_module(self, members, tmp_path):
        known = json.loads(members[METADATA])
        for name, part in {"inputs": {"shape": ["batch", 10**15]}, "outputs": {"dtype": "float64"}}.items():
            metadata = json.dumps(known | {name: {"": known[name][""] | part}})
            message, _ = refused(tmp_path / "model.zip", packed(members, metadata=metadata))
            assert "must describe the module beside it" in message

    def test_what_would_not_be_read_is_not_written(self, tmp_path):
        """A count for each channel, of which there are many, that all differ."""
        channels = 240_000
        model, x = nn.BatchNorm(use_running_average=True, use_scale=False, use_bias=False), np.eye(2, channels)
        stats = {"mean": np.zeros(channels, np.float32), "var": np.full(channels, 2, np.float32)}
        moments = flaxbn.Moments(1e9 + np.arange(channels), np.zeros(channels), np.full(channels, 2.0))
        with pytest.raises(ValueError, match=r"must have at most 4194304 bytes: got \d+\. Leave `moments` out"):
            flaxbn.export_inference(
                model, {"batch_stats": stats}, x.astype(np.float32), tmp_path / "model.zip", moments=moments
            )
        assert not list(tmp_path.iterdir())


class Part:
    """What jax's schema says of a module, written without jax."""

    def __init__(self):
        self.builder = flatbuffers.Builder(1024)

    def table(self, fields):
        self.builder.StartObject(26)
        for slot, offset in fields.items():
            self.builder.PrependUOffsetTRelativeSlot(slot, offset, 0)
        return self.builder.EndObject()

    def repeated(self, part, times):
        self.builder.StartVector(4, times, 4)
        for _ in range(times):
            self.builder.PrependUOffsetTRelative(part)
        return self.builder.EndVector()

    def finished(self, fields):
        name = self.builder.CreateString("f")
        self.builder.Finish(self.table({1: name, **fields}))
        return bytes(self.builder.Output())


def tree(depth, width):
    """Lists of lists, each of them the same one many times."""
    part = Part()
    node = part.table({})
    for _ in range(depth):
        node = part.table({1: part.repeated(node, width)})
    return part.finished({2: node, 4: node})


def texts(length, times):
    part = Part()
    return part.finished({9: part.repeated(part.builder.CreateString("x" * length), times)})


def dimension(text):
    part = Part()
    array = part.table({1: part.repeated(part.builder.CreateString(text), 1)})
    return part.finished({19: part.repeated(array, 1)})


def of_another_class():
    part = Part()
    return part.finished({2: part.table({3: part.builder.CreateString("Pickled")})})


@pytest.mark.parametrize(
    ("module", "cause"),
    [
        (tree(40, 2), "at most 100000 parts around its program"),
        (tree(3, 1000), "at most 100000 parts around its program"),
        (tree(5000, 1), "at most 100 deep"),
        (texts(300_000, 40_000), "at most 1048576 bytes of text"),
        (dimension("(batch+1)^9999"), "a number or a short polynomial"),
        (dimension("batch^999999999"), "a number or a short polynomial"),
        (dimension("b*" * 60 + "b"), "a number or a short polynomial"),
        (of_another_class(), "no containers but dictionaries, lists and tuples"),
    ],
    ids=["a tree", "a wide tree", "a deep tree", "texts", "a power", "a large power", "a product", "a class"],
)
def test_a_module_that_names_a_part_many_times(members, tmp_path, module, cause):
    assert len(module) < 1 << 20
    message, found = refused(tmp_path / "model.zip", packed(members, module=module))
    assert "must be a module that this jax" in message
    assert cause in str(found)


@pytest.mark.parametrize(
    ("dimension", "output"),
    [
        ("batch + 1", lambda y: jax.numpy.concatenate([y, np.zeros((1, 2), np.float32)])),
        ("batch^2", lambda y: (y @ y.T).reshape(-1)),
    ],
)
def test_dimensions_that_models_have(tmp_path, dimension, output):
    model, x, path = nn.Dense(2), np.float32([[1, 2, 3], [4, 5, 6]]), tmp_path / "model.zip"
    variables = model.init(jax.random.key(0), x)
    platforms = (jax.default_backend(),)
    flaxbn.export_inference(model, variables, x, path, call=lambda m, x: output(m(x)), platforms=platforms)
    assert flaxbn.load_inference(path).metadata["outputs"][""]["shape"][0] == dimension


LOAD = """
import pathlib, sys
import flaxbn

def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) >> 10

before = peak()
for path in sys.argv[1:]:
    try:
        flaxbn.load_inference(path)
    except ValueError:
        print(path.rpartition("/")[2], peak() - before)
        before = peak()
"""
METADATA_MEMORY = 150
"""MB that 4 MiB of JSON come to at most, 25 times as much; all else is a few times the size of the file."""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of memory is read from /proc")
def test_memory_is_bounded_by_the_size_of_the_file(members, tmp_path):
    """What a small file would become is refused before it does."""
    contents = {
        "bomb": packed(members, module=bytes(100_000_000), compression=zipfile.ZIP_DEFLATED),
        "spaces": packed(members, metadata=b" " * 100_000_000, compression=zipfile.ZIP_DEFLATED),
        "texts": packed(members, module=texts(300_000, 40_000)),
        "tree": packed(members, module=tree(40, 2)),
        "lists": packed(members, metadata=b'{"format_version": 1, "x": [' + b"[]," * 1_300_000 + b"[]]}"),
    }
    for name, content in contents.items():
        assert len(content) < 6 << 20
        (tmp_path / name).write_bytes(content)
    with (tmp_path / "directory").open("wb") as file:  # as long as a file of 3 GB, of which nothing was ever written
        file.seek(3_000_000_000)
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 2, 2, 3_000_000_000, 0, 0))
    command = [sys.executable, "-c", LOAD, *map(str, tmp_path.iterdir())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout
    grown = {name: int(megabytes) for name, megabytes in map(str.split, told.splitlines())}
    assert grown.keys() == {*contents, "directory"}
    assert grown.pop("lists") < METADATA_MEMORY
    assert max(grown.values()) < 50, grown
