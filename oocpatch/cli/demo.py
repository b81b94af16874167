"""The demo: a volume larger than its memory limit, a network that finds the nuclei in it, a score and a picture.

Nothing is downloaded. The volume is made chunk by chunk, imitating a light-sheet stack of a hollow, wobbly organoid:
uneven light, haze, noise, and nuclei whose shapes are known. The network's weights are calculated, not trained.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr
from torch import nn
from torch.nn import functional

import oocpatch
from oocpatch.errors import OutputExists
from oocpatch.planning.arguments import memory_limit
from oocpatch.planning.box import Box
from oocpatch.planning.plan import human
from oocpatch.system import resident_memory
from oocpatch.visualization.canvas import Figure, Panel
from oocpatch.visualization.colormaps import heat

PATCH, OVERLAP, CHUNK = 80, 16, 64
PITCH = 17
"""Voxels between the cells of the lattice that nuclei are scattered about."""
JITTER = 4.5
RADIUS = 10.0
"""No nucleus reaches farther from its centre, in voxels."""
EDGE = 1.2
"""Half the width of a nucleus' soft edge, in voxels: the optics' blur."""
GAIN, OFFSET, READ_NOISE = 12.0, 100.0, 600.0
"""The camera: counts per photon, counts of no light, variance of its own noise."""

MARK = "oocpatch_demo"
GREEN, PINK, AMBER = (63, 185, 130), (247, 90, 160), (250, 180, 60)

Array = npt.NDArray[Any]
Zarr = zarr.Array[Any]


@dataclass(frozen=True, slots=True)
class DemoReport:
    """The result of the demo.

    Attributes:
        seconds: duration of the prediction alone.
        peak_memory: bytes of resident memory that the prediction added to the process at its peak.
        limit: bytes it was allowed to add.
        score: Dice coefficient of prediction and truth.
        picture: the PNG; None without Pillow.
        output: the prediction's Zarr group.
        plan: the plan, as `Plan.to_json` gives it.
    """

    seconds: float
    peak_memory: int
    limit: int
    score: float
    picture: Path | None
    output: Path
    plan: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Specimen:
    """A light-sheet stack that can be computed anywhere: any split into boxes gives the same nuclei.

    Attributes:
        size: edge in voxels.
        seed: of the nuclei and the noise.
    """

    size: int
    seed: int = 7

    def render(self, box: Box) -> tuple[Array, Array]:
        """The counts in a box, `uint16`, and its truth, `uint8` with ones in nuclei.

        The noise is drawn per box: render whole chunks.
        """
        nuclei, truth = np.zeros(box.shape, np.float32), np.zeros(box.shape, np.uint8)
        for centre, radii, brightness in self._nuclei(box):
            low, high = np.floor(centre - radii - EDGE), np.ceil(centre + radii + EDGE)
            around = box & Box(tuple(int(v) for v in low), tuple(int(v) + 1 for v in high))
            if around.empty:
                continue
            offsets = ((v - c) / r for v, c, r in zip(_voxels(around), centre, radii, strict=True))
            depth = (1 - np.sqrt(sum(o * o for o in offsets))) * radii.mean()  # voxels below the surface, nearly
            here = around.slices(box.start)
            np.maximum(nuclei[here], brightness * np.clip(depth / (2 * EDGE) + 0.5, 0, 1), out=nuclei[here])
            truth[here] |= depth > 0
        voxels = _voxels(box)
        haze = 0.1 + 0.25 * np.clip(12 * self._tissue(*voxels) + 0.5, 0, 1)
        clean = 1100 * self._light(*voxels) * (haze + nuclei)
        noise = np.random.default_rng((self.seed, *box.start, 1)).standard_normal(box.shape, np.float32)
        counts = OFFSET + clean + np.sqrt(GAIN * clean + READ_NOISE) * noise
        return np.clip(np.rint(counts), 0, np.iinfo(np.uint16).max).astype(np.uint16), truth

    def _nuclei(self, box: Box) -> Iterator[tuple[Array, Array, float]]:
        """Centre, radii and brightness of every nucleus that may reach into the box."""
        reach = RADIUS + EDGE + JITTER
        rows = (
            range(int((a - reach) // PITCH), int((b + reach) // PITCH) + 1)
            for a, b in zip(box.start[:2], box.stop[:2], strict=True)
        )
        for i, j in itertools.product(*rows):
            yield from zip(*self._row(i, j), strict=True)

    def _row(self, i: int, j: int) -> tuple[Array, Array, Array]:
        """The nuclei of one row of the lattice, along the last axis: all from one seed, whoever asks."""
        count = self.size // PITCH + 3
        rng = np.random.default_rng((self.seed, i + PITCH, j + PITCH))  # seeds are not negative
        cells = np.stack([np.full(count, i), np.full(count, j), np.arange(-1, count - 1)], axis=1)
        centres = cells * PITCH + rng.uniform(-JITTER, JITTER, (count, 3))
        stretch = np.exp(rng.normal(0, 0.1, (count, 3)).clip(-0.22, 0.22))
        radii = rng.uniform(5.8, 7.8, (count, 1)) * stretch
        brightness = rng.uniform(0.7, 1.3, count)
        depth = self._tissue(*centres.T)
        crowded = np.where(depth < 0.14, 0.97, 0.55)  # dense along both surfaces, loose between them
        there = (depth > 0.02) & (rng.random(count) < crowded)
        return centres[there].astype(np.float32), radii[there].astype(np.float32), brightness[there]

    def _tissue(self, z: Array, y: Array, x: Array) -> Array:
        """Depth below the nearer surface of the organoid, relative to the volume's half edge; negative outside."""
        half = self.size / 2
        z, y, x = z / half - 1, y / half - 1, x / half - 1
        wobble = 0.07 * np.sin(4 * y + 1) * np.cos(3 * x) + 0.05 * np.sin(5 * z + 2 * x)
        outer = 0.84 - np.sqrt(z**2 + y**2 + (0.93 * x) ** 2) + wobble
        lumen = np.sqrt((z + 0.02) ** 2 + (1.2 * y + 0.18) ** 2 + (0.9 * x - 0.16) ** 2) - 0.36 + wobble
        return np.asarray(np.minimum(outer, lumen))

    def _light(self, z: Array, y: Array, x: Array) -> Array:
        """The light sheet: it enters at low x, fades on its way, and throws the stripes that light sheets throw."""
        del z  # every plane is lit alike
        half = self.size / 2
        profile = 0.75 + 0.25 * np.cos(2.2 * (y / half - 1))
        stripes = 1 - 0.12 * np.sin(y / 5) * np.exp(-x / self.size)
        return np.asarray(np.exp(-0.55 * x / half) * profile * stripes)


def _voxels(box: Box) -> tuple[Array, ...]:
    """Coordinates of a box's voxels, one open axis each."""
    axes = (np.arange(*span, dtype=np.float32) for span in zip(box.start, box.stop, strict=True))
    return np.meshgrid(*axes, indexing="ij", sparse=True)


class Blur(nn.Sequential):
    """A Gaussian of `sigma` voxels as three one-dimensional convolutions."""

    def __init__(self, sigma: float) -> None:
        reach = int(np.ceil(3 * sigma))
        kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
        layers = []
        n = len(kernel)
        for size in ((n, 1, 1), (1, n, 1), (1, 1, n)):
            layer = nn.Conv3d(1, 1, size, padding="same", padding_mode="replicate", bias=False)
            layer.weight = nn.Parameter((kernel / kernel.sum()).reshape(1, 1, *size), requires_grad=False)
            layers.append(layer)
        super().__init__(*layers)


class NucleusNet(nn.Module):
    """Finds bright blobs of about 13 voxels: `(B, 1, *patch)` counts to `(B, 1, *patch)` probabilities, even sizes.

    Where a voxel stands between the background around it and the brightest spot near it decides, so that neither the
    uneven light nor a nucleus' own brightness matters. All at half the resolution; weights from formulas.
    """

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv3d(1, 1, 2, stride=2, bias=False)
        self.squeeze.weight = nn.Parameter(torch.full((1, 1, 2, 2, 2), 1 / 8), requires_grad=False)
        self.denoise, self.level, self.spread = Blur(0.5), Blur(2.0), Blur(1.0)
        self.expand = nn.Upsample(scale_factor=2, mode="trilinear")

    def forward(self, counts: torch.Tensor) -> torch.Tensor:
        light = torch.relu(self.squeeze(counts) - OFFSET)
        signal = self.denoise(torch.sqrt(light + 20))  # the square root makes photon noise equal everywhere
        background = self.level(_dilate(-_dilate(-signal, 7), 7))  # an opening removes what is smaller than it
        contrast = signal - background
        # Half the height of the peak is where a blurred edge lies. The floor is a peak that noise does not reach.
        peak = self.spread(_dilate(contrast, 5)).clamp_min(5.0)
        return torch.sigmoid(14 * (self.expand(contrast / peak) - 0.5))


def _dilate(values: torch.Tensor, width: int) -> torch.Tensor:
    """Maximum over a cube, axis by axis: 3 n comparisons instead of n^3."""
    for axis in range(3):
        size = [width if a == axis else 1 for a in range(3)]
        values = functional.max_pool3d(values, size, stride=1, padding=[n // 2 for n in size])
    return values


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Watch the resident memory of the process; yield a function that returns its peak above the start, in bytes."""
    done = threading.Event()
    start = peak = resident_memory()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, resident_memory())

    watcher = threading.Thread(target=watch, name="peak-memory", daemon=True)
    watcher.start()
    try:
        yield lambda: peak - start
    finally:
        done.set()
        watcher.join()


def run_demo(
    directory: Path | None = None,
    *,
    size: int = 512,
    max_memory: str = "64MiB",
    keep: bool = True,
    progress: str = "auto",
    log: Callable[[str], None] = print,
) -> DemoReport:
    """Make a volume, predict it within `max_memory`, score and draw the result.

    The same call again finds the volume, resumes or returns the prediction, and draws anew.

    Args:
        directory: where the volumes and the picture go; default `oocpatch-demo` in the current directory.
        size: edge of the volume in voxels, of 2 bytes each.
        max_memory: bound on the memory the prediction adds.
        keep: leave the volumes where they are; else only the picture stays.
        progress: "auto", "bar" or "none", as for `predict`.
        log: takes each line of the demo's story.

    Raises:
        OutputExists: when something else lies where the demo would write.
        PlanTooLarge: when `max_memory` is too small.
    """
    stem = (directory or Path("oocpatch-demo")) / f"nuclei-{size}"
    source, output = stem.with_name(stem.name + ".zarr"), stem.with_name(stem.name + "-prediction.zarr")
    asked: dict[str, Any] = {
        "patch_size": PATCH,
        "patch_overlap": OVERLAP,
        "max_memory": max_memory,
        "progress": progress,
    }
    with tempfile.TemporaryDirectory() as folder:  # what is refused is refused before the volume is made
        blank = zarr.create_array({}, shape=(size,) * 3, chunks=(CHUNK,) * 3, dtype=np.uint16)
        oocpatch.plan(blank, NucleusNet(), f"{folder}/blank.zarr", **asked)
    make_volume(Specimen(size), source, log)
    plan = oocpatch.plan(str(source / "volume"), NucleusNet(), str(output), **asked)
    log(f"{plan}\n")
    with tempfile.TemporaryDirectory() as folder:  # a first run loads libraries; what is measured is the volume's share
        oocpatch.predict(np.zeros((8, 8, 8), np.float32), nn.Identity(), f"{folder}/first.zarr", patch_size=8)
    start = time.perf_counter()
    with peak_memory() as added:
        plan.run()
    seconds = time.perf_counter() - start
    volume, truth = (zarr.open_array(source / name, mode="r") for name in ("volume", "truth"))
    prediction = zarr.open_array(output / "prediction", mode="r")
    score = dice(prediction, truth)
    limit = memory_limit(max_memory)
    log(
        f"predicted {human(volume.nbytes)} in {seconds:.1f} s; memory added at the peak: {human(added())} "
        f"of the {human(limit)} allowed\nDice coefficient against the truth: {score:.3f}"
    )
    footer = (
        f"{plan.patches:,} patches of {PATCH}^3, overlap {OVERLAP}, hann, in {plan.blocks} block(s)   \u00b7   "
        f"{seconds:.1f} s   \u00b7   {human(added())} of memory added, {human(limit)} allowed"
    )
    png = stem.with_name(stem.name + ".png")
    picture: Path | None = png
    try:
        png.write_bytes(figure(volume, prediction, truth, score=score, footer=footer).png())
        log(f"picture: {png}")
    except ValueError:
        picture = None
        log("no picture: Pillow is not installed; pip install 'oocpatch[demo]'")
    if keep:
        opening = f'prediction = xr.open_zarr("{output}", consolidated=False).prediction'
        snippet = ("import xarray as xr", opening, f"nuclei = prediction[{size // 2}].load() > 0.5")
        log("\n    ".join((f"prediction: {output}\n", *snippet)))
    else:
        shutil.rmtree(source)
        shutil.rmtree(output)
    return DemoReport(seconds, added(), limit, score, picture, output, json.loads(plan.to_json()))


def make_volume(specimen: Specimen, path: Path, log: Callable[[str], None]) -> None:
    """Write the group of `volume` and `truth`, unless it is there. Idempotent: each chunk has one writer; marker last.

    Raises:
        OutputExists: when `path` holds something else.
    """
    mark = {"size": specimen.size, "seed": specimen.seed}
    stored = _mark(path)
    if path.exists() and (stored is None or {**stored, "complete": False} != {**mark, "complete": False}):
        raise OutputExists(f"the demo would write to {path}, which holds something else; give another directory")
    if stored and stored["complete"]:
        return
    start = time.perf_counter()
    group = zarr.open_group(path, mode="a")
    group.attrs[MARK] = {**mark, "complete": False}
    arrays = [
        group.create_array(name, shape=(specimen.size,) * 3, chunks=(CHUNK,) * 3, dtype=dtype, overwrite=True,
                           dimension_names=("z", "y", "x"))
        for name, dtype in (("volume", np.uint16), ("truth", np.uint8))
    ]  # fmt: skip

    def write(box: Box) -> None:
        for array, values in zip(arrays, specimen.render(box), strict=True):
            array[box.slices()] = values

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for _ in pool.map(write, Box.of_shape(arrays[0].shape).split(arrays[0].chunks)):
            pass
    group.attrs[MARK] = {**mark, "complete": True}
    log(f"made {path} ({human(arrays[0].nbytes)} of uint16) in {time.perf_counter() - start:.1f} s\n")


def _mark(path: Path) -> dict[str, Any] | None:
    """Return the record that the demo left at `path`; None where it left none."""
    try:
        mark = zarr.open_group(path, mode="r").attrs.get(MARK)
    except (OSError, ValueError):
        return None
    return mark if isinstance(mark, dict) else None


def dice(prediction: Zarr, truth: Zarr) -> float:
    """Dice coefficient of `prediction > 0.5` and `truth > 0`, chunk by chunk; 1 when both are empty."""
    common = total = 0
    for box in Box.of_shape(truth.shape).split(truth.chunks):
        a = np.asarray(prediction[box.slices()]) > 0.5
        b = np.asarray(truth[box.slices()]) > 0
        common += int(np.count_nonzero(a & b))
        total += int(np.count_nonzero(a)) + int(np.count_nonzero(b))
    return 2 * common / total if total else 1.0


def figure(volume: Zarr, prediction: Zarr, truth: Zarr, *, score: float, footer: str) -> Figure:
    """Return the middle slice of volume, prediction and verdict, whole and magnified."""
    middle, size = volume.shape[0] // 2, volume.shape[1]
    counts, scores, truths = (np.asarray(a[middle], np.float32) for a in (volume, prediction, truth))
    low, high = np.percentile(counts, (1, 99.8))
    shown = np.repeat(np.clip((counts - low) / (high - low), 0, 1)[..., None] ** 0.7, 3, axis=-1)
    hit, true = scores > 0.5, truths > 0
    verdict = 0.45 * shown
    for where, colour in ((hit & true, GREEN), (hit & ~true, PINK), (~hit & true, AMBER)):
        verdict[where] = 0.35 * shown[where] + 0.65 * np.array(colour) / 255
    columns = {"volume": shown, "prediction: probability of nucleus": heat(scores), "truth and prediction": verdict}
    zoom = min(size, max(64, size // 4))
    top, left = max(0, size // 4 - zoom // 2), (size - zoom) // 2  # tissue on the lit side
    part = np.s_[top : top + zoom, left : left + zoom]
    return Figure(
        rows=(
            tuple(Panel(_resized(values), name) for name, values in columns.items()),
            tuple(Panel(_resized(values[part]), "magnified") for values in columns.values()),
        ),
        title=f"oocpatch demo: slice {middle} of {' x '.join(map(str, volume.shape))} voxels, Dice {score:.3f}",
        subtitle=footer,
        legend=((GREEN, "found"), (AMBER, "missed"), (PINK, "invented")),
    )


def _resized(picture: Array, edge: int = 480) -> Array:
    """Return a square picture `(n, n, 3)` with another number of pixels, the nearest ones."""
    at = np.arange(edge) * len(picture) // edge
    return np.asarray(picture[at][:, at])
