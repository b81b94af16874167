"""Promises of `PatchAggregator` about memory, crashes, damage, and what lies where its store should be."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import oocpatch
from oocpatch import PatchAggregator, PatchLocation
from oocpatch.aggregation.tiles import Tile
from tests.support import aggregation
from tests.support.aggregation import Loop, add, assert_as_expected
from tests.support.cases import MODES
from tests.support.children import Children

ROOT = Path(__file__).parents[3]
MIB = 2**20


def started(children: Children, store: Path, options: dict[str, Any]) -> int:
    """Process id of a child that adds what is not done yet; nothing that was done is lost."""
    output = store.with_name("said")
    output.write_text("")
    pid = children.fork("call", "tests.support.aggregator_child", (store, options), ROOT, (output, output))
    while output.read_text() != "ready\n":
        assert children.poll(pid, 0.01) is None, output.read_text()
    return pid


# Memory


@pytest.mark.parametrize(
    ("mode", "seed", "known"),
    [("hann", None, True), ("hann", None, False), ("average", 1, True), ("crop", 1, True)],
    ids=["in-order", "unknown-grid", "shuffled", "shuffled-crop"],
)
def test_a_loop_adds_no_more_memory_than_its_limit(
    mode: str, seed: int | None, *, known: bool, children: Children, tmp_path: Path
) -> None:
    """22 MiB of output under 24 MiB, of which at most half is for sums."""
    options = {"shape": (192, 192, 160), "patch": 48, "overlap": 16, "mode": mode, "seed": seed, "known": known}
    options["max_memory"] = "24MiB"
    answer = children.measure("tests.support.aggregator_child", tmp_path / "out.zarr", options)
    assert answer["lowest"] == pytest.approx(1, rel=1e-5)
    assert answer["highest"] == pytest.approx(1, rel=1e-5)
    assert answer["added"] <= 24 * MIB, f"{answer['added'] / MIB:.0f} MiB were added"
    assert answer["files"] > 0 or (seed is None and known), "the limit was not tight enough to test anything"


# Crashes

KILLS = 4
OPTIONS: dict[str, Any] = {"shape": (96, 80), "patch": 12, "overlap": 6, "chunks": 6, "pause": 0.005}


def loop_of(options: dict[str, Any]) -> Loop:
    size = (options["patch"],) * 2
    shared = (options["overlap"],) * 2
    patches = [
        (start, aggregation.values_at(start, size, 2, "float32"))
        for start in aggregation.grid_starts(options["shape"], size, shared)
    ]
    return Loop(options["shape"], options["mode"], shared, patches, (options["chunks"],) * 2)


@pytest.mark.parametrize(
    ("mode", "seed", "max_memory", "skip"),
    [
        ("hann", None, "auto", True),
        ("crop", 5, "64KiB", True),
        ("hann", 5, "64KiB", True),
        ("crop", 5, "auto", False),
    ],
    ids=["in-order", "shuffled-tight-crop", "shuffled-tight", "everything-again-crop"],
)
def test_a_loop_that_is_killed_over_and_over_ends_with_the_same_output(
    mode: str, seed: int | None, max_memory: str, *, skip: bool, tmp_path: Path, children: Children
) -> None:
    """No location that was said to be done is lost."""
    moments = random.Random(f"{mode}{seed}")
    options = {**OPTIONS, "mode": mode, "seed": seed, "max_memory": max_memory, "skip": skip}
    options |= {"commit_seconds": 0.02, "log": str(tmp_path / "done.json")}
    for _ in range(KILLS):
        pid = started(children, tmp_path / "out.zarr", options)
        time.sleep(moments.random() * 0.1)
        assert children.kill(pid) == -signal.SIGKILL, "the loop ended before it was killed"
    assert children.wait(started(children, tmp_path / "out.zarr", options)) == 0
    loop = loop_of(options)
    assert_as_expected(np.asarray(PatchAggregator(**arguments(loop, tmp_path / "out.zarr")).get_array()[...]), loop)
    assert not (tmp_path / "out.zarr.oocpatch").exists()
    assert not list((tmp_path / "out.zarr").rglob("*.partial"))


def arguments(loop: Loop, store: Path) -> dict[str, Any]:
    return {
        "spatial_shape": loop.shape,
        "overlap_mode": loop.mode,
        "patch_overlap": loop.overlap,
        "output_chunks": loop.chunks if loop.chunks is None or len(set(loop.chunks)) > 1 else loop.chunks[0],
        "store": store,
    }


# Damage

LARGE = {**OPTIONS, "shape": (192, 160), "patch": 24, "overlap": 12, "chunks": 12}
"""Sums of 240 KiB, which do not fit 128 KiB."""


@pytest.fixture(scope="module")
def large_loops() -> dict[str, Loop]:
    """Loops whose expected values are computed once."""
    return {mode: shuffled(loop_of({**LARGE, "mode": mode})) for mode in ("crop", "hann")}


def shuffled(loop: Loop) -> Loop:
    random.Random(2).shuffle(loop.patches)
    return loop


def spilled(root: Path, loop: Loop) -> Path:
    """The workspace of a loop that stopped at two thirds: most of its sums in files, a journal of several commits."""
    aggregator = PatchAggregator(**arguments(loop, root / "out.zarr"), max_memory="128KiB")
    for first in range(0, 2 * len(loop.patches) // 3, 20):
        add(aggregator, loop.patches[first : min(first + 20, 2 * len(loop.patches) // 3)])
        aggregator.flush()
    (run,) = (root / "out.zarr.oocpatch").iterdir()
    assert len(list((run / "tiles").iterdir())) > 2
    return run


@pytest.fixture(scope="module")
def spilled_roots(tmp_path_factory: pytest.TempPathFactory, large_loops: dict[str, Loop]) -> dict[str, Path]:
    """Directories of such loops, to be copied."""
    roots = {mode: tmp_path_factory.mktemp(mode) for mode in large_loops}
    for mode, root in roots.items():
        spilled(root, large_loops[mode])
    return roots


def go_on(loop: Loop, root: Path, **options: Any) -> PatchAggregator:
    """Rerun the loop as a user would: what is not done is added; when told that something is damaged, once more."""
    aggregator = PatchAggregator(**arguments(loop, root / "out.zarr"), **options)
    for _ in range(20):
        try:
            add(aggregator, [p for p in loop.patches if aggregation.location(p) not in aggregator.done])
            aggregator.get_array()
        except oocpatch.CorruptData as error:
            assert "add the patches that are not in `done` again" in str(error)  # noqa: PT017 - it may not come at all
        else:
            return aggregator
    raise AssertionError("the damage was never repaired")


@pytest.mark.parametrize(("mode", "limit"), [("crop", "128KiB"), ("hann", "auto")])
@pytest.mark.parametrize(
    "damage", ["delete", "flip", "truncate", "swap", "commit-flip", "commit-delete", "commit-delete-first", "torn"]
)
def test_damage_to_the_workspace_never_reaches_the_output(
    mode: str, limit: str, damage: str, *, tmp_path: Path, large_loops: dict[str, Loop], spilled_roots: dict[str, Path]
) -> None:
    loop = large_loops[mode]
    shutil.copytree(spilled_roots[mode], tmp_path, ignore=shutil.ignore_patterns("*.lock"), dirs_exist_ok=True)
    (run,) = (tmp_path / "out.zarr.oocpatch").iterdir()
    tiles, journal = sorted((run / "tiles").iterdir()), run / "journal"
    tile, commits = tiles[len(tiles) // 2], journal.read_bytes().splitlines(keepends=True)
    assert len(commits) > 2
    if damage == "delete":
        tile.unlink()
    elif damage == "flip":
        flip(tile)
    elif damage == "truncate":
        os.truncate(tile, tile.stat().st_size // 2)
    elif damage == "swap":
        tile.write_bytes(tiles[0].read_bytes())
    elif damage == "commit-flip":
        flip(journal)
    elif damage == "commit-delete":
        journal.write_bytes(b"".join(commits[:-1]))
    elif damage == "commit-delete-first":
        journal.write_bytes(b"".join(commits[1:]))
    else:
        journal.write_bytes(b"".join(commits) + commits[0][:100])
        tile.with_name(f"{tile.name}.partial").write_bytes(tile.read_bytes()[:100])
    aggregator = go_on(loop, tmp_path, max_memory=limit)
    assert_as_expected(np.asarray(aggregator.get_array()[...]), loop)
    assert not (tmp_path / "out.zarr.oocpatch").exists()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_damage_found_at_the_end_is_an_error_and_repaired_by_adding_again(tmp_path: Path) -> None:
    loop = loop_of({**LARGE, "mode": "hann"})
    random.Random(1).shuffle(loop.patches)
    aggregator = PatchAggregator(**{**arguments(loop, tmp_path / "out.zarr"), "patch_overlap": 0}, max_memory="128KiB")
    add(aggregator, loop.patches)
    aggregator.flush()
    assert all(aggregation.location(p) in aggregator.done for p in loop.patches)
    flip(min((tmp_path / "out.zarr.oocpatch").glob("*/tiles/*")))
    with pytest.raises(oocpatch.CorruptData, match="not what was written; add the patches that are not in `done`"):
        aggregator.get_array()
    left = [p for p in loop.patches if aggregation.location(p) not in aggregator.done]
    assert left
    add(aggregator, left)
    assert_as_expected(np.asarray(aggregator.get_array()[...]), loop)


def test_a_store_whose_array_was_deleted_is_computed_again(tmp_path: Path, large_loops: dict[str, Loop]) -> None:
    loop = large_loops["hann"]
    spilled(tmp_path, loop)
    shutil.rmtree(tmp_path / "out.zarr" / "prediction")
    aggregator = PatchAggregator(**arguments(loop, tmp_path / "out.zarr"))
    assert not any(aggregation.location(p) in aggregator.done for p in loop.patches)
    assert_as_expected(np.asarray(go_on(loop, tmp_path).get_array()[...]), loop)


def test_an_interruption_in_the_middle_of_a_patch_tears_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between two tiles of a patch, with and without a store: what is not done is added again."""
    real = Tile.add
    for store in (None, tmp_path / "out.zarr"):
        loop = loop_of({**OPTIONS, "mode": "hann"})
        aggregator = PatchAggregator(**{**arguments(loop, tmp_path), "store": store})
        add(aggregator, loop.patches[:20])
        aggregator.flush()
        add(aggregator, loop.patches[20:23])
        calls = iter(range(100))

        def interrupted(self: Tile, *values: Any, calls: Any = calls) -> None:
            if next(calls) == 2:
                raise KeyboardInterrupt
            real(self, *values)

        monkeypatch.setattr(Tile, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            add(aggregator, loop.patches[23:26])
        monkeypatch.setattr(Tile, "add", real)
        done = [aggregation.location(p) in aggregator.done for p in loop.patches]
        assert done == [store is not None] * 20 + [False] * (len(loop.patches) - 20)
        add(aggregator, [p for p, there in zip(loop.patches, done, strict=True) if not there])
        assert_as_expected(aggregator.get_output().numpy(), loop)


def test_an_interruption_after_a_written_tile_was_opened_again_leaves_nothing_of_lost_patches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The output then has more than the grid, which must not be taken for the grid alone."""
    grid = loop_of({**OPTIONS, "mode": "hann"})
    extra = [((s, s), aggregation.values_at((s, s), (12, 12), 2, "float32")) for s in (1, 4)]
    loop = Loop(grid.shape, grid.mode, grid.overlap, [*grid.patches, *extra], grid.chunks)
    aggregator = loop.aggregator()
    add(aggregator, grid.patches)
    aggregator.get_array()
    add(aggregator, extra[:1])
    aggregator.get_array()

    def interrupted(self: Tile, *values: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Tile, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            add(aggregator, extra[1:])
    add(aggregator, [p for p in loop.patches if aggregation.location(p) not in aggregator.done])
    assert_as_expected(aggregator.get_output().numpy(), loop)


# The store


def test_done_says_what_is_durable_and_going_on_needs_no_more(tmp_path: Path) -> None:
    loop = loop_of({**OPTIONS, "mode": "crop"})
    aggregator = PatchAggregator(**arguments(loop, tmp_path / "out.zarr"))
    assert aggregation.location(loop.patches[0]) not in aggregator.done
    add(aggregator, loop.patches[:5])
    assert aggregation.location(loop.patches[0]) not in aggregator.done
    aggregator.flush()
    assert [aggregation.location(p) in aggregator.done for p in loop.patches[:6]] == [True] * 5 + [False]
    assert "no location" not in aggregator.done
    assert PatchLocation((0,), (4,)) not in aggregator.done
    fresh = PatchAggregator(**arguments(loop, tmp_path / "out.zarr"))
    assert [aggregation.location(p) in fresh.done for p in loop.patches[:6]] == [True] * 5 + [False]
    with pytest.raises(oocpatch.OutputBusy, match="a later PatchAggregator of this process has taken over"):
        add(aggregator, loop.patches[5:6])
    add(fresh, loop.patches[5:])
    assert_as_expected(np.asarray(fresh.get_array()[...]), loop)


def test_a_complete_store_takes_the_whole_loop_again_and_changes_nothing(tmp_path: Path) -> None:
    loop = loop_of({**OPTIONS, "mode": "hann"})
    add(first := PatchAggregator(**arguments(loop, tmp_path / "out.zarr")), loop.patches)
    first.get_array()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out.zarr").rglob("*")}
    again = PatchAggregator(**arguments(loop, tmp_path / "out.zarr"))
    assert all(aggregation.location(p) in again.done for p in loop.patches)
    assert_as_expected(again.get_output().numpy(), loop)
    add(again, loop.patches)
    assert again.num_repeated == len(loop.patches)
    again.close()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out.zarr").rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"overlap_mode": "average"}, ("overlap_mode",)),
        ({"patch_overlap": 4}, ("patch_overlap",)),
        ({"spatial_shape": (48, 41), "output_chunks": 5}, ("spatial_shape", "output_chunks")),
        ({"output_shape": (24, 20)}, ("output_shape",)),
    ],
)
def test_a_store_of_other_parameters_is_refused_and_each_is_named(
    change: dict[str, Any], fields: tuple[str, ...], tmp_path: Path
) -> None:
    loop = loop_of({**OPTIONS, "mode": "hann"})
    with PatchAggregator(**arguments(loop, tmp_path / "out.zarr")) as aggregator:
        add(aggregator, loop.patches[:3])
    with pytest.raises(oocpatch.RunMismatch, match=".*".join(fields)) as caught:
        PatchAggregator(**{**arguments(loop, tmp_path / "out.zarr"), **change})
    assert set(caught.value.fields) == set(fields)


def test_other_data_is_never_touched(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "array", data=np.arange(4))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("array", "folder", "file"):
        with pytest.raises(oocpatch.OutputExists):
            PatchAggregator((8, 8), store=tmp_path / name)
    assert (tmp_path / "folder" / "file").read_text() == (tmp_path / "file").read_text() == "mine"
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "array", mode="r")[...], np.arange(4))


def test_an_output_of_predict_is_refused(tmp_path: Path) -> None:
    data = np.ones((8, 8), np.float32)
    oocpatch.predict(data, torch.nn.Identity(), tmp_path / "out", patch_size=4, progress=False)
    with pytest.raises(oocpatch.RunMismatch, match="made_by"):
        PatchAggregator((8, 8), store=tmp_path / "out")


def test_another_process_at_work_is_refused_and_a_dead_one_is_not(tmp_path: Path, children: Children) -> None:
    options = {**OPTIONS, "mode": "crop", "seed": None, "max_memory": "auto", "skip": True, "pause": 0.05}
    options |= {"commit_seconds": 0.0, "log": str(tmp_path / "done.json")}
    loop = loop_of(options)
    pid = started(children, tmp_path / "out.zarr", options)
    while not (tmp_path / "done.json").exists():
        time.sleep(0.01)
    with pytest.raises(oocpatch.OutputBusy, match="another run is at work"):
        PatchAggregator(**arguments(loop, tmp_path / "out.zarr"))
    assert children.kill(pid) == -signal.SIGKILL
    aggregator = PatchAggregator(**arguments(loop, tmp_path / "out.zarr"))
    assert any(aggregation.location(p) in aggregator.done for p in loop.patches)


def test_a_process_that_just_ends_leaves_no_lock(tmp_path: Path) -> None:
    script = (
        "import sys, torch, oocpatch\n"
        "aggregator = oocpatch.PatchAggregator((8, 8), store=sys.argv[1])\n"
        "aggregator.add_batch(torch.ones(1, 1, 4, 4), [oocpatch.PatchLocation((0, 0), (4, 4))])\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "out.zarr")], cwd=ROOT, timeout=60, check=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.zarr"]


def test_nothing_is_written_before_the_first_batch(tmp_path: Path) -> None:
    PatchAggregator((8, 8), store=tmp_path / "deep" / "out.zarr").close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", MODES)
def test_leaving_the_with_block_keeps_what_was_added(mode: str, tmp_path: Path) -> None:
    loop = loop_of({**OPTIONS, "mode": mode})
    with contextlib.suppress(RuntimeError), PatchAggregator(**arguments(loop, tmp_path / "out.zarr")) as aggregator:
        add(aggregator, loop.patches[:7])
        raise RuntimeError("the model")
    with PatchAggregator(**arguments(loop, tmp_path / "out.zarr")) as aggregator:
        assert sum(aggregation.location(p) in aggregator.done for p in loop.patches) == 7
        add(aggregator, loop.patches[7:])
    assert_as_expected(aggregator.get_output().numpy(), loop)
    assert_as_expected(np.asarray(aggregator.get_array()[...]), loop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.zarr"]
    with pytest.raises(ValueError, match="a closed aggregator takes no more patches"):
        add(aggregator, loop.patches[:1])


def test_closing_ends_a_loop_that_is_not_complete(tmp_path: Path) -> None:
    loop = loop_of({**OPTIONS, "mode": "hann"})
    part = Loop(loop.shape, loop.mode, loop.overlap, loop.patches[:9], loop.chunks)
    aggregator = PatchAggregator(**arguments(loop, tmp_path / "out.zarr"))
    add(aggregator, part.patches)
    assert_as_expected(np.asarray(aggregator.get_array()[...]), part)
    assert (tmp_path / "out.zarr.oocpatch").exists()
    aggregator.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.zarr"]
    again = PatchAggregator(**arguments(loop, tmp_path / "out.zarr"))
    add(again, loop.patches)
    assert again.num_repeated == len(loop.patches)
    assert_as_expected(again.get_output().numpy(), part)
