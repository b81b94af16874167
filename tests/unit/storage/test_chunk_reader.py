"""Chunks that we code ourselves are, byte for byte, those of zarr-python; and damage and deceit are found."""

import os
import time
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr
from numpy.testing import assert_array_equal

from oocpatch.storage.chunk_reader import PlainArray
from oocpatch.storage.zarrs_codec import StagedArray, ZarrsArray

RNG = np.random.default_rng(0)
WRITTEN = {
    "zstd": {},
    "zstd level 5 with checksum": {"compressors": zarr.codecs.ZstdCodec(level=5, checksum=True)},
    "uncompressed": {"compressors": None},
    "v2": {"zarr_format": 2, "compressors": numcodecs.Zstd(3)},
}
READ_ONLY = {
    "blosc": {"compressors": zarr.codecs.BloscCodec()},
    "v2 blosc": {"zarr_format": 2, "compressors": numcodecs.Blosc()},
}
OTHERS = {
    "shards": {"shards": (8, 8)},
    "gzip": {"compressors": zarr.codecs.GzipCodec()},
    "crc32c": {"compressors": zarr.codecs.Crc32cCodec()},
    "transposed": {"filters": [zarr.codecs.TransposeCodec(order=(1, 0))]},
    "big-endian": {"serializer": zarr.codecs.BytesCodec(endian="big")},
    "v2, Fortran order": {"zarr_format": 2, "order": "F"},
    "v2, filtered": {"zarr_format": 2, "filters": [numcodecs.Delta("<f4")]},
}


def files(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != "zarr.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("fill", [0.0, -0.0, 1.5, np.nan])
@pytest.mark.parametrize("options", WRITTEN.values(), ids=WRITTEN)
def test_chunks_are_written_byte_for_byte_as_zarr_python_writes_them(options, fill, tmp_path, monkeypatch):
    values = RNG.random((10, 7)).astype("f4")  # the last chunks reach over the border
    values[:4, :4] = fill
    values[4:8, 4:] = 0.0
    values[8:, :4] = -0.0
    arrays = [
        zarr.create_array(tmp_path / name, shape=values.shape, chunks=(4, 4), dtype="f4", fill_value=fill, **options)
        for name in ("theirs", "ours")
    ]
    arrays[0][...] = values
    monkeypatch.setattr(ZarrsArray, "open", lambda *_: None)
    plain = PlainArray.of(arrays[1])
    assert plain is not None
    assert plain.writes
    staged = StagedArray.open(arrays[1], 1)
    assert staged is not None
    crcs = staged.write((slice(0, 10), slice(0, 7)), values)
    staged.close()
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    assert sum(crc != 0 for crc in crcs) == len([name for name in files(tmp_path / "ours") if not name.startswith(".")])


@pytest.mark.parametrize("options", [*WRITTEN.values(), *READ_ONLY.values()], ids=[*WRITTEN, *READ_ONLY])
def test_any_box_is_read_into_memory_with_any_strides(options, tmp_path):
    values = RNG.integers(0, 1000, (10, 7)).astype("i4")
    array = zarr.create_array(tmp_path / "a", shape=values.shape, chunks=(4, 4), dtype="i4", fill_value=7, **options)
    array[:8] = values[:8]
    values[8:] = 7
    plain = PlainArray.of(array)
    assert plain is not None
    for box in ((slice(0, 10), slice(0, 7)), (slice(3, 9), slice(2, 3)), (slice(5, 5), slice(0, 7))):
        shape = values[box].shape
        for out in (np.zeros(shape, "i4"), np.zeros(shape[::-1], "i4").T, np.zeros((12, 8), "i4")[2:, 1:]):
            part = out[: shape[0], : shape[1]]
            plain.read_into(part, box)
            assert_array_equal(part, values[box])


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_other_chunks_are_left_to_others(options, tmp_path):
    array = zarr.create_array(tmp_path / "a", shape=(8, 8), chunks=(4, 4), dtype="f4", **options)
    assert PlainArray.of(array) is None


@pytest.mark.parametrize("options", READ_ONLY.values(), ids=READ_ONLY)
def test_codecs_with_settings_of_their_own_are_only_read(options, tmp_path):
    plain = PlainArray.of(zarr.create_array(tmp_path / "a", shape=(8, 8), chunks=(4, 4), dtype="f4", **options))
    assert plain is not None
    assert not plain.writes


def test_a_frame_that_does_not_tell_its_size_is_read(tmp_path):
    array = zarr.create_array(tmp_path / "a", data=np.arange(16.0), chunks=(8,))
    stream = b"\x28\xb5\x2f\xfd\x00\x58" + (64 << 3 | 1).to_bytes(3, "little") + np.full(8, 3.0).tobytes()
    (tmp_path / "a" / "c" / "1").write_bytes(stream)
    plain, out = PlainArray.of(array), np.zeros(16)
    assert plain is not None
    plain.read_into(out, (slice(0, 16),))
    assert_array_equal(out, array[...])
    assert_array_equal(out[8:], 3)


def broken(path: Path, how: str) -> None:
    data = path.read_bytes()
    path.unlink()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "other bytes":
        path.write_bytes(RNG.bytes(len(data)))
    elif how == "a smaller chunk":
        path.write_bytes(numcodecs.Zstd().encode(np.zeros(8, "f4")))
    elif how == "inflates":
        path.write_bytes(numcodecs.Zstd(19).encode(np.zeros(1 << 28, "u1")))
    elif how == "a huge file":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    elif how == "a pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


@pytest.mark.parametrize(
    "how",
    ["truncated", "empty", "other bytes", "a smaller chunk", "inflates", "a huge file", "a directory"]
    + ["a pipe"] * hasattr(os, "O_NONBLOCK"),  # a system without it has no pipes in its file system
)
def test_a_chunk_that_is_not_what_it_should_be_is_refused_at_once(how, tmp_path):
    array = zarr.create_array(tmp_path / "a", data=RNG.random((8, 8)).astype("f4"), chunks=(4, 4))
    broken(tmp_path / "a" / "c" / "1" / "0", how)
    plain = PlainArray.of(array)
    assert plain is not None
    out, started = np.zeros((8, 8), "f4"), time.monotonic()
    with pytest.raises((ValueError, IsADirectoryError, PermissionError), match="1/0"):
        plain.read_into(out, (slice(0, 8), slice(0, 8)))
    assert time.monotonic() - started < 2
    plain.read_into(out[:4], (slice(0, 4), slice(0, 8)))
    assert_array_equal(out[:4], array[:4])
