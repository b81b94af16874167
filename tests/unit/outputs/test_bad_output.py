"""Promises on outputs: nothing foreign is harmed, nothing is half written, and the command line says so in one line."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import oocpatch
from tests.support.children import Children, file_digests, report, unchanged
from tests.support.crash_child import Job, make_volume
from tests.support.small_volume import predict

INSIDE = {
    "the volume itself": "volume.zarr",
    "the volume by another name": "./sub/../volume.zarr",
    "inside the volume": "volume.zarr/out",
    "deep inside the volume": "volume.zarr/c/0/out",
    "around the volume": ".",
}


@pytest.mark.parametrize("place", INSIDE.values(), ids=INSIDE)
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_would_hit_the_volume_is_refused(
    place: str, overwrite: bool, tmp_path: Path, volume: Path
) -> None:
    (tmp_path / "sub").mkdir()
    with unchanged(tmp_path), pytest.raises(ValueError, match="output"):
        predict(volume, f"{tmp_path}/{place}", overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sub", "volume.zarr"]


def test_an_output_that_is_a_link_to_the_volume_is_refused(tmp_path: Path, volume: Path) -> None:
    link = tmp_path / "link.zarr"
    link.symlink_to(volume, target_is_directory=True)
    with unchanged(tmp_path), pytest.raises(ValueError, match="output"):
        predict(volume, link, overwrite=True)
    assert link.is_symlink()


def test_a_workspace_inside_the_volume_is_refused(volume: Path, output: Path) -> None:
    with pytest.raises(ValueError, match="workspace"):
        predict(volume, output, workspace=volume / "scratch")


def directory_with_files(path: Path) -> None:
    (path / "thesis").mkdir(parents=True)
    (path / "thesis" / "chapter1.tex").write_text("mine")


def foreign_array(path: Path) -> None:
    zarr.create_array(path, data=np.arange(12), chunks=(4,))


def foreign_group(path: Path) -> None:
    zarr.create_group(path).create_array("prediction", data=np.arange(12), chunks=(4,))


def foreign_old_format(path: Path) -> None:
    zarr.create_array(path, data=np.arange(12), chunks=(4,), zarr_format=2)


def regular_file(path: Path) -> None:
    path.write_text("mine")


FOREIGN = (directory_with_files, foreign_array, foreign_group, foreign_old_format, regular_file)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("make", FOREIGN, ids=[make.__name__ for make in FOREIGN])
def test_foreign_data_at_the_output_is_refused_and_untouched(
    make: Any, overwrite: bool, volume: Path, tmp_path: Path
) -> None:
    place = tmp_path / "out.zarr"
    make(place)
    with unchanged(tmp_path), pytest.raises(oocpatch.OutputExists, match=re.escape(str(place))) as refusal:
        predict(volume, place, overwrite=overwrite)
    assert isinstance(refusal.value, FileExistsError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.zarr", "volume.zarr"]


def test_an_empty_directory_is_a_fine_output(volume: Path, tmp_path: Path) -> None:
    (tmp_path / "out.zarr").mkdir()
    result = predict(volume, tmp_path / "out.zarr")
    np.testing.assert_allclose(result.values, zarr.open_array(volume)[:], rtol=1e-6)


def test_missing_parents_of_the_output_are_made(volume: Path, tmp_path: Path) -> None:
    result = predict(volume, tmp_path / "some" / "where" / "out.zarr")
    np.testing.assert_allclose(result.values, zarr.open_array(volume)[:], rtol=1e-6)


def test_an_output_below_a_regular_file_is_refused(volume: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with unchanged(tmp_path), pytest.raises((OSError, ValueError), match="file"):
        predict(volume, tmp_path / "file" / "out.zarr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "volume.zarr"]


def test_a_workspace_below_a_regular_file_is_refused(volume: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with unchanged(tmp_path), pytest.raises((OSError, ValueError), match="file"):
        predict(volume, tmp_path / "out.zarr", workspace=tmp_path / "file" / "scratch")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "volume.zarr"]


@pytest.mark.skipif(sys.platform == "win32", reason="a limit on file sizes stands in for a full disk")
@pytest.mark.parametrize("limit", [300, 1500, 3000])
def test_a_full_disk_fails_with_one_message_and_the_run_continues_when_there_is_room(
    limit: int, children: Children, tmp_path: Path
) -> None:
    make_volume(tmp_path / "volume.zarr", (64, 64), (16, 16))
    (tmp_path / "run").mkdir()
    job = Job(
        volume=str(tmp_path / "volume.zarr"),
        output=str(tmp_path / "run" / "out"),
        log=os.devnull,
        report=str(tmp_path / "report"),
        options={"patch_size": 8, "patch_overlap": 4, "block_shape": 32, "output_chunks": 32, "workers": 1},
    )
    assert children.run(job) == 0
    expected = file_digests(Path(job.output) / "prediction")
    largest = max(path.stat().st_size for path in (Path(job.output) / "prediction").rglob("*") if path.is_file())
    assert largest > limit
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    with unchanged(tmp_path / "volume.zarr"):
        assert children.run(dataclasses.replace(job, file_size_limit=limit)) == 1
    assert report(job).error in {"BlockFailed", "OSError"}
    assert "File too large" in report(job).message
    assert children.run(job) == 0
    assert file_digests(Path(job.output) / "prediction") == expected
