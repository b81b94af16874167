"""Promises on damage: what rots or is mixed up in the workspace is computed anew or reported, never believed."""

from __future__ import annotations

import itertools
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from tests.support.children import Children, report
from tests.support.crash_child import Job, make_volume
from tests.support.small_run import (
    LAST_TINY_PATCH,
    MIDDLE,
    SHAPE,
    TINY,
    fresh,
    interrupted,
    job_in,
    prediction,
    restore,
    undisturbed,
)


def flip_a_bit(path: Path, generator: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


def flip_the_last_bit(path: Path, _: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut_in_half(path: Path, _: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_the_last_byte(path: Path, _: random.Random) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path, _: random.Random) -> None:
    path.write_bytes(b"")


def delete(path: Path, _: random.Random) -> None:
    path.unlink()


def zero(path: Path, _: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


Damage = Callable[[Path, random.Random], None]
DAMAGES: tuple[Damage, ...] = (
    flip_a_bit,
    flip_the_last_bit,
    cut_in_half,
    cut_the_last_byte,
    empty,
    delete,
    zero,
)


def wrong_end(children: Children, job: Job, expected: dict[str, str]) -> str:
    """What is wrong with how the next call ends; nothing if it gives the right bytes or says `CorruptData`."""
    if children.run(job) == 0:
        return "" if prediction(job) == expected else "other bytes"
    end = report(job)
    return "" if end.error.startswith("Corrupt") else f"{end.error}: {end.message}"


@pytest.fixture(scope="module")
def stopped(children: Children, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, dict[str, str], Path]:
    """The run over one axis, the bytes it ends in, and what is left when its last patch fails."""
    root = tmp_path_factory.mktemp("stopped")
    make_volume(root / "volume.zarr", (16,), (8,))
    job = job_in(root, **TINY)
    return job, undisturbed(children, job), interrupted(children, job, LAST_TINY_PATCH)


@pytest.mark.parametrize("damage", DAMAGES, ids=[damage.__name__ for damage in DAMAGES])
def test_damage_in_the_workspace_is_repaired_or_reported(
    damage: Damage, children: Children, stopped: tuple[Job, dict[str, str], Path]
) -> None:
    """To every second kind of file; the next kind of damage to the others."""
    tiny, expected, snapshot = stopped
    restore(tiny, snapshot)
    generator = random.Random(7)
    workspace = Path(tiny.output + ".oocpatch")
    kinds: dict[str, list[Path]] = {}
    for path in sorted(workspace.rglob("*")):
        if path.is_file():
            name = path.relative_to(workspace)
            kinds.setdefault(re.sub(r"\d+", "#", "/".join(name.parts[1:])), []).append(name)
    assert len(kinds) > 6, "plan, ledger, and data and metadata of partials"
    sample = [generator.choice(names) for names in list(kinds.values())[DAMAGES.index(damage) % 2 :: 2]]
    wrong = {}
    for name in sample:
        restore(tiny, snapshot)
        if (workspace / name).stat().st_size:
            damage(workspace / name, generator)
            wrong[str(name)] = wrong_end(children, tiny, expected)
    assert not {name: end for name, end in wrong.items() if end}


def test_partials_of_other_blocks_are_never_taken_for_ones_own(children: Children, job: Job) -> None:
    expected = undisturbed(children, job)
    snapshot = interrupted(children, job)
    workspace = Path(job.output + ".oocpatch")
    same_size: dict[tuple[str, int], list[Path]] = {}
    for path in sorted(workspace.rglob("*")):
        if path.is_file() and path.stat().st_size:
            same_size.setdefault((path.suffix, path.stat().st_size), []).append(path.relative_to(workspace))
    pairs = [pair for names in same_size.values() for pair in itertools.pairwise(names)]
    assert pairs
    wrong = {}
    for one, other in random.Random(3).sample(pairs, min(6, len(pairs))):
        restore(job, snapshot)
        first, second = (workspace / one).read_bytes(), (workspace / other).read_bytes()
        (workspace / one).write_bytes(second)
        (workspace / other).write_bytes(first)
        wrong[f"{one} and {other}"] = wrong_end(children, job, expected)
    assert not {pair: end for pair, end in wrong.items() if end}


def test_a_stale_partial_of_an_earlier_run_is_never_used(children: Children, job: Job, tmp_path: Path) -> None:
    """Partials of the same geometry over other data have the right names and sizes, and must not be believed."""
    expected = undisturbed(children, job)
    snapshot = interrupted(children, job)
    workspace = Path(job.output + ".oocpatch")
    (tmp_path / "volume.zarr").rename(tmp_path / "aside")  # its files keep the times that the ledger has
    data = np.arange(1, math.prod(SHAPE) + 1, dtype=np.float32).reshape(SHAPE) * 2
    zarr.create_array(tmp_path / "volume.zarr", data=data, chunks=(8, 8))
    assert children.run(fresh(job, fail_on=(2 * MIDDLE,))) == 1
    stale = tmp_path / "stale"
    shutil.copytree(workspace, stale)
    shutil.rmtree(tmp_path / "volume.zarr")
    (tmp_path / "aside").rename(tmp_path / "volume.zarr")
    restore(job, snapshot)
    (mine,), (theirs,) = workspace.rglob("plan.json"), stale.rglob("plan.json")
    kept = {"plan.json", "ledger"}
    replaced = 0
    for path in sorted(mine.parent.rglob("*")):
        older = theirs.parent / path.relative_to(mine.parent)
        if len(older.parts) > len(theirs.parts) + 2:  # blocks/<index>/<attempt>/..., each with its own name
            folder, index, _, *rest = path.relative_to(mine.parent).parts
            older = next(iter((theirs.parent / folder / index).glob("*")), theirs).joinpath(*rest)
        if path.is_file() and path.name not in kept and older.is_file():
            replaced += older.read_bytes() != path.read_bytes()
            shutil.copy(older, path)
    assert replaced > 10
    assert not wrong_end(children, job, expected)


def test_no_digit_of_the_stored_plan_is_believed_when_it_was_changed(
    children: Children, stopped: tuple[Job, dict[str, str], Path]
) -> None:
    """A plan that rots into another valid plan would give other bytes without any error."""
    tiny, expected, snapshot = stopped
    restore(tiny, snapshot)
    (plan,) = Path(tiny.watch).rglob("plan.json")
    text = plan.read_text()
    wrong = {}
    digits = [place for place, letter in enumerate(text) if letter.isdigit()]
    for place in random.Random(5).sample(digits, min(10, len(digits))):
        restore(tiny, snapshot)
        other = "7" if text[place] != "7" else "5"
        plan.write_text(text[:place] + other + text[place + 1 :])
        line = text[text.rfind("\n", 0, place) + 1 : text.find("\n", place)].strip()
        wrong[f"{line} with a {other} at {place}"] = wrong_end(children, tiny, expected)
    assert not {digit: end for digit, end in wrong.items() if end}
