"""A published network on a published scan, through the command line: the numbers come out as they should."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zarr

from tests.support import oracle
from tests.support.real_data import fetch, had

pytestmark = pytest.mark.real_data

PATCH, OVERLAP = 128, 64
MAX_MEMORY = "2GiB"
BRAIN = 1
"""The network's channel of brain."""
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Head:
    """The scan as the network wants it, and which voxels of it are brain."""

    values: Array
    brain: Array
    volume: Path
    network: Path


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Head:
    nibabel = pytest.importorskip("nibabel", reason="reads the scan; it is in the extra `test`")
    data = had(fetch)
    scan, reference = (nibabel.as_closest_canonical(nibabel.load(path)) for path in (data.scan, data.reference))
    values = preprocess(scan.get_fdata(dtype=np.float32))
    volume = tmp_path_factory.mktemp("head") / "head.zarr"
    zarr.create_array(volume, data=values, chunks=(64, 64, 64), dimension_names=("x", "y", "z"))
    return Head(values, np.asarray(reference.dataobj) > 0, volume, data.network)


@pytest.fixture(scope="module")
def scores(head: Head) -> Path:
    """The output of `oocpatch predict` in a process of its own."""
    output = head.volume.with_name("scores.zarr")
    assert predict(head, output)["uncovered_voxels"] == 0
    return output


def preprocess(values: Array) -> Array:
    """As the network was trained: clipped to percentiles, standardized, and shifted as natural images are."""
    low, high = np.percentile(values, (0.5, 99.5))
    clipped = np.clip((values - low) / (high - low), 0, 1)
    return np.asarray(0.226 * (clipped - clipped.mean()) / clipped.std() + 0.449, np.float32)


def predict(head: Head, output: Path) -> dict[str, Any]:
    command = [
        *(sys.executable, "-m", "oocpatch", "predict", str(head.volume), str(output)),
        *("--model", str(head.network), "--patch-size", str(PATCH), "--patch-overlap", str(OVERLAP)),
        *("--overlap-mode", "hann", "--max-memory", MAX_MEMORY, "--json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def opened(output: Path) -> xr.DataArray:
    return xr.open_zarr(output, consolidated=False).prediction


def dice(a: Array, b: Array) -> float:
    return float(2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b)))


def test_a_published_network_finds_the_brain_in_a_published_scan(head: Head, scores: Path) -> None:
    found = opened(scores)
    assert found.dims == ("channel", "x", "y", "z")
    assert found.shape == (2, 181, 217, 181)
    assert dice(found[BRAIN].values > 0.5, head.brain) >= 0.92


def test_what_is_blended_on_disk_is_what_is_blended_in_memory(head: Head, scores: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit", category=DeprecationWarning)
        network = torch.jit.load(head.network).eval()

    def model(patch: Array) -> Array:
        with torch.inference_mode():
            return np.asarray(network(torch.from_numpy(patch.copy())[None])[0])

    expected = oracle.predict(head.values[None], model, patch=(PATCH,) * 3, overlap=(OVERLAP,) * 3, mode="hann")
    # float32 sums, and a network whose last bits depend on the number of threads.
    np.testing.assert_allclose(opened(scores).values, expected, rtol=0, atol=1e-5)
