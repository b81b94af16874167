"""Whoever codes the chunks, zarr-python, zarrs or we, it is the same voxels, the same bytes and the same faults."""

import importlib.util
import itertools
import os
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from zarr.storage import LocalStore

import oocpatch
from oocpatch.planning.box import Box
from oocpatch.storage.chunk_reader import PlainArray
from oocpatch.storage.zarrs_codec import StagedArray, ZarrsArray, os_errors
from oocpatch.volumes.volume import Volume

RNG = np.random.default_rng(0)
KINDS = [
    pytest.param({"zarr_format": 3}, id="v3"),
    pytest.param({"zarr_format": 2}, id="v2"),
    pytest.param({"zarr_format": 3, "shards": (16, 8, 16)}, id="shards"),
    pytest.param({"zarr_format": 3, "compressors": None}, id="uncompressed"),
    pytest.param({"zarr_format": 3, "compressors": zarr.codecs.BloscCodec()}, id="blosc"),
    pytest.param({"zarr_format": 3, "compressors": [zarr.codecs.GzipCodec(), zarr.codecs.Crc32cCodec()]}, id="gzip"),
]
PLAIN = [p for p in KINDS if p.id not in {"shards", "gzip"}]


def some(shape, dtype):
    return (RNG.random(shape) * 200 - 20 * (np.dtype(dtype).kind in "if")).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "uint8", "int16", "uint64", "bool"])
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("coder", ["ours", "zarrs"])
def test_boxes_are_read_as_zarr_python_reads_them(coder, options, dtype, tmp_path, monkeypatch):
    array = zarr.create_array(tmp_path / "a.zarr", shape=(37, 20, 33), chunks=(8, 8, 8), dtype=dtype, **options)
    array[:24] = some((24, 20, 33), dtype)  # the rest was never written
    if coder == "zarrs":
        monkeypatch.setattr(PlainArray, "of", lambda _: None)
    volume = Volume(array, "zyx").for_run(2)
    ours = coder == "ours" and options in [p.values[0] for p in PLAIN]
    assert isinstance(volume.chunk_reader, PlainArray if ours else ZarrsArray)
    for box in (Box((0, 0, 0), (37, 20, 33)), Box((5, 3, 9), (31, 19, 10)), Box((30, 0, 0), (37, 20, 33))):
        assert_array_equal(volume.read(box)[0], array[box.slices()])
        ring = np.zeros((1, *(n + 3 for n in box.shape)), dtype)  # a target that is not contiguous
        inner = ring[(slice(None), *(slice(1, 1 + n) for n in box.shape))]
        volume.read_into(inner, box)
        assert_array_equal(inner[0], array[box.slices()])


@given(channel=st.sampled_from([None, 0, 1, 3]), start=st.tuples(*[st.integers(-4, 8)] * 3))
def test_channels_and_padding_are_the_same_with_and_without(tmp_path_factory, channel, start):
    folder = tmp_path_factory.getbasetemp() / f"channels-{channel}.zarr"
    shape = [12, 9, 10]
    axes = ["z", "y", "x"]
    if channel is not None:
        shape.insert(channel, 3)
        axes.insert(channel, "c")
    if not folder.exists():
        zarr.create_array(folder, data=some(shape, "int16"), chunks=(3,) * len(shape))
    plain = Volume(folder, axes)
    box = Box(start, tuple(a + 7 for a in start))
    assert_array_equal(plain.for_run(2).read(box, "reflect"), plain.read(box, "reflect"))


def test_arrays_that_zarrs_cannot_read_are_left_to_zarr_python(tmp_path):
    swapped = zarr.create_array(tmp_path / "swapped.zarr", data=np.arange(64, dtype=">i4").reshape(8, 8))
    memory = zarr.create_array({}, data=np.arange(64.0).reshape(8, 8))
    delta = zarr.create_array(
        tmp_path / "delta.zarr", data=np.arange(64.0).reshape(8, 8), zarr_format=2, filters=[numcodecs.Delta("<f8")]
    )
    for array in (swapped, memory, delta):
        volume = Volume(array, "yx").for_run(2)
        assert_array_equal(volume.read(Box((1, 1), (7, 7)))[0], array[1:7, 1:7])


@pytest.mark.parametrize("options", [p for p in KINDS if p.id != "v2"])
@pytest.mark.parametrize("coder", ["ours", "zarrs"])
def test_whole_units_are_written_as_zarr_python_writes_them(coder, options, tmp_path, monkeypatch):
    if coder == "ours":
        if options not in [p.values[0] for p in PLAIN if p.id != "blosc"]:
            pytest.skip("we write plain chunks only")
        monkeypatch.setattr(ZarrsArray, "open", lambda *_: None)
    array = zarr.create_array(tmp_path / "a.zarr", shape=(37, 20, 33), chunks=(8, 8, 8), dtype="f4", **options)
    expected = some(array.shape, "f4")
    expected[:16, :8, :16] = 0  # the fill value: not stored
    staged = StagedArray.open(array, 2)
    assert staged is not None
    for z, y in itertools.product((0, 16, 32), (0, 8, 16)):
        box = (slice(z, min(z + 16, 37)), slice(y, min(y + 8, 20)), slice(0, 33))
        staged.write(box, expected[box])
    assert_array_equal(array[...], expected)
    assert not (tmp_path / "a.zarr" / "c" / "0" / "0" / "0").exists()
    staged.write((slice(0, 16), slice(8, 16), slice(0, 33)), np.zeros((16, 8, 33), "f4"))  # replaces what was there
    assert not array[:16, 8:16].any()
    staged.close()
    assert sorted(p.name for p in (tmp_path / "a.zarr").iterdir()) == ["c", "zarr.json"]


def test_the_same_values_give_the_same_shard_byte_for_byte(tmp_path):
    values = some((16, 16, 16), "i4")
    files = set()
    for attempt in range(50):
        folder = tmp_path / f"{attempt}.zarr"
        array = zarr.create_array(folder, shape=values.shape, chunks=(2, 2, 2), shards=(16, 16, 16), dtype="i4")
        staged = StagedArray.open(array, 4)
        assert staged is not None
        staged.write((slice(0, 16),) * 3, values)
        staged.close()
        assert_array_equal(array[...], values)
        files.add((folder / "c" / "0" / "0" / "0").read_bytes())
    assert len(files) == 1


def test_a_fault_of_the_system_keeps_its_number():
    with pytest.raises(OSError, match="No space left") as caught, os_errors():
        raise RuntimeError("No space left on device (os error 28)")
    assert caught.value.errno == 28
    with pytest.raises(RuntimeError, match="anything else"), os_errors():
        raise RuntimeError("anything else")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written_is_an_os_error(tmp_path):
    array = zarr.create_array(tmp_path / "a.zarr", shape=(8,), chunks=(4,), dtype="f4")
    native = ZarrsArray.open(array, 2)
    assert native is not None
    (tmp_path / "a.zarr").chmod(0o500)
    with pytest.raises(PermissionError):
        native.write((slice(0, 8),), np.ones(8, "f4"))


@pytest.mark.parametrize("mode", ["crop", "hann"])
def test_a_run_gives_the_same_voxels_without_zarrs(mode, tmp_path, monkeypatch):
    data = some((50, 41, 38), "f4")
    zarr.create_array(tmp_path / "in.zarr", data=data, chunks=(16, 16, 16))
    options = {"patch_size": 16, "patch_overlap": 8, "overlap_mode": mode, "max_memory": "8MiB", "block_shape": 25}
    fast = oocpatch.predict(tmp_path / "in.zarr", "identity", tmp_path / "fast.zarr", **options).values
    assert not list(Path(tmp_path / "fast.zarr").rglob("*.partial"))
    monkeypatch.setattr(PlainArray, "of", lambda _: None)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "zarrs" else real(name, *rest))
    assert ZarrsArray.open(zarr.open_array(LocalStore(tmp_path / "in.zarr")), 2) is None
    plain = oocpatch.predict(tmp_path / "in.zarr", "identity", tmp_path / "plain.zarr", **options).values
    assert_array_equal(fast, plain)
    np.testing.assert_allclose(fast, data, rtol=0 if mode == "crop" else 1e-6)
