"""The installed commands, as a shell starts them: `oocpatch`, `dask oocpatch`, and what is completed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

BIN = Path(sys.executable).parent


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_dask_oocpatch_is_oocpatch(tmp_path: Path) -> None:
    dask_help = run(str(BIN / "dask"), "oocpatch", "--help", folder=tmp_path)
    assert dask_help.returncode == 0, dask_help.stderr
    own = run(str(BIN / "oocpatch"), "--help", folder=tmp_path)
    # All but the first line, which names the program.
    assert dask_help.stdout.splitlines()[1:] == own.stdout.splitlines()[1:]
    assert "predict" in dask_help.stdout


def test_a_command_under_dask_s_name_does_its_work_and_ends_in_the_same_codes(tmp_path: Path) -> None:
    data = np.arange(24 * 20, dtype=np.uint16).reshape(24, 20)
    zarr.create_array(tmp_path / "a.zarr", data=data, chunks=(8, 8), dimension_names=("y", "x"))
    command = [str(BIN / "dask"), "oocpatch"]
    done = run(*command, "convert", "a.zarr", "b.zarr", "--chunks", "4", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "b.zarr/scale0/image", mode="r")[:], data)
    refused = run(*command, "predict", "a.zarr", "b.zarr", "--patch-size", "few", folder=tmp_path)
    assert refused.returncode == 2
    assert "sizes are whole numbers of voxels" in refused.stderr


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("oocpatch conv", ["convert"]),
        ("oocpatch predict --output-f", ["--output-fill", "--output-format"]),
        ("oocpatch predict --output-format ome", ["ome-zarr"]),
    ],
)
def test_bash_completes_commands_options_and_values(typed: str, expected: list[str], tmp_path: Path) -> None:
    script = f"""
        PATH="{BIN}:$PATH"
        eval "$(_OOCPATCH_COMPLETE=bash_source oocpatch)"
        complete -p oocpatch > /dev/null || exit 1
        COMP_WORDS=({typed})
        COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        _oocpatch_completion oocpatch
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = run("bash", "-c", script, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == expected
