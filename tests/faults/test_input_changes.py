"""The input is edited between two calls, or the folder moves: never a result that is stale or mixed.

`campaign_edits` tries many more. Results are compared with those of numpy, and patches are counted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from distributed import Client

import oocpatch
from oocpatch.outputs.integrity import METADATA_CRC, metadata_checksum
from oocpatch.outputs.record import ATTRIBUTE
from tests.support import edits
from tests.support.children import Children
from tests.support.clusters import Fork
from tests.support.edits import (
    FORMATS,
    MODES,
    PATCHES,
    Call,
    Edit,
    Input,
    Mode,
    call,
    check_edit,
    check_values,
    contents,
)

CROP = MODES["crop"]


@pytest.mark.parametrize(
    ("form", "mode", "edit", "stop"),
    [
        ("zarr", "hann", edits.swap_folders, None),
        ("zarr", "crop", edits.fill_value, 20),
        ("zarr sharded", "zscore", edits.swap_chunks, None),
        ("zarr packed", "reflect", edits.scale_factor, 20),
        ("ome-zarr level 1", "pyramid", edits.delete_chunk, None),
        ("nifti gz", "argmax", edits.voxel_same_time, None),
        ("ome-tiff files", "heads", edits.voxel_renamed, None),
        ("hdf5 virtual", "wrap", edits.voxel_while_open, None),
        ("n5", "skip_empty", edits.delete_chunk, 20),
        ("memmap flipped", "hann", edits.voxel, None),
        ("xarray", "gaussian, two workers", edits.other_half, None),
        ("tiff zlib", "hann", edits.copy, None),
    ],
)
def test_an_edit_is_seen(tmp_path: Path, form: str, mode: str, edit: Edit, stop: int | None) -> None:
    outcome = check_edit(tmp_path, form, mode, edit, stop=stop, seed=5)
    seen = "refused" if edit not in edits.SAME else "returned" if stop is None else "resumed"
    assert outcome.startswith(seen)


@pytest.mark.parametrize(
    "other",
    [
        lambda mapped: mapped[:, ::-1],
        lambda mapped: mapped[::-1],
        lambda mapped: np.roll(mapped, 8, axis=2),
        lambda mapped: mapped[:, :, ::-1],
    ],
    ids=["y", "z", "rolled", "x"],
)
def test_views_of_one_memory_map_are_different_volumes(
    tmp_path: Path, other: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
) -> None:
    stored = Input.of("memmap", tmp_path / "in", edits.new_data(1))
    assert call(stored, CROP, tmp_path / "out") == Call(PATCHES)
    stored.opened = other(stored.open())
    assert call(stored, CROP, tmp_path / "out") == Call(0, ("volume",))


@pytest.mark.parametrize("stop", [None, 10])
@pytest.mark.parametrize("overlap_mode", ["crop", "hann"])
def test_an_edited_mask_is_seen_and_leaves_no_old_voxels(tmp_path: Path, overlap_mode: str, stop: int | None) -> None:
    stored = Input.of("zarr", tmp_path / "in", edits.new_data(2))
    mask = zarr.create_array(tmp_path / "mask.zarr", shape=(1, 2, 16), chunks=(1, 2, 2), dtype="uint8")
    mask[:, :, 2:8] = 1
    options = {"mask": str(tmp_path / "mask.zarr"), "overlap_mode": overlap_mode}
    first = call(stored, CROP, tmp_path / "out", limit=stop, **options)
    assert first.failed == (stop is not None)
    mask[:, :, 2:4], mask[:, :, 12] = 0, 1
    assert call(stored, CROP, tmp_path / "out", **options) == Call(0, ("mask",))
    updated = call(stored, CROP, tmp_path / "out", update=True, **options)
    fresh = call(stored, CROP, tmp_path / "fresh", **options)
    assert 0 < updated.computed <= fresh.computed < PATCHES
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    result = zarr.open_array(tmp_path / "out" / "prediction")[:]
    computed = result != 0
    assert np.allclose(result[computed], 2 * stored.data[computed] + 1)
    assert not computed[..., :4].any()
    assert computed[..., 16:32].all()


def test_a_change_of_the_fill_value_that_is_skipped(tmp_path: Path) -> None:
    data = edits.new_data(3)
    data[..., 32:] = 5
    array = zarr.create_array(tmp_path / "in.zarr", shape=data.shape, chunks=(8, 8, 8), dtype="float32", fill_value=5)
    array[:] = data
    stored = Input(FORMATS["zarr"], tmp_path / "in.zarr", data)
    skipping = call(stored, CROP, tmp_path / "out", skip_empty=True).computed
    assert skipping < PATCHES
    metadata = tmp_path / "in.zarr" / "zarr.json"
    metadata.write_text(metadata.read_text().replace('"fill_value": 5.0', '"fill_value": 6.0'))
    assert call(stored, CROP, tmp_path / "out", skip_empty=True) == Call(0, ("volume",))
    assert call(stored, CROP, tmp_path / "out", skip_empty=True, update=True).computed == skipping
    stored.data = np.where(data == 5, 0, data)
    result = zarr.open_array(tmp_path / "out" / "prediction")[:]
    assert (result[..., 40:] == 0).all(), "those chunks now have the fill value 6, which is skipped"


@pytest.mark.parametrize("workspace", [None, "a/work", "work"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_folder_moves_or_is_copied(tmp_path: Path, workspace: str | None, *, copied: bool) -> None:
    stored = Input.of("zarr", tmp_path / "a", edits.new_data(4))
    there = Input(stored.format, tmp_path / "b" / "a.zarr", stored.data)
    place = None if workspace is None else tmp_path / workspace
    assert call(stored, CROP, tmp_path / "a/out", limit=20, workspace=place).failed
    (shutil.copytree if copied else shutil.move)(tmp_path / "a", tmp_path / "b")
    moved = tmp_path / "b/work" if workspace == "a/work" else place
    is_of_original = copied and workspace == "work"
    rest = call(there, CROP, tmp_path / "b/out", workspace=moved)
    assert rest == Call(PATCHES if is_of_original else PATCHES - 20)
    check_values(tmp_path / "b/out", CROP, stored.data)
    assert call(there, CROP, tmp_path / "b/out", workspace=moved) == Call(0)
    if copied:
        assert call(stored, CROP, tmp_path / "a/out", workspace=place) == Call(PATCHES - 20)
        check_values(tmp_path / "a/out", CROP, stored.data)


def test_a_copy_does_not_count_what_the_original_did_after_it(tmp_path: Path) -> None:
    stored = Input.of("zarr", tmp_path / "in", edits.new_data(6))
    assert call(stored, CROP, tmp_path / "out", limit=20, workspace=tmp_path / "work").failed
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    assert call(stored, CROP, tmp_path / "out", limit=10, workspace=tmp_path / "work").failed
    shutil.rmtree(tmp_path / "out")
    assert call(stored, CROP, tmp_path / "copy", workspace=tmp_path / "work") == Call(PATCHES - 20)
    check_values(tmp_path / "copy", CROP, stored.data)


def test_a_workspace_moves_and_serves_two_outputs(tmp_path: Path) -> None:
    stored = Input.of("zarr", tmp_path / "in", edits.new_data(7))
    for name in ("one", "two"):
        assert call(stored, CROP, tmp_path / name, limit=20, workspace=tmp_path / "work").failed
    (tmp_path / "work").rename(tmp_path / "moved")
    for name in ("one", "two"):
        assert call(stored, CROP, tmp_path / name, workspace=tmp_path / "moved") == Call(PATCHES - 20)
        check_values(tmp_path / name, CROP, stored.data)
    assert not (tmp_path / "moved").exists()


def test_outputs_of_earlier_versions_are_refused_and_verify(tmp_path: Path) -> None:
    stored = Input.of("zarr", tmp_path / "in", edits.new_data(10))
    assert call(stored, CROP, tmp_path / "out") == Call(PATCHES)
    file = tmp_path / "out" / "zarr.json"
    metadata = json.loads(file.read_text())
    metadata["attributes"]["oocpatch"]["parameters"]["volume"] = "183cb14f0c2f8a4c7d5e"
    metadata["attributes"]["oocpatch"]["details"][METADATA_CRC] = metadata_checksum(metadata, ATTRIBUTE)
    file.write_text(json.dumps(metadata))
    settings = {**edits.SETTINGS, **CROP.options}
    for update in (False, True):
        with pytest.raises(oocpatch.RunMismatch, match="of an earlier version of oocpatch"):
            oocpatch.predict(stored.open(), edits.Twice(), tmp_path / "out", update=update, **settings)
    assert not oocpatch.verify(tmp_path / "out").damaged
    assert call(stored, CROP, tmp_path / "out", overwrite=True) == Call(PATCHES)
    check_values(tmp_path / "out", CROP, stored.data)


def test_an_edit_between_parts(tmp_path: Path) -> None:
    stored = Input.of("zarr", tmp_path / "in", edits.new_data(8))
    first = call(stored, CROP, tmp_path / "out", part=(1, 2))
    assert 0 < first.computed < PATCHES
    edits.add_chunk(stored, np.random.default_rng(0))
    assert call(stored, CROP, tmp_path / "out", part=(2, 2)) == Call(0, ("volume",))
    call(stored, CROP, tmp_path / "out", update=True)
    check_values(tmp_path / "out", CROP, stored.data)


def test_an_edit_between_calls_on_a_cluster(children: Children, tmp_path: Path) -> None:
    stored = Input.of("zarr", tmp_path / "in", edits.new_data(9))
    mode = Mode({"model_id": "identity"}, expected=lambda data: {"prediction": data})
    settings = {**edits.SETTINGS, **mode.options}
    fork = Fork(children, tmp_path)
    _, address = fork.scheduler()
    fork.start("worker", address, 1)
    with Client(address, set_as_default=False) as own:
        oocpatch.predict(stored.open(), "identity", tmp_path / "out", client=own, **settings)
        edits.delete_chunk(stored, np.random.default_rng(0))
        with pytest.raises(oocpatch.RunMismatch, match="1 of 16 chunks"):
            oocpatch.predict(stored.open(), "identity", tmp_path / "out", client=own, **settings)
        events: list[Any] = []
        settings["progress"] = events.append
        oocpatch.predict(stored.open(), "identity", tmp_path / "out", client=own, update=True, **settings)
    fork.kill_all()
    check_values(tmp_path / "out", mode, stored.data)
    assert 0 < sum(event.patches for event in events) < PATCHES
