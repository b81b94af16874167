"""What `benchmarks.gpu` measures; each task in a process of its own."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

import oocpatch
from benchmarks.contest import corners, remove
from benchmarks.measure import answer, measured
from benchmarks.models import UNet3d
from benchmarks.sources import make_random
from oocpatch.models.compilation import OptimizedModel, optimized_model
from oocpatch.models.predictor import resolve_device

Corner = tuple[int, ...]


def make_volume(path: str, side: int, chunk: int, dtype: str) -> dict[str, Any]:
    """A cube of random numbers; one that is there already is taken."""
    return {} if Path(path).exists() else make_random(path, side, min(chunk, side), dtype=dtype)


def bare(
    source: str, *, width: int, device: str, patch: int, overlap: int, batch: int, **variant: Any
) -> dict[str, Any]:
    """The network on the patches that `predict` gives it, from a volume on the device; scores are dropped."""
    with contextlib.ExitStack() as stack:
        place = torch.device(resolve_device(device))
        options = {"channels_last": False, "compile": None, "autocast": False, **variant, "device": str(place)}
        model = optimized_model(
            _network(width).to(place),
            3,
            channels_last=options["channels_last"],
            compile_mode=options["compile"],
            device=str(place),
        )
        if isinstance(model, OptimizedModel):
            stack.enter_context(model.ready())
        return _bare(model, place, options, source=source, patch=patch, overlap=overlap, batch=batch)


def _bare(
    model: torch.nn.Module,
    place: torch.device,
    options: dict[str, Any],
    *,
    source: str,
    patch: int,
    overlap: int,
    batch: int,
) -> dict[str, Any]:
    volume = torch.from_numpy(np.asarray(zarr.open_array(source, mode="r")[...])).to(place)
    starts = corners(tuple(volume.shape), patch, overlap)
    buffer = torch.empty((batch, 1, *(patch,) * 3), device=place)

    def call(members: Sequence[Corner]) -> None:
        for target, corner in zip(buffer, members, strict=False):
            target[0] = volume[tuple(slice(a, a + patch) for a in corner)]
        with torch.no_grad(), torch.autocast(place.type, enabled=options["autocast"]):
            model(buffer if options["compile"] else buffer[: len(members)])  # compiled for full batches

    started = time.perf_counter()
    for _ in range(3):
        call(starts[:batch])
    _finish(place)
    warm = time.perf_counter() - started
    with measured() as usage:
        for first in range(0, len(starts), batch):
            call(starts[first : first + batch])
        _finish(place)
    return {**vars(usage), "warm_up": warm, "throughput": len(starts) / usage.wall}


def ours(
    source: str,
    target: str,
    *,
    width: int,
    device: str,
    patch: int,
    overlap: int,
    batch: int,
    options: dict[str, Any],
    **variant: Any,
) -> dict[str, Any]:
    """`predict`, from the volume on disk to labels on disk."""
    model, place = _network(width), torch.device(resolve_device(device))
    settings = {"patch_size": patch, "patch_overlap": overlap, "batch_size": batch, "device": device}
    settings |= {"postprocess": "argmax", "progress": False, **options, **variant}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:  # what is loaded, compiled and allocated once is not counted
        small = np.zeros((2 * patch - overlap,) * 3, zarr.open_array(source, mode="r").dtype)
        oocpatch.predict(small, model, f"{folder}/out", **settings)
    warm = time.perf_counter() - started
    remove(target)
    plan = oocpatch.plan(source, model, target, **settings)
    before = 0
    if place.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(place)
        before = torch.cuda.memory_reserved(place)
    with measured() as usage:
        plan.run()
    record = {
        **vars(usage),
        "warm_up": warm,
        "throughput": plan.patches / usage.wall,
        "patches": plan.patches,
        "blocks": plan.blocks,
        "parameters": sum(p.numel() for p in model.parameters()),
        "projected_memory": plan.projected_memory,
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "projected_device_memory": plan.projected_device_memory,
        "device_peak": torch.cuda.max_memory_reserved(place) - before if place.type == "cuda" else 0,
        "unlike": _unlike(source, target, model.to(place), patch, overlap),
    }
    remove(target)
    return record


def _network(width: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return UNet3d(width=width).eval()


def _unlike(source: str, target: str, model: torch.nn.Module, patch: int, overlap: int) -> float:
    """Share of voxels with another label than the network gives, where only the first or the last patch lies."""
    volume, labels = zarr.open_array(source, mode="r"), zarr.open_array(f"{target}/prediction", mode="r")
    starts = sorted({corner[0] for corner in corners(volume.shape, patch, overlap)})
    unlike = []
    for at, own in ((0, slice(0, starts[1])), (starts[-1], slice(starts[-2] + patch, volume.shape[0]))):
        box = (slice(at, at + patch),) * 3
        given = torch.from_numpy(np.asarray(volume[box], np.float32))[None, None].to(next(model.parameters()).device)
        with torch.no_grad():
            expected = model(given)[0].argmax(0).cpu().numpy()
        inner = (slice(own.start - at, own.stop - at),) * 3
        unlike.append(np.mean(np.asarray(labels[(..., own, own, own)]) != expected[inner]))
    return float(max(unlike))


def _finish(device: torch.device) -> None:
    """Until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    answer(make_volume, bare, ours)
