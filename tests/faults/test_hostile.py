"""Promises on hostile volumes: refused in one message, within two seconds and 500 MiB, in a process of its own."""

from __future__ import annotations

import bz2
import json
import lzma
import os
import pickle
import re
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numcodecs
import numpy as np
import pytest
import zarr

from oocpatch.cli.main import main
from oocpatch.planning.box import Box
from oocpatch.volumes.volume import Volume
from tests.support.children import Children, report, unchanged
from tests.support.crash_child import Job

SECONDS, BYTES = 2.0, 500 << 20


def metadata_of(path: Path, **fields: object) -> None:
    """A Zarr array with metadata of choice."""
    zarr.create_array(path, shape=(64, 64), chunks=(64, 64), dtype="uint8", compressors=None, filters=None)
    metadata = json.loads((path / "zarr.json").read_text())
    (path / "zarr.json").write_text(json.dumps({**metadata, **fields}))


def inflating(path: Path, compressor: object, stored: bytes) -> None:
    with warnings.catch_warnings(action="ignore"):
        zarr.create_array(path, shape=(64, 64), chunks=(64, 64), dtype="uint8", compressors=compressor, filters=None)
    (path / "c" / "0").mkdir(parents=True)
    (path / "c" / "0" / "0").write_bytes(stored)


def named(codec: str, **settings: object) -> object:
    """A codec that Zarr v3 takes from numcodecs."""
    with warnings.catch_warnings(action="ignore"):  # it is not in the specification
        return zarr.registry.get_codec_class(f"numcodecs.{codec}")(**settings)


ZEROS = 1 << 30
"""What the chunks below decode to; they should be 4 KiB."""


def zstd_with_its_size(path: Path) -> None:
    inflating(path, zarr.codecs.ZstdCodec(), numcodecs.Zstd(1).encode(np.zeros(ZEROS, np.uint8)))


def zstd_without_its_size(path: Path) -> None:
    """A frame of as many blocks as it takes, each one byte that is repeated 128 KiB times."""
    block = (1 << 1 | (1 << 17) << 3).to_bytes(3, "little") + b"\0"
    last = (1 | 1 << 1 | (1 << 17) << 3).to_bytes(3, "little") + b"\0"
    inflating(path, zarr.codecs.ZstdCodec(), b"\x28\xb5\x2f\xfd\x00\x58" + block * (ZEROS // (1 << 17) - 1) + last)


def blosc(path: Path) -> None:
    inflating(path, zarr.codecs.BloscCodec(), numcodecs.Blosc("zstd", 1).encode(np.zeros(ZEROS, np.uint8)))


def gzip(path: Path) -> None:
    inflating(path, zarr.codecs.GzipCodec(), numcodecs.GZip(1).encode(np.zeros(ZEROS // 2, np.uint8)))


def gzip_in_many_members(path: Path) -> None:
    inflating(path, zarr.codecs.GzipCodec(), numcodecs.GZip(1).encode(np.zeros(1 << 20, np.uint8)) * 1024)


def old_format(path: Path, compressor: object, stored: bytes) -> None:
    zarr.create_array(path, shape=(64, 64), chunks=(64, 64), dtype="u1", compressors=compressor, zarr_format=2)
    (path / "0.0").write_bytes(stored)


def old_zlib(path: Path) -> None:
    old_format(path, numcodecs.Zlib(1), numcodecs.Zlib(1).encode(np.zeros(ZEROS // 2, np.uint8)))


def old_lz4(path: Path) -> None:
    old_format(path, numcodecs.LZ4(1), (1 << 30).to_bytes(4, "little") + b"\0" * 64)


def streams(compress: Callable[[bytes], bytes]) -> bytes:
    """A gigabyte in 64 streams, of a codec that takes long for one."""
    return compress(bytes(1 << 24)) * 64


def bzip2(path: Path) -> None:
    inflating(path, named("bz2"), streams(bz2.compress))


def xz(path: Path) -> None:
    inflating(path, named("lzma"), streams(lzma.compress))


def lzma_without_a_header(path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 1}]
    raw = lzma.compress(bytes(1 << 26), lzma.FORMAT_RAW, filters=filters)
    inflating(path, named("lzma", format=lzma.FORMAT_RAW, filters=filters), raw)


def old_bzip2(path: Path) -> None:
    old_format(path, numcodecs.BZ2(1), streams(bz2.compress))


def a_checksum_around_it(path: Path) -> None:
    stored = numcodecs.Zstd(1).encode(np.zeros(ZEROS // 2, np.uint8))
    crc = google_crc32c.value(stored).to_bytes(4, "little")
    inflating(path, [zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()], stored + crc)


def a_checksum_before_it(path: Path) -> None:
    stored = streams(bz2.compress)
    inflating(path, [named("bz2"), named("crc32")], zlib.crc32(stored).to_bytes(4, "little") + stored)


def compressed_twice(path: Path) -> None:
    stored = numcodecs.Zstd(1).encode(numcodecs.GZip(1).encode(np.zeros(1 << 24, np.uint8)))
    inflating(path, [zarr.codecs.GzipCodec(), zarr.codecs.ZstdCodec()], stored)


def shard(path: Path, compressors: object, chunks: list[bytes], **index: int) -> None:
    """A shard of 64 x 64 voxels with inner chunks of 8 x 8: the last ones are given, the others are not there."""
    shape = {"shape": (64, 64), "chunks": (8, 8), "shards": (64, 64)}
    with warnings.catch_warnings(action="ignore"):
        zarr.create_array(path, **shape, dtype="uint8", compressors=compressors, filters=None)
    entries = np.full((64, 2), 2**64 - 1, "<u8")
    starts = np.cumsum([0, *map(len, chunks)])
    for place, (chunk, start) in enumerate(zip(chunks, starts, strict=False), 64 - len(chunks)):
        entries[place] = index.get("start", start), index.get("size", len(chunk))
    stored = entries.tobytes()
    (path / "c" / "0").mkdir(parents=True)
    crc = google_crc32c.value(stored).to_bytes(4, "little")
    (path / "c" / "0" / "0").write_bytes(b"".join(chunks) + stored + crc)


def a_shard_of_zstd(path: Path) -> None:
    shard(path, zarr.codecs.ZstdCodec(), [numcodecs.Zstd(1).encode(np.zeros(ZEROS, np.uint8))])


def a_shard_of_blosc(path: Path) -> None:
    shard(path, zarr.codecs.BloscCodec(), [numcodecs.Blosc("zstd", 1).encode(np.zeros(1 << 24, np.uint8))])


def a_shard_of_gzip(path: Path) -> None:
    shard(path, zarr.codecs.GzipCodec(), [numcodecs.GZip(1).encode(np.zeros(1 << 24, np.uint8))])


def a_shard_of_bzip2(path: Path) -> None:
    shard(path, named("bz2"), [bz2.compress(bytes(1 << 24)) * 2])


def a_shard_of_many_that_are_a_little_too_large(path: Path) -> None:
    shard(path, zarr.codecs.ZstdCodec(), [numcodecs.Zstd(1).encode(np.zeros(1 << 20, np.uint8))] * 64)


def a_shard_that_points_beyond_its_end(path: Path) -> None:
    shard(path, zarr.codecs.ZstdCodec(), [b"chunk"], start=2**63, size=2**62)


def a_shard_of_endless_chunks(path: Path) -> None:
    shard(path, zarr.codecs.ZstdCodec(), [b"chunk"], size=2**62)


def shards_within_shards(path: Path) -> None:
    inner = {"name": "sharding_indexed", "configuration": {
        "chunk_shape": [4, 4], "codecs": [{"name": "bytes"}], "index_codecs": [{"name": "bytes"}],
        "index_location": "end",
    }}  # fmt: skip
    outer = {**inner, "configuration": {**inner["configuration"], "chunk_shape": [8, 8], "codecs": [inner]}}
    metadata_of(path, codecs=[outer])


def shape_of_2_to_the_60(path: Path) -> None:
    metadata_of(path, shape=[2**60, 2**60])


def chunks_of_2_to_the_40(path: Path) -> None:
    grid = {"name": "regular", "configuration": {"chunk_shape": [2**20, 2**20]}}
    metadata_of(path, shape=[2**21, 2**21], chunk_grid=grid)


def more_dimensions_than_there_are(path: Path) -> None:
    grid = {"name": "regular", "configuration": {"chunk_shape": [1] * 5000}}
    metadata_of(path, shape=[2] * 5000, chunk_grid=grid)


def dimensions_that_chunks_do_not_have(path: Path) -> None:
    metadata_of(path, shape=[64, 64, 64])


def nested_deeply(path: Path) -> None:
    metadata_of(path)
    text = (path / "zarr.json").read_text()
    deep = "[" * 100_000 + "]" * 100_000
    (path / "zarr.json").write_text(text.replace('"attributes": {}', f'"attributes": {{"deep": {deep}}}'))


def fill_value_that_is_no_number(path: Path) -> None:
    metadata_of(path, fill_value={"$ref": "#"})


def pickled_objects(path: Path) -> None:
    """Zarr v2 lets a filter unpickle what is stored; unpickling would make the file `owned`."""
    path.mkdir()
    metadata = {
        "zarr_format": 2, "shape": [64, 64], "chunks": [64, 64], "dtype": "|O", "order": "C", "fill_value": None,
        "compressor": None, "filters": [{"id": "pickle", "protocol": 4}],
    }  # fmt: skip
    (path / ".zarray").write_text(json.dumps(metadata))
    command = f"touch {path.parent / 'owned'}"
    (path / "0.0").write_bytes(b"cos\nsystem\n(V" + command.encode() + b"\ntR.")


def pickled_numbers(path: Path) -> None:
    """The same filter on an array that says that it holds numbers."""
    pickled_objects(path)
    metadata = json.loads((path / ".zarray").read_text())
    (path / ".zarray").write_text(json.dumps({**metadata, "dtype": "|u1", "fill_value": 0}))


def a_name_that_climbs_out(path: Path) -> None:
    metadata_of(path.parent / "secret.zarr")
    scales = [{"axes": ["y", "x"], "datasets": [{"path": "../secret.zarr"}]}]
    zarr.create_group(path, attributes={"multiscales": scales})


def a_link_in_place_of_metadata(path: Path) -> None:
    path.mkdir()
    (path.parent / "secret").write_text("mine")
    (path / "zarr.json").symlink_to(path.parent / "secret")


def a_link_that_leads_nowhere_but_to_itself(path: Path) -> None:
    path.symlink_to(path)


def a_device_as_a_chunk(path: Path) -> None:
    metadata_of(path)
    (path / "c" / "0").mkdir(parents=True)
    (path / "c" / "0" / "0").symlink_to("/dev/zero")


HOSTILE: tuple[Callable[[Path], None], ...] = (
    zstd_with_its_size,
    zstd_without_its_size,
    blosc,
    gzip,
    gzip_in_many_members,
    old_zlib,
    old_lz4,
    bzip2,
    xz,
    lzma_without_a_header,
    old_bzip2,
    a_checksum_around_it,
    a_checksum_before_it,
    compressed_twice,
    a_shard_of_zstd,
    a_shard_of_blosc,
    a_shard_of_gzip,
    a_shard_of_bzip2,
    a_shard_of_many_that_are_a_little_too_large,
    a_shard_that_points_beyond_its_end,
    a_shard_of_endless_chunks,
    shards_within_shards,
    shape_of_2_to_the_60,
    chunks_of_2_to_the_40,
    more_dimensions_than_there_are,
    dimensions_that_chunks_do_not_have,
    nested_deeply,
    fill_value_that_is_no_number,
    pickled_objects,
    pickled_numbers,
    a_name_that_climbs_out,
    a_link_in_place_of_metadata,
    a_link_that_leads_nowhere_but_to_itself,
    a_device_as_a_chunk,
)


@pytest.mark.parametrize("make", HOSTILE, ids=[make.__name__ for make in HOSTILE])
def test_a_hostile_volume_is_refused_quickly_and_in_little_memory(
    make: Callable[[Path], None], children: Children, tmp_path: Path
) -> None:
    make(tmp_path / "volume.zarr")
    (tmp_path / "run").mkdir()
    job = Job(
        volume=str(tmp_path / "volume.zarr"),
        output=str(tmp_path / "run" / "out"),
        log=os.devnull,
        report=str(tmp_path / "report"),
        options={"patch_size": 16, "max_memory": 64 << 20, "max_disk": 1 << 30},
    )
    assert children.run(job) == 1
    end = report(job)
    assert end.error in {"ValueError", "PlanTooLarge", "BlockFailed", "TypeError"}, end
    assert "\n" not in end.message
    assert re.search(r"volume\.zarr|needs|5000 axes", end.message), end.message
    assert end.seconds < SECONDS
    assert end.added < BYTES
    assert not (tmp_path / "owned").exists()


def test_unpickling_would_have_been_noticed(tmp_path: Path) -> None:
    pickled_objects(tmp_path / "volume.zarr")
    pickle.loads((tmp_path / "volume.zarr" / "0.0").read_bytes())  # noqa: S301 - it is what the test is about
    assert (tmp_path / "owned").exists()


def test_the_command_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    zstd_with_its_size(tmp_path / "volume.zarr")
    arguments = ["--model", "identity", "--patch-size", "16", "--axes", "yx"]
    paths = [str(tmp_path / "volume.zarr"), str(tmp_path / "out.zarr")]
    monkeypatch.setattr(sys, "argv", ["oocpatch", "predict", *paths, *arguments])
    with unchanged(tmp_path / "volume.zarr"), pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    printed = capfd.readouterr().err
    assert "must decode to 4096 bytes" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("codec", ["zstd", "blosc", "gzip", "bz2", "xz", "none"])
@pytest.mark.parametrize(("level", "shards"), [(1, None), (9, (500, 250))])
def test_what_compresses_very_well_is_no_attack(
    codec: str, level: int, shards: tuple[int, int] | None, tmp_path: Path
) -> None:
    """A constant volume has chunks of a thousandth of their size, and they are what they say."""
    compressors = {
        "zstd": zarr.codecs.ZstdCodec(level=level),
        "blosc": zarr.codecs.BloscCodec(clevel=level),
        "gzip": zarr.codecs.GzipCodec(level=level),
        "bz2": named("bz2", level=level),
        "xz": named("lzma", preset=level),
        "none": None,
    }
    data = np.ones((300, 300), np.float64)
    path = tmp_path / "volume.zarr"
    with warnings.catch_warnings(action="ignore"):  # not all of them are in the specification of Zarr v3
        zarr.create_array(path, data=data, chunks=(250, 250), shards=shards, compressors=compressors[codec])
        volume = Volume(path, "yx")
    for box in (Box((0, 0), (300, 300)), Box((240, 10), (260, 20)), Box((260, 0), (270, 300))):
        np.testing.assert_array_equal(volume.read(box)[0], data[box.slices()])
