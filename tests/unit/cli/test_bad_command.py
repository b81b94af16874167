"""Promises on the command line: a user's mistake is one message on stderr and an exit code, never a traceback."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import oocpatch
from tests.support.children import unchanged
from tests.unit.outputs.test_bad_output import FOREIGN

Command = Callable[..., tuple[int, str, str]]


REFUSALS: dict[str, tuple[int, list[str], str]] = {
    "overlap as large as the patch": (2, ["--patch-size", "8", "--patch-overlap", "8"], "patch_overlap"),
    "unknown mode": (2, ["--patch-size", "8", "--overlap-mode", "linear"], "linear"),
    "sizes that are no numbers": (2, ["--patch-size", "8,tall"], "tall"),
    "no patch size": (2, [], "patch-size"),
    "unknown model": (2, ["--patch-size", "8", "--model", "no.such.module:net"], "no.such.module"),
    "axes of another length": (2, ["--patch-size", "8", "--axes", "zyx"], "zyx"),
    "memory too small": (3, ["--patch-size", "2048", "--max-memory", "4MiB"], "max_memory"),
}


@pytest.mark.parametrize("verb", ["predict", "plan"])
@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_is_one_message_and_the_right_exit_code(
    refusal: str, verb: str, volume: Path, output: Path, command: Command
) -> None:
    code, arguments, message = REFUSALS[refusal]
    model = [] if "--model" in arguments else ["--model", "identity"]
    ended, out, err = command(verb, volume, output, *model, *arguments)
    assert ended == code
    assert message in err
    assert "Traceback" not in err
    assert not out


def test_a_missing_volume_is_bad_input(tmp_path: Path, command: Command) -> None:
    ended, out, err = command(
        "predict", tmp_path / "no.zarr", tmp_path / "out", "--model", "identity", "--patch-size", 8
    )
    assert ended == 2
    assert "no.zarr" in err
    assert "Traceback" not in err
    assert not out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ruin", ["", "{", "[]", '{"zarr_format": 3}'])
def test_broken_metadata_is_bad_input(ruin: str, volume: Path, tmp_path: Path, command: Command) -> None:
    (volume / "zarr.json").write_text(ruin)
    with unchanged(tmp_path):
        ended, _, err = command("predict", volume, tmp_path / "out", "--model", "identity", "--patch-size", 8)
    assert ended == 2
    assert str(volume) in err
    assert "Traceback" not in err


@pytest.mark.parametrize("make", FOREIGN, ids=[make.__name__ for make in FOREIGN])
def test_foreign_data_is_refused(make: Any, volume: Path, tmp_path: Path, command: Command) -> None:
    make(tmp_path / "out.zarr")
    with unchanged(tmp_path):
        ended, _, err = command("predict", volume, tmp_path / "out.zarr", "--model", "identity", "--patch-size", 8)
    assert ended == 3
    assert "out.zarr" in err
    assert "Traceback" not in err


def test_another_run_is_refused(volume: Path, tmp_path: Path, command: Command) -> None:
    arguments = ["predict", volume, tmp_path / "out.zarr", "--model", "identity", "--patch-size"]
    assert command(*arguments, 8)[0] == 0
    with unchanged(tmp_path):
        ended, _, err = command(*arguments, 16)
    assert ended == 3
    assert "patch_size" in err
    assert "Traceback" not in err


def test_another_model_is_named_briefly(volume: Path, tmp_path: Path, command: Command) -> None:
    arguments = ["predict", volume, tmp_path / "out.zarr", "--patch-size", 8, "--model"]
    assert command(*arguments, "identity")[0] == 0
    ended, _, err = command(*arguments, "torch.nn:ReLU")
    assert ended == 3
    assert re.search(r"\(model: [0-9a-f]{8} before, [0-9a-f]{8} now\)", err)


@pytest.mark.parametrize("verb", ["status", "check"])
def test_looking_at_what_no_run_wrote_asks_for_an_output(verb: str, volume: Path, command: Command) -> None:
    ended, out, err = command(verb, volume)
    assert ended == 3
    assert f"oocpatch wrote, but {volume} holds other data" in err
    assert not out


def test_the_status_of_a_folder_of_results_asks_for_one_of_them(volume: Path, tmp_path: Path, command: Command) -> None:
    for name in ("b.zarr", "a.zarr"):
        oocpatch.predict(volume, "identity", tmp_path / "results" / name, patch_size=8, progress=False)
    (tmp_path / "results" / "notes").mkdir()
    folder = tmp_path / "results"
    ended, _, err = command("status", folder)
    assert ended == 3
    assert f"{folder} is a folder of 2 others, such as {folder / 'a.zarr'}: name one" in err


def test_a_picture_that_cannot_be_read_comes_with_advice(volume: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "tissue.png").write_bytes(b"\x89PNG")
    options = ["--model", "identity", "--patch-size", 8, "--mask", tmp_path / "tissue.png"]
    ended, _, err = command("predict", volume, tmp_path / "out.zarr", *options)
    assert ended == 2
    assert "mask: volume cannot be read" in err
    assert "tifffile.imwrite('tissue.tif', numpy.asarray(PIL.Image.open('tissue.png')))" in err


FILES = ["out.nii", "out.nii.gz", "OUT.NII.GZ", "out.tif", "out.tiff", "out.ome.tif", "out.ome.tiff", "out.h5", ".nii"]
FILES += ["out.n5", "out.npy", "out.png"]
ZIP_FILES = ["out.zarr.zip", "out.ozx"]


@pytest.mark.parametrize("verb", ["predict", "plan", "convert"])
@pytest.mark.parametrize("name", [*FILES, *ZIP_FILES])
def test_a_zarr_is_not_written_under_the_name_of_a_file(
    name: str, verb: str, volume: Path, tmp_path: Path, command: Command
) -> None:
    arguments = [] if verb == "convert" else ["--model", "identity", "--patch-size", "8"]
    with unchanged(tmp_path):
        code, out, err = command(verb, volume, tmp_path / "runs" / name, *arguments)
    assert (code, out) == (2, "")
    assert ("output must be a directory" if name in ZIP_FILES else "output must be a Zarr, such as") in err
    assert name in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_the_status_of_nothing_is_bad_usage(tmp_path: Path, command: Command) -> None:
    for name in ("out.zarr", "no/such/folder/out.zarr"):
        code, out, err = command("status", tmp_path / name)
        assert (code, out) == (2, "")
        assert "nothing is at" in err
    (tmp_path / "empty").mkdir()
    assert command("status", tmp_path / "empty")[0] == 2


def test_a_file_that_cannot_be_drawn_is_refused_by_its_format(command: Command) -> None:
    ended, out, err = command("view", __file__)
    assert ended == 2
    assert "must be a Zarr array or group, or a file that ends in" in err
    assert not out


@pytest.mark.parametrize(("limit", "code"), [("lots", 2), ("1MiB", 3)])
def test_a_demo_refuses_its_options_before_it_makes_its_volume(
    limit: str, code: int, tmp_path: Path, command: Command
) -> None:
    ended, _, err = command("demo", tmp_path / "demo", "--max-memory", limit)
    assert ended == code
    assert "max_memory" in err
    assert "made" not in err
    assert not list(tmp_path.iterdir())


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "oocpatch", "--version"], capture_output=True, text=True, check=True)
    assert oocpatch.__version__ in done.stdout
