"""`predict` with models of objects as a whole: what it joins, writes, resumes and repairs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import zarr
from click.testing import CliRunner
from torch import nn

import oocpatch
from oocpatch.cli.main import main
from oocpatch.execution.scheduler import Task
from oocpatch.planning.grid import PatchGrid
from oocpatch.run.instance_tasks import InstanceTasks
from tests.support.children import file_digests
from tests.support.instance_models import Renumber, WithScores, renumbered
from tests.support.instances import oracle, owners

Array = npt.NDArray[Any]
QUIET: dict[str, Any] = {"progress": False, "overlap_mode": "instances"}


class Unsure(nn.Module):
    """Finds most voxels of objects, others in each patch, and numbers objects anew."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.stack([self.one(patch) for patch in batch[:, 0].numpy(force=True)])[:, None])

    def one(self, patch: Array) -> Array:
        seed = int(patch.sum(dtype=np.int64))
        values = renumbered(patch, seed)
        values[np.random.default_rng(seed).random(patch.shape) < 0.1] = 0
        return values


def cells(shape: tuple[int, ...], side: int, seed: int = 0) -> Array:
    """Touching cells with edges of about `side`, and some background."""
    random = np.random.default_rng(seed)
    points = random.random((int(np.prod(shape)) // side ** len(shape) + 1, len(shape))) * shape
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    nearest = ((grid[..., None, :] - points) ** 2).sum(axis=-1).argmin(axis=-1)
    return np.where(nearest % 5 == 0, 0, nearest + 1).astype(np.int32)


@pytest.fixture
def tissue() -> Array:
    return cells((44, 52), 7)


@pytest.mark.parametrize(
    ("shape", "patch", "overlap", "options"),
    [
        ((61,), 12, 5, {"block_shape": 11, "output_chunks": 3, "axes": "x"}),
        ((23, 26), 8, 4, {"block_shape": 7, "output_chunks": 4}),
        ((23, 26), (9, 8), (3, 5), {"padding_mode": "edge", "block_shape": 8, "output_chunks": 4}),
        ((5, 26), 8, 4, {"block_shape": 8, "output_chunks": 5}),
        ((9, 10, 8), 5, 3, {"block_shape": 4, "output_chunks": 2}),
        ((23, 26), 8, 4, {"match": 0.9, "batch_size": 3, "workers": 2, "block_shape": 7, "output_chunks": 4}),
    ],
)
def test_objects_are_those_of_loops_over_voxels(
    shape: tuple[int, ...], patch: Any, overlap: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    values, match = cells(shape, 4), options.get("match", 0.5)
    result = oocpatch.predict(
        values, Unsure(), tmp_path / "out.zarr", patch_size=patch, patch_overlap=overlap, **QUIET, **options
    )
    sizes, overlaps = (np.broadcast_to(n, len(shape)).tolist() for n in (patch, overlap))
    grid = PatchGrid.of(shape, tuple(sizes), tuple(overlaps), padded="padding_mode" in options)
    padded = np.pad(values, [(p, p) for p in sizes], mode="edge")
    starts = [place.index_ini for place in grid]
    boxes = [tuple(slice(a + p, a + 2 * p) for a, p in zip(s, sizes, strict=True)) for s in starts]
    owner = owners(grid)
    expected, count = oracle(shape, starts, [Unsure().one(padded[b]) for b in boxes], lambda v: int(owner[v]), match)
    np.testing.assert_array_equal(result.values, expected)
    assert (result.attrs["objects"], result.dtype) == (count, np.uint32)
    assert oocpatch.verify(tmp_path / "out.zarr").passed
    assert not list(tmp_path.glob("out.zarr.*"))


def test_a_perfect_model_splits_and_merges_no_touching_cell(tmp_path: Path) -> None:
    for shape, side, patch, overlap in (((120, 130), 10, 40, 24), ((32, 36, 30), 8, 20, 12)):
        truth = cells(shape, side)
        options = {"patch_size": patch, "patch_overlap": overlap, "block_shape": 32, "output_chunks": 16, **QUIET}
        result = oocpatch.predict(truth, Renumber(), tmp_path / f"{len(shape)}d.zarr", **options)
        pairs = np.unique(np.stack([truth.reshape(-1), result.values.reshape(-1)]), axis=1)
        assert pairs.shape[1] == len(np.unique(truth)) == result.attrs["objects"] + 1
        assert result.attrs["objects"] > 50


def test_bytes_do_not_depend_on_blocks_workers_or_parts(tissue: Array, tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "volume.zarr", data=tissue, chunks=(16, 16))
    options = {"patch_size": 12, "patch_overlap": 6, "output_chunks": 8, **QUIET}
    digests = []
    for name, how in {
        "one": {"workers": 1, "block_shape": 16},
        "two": {"workers": 2, "block_shape": 16},
        "larger": {"block_shape": (64, 24)},
    }.items():
        oocpatch.predict(tmp_path / "volume.zarr", Unsure(), tmp_path / name, **options, **how)
        digests.append(file_digests(tmp_path / name / "prediction" / "c"))
    for i in (3, 1, 2, 2):
        result = oocpatch.predict(
            tmp_path / "volume.zarr", Unsure(), tmp_path / "parts", part=(i, 3), block_shape=16, **options
        )
    assert result.attrs["objects"] == result.values.max()
    digests.append(file_digests(tmp_path / "parts" / "prediction" / "c"))
    assert digests[0] == digests[1] == digests[2] == digests[3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["larger", "one", "parts", "two", "volume.zarr"]


def test_each_time_is_joined_by_itself(tmp_path: Path) -> None:
    values = np.stack([cells((30, 28), 6, seed) for seed in range(3)])
    options = {"patch_size": 12, "patch_overlap": 6, "block_shape": 12, "output_chunks": 6, **QUIET}
    result = oocpatch.predict(values, Unsure(), tmp_path / "all.zarr", axes="tyx", **options)
    for t in range(3):
        alone = oocpatch.predict(values[t], Unsure(), tmp_path / f"{t}.zarr", **options)
        np.testing.assert_array_equal(result.values[t], alone.values)
        assert result.attrs["objects"][t] == alone.attrs["objects"]


def test_other_heads_are_as_without_objects(tissue: Array, tmp_path: Path) -> None:
    options = {"patch_size": 12, "patch_overlap": 6, "block_shape": 16, "output_chunks": 8, "progress": False}
    modes = {"cells": "instances", "prob": "hann"}
    both = oocpatch.predict(tissue, WithScores(), tmp_path / "both.zarr", overlap_mode=modes, **options)
    alone = oocpatch.predict(tissue, Renumber(), tmp_path / "alone.zarr", overlap_mode="instances", **options)
    np.testing.assert_array_equal(both.cells.values, alone.values)
    np.testing.assert_allclose(both.prob.values, tissue / 100, atol=1e-6)
    assert both.cells.attrs["objects"] == alone.attrs["objects"]
    assert both.prob.dtype == np.float32
    assert oocpatch.verify(tmp_path / "both.zarr").passed


def test_the_command_says_how_many_objects_there_are(tissue: Array, tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "v.zarr", data=tissue, chunks=(16, 16))
    command = ["predict", str(tmp_path / "v.zarr"), "--patch-size", "12", "--patch-overlap", "6", "--progress", "none"]
    reports = {}
    for name, modes in {"Renumber": "instances", "WithScores": "cells=instances,prob=hann"}.items():
        model = f"tests.support.instance_models:{name}"
        arguments = [str(tmp_path / name), "--model", model, "--overlap-mode", modes, "--match", "0.6", "--json"]
        result = CliRunner().invoke(main, [*command, *arguments])
        assert result.exit_code == 0, result.output
        reports[name] = json.loads(result.stdout)["objects"]
    count = len(np.unique(tissue)) - 1
    assert reports == {"Renumber": count, "WithScores": {"cells": count}}


def test_voxels_without_a_patch_have_the_fill_unless_an_object_reaches_them(tmp_path: Path) -> None:
    values = np.zeros((1, 40), np.int32)
    values[0, 12:19], values[0, 30:38] = 1, 2
    mask = np.zeros_like(values)
    mask[0, 9] = 1  # of the patches at 0, 5, 10 ... those at 0 and 5, which own the voxels before 13
    options = {"patch_size": (1, 15), "patch_overlap": (0, 10), "output_chunks": (1, 5), "axes": "yx", **QUIET}
    result = oocpatch.predict(values, Renumber(), tmp_path / "out.zarr", mask=mask, output_fill=9, **options)
    assert result.values[0].tolist() == [0] * 12 + [1] * 7 + [9] * 21
    assert result.attrs["uncovered_voxels"] == 21


def test_ids_that_do_not_fit_are_refused_with_their_number(tmp_path: Path) -> None:
    values = np.arange(1, 601, dtype=np.int32).reshape(20, 30)
    options = {"patch_size": 10, "patch_overlap": 4, "output_chunks": 5, **QUIET}
    with pytest.raises(ValueError, match=r"must hold the number of objects, 600, got uint8"):
        oocpatch.predict(values, Renumber(), tmp_path / "out.zarr", output_dtype="uint8", **options)
    result = oocpatch.predict(
        values, Renumber(), tmp_path / "out.zarr", output_dtype="int16", overwrite=True, **options
    )
    assert result.dtype == np.int16
    np.testing.assert_array_equal(result.values, values)


def test_negative_labels_fail_their_block(tmp_path: Path) -> None:
    def negative(batch: torch.Tensor) -> torch.Tensor:
        return -batch[:, :1].to(torch.int64)

    with pytest.raises(oocpatch.BlockFailed, match="labels of objects must be 0 or more, 0 the background, got -7"):
        oocpatch.predict(np.full((8, 8), 7), negative, tmp_path / "o", patch_size=8, patch_overlap=2, **QUIET)


def test_single_blocks_have_the_ids_of_all(tissue: Array, tmp_path: Path) -> None:
    options = {"patch_size": 12, "patch_overlap": 6, "block_shape": 16, "output_chunks": 8, **QUIET}
    whole = oocpatch.predict(tissue, Renumber(), tmp_path / "whole.zarr", **options).values
    plan = oocpatch.plan(tissue, Renumber(), tmp_path / "out.zarr", **options)
    part = plan.run(blocks=[3])
    assert part.attrs["complete"] is False
    core = plan.block_grid[3].core.slices()
    np.testing.assert_array_equal(part.values[core], whole[core])
    assert np.count_nonzero(part.values) == np.count_nonzero(whole[core])
    np.testing.assert_array_equal(plan.run().values, whole)


def test_a_changed_volume_is_joined_anew_with_update(tissue: Array, tmp_path: Path) -> None:
    volume = zarr.create_array(tmp_path / "volume.zarr", data=tissue, chunks=(16, 16))
    options = {"patch_size": 12, "patch_overlap": 6, "block_shape": 16, "output_chunks": 8, **QUIET}
    oocpatch.predict(tmp_path / "volume.zarr", Renumber(), tmp_path / "out.zarr", **options)
    volume[0:16, 0:16] = 0
    with pytest.raises(oocpatch.RunMismatch, match="volume: 1 of 12 chunks changed"):
        oocpatch.predict(tmp_path / "volume.zarr", Renumber(), tmp_path / "out.zarr", **options)
    oocpatch.predict(tmp_path / "volume.zarr", Renumber(), tmp_path / "out.zarr", update=True, **options)
    oocpatch.predict(tmp_path / "volume.zarr", Renumber(), tmp_path / "fresh.zarr", **options)
    out, fresh = (file_digests(tmp_path / name / "prediction" / "c") for name in ("out.zarr", "fresh.zarr"))
    assert out == fresh


def test_damage_of_the_output_is_found_and_repaired(tissue: Array, tmp_path: Path) -> None:
    options = {"patch_size": 12, "patch_overlap": 6, "block_shape": 16, "output_chunks": 8, **QUIET}
    oocpatch.predict(tissue, Renumber(), tmp_path / "out.zarr", **options)
    before = file_digests(tmp_path / "out.zarr" / "prediction")
    flip(next(path for path in sorted((tmp_path / "out.zarr/prediction/c").rglob("*")) if path.is_file()))
    assert not oocpatch.verify(tmp_path / "out.zarr", repair=True).passed
    oocpatch.predict(tissue, Renumber(), tmp_path / "out.zarr", **options)
    assert file_digests(tmp_path / "out.zarr" / "prediction") == before


def flip(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    "case",
    [
        ("assemble", "blocks/*/*/0/objects-*", "predict"),
        ("assemble", "blocks/*/*/0/objects", "predict"),
        ("merge", "blocks/*/*/0/table", "assemble"),
        ("normalize", "blocks/*/*/0/table", "assemble"),
        ("normalize", "blocks/*/*/0/objects-*", "predict"),
        ("normalize", "merged/*/0/*", "merge"),
    ],
)
def test_what_is_damaged_between_stages_is_made_again(
    case: tuple[str, str, str], tissue: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file is damaged before the first task of a stage; what left it runs once more, and no other block."""
    stage, pattern, again = case
    options = {"patch_size": 12, "patch_overlap": 6, "block_shape": 16, "output_chunks": 8, "workers": 1, **QUIET}
    whole = oocpatch.predict(tissue, Renumber(), tmp_path / "whole.zarr", **options)
    runs: Counter[str] = Counter()
    run: Callable[..., Any] = InstanceTasks.run

    def damaging(tasks: InstanceTasks, task: Task) -> Any:
        runs[task.stage] += 1
        if task.stage == stage and runs[stage] == 1:
            flip(min(tmp_path.glob(f"out.zarr.oocpatch/*/{pattern}")))
        return run(tasks, task)

    monkeypatch.setattr(InstanceTasks, "run", damaging)
    result = oocpatch.predict(tissue, Renumber(), tmp_path / "out.zarr", **options)
    np.testing.assert_array_equal(result.values, whole.values)
    blocks = oocpatch.plan(tissue, Renumber(), tmp_path / "new.zarr", **options).blocks
    assert runs[again] == (1 if again == "merge" else blocks) + 1
    assert runs["predict"] <= blocks + 1
    assert runs["assemble"] + runs["merge"] + runs["normalize"] <= 2 * blocks + 1 + 3
