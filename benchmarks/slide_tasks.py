"""What `benchmarks.slide` measures; each task in a process of its own."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

import oocpatch
from benchmarks import architectures
from benchmarks.measure import answer, measured
from benchmarks.models import alone
from benchmarks.sources import CHUNK, COLOURS, tile


def make_slide(path: str, mask: str, size: int) -> dict[str, Any]:
    """A disc of tissue with nuclei in it; what lies outside is not stored and reads as background."""
    slide = zarr.create_array(
        path, shape=(size, size, 3), chunks=(CHUNK, CHUNK, 3), dtype="uint8", dimension_names=("y", "x", "c"),
        fill_value=int(COLOURS[0, 0]), overwrite=True,
    )  # fmt: skip
    low = -(-size // 32)
    centre, radius = low / 2, low / 4
    y, x = np.ogrid[:low, :low]
    tissue = (y - centre) ** 2 + (x - centre) ** 2 < radius**2
    zarr.create_array(mask, data=tissue, chunks=(CHUNK, CHUNK), dimension_names=("y", "x"), overwrite=True)
    pattern = tile()
    step = CHUNK // 32
    for i in range(0, low, step):
        for j in range(0, low, step):
            if tissue[i : i + step, j : j + step].any():
                box = tuple(slice(a * 32, min(a * 32 + CHUNK, size)) for a in (i, j))
                slide[box] = pattern[tuple(slice(0, s.stop - s.start) for s in box)]
    return {"tissue": float(tissue.mean())}


def segment(source: str, target: str, options: dict[str, Any]) -> dict[str, Any]:
    """A network that knows the colours, at two convolutions a pixel."""
    called = [0]
    colours = torch.from_numpy(COLOURS).float()
    scores = torch.nn.Conv2d(3, 3, 1)  # |x - c|^2 is smallest where 2 c x - |c|^2 is largest
    scores.weight.data = 2 * colours[:, :, None, None]
    scores.bias.data = -(colours**2).sum(1)
    scores.register_forward_hook(lambda *_: called.__setitem__(0, called[0] + 1))
    with measured() as usage:
        plan = oocpatch.plan(
            source, scores, target, axes="yxc", postprocess="argmax", overwrite=True, progress=False, **options
        )
        result = plan.run()
    return {
        **vars(usage),
        "patches": plan.patches,
        "called": called[0] - 1,  # the probe
        "uncovered": result.attrs.get("uncovered_voxels", 0),
        "wrong": _wrong(source, Path(target) / "prediction", options["mask"]),
    }


def light_encoder() -> torch.nn.Module:
    """Return five convolutions, a vector of 512 numbers per patch: an eighth of the work of the smallest ResNet."""
    layers: list[torch.nn.Module] = []
    for a, b in itertools.pairwise((3, 32, 64, 128, 256, 512)):
        layers += [torch.nn.Conv2d(a, b, 3, stride=2, padding=1), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval()


def encoder_alone(light: bool, batch_sizes: list[int], patches: int) -> dict[str, Any]:
    """Encode about so many patches in memory, in each of some batches, with all threads a call and with a thread each.

    The fastest way counts.
    """
    encoder, threads = _encoder(light), torch.get_num_threads()
    ways: list[dict[str, Any]] = []
    for size in batch_sizes:
        batch, calls = torch.rand(size, 3, 224, 224), threads * max(1, patches // size // threads)
        for at_a_time in {1, threads}:
            with alone(encoder, at_a_time) as call:
                call([batch] * threads)  # the threads begin
                with measured() as usage:
                    call([batch] * calls)
            encoded = calls * size
            ways.append({"batch": size, "calls": at_a_time, "wall": usage.wall / encoded, "cpu": usage.cpu / encoded})
    return min(ways, key=lambda way: way["wall"])


def _encoder(light: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    return light_encoder() if light else architectures.encoder()


def encode(source: str, target: str, light: bool, options: dict[str, Any]) -> dict[str, Any]:
    """A vector per patch of the tissue."""
    with measured() as usage:
        plan = oocpatch.plan(
            source, _encoder(light), target, axes="yxc", patch_size=224, overwrite=True, progress=False, **options
        )
        result = plan.run()
    return {**vars(usage), "patches": result.sizes["patch"], "planned": plan.projected_memory}


def _wrong(source: str, target: Path, mask: str | None) -> int:
    """Pixels of the tissue whose class is not that of the nearest colour."""
    slide, labels = zarr.open_array(source, mode="r"), zarr.open_array(target, mode="r")
    tissue = None if mask is None else zarr.open_array(mask, mode="r")[...]
    wrong = 0
    for i in range(math.ceil(slide.shape[0] / CHUNK)):
        rows = slice(i * CHUNK, min((i + 1) * CHUNK, slide.shape[0]))
        columns = slice(slide.shape[1] // 2, min(slide.shape[1] // 2 + 4 * CHUNK, slide.shape[1]))
        pixels = np.asarray(slide[rows, columns], np.int32)
        expected = np.argmin(((pixels[:, :, None] - COLOURS.astype(np.int32)) ** 2).sum(-1), axis=-1)
        differs = np.asarray(labels[0, rows, columns]) != expected
        if tissue is not None:
            inside = np.repeat(np.repeat(tissue[rows.start // 32 :, columns.start // 32 :][:17, :66], 32, 0), 32, 1)
            shift = columns.start % 32
            differs &= inside[: differs.shape[0], shift : shift + differs.shape[1]]
        wrong += int(differs.sum())
    return wrong


if __name__ == "__main__":
    answer(make_slide, segment, encode, encoder_alone)
