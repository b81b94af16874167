"""Converting: the same values, names, places and attributes, in chunks, within the memory limit, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
import tifffile
import torch
import xarray
import zarr
from click.testing import CliRunner

import oocpatch
from oocpatch.cli import main as cli
from oocpatch.conversion import convert as converting
from oocpatch.conversion import target as conversion
from oocpatch.outputs.pyramid import Level
from oocpatch.storage.journal import encode_record, read_journal
from oocpatch.storage.paths import LocalPath
from tests.support.children import Children, file_digests, unchanged
from tests.unit.volumes.test_formats import KINDS, SLIDE, STACK, pyramidal_tiff

ROOT = Path(__file__).parents[3]
MIB = 1 << 20


@pytest.mark.parametrize("kind", ["ome-tiff", "slide", "nifti.gz", "hdf5", "precomputed"])
def test_a_converted_file_has_its_values_names_places_and_attributes(kind: str, tmp_path: Path) -> None:
    make, name, part, names, _ = KINDS[kind]
    expected = make(tmp_path / name)
    source = oocpatch.Volume(f"{tmp_path / name}{part}").source
    array = oocpatch.convert(f"{tmp_path / name}{part}", tmp_path / "out.zarr", chunks=40, progress=False)
    np.testing.assert_array_equal(array.transpose(*names), expected)
    assert array.dims == (("c", "y", "x") if "c" in names else names)
    assert array.dtype == expected.dtype
    kept = oocpatch.Volume(tmp_path / "out.zarr").source.coords
    assert set(kept) - {"c"} == set(source.coords)  # channels have names now
    for axis, coordinate in source.coords.items():
        for found in (array.coords[axis], kept[axis]):
            np.testing.assert_array_equal(found, coordinate)
            assert found.attrs == coordinate.attrs
    assert {k: array.attrs[k] for k in source.attrs} == dict(source.attrs)
    again = oocpatch.predict(
        tmp_path / "out.zarr", torch.nn.Identity(), tmp_path / "predicted.zarr",
        patch_size=8, overlap_mode="crop", progress=False,
    )  # fmt: skip
    np.testing.assert_array_equal(again, array)
    assert not list(tmp_path.glob("*partial*"))


def test_chunks_and_shards_are_those_that_were_asked_for(tmp_path: Path) -> None:
    oocpatch.convert(STACK, tmp_path / "out.zarr", chunks=(4, 8, 8), shards=(8, 16, 16), axes="zyx", progress=False)
    array = zarr.open_array(tmp_path / "out.zarr/scale0/image", mode="r")
    assert array.metadata.zarr_format == 3
    assert (array.chunks, array.shards) == ((4, 8, 8), (8, 16, 16))
    assert array.metadata.dimension_names == ("z", "y", "x")
    np.testing.assert_array_equal(array[:], STACK)


@pytest.mark.parametrize("axes", ["tyx", "cyx", "yxc", "zyx"])
def test_axes_say_what_is_channel_and_what_is_looped(axes: str, tmp_path: Path) -> None:
    data = STACK if axes != "yxc" else STACK.transpose(1, 2, 0)
    array = oocpatch.convert(data, tmp_path / "out.zarr", axes=axes, chunks=16, progress=False)
    assert array.dims == tuple("cyx" if axes == "yxc" else axes)
    np.testing.assert_array_equal(array, STACK)
    array = zarr.open_array(tmp_path / "out.zarr/scale0/image", mode="r")
    assert array.chunks == ((12 if axes == "zyx" else 1), 16, 16)  # many channels, and times, have chunks of their own


def test_a_level_is_chosen(tmp_path: Path) -> None:
    pyramidal_tiff(tmp_path / "a.tif")
    array = oocpatch.convert(tmp_path / "a.tif", tmp_path / "out.zarr", level=1, progress=False)
    np.testing.assert_array_equal(array.transpose("y", "x", "c"), SLIDE[::2, ::2])
    with pytest.raises(ValueError, match="level must be 0 unless the volume is an OME-Zarr or a file with levels"):
        oocpatch.convert(STACK, tmp_path / "other.zarr", level=1)


def pyramid(path: Path) -> list[Any]:
    """The levels that the metadata of an OME-Zarr list, finest first, as they are read."""
    image = zarr.open_group(path, mode="r").attrs.asdict()["ome"]["multiscales"][0]
    return [np.asarray(zarr.open_array(path / level["path"], mode="r")) for level in image["datasets"]]


def halved(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Means of 2 x 2 voxels of the last two axes, whose lengths are even."""
    *front, h, w = values.shape
    means = values.reshape(*front, h // 2, 2, w // 2, 2).mean((-3, -1), dtype=np.float64)
    return np.rint(means).astype(values.dtype)


def test_a_slide_becomes_a_pyramid_with_the_colours_and_sizes_of_the_slide(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "a.ome.tif", SLIDE, metadata={"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    )
    oocpatch.convert(tmp_path / "a.ome.tif", tmp_path / "out.zarr", chunks=64, progress=False)
    first, *others = pyramid(tmp_path / "out.zarr")
    np.testing.assert_array_equal(first, SLIDE.transpose(2, 0, 1))
    assert len(others) >= 2
    assert max(others[-1].shape) <= 64
    above = first
    for level in others:
        if not above.shape[1] % 2 and not above.shape[2] % 2:
            np.testing.assert_array_equal(level, halved(above))
        above = level
    for number in range(len(others) + 1):
        volume = oocpatch.Volume(tmp_path / "out.zarr", level=number)
        assert volume.source.coords["x"].values[:2].tolist() == [0.25 * 2**number - 0.25, 0.75 * 2**number - 0.25]
    channels = zarr.open_group(tmp_path / "out.zarr", mode="r").attrs.asdict()["ome"]["omero"]["channels"]
    assert [channel["color"] for channel in channels] == ["FF0000", "00FF00", "0000FF"]
    assert all(channel["window"] == {"min": 0, "max": 255, "start": 0, "end": 255} for channel in channels)
    assert not list(tmp_path.rglob("*.partial*"))


def test_levels_hold_means_or_where_it_says_labels_values_that_were_there(tmp_path: Path) -> None:
    labels = np.kron(np.arange(1, 26, dtype=np.uint32).reshape(5, 5), np.ones((16, 16), np.uint32))
    labels[::2] = 7
    for name, options, method in (("a", {}, "mode"), ("b", {"labels": False}, "mean")):
        oocpatch.convert(labels, tmp_path / f"{name}.zarr", chunks=20, levels=2, progress=False, **options)
        _, level = pyramid(tmp_path / f"{name}.zarr")
        rows = labels[1::2, ::2]  # each voxel has two of them, and two of 7
        expected = np.minimum(rows, 7) if method == "mode" else np.rint((rows + 7) / 2).astype(np.uint32)
        np.testing.assert_array_equal(level, expected)


def test_one_level_and_what_an_image_cannot_describe_are_plain_arrays(tmp_path: Path) -> None:
    uneven = xarray.DataArray(STACK, dims=tuple("zyx"), coords={"z": np.arange(12) ** 2})
    for name, volume, options in (
        ("a", STACK, {"levels": 1}),
        ("b", uneven, {}),
        ("c", STACK[:, None, None], {"axes": "abzyx"}),
    ):
        array = oocpatch.convert(volume, tmp_path / name, progress=False, **options)
        np.testing.assert_array_equal(array, volume)
        np.testing.assert_array_equal(zarr.open_array(tmp_path / name / "volume", mode="r")[:], volume)
    np.testing.assert_array_equal(oocpatch.Volume(tmp_path / "b").source.coords["z"], uneven["z"])
    with pytest.raises(ValueError, match=r"levels must be 1 unless .* evenly spaced coordinates.*, got 2 for Volume"):
        oocpatch.convert(uneven, tmp_path / "d", levels=2)
    with pytest.raises(ValueError, match="levels must be at least 1, got 0"):
        oocpatch.convert(STACK, tmp_path / "d", levels=0)


def test_a_conversion_that_died_within_its_pyramid_makes_the_same_bytes(tmp_path: Path, monkeypatch: Any) -> None:
    options: dict[str, Any] = {"axes": "zyx", "chunks": 8, "progress": False}
    oocpatch.convert(STACK, tmp_path / "undisturbed.zarr", **options)
    build, built = Level.build, []

    def failing(self: Level, region: Any) -> None:
        if built:
            raise KeyboardInterrupt
        built.append(region)
        build(self, region)

    monkeypatch.setattr(Level, "build", failing)
    with pytest.raises(KeyboardInterrupt):
        oocpatch.convert(STACK, tmp_path / "out.zarr", **options)
    assert not (tmp_path / "out.zarr").exists()
    monkeypatch.setattr(Level, "build", build)
    finest = chunks_of(tmp_path / "out.zarr.partial/scale0")
    oocpatch.convert(STACK, tmp_path / "out.zarr", **options)
    assert chunks_of(tmp_path / "out.zarr/scale0") == finest  # none was written again
    assert file_digests(tmp_path / "out.zarr") == file_digests(tmp_path / "undisturbed.zarr")


def measured(children: Children, volume: Path, output: Path, **options: Any) -> int:
    """Bytes that a conversion adds to a fresh process."""
    return int(children.measure("tests.support.convert_child", volume, output, options)["added"])


def big(path: Path, shape: tuple[int, ...]) -> None:
    """Uint16 in the format that the name tells, with a plane number in each plane."""
    planes: Iterator[np.ndarray[Any, Any]] = (np.full(shape[1:], z, np.uint16) for z in range(shape[0]))
    if path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            array = file.create_dataset("data", shape, np.uint16, chunks=(32, 64, 64), compression="gzip")
            for z in range(0, shape[0], 32):
                array[z : z + 32] = np.stack([next(planes) for _ in range(32)])
    elif path.suffix == ".tif":
        with tifffile.TiffWriter(path) as file:
            for plane in planes:
                file.write(plane, compression="zlib", rowsperstrip=shape[1], contiguous=False, metadata=None)
    else:
        nibabel.save(nibabel.Nifti1Image(np.stack(list(planes)).T, np.eye(4)), path)


@pytest.mark.parametrize("name", ["a.h5", "a.tif", "a.nii.gz"])
def test_converting_takes_no_more_memory_than_it_may(name: str, tmp_path: Path, children: Children) -> None:
    """64 MiB under 32 MiB."""
    shape = (128, 512, 512)
    big(tmp_path / name, shape)
    added = measured(children, tmp_path / name, tmp_path / "out.zarr", max_memory="32MiB", chunks=64, shards=64)
    assert added <= 32 * MIB
    array = zarr.open_array(tmp_path / "out.zarr/scale0/image", mode="r")
    axes = (2, 1, 0) if ".nii" in name else (0, 1, 2)
    for z in (0, 63, 64, 127):
        index: list[Any] = [slice(None)] * 3
        index[axes[0]] = z
        assert np.unique(np.asarray(array[tuple(index)])).tolist() == [z]


def test_a_limit_that_holds_no_write_unit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(oocpatch.PlanTooLarge, match=r"one write unit of \(12, 40, 50\) .* is 64.0 KiB; raise"):
        oocpatch.convert(STACK, tmp_path / "out.zarr", max_memory="64KiB")
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.zarr").mkdir()
    with pytest.raises(oocpatch.OutputExists, match=r"output must be a new path, but .* exists"):
        oocpatch.convert(STACK, tmp_path / "out.zarr")
    (tmp_path / "new.zarr.partial").mkdir()
    (tmp_path / "new.zarr.partial" / "diary.txt").write_text("mine")
    with pytest.raises(oocpatch.OutputExists, match="holds something else; move it away"):
        oocpatch.convert(STACK, tmp_path / "new.zarr")
    assert (tmp_path / "new.zarr.partial" / "diary.txt").read_text() == "mine"


KILLED = """
import itertools, os, signal, sys
import oocpatch
from oocpatch.conversion.target import Conversion

write, count = Conversion.write, itertools.count(1)


def killed(self, part, values):
    write(self, part, values)
    if next(count) == 40:
        os.kill(os.getpid(), signal.SIGKILL)


Conversion.write = killed
oocpatch.convert(*sys.argv[1:], chunks=16, progress=False)
"""
"""A conversion that is killed when it has marked its 40th unit, wherever its other threads are."""


def chunks_of(path: Path) -> dict[str, tuple[int, int]]:
    """Stored chunks, by when and as which file they were written."""
    found = (file for file in path.rglob("*") if file.is_file() and file.parent.name.isdecimal())
    return {str(f.relative_to(path)): (f.stat().st_mtime_ns, f.stat().st_ino) for f in found if f.name.isdecimal()}


def test_a_killed_conversion_goes_on_and_makes_nothing_twice(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 4000, (32, 128, 128), dtype=np.uint16)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("data", data=data, chunks=(8, 32, 32), compression="gzip")
    output, partial = tmp_path / "out.zarr", tmp_path / "out.zarr.partial"
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a.h5"), str(output)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert not output.exists()
    done = len(list(read_journal(LocalPath(partial / conversion.JOURNAL))))
    assert 40 <= done < 2 * 8 * 8
    before = chunks_of(partial)
    again = oocpatch.convert(tmp_path / "a.h5", output, chunks=16, progress=False)
    kept = before.items() & chunks_of(output).items()
    # A thread that died between the two had stored a unit that it had not marked.
    assert done <= len(kept) <= len(before) <= done + converting.THREADS
    np.testing.assert_array_equal(again, data)
    oocpatch.convert(tmp_path / "a.h5", tmp_path / "undisturbed.zarr", chunks=16, progress=False)
    assert file_digests(output) == file_digests(tmp_path / "undisturbed.zarr")
    assert not list(tmp_path.rglob("*partial*"))


@pytest.mark.parametrize("shards", [None, 8])
@pytest.mark.parametrize("lost", ["nothing", "a record", "a unit", "the journal", "the array", "the name"])
def test_whatever_a_call_left_the_same_call_makes_the_same_bytes(lost: str, shards: int | None, tmp_path: Path) -> None:
    """As if it had died between two steps: data and record, set-up and journal, the new name and the end."""
    data = np.arange(10 * 12 * 9, dtype=np.uint16).reshape(10, 12, 9)
    options: dict[str, Any] = {"axes": "zyx", "chunks": 4, "shards": shards, "progress": False}
    out, partial = tmp_path / "out.zarr", tmp_path / "out.zarr.partial"
    oocpatch.convert(data, out, **options)
    expected = file_digests(out)
    count = 2 * 2 * 2 if shards else 3 * 3 * 3
    lines = [encode_record([number]) for number in range(count)]
    if lost == "the name":
        (out / conversion.JOURNAL).write_bytes(b"".join(lines))
    else:
        out.rename(partial)
        (partial / conversion.JOURNAL).write_bytes(b"".join(lines if lost == "nothing" else lines[1:]))
        if lost == "the journal":
            (partial / conversion.JOURNAL).unlink()
        if lost == "the array":
            shutil.rmtree(partial / "scale0")
            (partial / conversion.JOURNAL).unlink()
        if lost == "a unit":
            (partial / "scale0/image/c/0/0/0").rename(partial / "scale0/image/c/0/0/0.5f2d.partial")
    np.testing.assert_array_equal(oocpatch.convert(data, out, **options), data)
    assert file_digests(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out.zarr"]


def test_another_volume_or_other_parameters_are_refused_by_name_until_it_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    oocpatch.convert(STACK, out, axes="zyx", chunks=16, progress=False)
    with unchanged(out):  # complete: it returns at once
        np.testing.assert_array_equal(oocpatch.convert(STACK, out, axes="zyx", chunks=16, progress=False), STACK)
    for _ in ("complete", "interrupted"):
        for field, given in {
            "volume": {"volume": STACK + 1},
            "axes": {"axes": "tyx"},
            "chunks": {"chunks": 8},
            "shards": {"shards": (12, 32, 32)},
            "levels": {"levels": 3},
            "labels": {"labels": True},
        }.items():
            settings: dict[str, Any] = {"volume": STACK, "axes": "zyx", "chunks": 16, "progress": False, **given}
            with (
                unchanged(tmp_path),
                pytest.raises(oocpatch.RunMismatch, match=f"{field}: .* overwrite=True") as refusal,
            ):
                oocpatch.convert(settings.pop("volume"), out, **settings)
            assert field in refusal.value.fields
        if out.exists():
            out.rename(tmp_path / "out.zarr.partial")
            (tmp_path / "out.zarr.partial" / conversion.JOURNAL).write_bytes(b"")
    array = oocpatch.convert(STACK + 1, out, axes="zyx", chunks=16, progress=False, overwrite=True)
    np.testing.assert_array_equal(array, STACK + 1)
    again = oocpatch.convert(STACK, out, axes="zyx", chunks=8, progress=False, overwrite=True)
    np.testing.assert_array_equal(again, STACK)
    assert [path.name for path in tmp_path.iterdir()] == ["out.zarr"]


def test_overwriting_replaces_no_data_of_others(tmp_path: Path) -> None:
    (tmp_path / "out.zarr").mkdir()
    (tmp_path / "out.zarr/diary.txt").write_text("mine")
    with unchanged(tmp_path), pytest.raises(oocpatch.OutputExists, match="replaces only what convert wrote"):
        oocpatch.convert(STACK, tmp_path / "out.zarr", overwrite=True)


def test_the_command_prints_what_it_made_and_ends_in_one_line_for_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    KINDS["nifti.gz"][0](tmp_path / "scan.nii.gz")
    arguments = ["convert", "scan.nii.gz", "scan.zarr", "--chunks", "16,16,8", "--json"]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["axes"], report["shape"], report["chunks"]) == (["x", "y", "z"], [50, 40, 12], [16, 16, 8])
    assert CliRunner().invoke(cli.main, arguments).exit_code == 0  # complete
    result = CliRunner().invoke(cli.main, [*arguments, "--chunks", "8"])
    assert result.exit_code == 3
    assert result.stderr.startswith("oocpatch: ")
    assert "chunks: [16, 16, 8] before, [8, 8, 8] now" in result.stderr
    assert CliRunner().invoke(cli.main, [*arguments, "--chunks", "8", "--overwrite"]).exit_code == 0
    result = CliRunner().invoke(cli.main, ["convert", "scan.nii.gz::level=two", "other.zarr"])
    assert result.exit_code == 2
    assert "must be the path of a dataset, level=NUMBER" in result.stderr
