"""The small run that tests stop: its volume, its block of each patch, and what is left of it.

Patches start with the value of their first voxel, which tells their place; 0 is the planner's probe.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from tests.support.children import Children, calls, file_digests, report
from tests.support.crash_child import DIED, Job, make_volume

SHAPE, PATCH, OVERLAP, BLOCK = (32, 32), 8, 4, 8
"""49 patches in 16 blocks, of which 15 receive seams."""
MOST_IN_BLOCK = 4
"""No block has more patches than this."""
OPTIONS = {"patch_size": PATCH, "patch_overlap": OVERLAP, "block_shape": BLOCK, "output_chunks": 4, "workers": 1}

MIDDLE = float(np.ravel_multi_index((8, 16), SHAPE) + 1)
"""First voxel of a patch of a block with neighbours on all axes; the only patch that starts so."""

TINY = {"patch_size": 6, "patch_overlap": 3, "block_shape": 8, "output_chunks": 4, "workers": 1}
"""For 16 voxels on one axis: two blocks with a seam between them, every kind of write, as few as possible."""
LAST_TINY_PATCH = 11.0
"""First voxel of the patch that ends at its border."""


def small_run(root: Path) -> Job:
    """The run over `SHAPE` in an empty directory."""
    make_volume(root / "volume.zarr", SHAPE, (8, 8))
    return job_in(root, **OPTIONS)


def labelling_job(root: Path, shape: tuple[int, ...] = (16,), **options: Any) -> Job:
    """A call of `label` in an empty directory: two blocks per axis of 16, with objects within and across them."""
    data = np.ones(shape, bool)
    for axis, length in enumerate(shape):  # walls between the objects, none of them where blocks meet
        at = [slice(None)] * len(shape)
        at[axis] = slice(2, length, 3)
        data[tuple(at)] = False
    zarr.create_array(root / "volume.zarr", data=data, chunks=(4,) * len(shape))
    return dataclasses.replace(job_in(root, block_shape=8, output_chunks=4, workers=1, **options), verb="label")


def resampling_job(root: Path) -> Job:
    """A run in an empty directory whose scores, of two blocks on another grid, are resampled to that of the volume."""
    group = zarr.create_group(root / "volume.zarr")
    group.create_array("v", data=np.arange(1, 25, dtype=np.float32), chunks=(4,), dimension_names=("x",))
    group.create_array("x", data=np.arange(24.0), dimension_names=("x",))
    return job_in(root, **{**TINY, "output_chunks": 12}, spacing=1.5)


def table_job(root: Path, **options: Any) -> Job:
    """A call of `objects` in an empty directory: four blocks, with objects within and across them."""
    data = np.arange(256, dtype=np.uint16).reshape(16, 16) // 48
    zarr.create_array(root / "volume.zarr", data=data, chunks=(4, 4))
    job = job_in(root, block_shape=8, workers=1, **options)
    return dataclasses.replace(job, output=f"{job.output}.csv", verb="objects")


def job_in(root: Path, **options: Any) -> Job:
    (root / "run").mkdir()
    return Job(
        volume=str(root / "volume.zarr"),
        output=str(root / "run" / "out"),
        log=str(root / "calls"),
        report=str(root / "report"),
        watch=str(root / "run"),
        options=options,
    )


def fresh(job: Job, **changes: Any) -> Job:
    """The same job with nothing done yet."""
    shutil.rmtree(job.watch)
    Path(job.watch).mkdir()
    Path(job.log).unlink(missing_ok=True)
    return dataclasses.replace(job, **changes)


def prediction(job: Job) -> dict[str, str]:
    if job.verb == "objects":
        return {"table": Path(job.output).read_text()}
    arrays = ("labels", "prediction", "vectors", "starts")
    digests = {name: file_digests(Path(job.output) / name) for name in arrays if Path(job.output, name).exists()}
    return {f"{name}/{file}": digest for name, files in digests.items() for file, digest in files.items()}


def block_of(first: float) -> tuple[int, ...]:
    """The block that computes the patch which starts with the voxel of this value."""
    return tuple(int(start) // BLOCK for start in np.unravel_index(int(first) - 1, SHAPE))


def patch_calls(job: Job) -> list[tuple[int, float]]:
    """Process id and patch of each call, without the planner's probe (a patch of zeros)."""
    return [(pid, first) for pid, firsts in calls(job) for first in firsts if first]


def undisturbed(children: Children, job: Job) -> dict[str, str]:
    """Bytes of a run that nothing stops; leaves an empty directory again."""
    assert children.run(job) == 0
    digests = prediction(job)
    patches = [first for _, first in patch_calls(job)]
    assert len(patches) == len(set(patches)), "an undisturbed run computes no patch twice"
    assert not list(Path(job.watch).glob("out?*")), "workspace and lock are gone after success"
    fresh(job)
    return digests


def die_and_resume(children: Children, job: Job, expected: dict[str, str], number: int) -> None:
    """Let a run die before a change of the disk, run it again, and compare its bytes."""
    dying = fresh(job, die_before=number)
    died = children.run(dying) == DIED
    # Threads race for making directories, so that a run may have a change less than another.
    assert died or report(dying).changes <= number
    assert children.run(job) == 0, f"after change {number}: {report(job).message}"
    assert prediction(job) == expected, f"after change {number}"
    kept = {Path(job.output).name, *([f"{Path(job.output).name}.oocpatch.record"] if job.verb == "objects" else [])}
    left = {path.name for path in Path(job.watch).iterdir()}
    assert left == kept, f"something was left behind after change {number}"


def all_patches() -> list[float]:
    """First voxel of each patch of the run."""
    ys, xs = (range(0, n - PATCH + 1, PATCH - OVERLAP) for n in SHAPE)
    return [float(y * SHAPE[1] + x + 1) for y in ys for x in xs]


def interrupted(children: Children, job: Job, failing: float = MIDDLE) -> Path:
    """Leave a run of which one patch has failed; return a copy of all that it left on disk."""
    assert children.run(fresh(job, fail_on=(failing,))) == 1
    assert report(job).error == "BlockFailed"
    snapshot = Path(job.watch).with_name("snapshot")
    shutil.copytree(job.watch, snapshot)
    return snapshot


def restore(job: Job, snapshot: Path) -> None:
    """Put back what `interrupted` left."""
    fresh(job)
    shutil.copytree(snapshot, job.watch, dirs_exist_ok=True)
