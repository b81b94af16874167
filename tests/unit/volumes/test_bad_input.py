"""Promises on bad input: one clear message, the right exception, nothing written, nothing lost."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import oocpatch
from oocpatch.planning.arguments import num_bytes
from tests.support.children import file_digests, unchanged
from tests.support.small_volume import predict

GIB = 2**30


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "overlap as large as the patch": ({"patch_overlap": 8}, r"patch_overlap must be smaller than patch_size.*8.*8"),
    "overlap larger on one axis": ({"patch_overlap": (0, 9)}, r"patch_overlap must be smaller than patch_size.*9"),
    "negative overlap": ({"patch_overlap": -1}, r"patch_overlap .*-1"),
    "negative patch": ({"patch_size": -8}, r"patch_size .*-8"),
    "no patch": ({"patch_size": 0, "patch_overlap": 0}, r"patch_size .*0"),
    "fractional patch": ({"patch_size": 8.5}, r"patch_size.*8\.5"),
    "fractional overlap": ({"patch_overlap": 0.5}, r"patch_overlap.*0\.5"),
    "patch of too many axes": ({"patch_size": (8, 8, 8)}, r"patch_size.*8, 8, 8"),
    "overlap of too few axes": ({"patch_overlap": (2,)}, r"patch_overlap.*2"),
    "unknown overlap mode": ({"overlap_mode": "linear"}, r"overlap_mode.*linear"),
    "unknown padding mode": ({"padding_mode": "mirror"}, r"padding_mode.*mirror"),
    "unknown postprocess": ({"postprocess": "argmin"}, r"postprocess.*argmin"),
    "threshold at no number": ({"postprocess": "threshold:x"}, r"postprocess.*threshold:x"),
    "unknown dtype": ({"output_dtype": "float12"}, r"output_dtype.*float12"),
    "batch of nothing": ({"batch_size": 0}, r"batch_size.*0"),
    "no workers": ({"workers": 0}, r"workers.*0"),
    "negative workers": ({"workers": -2}, r"workers.*-2"),
    "axes of another length": ({"axes": "zyx"}, r"axes.*zyx"),
    "axis named twice": ({"axes": "yy"}, r"axes.*y.*y"),
    "no spatial axis": ({"axes": "tc"}, r"axes.*t.*c"),
    "a switch that is a text": ({"overwrite": "no"}, r"overwrite.*True or False.*no"),
    "another switch that is a text": ({"resume": "never"}, r"resume.*True or False.*never"),
    "precision that is a text": ({"autocast": "bf16"}, r"autocast.*True or False.*bf16"),
    "fill that the output cannot hold": ({"output_fill": 300, "output_dtype": "uint8"}, r"output_fill.*0 to 255.*300"),
    "fill that no label is": ({"output_fill": float("nan"), "postprocess": "argmax"}, r"output_fill.*0 to 255.*nan"),
    "fill beyond half floats": ({"output_fill": 1e9, "output_dtype": "float16"}, r"output_fill.*65504.*1e\+09"),
    "fraction in an integer output": ({"output_fill": 0.5, "output_dtype": "int8"}, r"output_fill.*-128 to 127.*0\.5"),
    "mask that is not there": ({"mask": "no-mask.zarr"}, r"mask: .*no-mask\.zarr"),
    "memory that is no size": ({"max_memory": "lots"}, r"max_memory.*lots"),
    "negative memory": ({"max_memory": -1}, r"max_memory.*-1"),
    "disk that is no size": ({"max_disk": "2GiBs"}, r"max_disk.*2GiBs"),
    "chunk of nothing": ({"output_chunks": 0}, r"output_chunks.*0"),
    "chunks of too many axes": ({"output_chunks": (4, 4, 4)}, r"output_chunks.*4, 4, 4"),
    "shard that is no multiple": ({"output_chunks": 4, "output_shards": 6}, r"output_shards.*6"),
    "negative block": ({"block_shape": -4}, r"block_shape.*-4"),
    "block of too many axes": ({"block_shape": (8, 8, 8)}, r"block_shape.*8, 8, 8"),
    "unknown device": ({"device": "abacus"}, r"device.*abacus|abacus.*device"),
    "unknown output format": ({"output_format": "tiff"}, r"output_format"),
}


@pytest.mark.parametrize(("options", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_a_bad_argument_is_named_with_its_value_and_nothing_is_written(
    options: dict[str, Any], message: str, volume: Path, output: Path
) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as error:
        predict(volume, output, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("options", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_planning_refuses_what_running_would(options: dict[str, Any], message: str, volume: Path, output: Path) -> None:
    arguments: dict[str, Any] = {"patch_size": 8, "patch_overlap": 4, **options}
    with pytest.raises((ValueError, TypeError), match=message):
        oocpatch.plan(volume, torch.nn.Identity(), output, **arguments)


def test_a_parameter_that_does_not_exist_is_a_type_error(volume: Path, output: Path) -> None:
    with pytest.raises(TypeError, match="overlap_size"):
        predict(volume, output, overlap_size=3)


def missing(path: Path) -> None:
    shutil.rmtree(path)


def empty_directory(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def truncated_metadata(path: Path) -> None:
    text = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(text[: len(text) // 2])


def empty_metadata(path: Path) -> None:
    (path / "zarr.json").write_text("")


def binary_metadata(path: Path) -> None:
    (path / "zarr.json").write_bytes(bytes(range(256)))


def metadata_of_something_else(path: Path) -> None:
    (path / "zarr.json").write_text('{"name": "left-pad", "version": "1.0.0"}')


def metadata_is_a_list(path: Path) -> None:
    (path / "zarr.json").write_text("[1, 2, 3]")


def a_regular_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"\x89PNG\r\n")


def a_group_without_arrays(path: Path) -> None:
    shutil.rmtree(path)
    zarr.create_group(path)


def edited(path: Path, **fields: Any) -> None:
    metadata = json.loads((path / "zarr.json").read_text())
    (path / "zarr.json").write_text(json.dumps({**metadata, **fields}))


def negative_shape(path: Path) -> None:
    edited(path, shape=[-24, 20])


def text_as_shape(path: Path) -> None:
    edited(path, shape="big")


def unknown_dtype(path: Path) -> None:
    edited(path, data_type="float12")


def unknown_codec(path: Path) -> None:
    edited(path, codecs=[{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "middle-out"}])


def zero_chunks(path: Path) -> None:
    edited(path, chunk_grid={"name": "regular", "configuration": {"chunk_shape": [0, 8]}})


RUINS = (
    missing,
    empty_directory,
    truncated_metadata,
    empty_metadata,
    binary_metadata,
    metadata_of_something_else,
    metadata_is_a_list,
    a_regular_file,
    a_group_without_arrays,
    negative_shape,
    text_as_shape,
    unknown_dtype,
    unknown_codec,
    zero_chunks,
)


@pytest.mark.parametrize("ruin", RUINS, ids=[ruin.__name__ for ruin in RUINS])
def test_a_volume_that_cannot_be_read_is_named_and_nothing_is_written(ruin: Any, tmp_path: Path, volume: Path) -> None:
    ruin(volume)
    before = file_digests(tmp_path)
    with pytest.raises((ValueError, TypeError, OSError), match=re.escape(str(volume))) as error:
        predict(volume, tmp_path / "out.zarr", axes="yx")
    assert "\n" not in str(error.value)
    assert file_digests(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"volume.zarr"}


def test_a_volume_without_voxels_is_refused(volume: Path, tmp_path: Path) -> None:
    edited(volume, shape=[0, 20])
    with unchanged(tmp_path), pytest.raises(ValueError, match=r"at least one voxel.*0, 20"):
        predict(volume, tmp_path / "out.zarr")


def test_a_dtype_that_a_model_cannot_take_is_refused(output: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=r"U5|<U|str"):
        predict(np.full((24, 20), "voxel"), output, axes="yx")


def sparse(path: Path, shape: tuple[int, ...], chunks: tuple[int, ...]) -> Path:
    """Metadata that claims any shape; no voxel is stored."""
    zarr.create_array(path, shape=(8,) * len(shape), chunks=(8,) * len(shape), dtype="float32", fill_value=1)
    grid = {"name": "regular", "configuration": {"chunk_shape": list(chunks)}}
    edited(path, shape=list(shape), chunk_grid=grid)
    return path


ABSURD = {
    "2**60 voxels on one axis": ((2**60,), (64,)),
    "2**60 voxels on three axes": ((2**20,) * 3, (64,) * 3),
    "more voxels than an int64 counts": ((2**60,) * 3, (64,) * 3),
    "a chunk of 2**40 voxels": ((2**14,) * 3, (2**13, 2**13, 2**14)),
    "a chunk of 2**60 voxels": ((2**20,) * 3, (2**20,) * 3),
}


@pytest.mark.parametrize(("shape", "chunks"), ABSURD.values(), ids=ABSURD)
def test_metadata_that_lies_about_sizes_is_refused_quickly_before_anything_is_allocated(
    shape: tuple[int, ...], chunks: tuple[int, ...], tmp_path: Path
) -> None:
    absurd = sparse(tmp_path / "absurd.zarr", shape, chunks)
    began = time.process_time()
    with pytest.raises(ValueError, match=r"\d") as error:
        predict(absurd, tmp_path / "out.zarr", axes="zyx"[-len(shape) :], max_memory="64MiB", max_disk="1GiB")
    assert time.process_time() - began < 20
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["absurd.zarr"]


def test_a_large_volume_is_planned_without_work_that_grows_with_its_voxels(tmp_path: Path) -> None:
    """2**42 voxels in chunks of 2**18: the plan is arithmetic, the numbers are exact."""
    large = sparse(tmp_path / "large.zarr", (2**14,) * 3, (64,) * 3)
    began = time.process_time()
    plan = oocpatch.plan(
        large,
        torch.nn.Identity(),
        tmp_path / "out.zarr",
        axes="zyx",
        patch_size=128,
        patch_overlap=64,
        max_memory="4GiB",
    )
    assert time.process_time() - began < 20
    assert plan.patches == (2**14 // 64 - 1) ** 3
    assert plan.bytes_written >= 4 * 2**42
    assert plan.projected_memory <= 4 * GIB


@pytest.mark.parametrize("limit", ["64MiB", 64 * 2**20])
def test_memory_too_small_for_the_smallest_block_is_refused_with_the_numbers(limit: Any, output: Path) -> None:
    large = np.broadcast_to(np.float32(1), (600, 600, 600))
    with pytest.raises(oocpatch.PlanTooLarge) as refusal:
        predict(large, output, axes="zyx", patch_size=256, patch_overlap=128, max_memory=limit)
    message = str(refusal.value)
    assert "64" in message
    assert "max_memory" in message
    assert re.search(r"needs? \d", message)
    # One patch in, one out, and sums of the same size: no plan needs less than 3 * 256**3 * 4 bytes.
    needed = re.search(r"(\d+(?:\.\d+)?) (MiB|GiB)", message)
    assert needed
    assert float(needed[1]) * {"MiB": 2**20, "GiB": 2**30}[needed[2]] >= 2 * 256**3 * 4
    assert isinstance(refusal.value, ValueError)


def test_the_numbers_of_a_refusal_are_true(tmp_path: Path) -> None:
    """With the memory that the refusal asks for, the plan is accepted; with a little less it is not."""
    shape = (40, 40, 40)
    needed, limit = 0, 2**20
    for _ in range(30):
        try:
            plan = oocpatch.plan(
                np.zeros(shape, np.float32), torch.nn.Identity(), tmp_path / "o", patch_size=32, max_memory=limit
            )
        except oocpatch.PlanTooLarge:
            needed, limit = limit, int(limit * 1.25)
            continue
        assert plan.projected_memory <= limit
        assert needed, "the first limit was meant to be too small"
        break
    else:
        raise AssertionError("no limit up to 800 MiB was enough for a volume of 250 KiB")


def test_the_memory_that_a_refusal_names_is_enough(tmp_path: Path) -> None:
    """Threads for chunks grow with the limit, and a number that is rounded down is too small by a little."""
    volume = np.zeros((60, 90, 100), np.uint16)
    net = torch.nn.Conv3d(1, 2, 3, padding=1)
    for chunk in (16, 37, 90):
        asked = {"patch_size": 32, "output_chunks": (1, chunk, chunk), "axes": "zyx"}
        with pytest.raises(oocpatch.PlanTooLarge) as refusal:
            oocpatch.plan(volume, net, tmp_path / "o", **asked, max_memory="2MiB")
        needed = re.search(r"needs (\d+\.\d [KM]iB)", str(refusal.value))
        assert needed
        plan = oocpatch.plan(volume, net, tmp_path / "o", **asked, max_memory=needed[1])
        assert plan.projected_memory <= num_bytes("max_memory", needed[1])


@pytest.mark.parametrize(("dtype", "fill"), [("uint8", 300), ("uint8", -1), ("int16", 0.5), ("uint8", float("nan"))])
def test_padding_that_the_volume_cannot_hold_is_refused(dtype: str, fill: float, output: Path) -> None:
    with pytest.raises(ValueError, match=rf"fill must be a whole number from .* as {dtype} holds them, got {fill}"):
        predict(np.zeros((20, 20), dtype), output, patch_size=8, padding_mode="constant", fill=fill)


def test_disk_too_small_for_the_workspace_is_refused_with_the_numbers(output: Path) -> None:
    large = np.broadcast_to(np.float32(1), (256, 256, 256))
    arguments = {"axes": "zyx", "patch_size": 32, "patch_overlap": 16, "block_shape": 64}
    plan = oocpatch.plan(large, torch.nn.Identity(), output, **arguments)
    assert plan.projected_disk > 2**20
    with pytest.raises(oocpatch.PlanTooLarge, match="max_disk") as refusal:
        predict(large, output, **arguments, max_disk=2**20)
    assert re.search(r"1(\.0+)? MiB", str(refusal.value))
