"""A published network as its package has it: its source, its weights, and the loop that applies it to chunks."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from click.testing import CliRunner

from oocpatch.cli.main import main
from tests.support.real_data import fetch_nuclei, fetch_platelets, had

pytestmark = pytest.mark.real_data

CHUNK, MARGIN = (10, 48, 48), (1, 0, 0)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the package that predicts, with nothing in the place of the viewer that it opens."""
    source = had(fetch_platelets).source
    stands = {name: ModuleType(name) for name in ("plateseg", "plateseg.watershed", "napari", "napari.qt")}
    stands["plateseg"].__path__ = [str(source.parent)]
    stands["napari.qt"].thread_worker = None  # type: ignore[attr-defined]
    for name, module in stands.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("predict", "unet"):
        monkeypatch.delitem(sys.modules, f"plateseg.{name}", raising=False)
    return importlib.import_module("plateseg.predict")


def test_one_command_does_what_the_package_does(package: Any, tmp_path: Any) -> None:
    """The package leaves its network in training mode, so that norms have the statistics of each chunk."""
    files = had(fetch_platelets)
    stack = tifffile.imread(had(fetch_nuclei).stack)[:26, :48, :48]  # whole chunks: else it takes others at the end
    zarr.create_array(tmp_path / "stack.zarr", data=stack, chunks=(8, 48, 48), dimension_names=tuple("zyx"))
    expected = np.zeros((5, *stack.shape), np.float32)
    volume = stack.astype(np.float32) / stack.max()
    list(package.predict_output_chunks(package.u, volume, CHUNK, expected, margin=MARGIN))
    words = ["predict", str(tmp_path / "stack.zarr"), str(tmp_path / "out.zarr"), "--progress", "none"]
    words += ["--model", f"{files.source}:UNet", "--model-args", "out_channels=5", "--weights", str(files.weights)]
    words += ["--patch-size", "10,48,48", "--patch-overlap", "2,0,0", "--overlap-mode", "crop", "--no-eval-mode"]
    words += ["--preprocess", f'{{"name": "scale", "subtract": 0, "divide": {stack.max()}}}']
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    found = zarr.open_array(tmp_path / "out.zarr" / "prediction")
    np.testing.assert_allclose(found[:], expected, rtol=0, atol=1e-5)
    assert expected.std(axis=(1, 2, 3)).min() > 0.005  # of five channels that say something
