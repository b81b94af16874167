"""Promises on faults that are not deaths: a bad disk, a full disk, a slow one, and one that lies."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import oocpatch
from oocpatch.outputs.record import inspect_output
from oocpatch.storage.files import flush_file_system
from oocpatch.storage.paths import LocalPath
from tests.support.children import Children, report
from tests.support.crash_child import Job, make_volume
from tests.support.faults import outcome
from tests.support.small_run import fresh, prediction, small_run


def ends(children: Children, tiny: Job, fault: str, every: int, offset: int) -> Counter[str]:
    """How runs end that meet a fault at every n-th of their changes; the campaign does all of them."""
    assert children.run(tiny) == 0
    expected, changes = prediction(tiny), report(tiny).changes
    return Counter(outcome(children, tiny, expected, fault, k) for k in range(offset, changes, every))


def test_a_change_of_the_disk_that_fails_once_is_retried_or_reported(children: Children, tiny: Job) -> None:
    found = ends(children, tiny, "eio", every=9, offset=0)
    assert found["absorbed"] >= 2, "the changes that blocks make are tried again"
    assert found["resumed"] >= 2, "those of the driver stop the run"
    assert not found["afresh"] + found["mended"]


def test_a_disk_that_is_full_from_any_change_on_stops_the_run_which_goes_on_when_there_is_room(
    children: Children, tiny: Job
) -> None:
    found = ends(children, tiny, "enospc", every=12, offset=1)
    assert found["resumed"] >= 3
    assert not found["afresh"] + found["mended"]


@pytest.mark.parametrize("fault", ["tear", "flip", "stale"])
def test_a_disk_that_lies_is_found_out(fault: str, children: Children, tiny: Job) -> None:
    found = ends(children, tiny, fault, every=8, offset=3)
    assert sum(found.values()) - found["no fault"] >= 2
    assert found["absorbed"] + found["mended"] + found["resumed"] >= 1


def test_a_full_disk_is_named_and_nothing_else_is_tried(children: Children, tiny: Job) -> None:
    assert children.run(tiny) == 0
    changes = report(tiny).changes
    full = fresh(tiny, die_before=changes // 2, fault="enospc")
    assert children.run(full) == 1
    assert report(full).error in {"OSError", "BlockFailed"}
    assert os.strerror(errno.ENOSPC) in report(full).message


def run_here(tmp_path: Path) -> None:
    data = np.arange(1, 257, dtype=np.float32).reshape(16, 16)
    sizes = {"patch_size": 8, "patch_overlap": 4, "block_shape": 8, "output_chunks": 4, "progress": False}
    oocpatch.predict(data, torch.nn.Identity(), tmp_path / "out", axes="yx", **sizes)


def test_the_disk_has_the_output_before_success_is_recorded_and_success_before_the_workspace_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def noted(path: LocalPath) -> None:
        flush_file_system(path)
        found = inspect_output(path)
        assert found is not None
        chunks = len([p for p in (path / "prediction" / "c").rglob("*") if p.is_file()])
        seen.append((found.complete, chunks, (tmp_path / "out.oocpatch").exists()))

    monkeypatch.setattr(LocalPath, "flush", noted)
    run_here(tmp_path)
    assert seen == [(False, 16, True), (True, 16, True)]
    assert not (tmp_path / "out.oocpatch").exists()


def test_when_the_disk_does_not_take_what_was_written_the_output_stays_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(LocalPath, "flush", broken)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        run_here(tmp_path)
    assert oocpatch.status(tmp_path / "out").state == "incomplete"
    monkeypatch.undo()
    run_here(tmp_path)
    assert oocpatch.verify(tmp_path / "out").passed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = [shutil.which("mount") or "mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    mounted = subprocess.run(mount, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("only root may mount a small file system; the injected faults above run everywhere")
    yield place
    subprocess.run([shutil.which("umount") or "umount", str(place)], check=True)


def test_a_run_on_a_small_disk_stops_when_it_is_full_and_goes_on_when_there_is_room(
    children: Children, tmp_path: Path, small_disk: Path
) -> None:
    elsewhere = small_run(tmp_path)
    assert children.run(elsewhere) == 0
    expected = prediction(elsewhere)
    job = dataclasses.replace(elsewhere, output=str(small_disk / "out"))
    ballast = small_disk / "ballast"
    stopped = 0
    for left in (900, 600, 400, 200, 100):
        free = shutil.disk_usage(small_disk).free
        ballast.write_bytes(bytes(max(0, free - left * 1024)))
        code = children.run(job)
        ballast.unlink()
        if code:
            stopped += 1
            assert "No space left" in report(job).message
            assert report(job).error in {"OSError", "BlockFailed"}
            assert code == 1
            break
        shutil.rmtree(job.output)
    assert stopped
    assert children.run(job) == 0
    assert prediction(job) == expected
    assert oocpatch.verify(job.output).passed


def test_the_command_says_in_one_line_that_the_disk_is_full(tmp_path: Path, small_disk: Path) -> None:
    volume = tmp_path / "volume.zarr"
    make_volume(volume, (64, 64, 64), (32, 32, 32))
    (small_disk / "ballast").write_bytes(bytes(3900 << 10))
    command = [sys.executable, "-m", "oocpatch", "predict", volume, small_disk / "out", "--model", "identity"]
    command += ["--patch-size", "16", "--patch-overlap", "8", "--axes", "zyx", "--progress", "none"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr
