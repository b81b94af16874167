"""The page on the design names the files from `predict()` to a written chunk: no more than a reader can follow."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import nn

import oocpatch
from oocpatch.outputs.output import Output
from oocpatch.volumes.volume import Volume
from oocpatch.workspace.ledger import Ledger

PACKAGE = Path(oocpatch.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "design.md"


def named() -> dict[str, bool]:
    """The files that the page names in its drawing, and whether they are marked as hot."""
    drawing = PAGE.read_text().partition("## From predict() to a written chunk")[2].split("```")[1]
    rows = re.findall(r"([a-z_]+/[a-z_/]+\.py)( +\*)?", drawing)
    return {name: bool(mark) for name, mark in rows}


class Stacks:
    """The files of the package that are on the stack when a function is called."""

    def __init__(self) -> None:
        self.files: set[str] = set()

    def note(self) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if PACKAGE in path.parents:
                self.files.add(str(path.relative_to(PACKAGE)))
            frame = frame.f_back


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> Stacks:
    """Stacks at each read of a box, write of a box, and record in the ledger."""
    noted = Stacks()

    def watch(owner: type, name: str) -> None:
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            noted.note()
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in ((Volume, "read_into"), (Output, "write"), (Ledger, "append")):
        watch(owner, name)
    return noted


def test_the_page_names_few_files_and_they_are_there() -> None:
    files = named()
    assert [name for name in files if not (PACKAGE / name).exists()] == []
    assert len(files) <= 30
    assert sum(files.values()) <= 16


def test_a_run_passes_no_other_files_on_its_way_from_predict_to_a_chunk(tmp_path: Path, stacks: Stacks) -> None:
    class Network(nn.Conv3d):
        def forward(self, patches: torch.Tensor) -> torch.Tensor:
            stacks.note()
            return super().forward(patches)

    data = np.random.default_rng(0).random((32, 32, 32), dtype=np.float32)
    zarr.create_array(tmp_path / "in.zarr", data=data, chunks=(16, 16, 16), dimension_names=("z", "y", "x"))
    sizes = {"patch_size": 16, "patch_overlap": 8, "block_shape": (32, 16, 16)}
    oocpatch.predict(tmp_path / "in.zarr", Network(1, 2, 3, padding=1), tmp_path / "out.zarr", progress=False, **sizes)
    assert "engine/stages.py" in stacks.files
    assert sorted(stacks.files - named().keys()) == []
