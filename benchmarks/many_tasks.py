"""Predictions over many volumes in one process, each after one over a volume that is not measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
import zarr

import oocpatch
from benchmarks.contest import corners, remove
from benchmarks.measure import answer, measured
from benchmarks.models import alone, network
from oocpatch.cli.main import main

EDGE = 64


def make_volumes(folder: str, count: int) -> dict[str, Any]:
    """Noise, as Zarr arrays of one chunk and as compressed NIfTI files; one volume more for what runs before."""
    generator = np.random.default_rng(0)
    for kind in ("warm", "scans"):
        Path(folder, kind).mkdir(parents=True, exist_ok=True)
        for number in range(count if kind == "scans" else 1):
            data = generator.integers(0, 4096, (EDGE,) * 3).astype(np.float32)
            path = f"{folder}/{kind}/{number:04d}"
            zarr.create_array(f"{path}.zarr", data=data, dimension_names=("z", "y", "x"), overwrite=True)
            nibabel.Nifti1Image(data, np.eye(4)).to_filename(f"{path}.nii.gz")
    return {}


def one_call(folder: str, model: str, patch: int, overlap: int) -> dict[str, Any]:
    """Call the network alone, with all threads of torch, on the patches of volumes in memory."""
    return _alone(folder, model, patch, overlap, 1)


def side_by_side(folder: str, model: str, patch: int, overlap: int) -> dict[str, Any]:
    """Call the network alone, as often at a time as there are threads, with one each."""
    return _alone(folder, model, patch, overlap, torch.get_num_threads())


def _alone(folder: str, model: str, patch: int, overlap: int, calls: int) -> dict[str, Any]:
    places = [tuple(slice(a, a + patch) for a in corner) for corner in corners((EDGE,) * 3, patch, overlap)]

    def run(kind: str) -> None:
        for path in sorted(Path(folder, kind).glob("*.zarr")):
            volume = torch.from_numpy(np.asarray(zarr.open_array(path, mode="r")[:]))
            call(volume[None, None, *place] for place in places)

    with alone(network(model), calls) as call:
        return _measured(run)


def python(folder: str, model: str, patch: int, overlap: int) -> dict[str, Any]:
    """Predict over each array of a folder, with one model."""
    net = network(model)

    def run(kind: str) -> None:
        for path in sorted(Path(folder, kind).glob("*.zarr")):
            output = f"{folder}/python-{kind}/{path.name}"
            oocpatch.predict(path, net, output, patch_size=patch, patch_overlap=overlap, progress=False)

    remove(f"{folder}/python-")
    return _measured(run)


def command_line(folder: str, model: str, patch: int, overlap: int) -> dict[str, Any]:
    """Predict over each file that a pattern matches."""
    Path(folder, "net.py").write_text(f"from benchmarks.models import network\n\nnet = network({model!r})\n")

    def run(kind: str) -> None:
        words = [
            f"{folder}/{kind}/*.nii.gz",
            f"{folder}/files-{kind}",
            "--model",
            f"{folder}/net.py:net",
            "--progress",
            "none",
        ]
        main(["predict", *words, "--patch-size", f"{patch}", "--patch-overlap", f"{overlap}"], standalone_mode=False)

    remove(f"{folder}/files-")
    return _measured(run)


def _measured(run: Callable[[str], None]) -> dict[str, Any]:
    """Measure a run over the volumes, after one over the other."""
    run("warm")
    with measured() as usage:
        run("scans")
    return {"wall": usage.wall, "cpu": usage.cpu}


if __name__ == "__main__":
    answer(make_volumes, one_call, side_by_side, python, command_line)
