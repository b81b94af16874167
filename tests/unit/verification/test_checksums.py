"""Promises on verifying: what is not as it was written is found, its voxels are named, and recomputing mends it."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zarr

import oocpatch
from oocpatch.outputs.integrity import METADATA_CRC, metadata_checksum
from oocpatch.outputs.record import ATTRIBUTE
from oocpatch.planning.plan import Plan
from tests.support import crash_child
from tests.support.children import file_digests
from tests.support.crash_child import Job, scripted_model
from tests.support.small_run import MIDDLE, block_of, patch_calls, prediction, small_run
from tests.support.small_volume import make_small_volume


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """The small run for this process."""
    job = small_run(tmp_path)
    monkeypatch.setattr(crash_child, "JOB", job)
    return job


def predict(job: Job, **changes: Any) -> Any:
    return oocpatch.predict(job.volume, scripted_model, job.output, **{**job.options, "progress": False, **changes})


def two_scales(patches: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"fine": torch.cat([patches, -patches], dim=1), "coarse": patches[..., ::2, ::2]}


def two_channels(patches: torch.Tensor) -> torch.Tensor:
    return torch.cat([patches, patches + 1], dim=1)


def labels_and_scores(patches: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"one": patches, "two": torch.cat([patches, patches], dim=1)}


RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "one head": (torch.nn.Identity(), {}),
    "crop": (torch.nn.Identity(), {"overlap_mode": "crop"}),
    "shards": (torch.nn.Identity(), {"output_shards": 8}),
    "channels": (two_channels, {}),
    "channels in shards": (two_channels, {"output_shards": 8}),
    "two heads": (labels_and_scores, {"overlap_mode": {"one": "crop", "two": "hann"}}),
    "heads of two scales": (two_scales, {}),
    "what was not looked at": (torch.nn.Identity(), {"mask": np.eye(3, 5)}),
    "nothing but the fill value": (lambda patches: patches * 0, {}),
    "one block": (torch.nn.Identity(), {"block_shape": None}),
}


def units_in(folder: Path) -> int:
    array = zarr.open_array(folder, mode="r")
    units = array.shards or array.chunks
    return int(np.prod([-(-n // u) for n, u in zip(array.shape, units, strict=True)]))


CODERS = ("zarr", "zarrs", "ours")


@pytest.mark.parametrize(
    ("run", "coder"),
    [
        *((run, CODERS[number % 3]) for number, run in enumerate(RUNS)),
        *(("channels in shards", coder) for coder in ("zarr", "ours")),
        *(("one head", coder) for coder in ("zarrs", "ours")),
    ],
)
def test_an_undamaged_output_passes_and_every_write_unit_is_verified(
    run: str, coder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, options = RUNS[run]
    if coder == "zarrs" and importlib.util.find_spec("zarrs") is None:
        pytest.skip("needs zarrs, which is in the extra `fast`")
    if coder == "zarr":
        monkeypatch.setattr("oocpatch.storage.chunk_reader.PlainArray.of", lambda _: None)
    if coder != "zarrs":
        monkeypatch.setattr("oocpatch.storage.zarrs_codec.ZarrsArray.open", lambda *_: None)
    data = np.arange(24 * 20, dtype=np.float32).reshape(24, 20)
    sizes = {"patch_size": 8, "patch_overlap": 4, "block_shape": 8, "output_chunks": 4, "progress": False}
    oocpatch.predict(data, model, tmp_path / "out", axes="yx", **{**sizes, **options})
    found = oocpatch.verify(tmp_path / "out")
    assert found.passed, str(found)
    assert found.complete
    heads = [path for path in tmp_path.rglob("zarr.json") if json.loads(path.read_text())["node_type"] == "array"]
    heads = [path.parent for path in heads if path.parent.name not in ("y", "x")]
    assert found.units == sum(units_in(head) for head in heads)
    assert found.bytes >= sum(path.stat().st_size for head in heads for path in head.rglob("c/**/*") if path.is_file())


def test_the_levels_of_an_ome_zarr_are_verified_with_channels_after_time(tmp_path: Path) -> None:
    data = np.random.default_rng(0).random((2, 20, 24), dtype=np.float32)
    sizes = {"patch_size": 8, "patch_overlap": 4, "block_shape": 8, "output_chunks": 4, "axes": "tyx"}
    call = functools.partial(oocpatch.predict, data, two_channels, progress=False, **sizes)
    call(tmp_path / "out", output_format="ome-zarr")
    found = oocpatch.verify(tmp_path / "out")
    assert found.passed, str(found)
    levels = sorted(tmp_path.glob("out/scale*/image"))
    assert units_in(levels[0]) == 2 * 2 * 5 * 6
    assert found.units == sum(map(units_in, levels))
    unit = tmp_path / "out" / "scale0" / "image" / "c" / "1" / "0" / "2" / "3"
    unit.write_bytes(unit.read_bytes()[:-1])
    [damage] = oocpatch.verify(tmp_path / "out", repair=True).damaged
    assert (damage.start, damage.shape) == ((1, 0, 8, 12), (1, 1, 4, 4))
    call(tmp_path / "out", output_format="ome-zarr")
    assert oocpatch.verify(tmp_path / "out").passed


@pytest.mark.parametrize("shards", [None, 8])
def test_damage_to_a_coarser_level_is_found_and_repaired_from_the_finest(shards: int | None, tmp_path: Path) -> None:
    called = []

    def doubled(patches: torch.Tensor) -> torch.Tensor:
        called.append(len(patches))
        return patches * 2

    data = np.random.default_rng(0).random((40, 48), dtype=np.float32)
    sizes = {"patch_size": 16, "output_chunks": 4, "output_shards": shards, "output_format": "ome-zarr", "axes": "yx"}
    call = functools.partial(oocpatch.predict, data, doubled, tmp_path / "out", progress=False, **sizes)
    call()
    before = file_digests(tmp_path / "out")
    folder = tmp_path / "out" / "scale1" / "image" / "c"
    (folder / "0/0").write_bytes((folder / "1/1").read_bytes())  # valid, of other voxels
    (folder / "1/0").write_bytes((folder / "1/0").read_bytes()[:-1])
    (folder / "1/1").unlink()
    found = oocpatch.verify(tmp_path / "out", repair=True)
    assert [(d.array, d.key, d.stage, d.block) for d in found.damaged] == [
        ("scale1/image", key, "pyramid", None) for key in ("c/0/0", "c/1/0", "c/1/1")
    ]
    edge = shards or 4
    assert (found.damaged[1].start, found.damaged[1].shape) == ((edge, 0), (edge, edge))
    assert str(found.damaged[0]) == (
        f"scale1/image/c/0/0 is not what the level above gives: voxels 0,0 to {edge},{edge}, pyramid"
    )
    called.clear()
    call()
    assert sum(called) <= 2, "no patch is computed again, the probe's apart"
    assert oocpatch.verify(tmp_path / "out").passed
    after = file_digests(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} <= {"zarr.json"}, "the record of the run has times"


def test_the_checksums_are_hidden_from_those_who_read_the_output(here: Job) -> None:
    """Warnings are errors here: Zarr warns of files in a group that it does not know."""
    predict(here)
    group = zarr.open_group(here.output, mode="r", use_consolidated=False)
    assert [name for name, _ in group.members(max_depth=None)] == ["prediction"]
    assert list(xr.open_zarr(here.output).variables) == ["prediction"]
    assert zarr.open_array(Path(here.output) / "prediction", mode="r").nchunks_initialized == 64


def flip(path: Path, generator: random.Random, _: Path) -> None:
    data = bytearray(path.read_bytes())
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, generator: random.Random, _: Path) -> None:
    path.write_bytes(path.read_bytes()[: generator.randrange(1, path.stat().st_size)])


def append(path: Path, _: random.Random, __: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path, _: random.Random, __: Path) -> None:
    path.write_bytes(b"")


def delete(path: Path, _: random.Random, __: Path) -> None:
    path.unlink()


def replace_by_another(path: Path, _: random.Random, other: Path) -> None:
    shutil.copy(other, path)


def replace_by_a_directory(path: Path, _: random.Random, __: Path) -> None:
    path.unlink()
    path.mkdir()


Damage = Callable[[Path, random.Random, Path], None]
DAMAGES: tuple[Damage, ...] = (flip, truncate, append, empty, delete, replace_by_another, replace_by_a_directory)


def labelled(root: Path) -> Path:
    """An output with coordinates, in two channels."""
    volume = xr.DataArray(
        np.arange(24.0 * 20).reshape(24, 20), dims=("y", "x"), coords={"y": np.arange(24) * 0.5, "x": np.arange(20)}
    )
    oocpatch.predict(
        volume, two_channels, root / "out", patch_size=8, patch_overlap=4, block_shape=8, output_chunks=(4, 5),
        progress=False,
    )  # fmt: skip
    return root / "out"


@pytest.mark.parametrize("damage", DAMAGES, ids=[damage.__name__ for damage in DAMAGES])
def test_damage_to_any_file_is_found_and_its_voxels_are_named(damage: Damage, tmp_path: Path) -> None:
    output = labelled(tmp_path)
    files = sorted(path for path in output.rglob("*") if path.is_file())
    assert len(files) > 2 * 6 * 4, "every unit, and metadata and coordinates"
    generator = random.Random(1)
    for path, other in zip(files, [*files[1:], files[0]], strict=True):
        whole = path.read_bytes()
        damage(path, generator, other)
        found = oocpatch.verify(output)
        name = path.relative_to(output).as_posix()
        assert [f"{d.array}/{d.key}".lstrip("/") for d in found.damaged][:1] == [name], str(found)
        assert "PASS" not in str(found)
        if "/c/" in name and name.startswith("prediction"):
            assert len(found.damaged) == 1
            c, y, x = map(int, name.split("/")[-3:])
            assert (found.damaged[0].start, found.damaged[0].shape) == ((c, 4 * y, 5 * x), (1, 4, 5))
        if path.is_dir():
            path.rmdir()
        path.write_bytes(whole)
    assert oocpatch.verify(output).passed


def test_a_bit_of_each_byte_of_a_write_unit_and_a_sample_of_all_others_count(tmp_path: Path) -> None:
    output = labelled(tmp_path)
    unit = output / "prediction" / "c" / "1" / "2" / "3"
    files = sorted(path for path in output.rglob("*") if path.is_file())
    generator = random.Random(2)
    places = [(unit, 8 * byte + generator.randrange(8)) for byte in range(unit.stat().st_size)]
    for path in files:
        places += [(path, generator.randrange(8 * path.stat().st_size)) for _ in range(3)]
    missed = []
    for path, bit in places:
        data = bytearray(path.read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        whole = path.read_bytes()
        path.write_bytes(data)
        if oocpatch.verify(output).passed:
            missed.append((path.name, bit))
        path.write_bytes(whole)
    assert not missed


def test_a_unit_of_only_the_fill_value_must_have_no_file(tmp_path: Path) -> None:
    volume = np.zeros((16, 16), np.float32)
    volume[8:] = 1
    oocpatch.predict(
        volume, torch.nn.Identity(), tmp_path / "out", patch_size=8, output_chunks=8, overlap_mode="crop", axes="yx"
    )
    units = tmp_path / "out" / "prediction" / "c"
    assert not (units / "0" / "1").exists()
    (units / "0").mkdir(exist_ok=True)
    shutil.copy(units / "1" / "1", units / "0" / "1")
    (damaged,) = oocpatch.verify(tmp_path / "out").damaged
    assert (damaged.key, damaged.start, damaged.shape) == ("c/0/1", (0, 8), (8, 8))
    assert "fill value" in damaged.problem


def test_attributes_that_a_user_adds_to_the_group_are_no_damage(here: Job) -> None:
    predict(here)
    zarr.open_group(here.output, mode="r+").attrs["note"] = "mine"
    assert oocpatch.verify(here.output).passed
    metadata = json.loads((Path(here.output) / "zarr.json").read_text())
    metadata["attributes"]["oocpatch"]["details"]["patches"] += 1
    (Path(here.output) / "zarr.json").write_text(json.dumps(metadata))
    assert [damage.key for damage in oocpatch.verify(here.output).damaged] == ["zarr.json"]


@pytest.mark.parametrize("seed", range(4))
def test_repair_computes_only_what_is_damaged_and_gives_the_same_bytes(seed: int, here: Job) -> None:
    predict(here)
    expected = prediction(here)
    generator = random.Random(seed)
    units = sorted(path for path in (Path(here.output) / "prediction" / "c").rglob("*") if path.is_file())
    broken = generator.sample(units, 1 + seed)
    for path in broken:
        generator.choice((flip, delete, empty))(path, generator, path)
    found = oocpatch.verify(here.output, repair=True)
    assert len(found.damaged) == len(broken)
    assert oocpatch.status(here.output).state == "incomplete"
    assert not oocpatch.verify(here.output).damaged, "what is marked as not done is not looked at"
    Path(here.log).unlink()
    predict(here)
    assert prediction(here) == expected
    assert oocpatch.verify(here.output).passed
    # A unit is made of its own block's patches and those of the lower neighbours.
    needed = set()
    for path in broken:
        y, x = (int(part) // 2 for part in path.parts[-2:])
        needed |= {(y - dy, x - dx) for dy, dx in itertools.product((0, 1), repeat=2)}
    assert {block_of(first) for _, first in patch_calls(here)} <= needed
    assert not list(Path(here.watch).glob("out?*"))


def test_repair_of_what_is_no_write_unit_is_refused_and_changes_nothing(here: Job) -> None:
    predict(here)
    path = Path(here.output) / "prediction" / "zarr.json"
    path.write_text(path.read_text() + " ")
    before = file_digests(Path(here.watch))
    with pytest.raises(oocpatch.CorruptData, match=r"prediction/zarr\.json.*overwrite=True"):
        oocpatch.verify(here.output, repair=True)
    assert file_digests(Path(here.watch)) == before


@pytest.fixture
def halted(here: Job, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A run of which one block has failed."""
    monkeypatch.setattr(crash_child, "JOB", dataclasses.replace(here, fail_on=(MIDDLE,)))
    with pytest.raises(oocpatch.BlockFailed):
        predict(here)
    monkeypatch.setattr(crash_child, "JOB", here)
    return here


@pytest.mark.parametrize("damage", [flip, truncate, empty, delete])
def test_damage_to_the_finished_part_of_an_incomplete_run_is_found_and_repaired(damage: Damage, halted: Job) -> None:
    before = oocpatch.verify(halted.output)
    assert before.passed
    assert not before.complete
    units = sorted(path for path in (Path(halted.output) / "prediction" / "c").rglob("*") if path.is_file())
    assert before.units == len(units), "this volume has no unit of fill values"
    damage(units[0], random.Random(0), units[0])
    damage(units[-1], random.Random(0), units[-1])
    found = oocpatch.verify(halted.output, repair=True)
    assert [d.key for d in found.damaged] == ["c/0/0", "c/7/7"]
    predict(halted)
    assert oocpatch.verify(halted.output).passed
    mended = prediction(halted)
    predict(halted, overwrite=True)
    assert prediction(halted) == mended


@pytest.mark.parametrize(("name", "state"), [("overlap_mode", "complete"), ("patch_size", "incomplete")])
def test_damage_to_the_record_of_an_output_is_not_taken_for_another_run(
    name: str, state: str, request: pytest.FixtureRequest
) -> None:
    job = request.getfixturevalue("halted" if state == "incomplete" else "here")
    if state == "complete":
        predict(job)
    file = Path(job.output) / "zarr.json"
    before = file.read_text()
    file.write_text(before.replace(f'"{name}"', f'"{name[:-1]}{chr(ord(name[-1]) ^ 1)}"', 1))
    for size in (job.options["patch_size"], "auto"):
        with pytest.raises(oocpatch.CorruptData, match=r"metadata.*start afresh"):
            predict(job, patch_size=size)
    file.write_text(before)
    with pytest.raises(oocpatch.RunMismatch, match=r"overlap_mode: 'hann' before, 'crop' now"):
        predict(job, overlap_mode="crop")
    predict(job)
    assert oocpatch.verify(job.output).passed


def test_what_is_no_output_of_predict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        oocpatch.verify(tmp_path / "nothing")
    with pytest.raises(oocpatch.OutputExists, match="volume"):
        oocpatch.verify(make_small_volume(tmp_path / "volume.zarr"))
    aggregator = oocpatch.PatchAggregator((16, 16), store=str(tmp_path / "loop.zarr"))
    aggregator.add_batch(torch.ones(1, 1, 16, 16), [oocpatch.PatchLocation(index=(0, 0), size=(16, 16))])
    aggregator.get_array()
    del aggregator
    with pytest.raises((ValueError, oocpatch.OutputBusy), match=r"loop\.zarr"):
        oocpatch.verify(tmp_path / "loop.zarr")


Command = Callable[..., tuple[int, str, str]]


def test_the_command_names_the_damage_and_repairs_it(tmp_path: Path, command: Command) -> None:
    volume, output = make_small_volume(tmp_path / "volume.zarr"), tmp_path / "out.zarr"
    run = [
        "predict",
        volume,
        output,
        "--model",
        "identity",
        "--patch-size",
        8,
        "--patch-overlap",
        4,
        "--output-chunks",
        8,
    ]
    assert command(*run)[0] == 0
    expected = file_digests(output / "prediction")
    code, out, _ = command("check", output)
    assert (code, out.splitlines()[-1]) == (0, "PASS")
    (output / "prediction" / "c" / "1" / "1").write_bytes(b"")
    code, out, _ = command("check", output)
    assert code == 1
    assert "prediction/c/1/1 is not what was written: voxels 8,8 to 16,16, block 0" in out
    code, out, _ = command("check", output, "--json")
    assert code == 1
    report = json.loads(out)
    assert (report["passed"], report["units"], report["damaged"][0]["key"]) == (False, 9, "c/1/1")
    code, out, err = command("check", output, "--repair")
    assert code == 1
    assert "the same predict command" in err
    assert command(*run)[0] == 0
    assert command("check", output)[0] == 0
    assert file_digests(output / "prediction") == expected


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("nowhere.zarr", 2, "nowhere.zarr does not exist"),
        ("volume.zarr", 3, "volume.zarr"),
        ("volume.zarr --model identity", 2, "--patch-size"),
        ("volume.zarr --patch-size 8", 2, "--model"),
        ("volume.zarr --patch-size 8 --model identity --repair", 2, "neither"),
    ],
)
def test_a_check_of_something_else_is_refused_in_one_message(
    arguments: str, code: int, message: str, tmp_path: Path, command: Command
) -> None:
    make_small_volume(tmp_path / "volume.zarr")
    name, *options = arguments.split()
    ended, out, err = command("check", tmp_path / name, *options)
    assert (ended, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


def test_outputs_of_the_format_before_are_verified_and_its_unfinished_runs_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    oocpatch.predict(np.ones((24, 24), np.float32), "identity", path, patch_size=8, progress=False)
    metadata = json.loads((path / "zarr.json").read_text())
    details = metadata["attributes"]["oocpatch"]["details"]
    plan = details["plan"]
    strategy = plan.pop("io_strategy")
    plan |= {
        "format": 2,
        "way": {"aligned": strategy["aligned_reads"], "ahead": strategy["prefetch"], "io_threads": strategy["threads"]},
        "skips": plan.pop("may_skip"),
        "note": plan.pop("model_note"),
    }
    for name in ("box", "skip_value", "output_fill", "allow_nonfinite"):
        del plan[name]
    details[METADATA_CRC] = metadata_checksum(metadata, ATTRIBUTE)
    (path / "zarr.json").write_text(json.dumps(metadata))
    assert oocpatch.verify(path).passed
    with pytest.raises(oocpatch.RunMismatch, match="must have format 3, got 2 of another version of oocpatch"):
        Plan.from_json(json.dumps(plan))
