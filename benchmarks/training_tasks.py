"""What `benchmarks.training` measures; each task in a process of its own."""

from __future__ import annotations

import hashlib
import itertools
import math
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torchio
import zarr

import oocpatch
from benchmarks.measure import answer

SUBJECTS, CHUNK, IN_MEMORY = 4, 64, 128
MAX_LENGTH, PATCHES_PER_VOLUME = 64, 20
VOXEL_BYTES = 5
"""A float32 and a uint8."""
STORED = 40
"""Chunks of a volume that are stored; the others are zero."""


def make_study(path: str, gib: float) -> dict[str, Any]:
    """Make sparse volumes with labels of which one voxel in five hundred is 1, in a few chunks here and there."""
    edge = math.ceil((gib * 2**30 / SUBJECTS / VOXEL_BYTES) ** (1 / 3) / CHUNK) * CHUNK
    random = np.random.default_rng(0)
    for i in range(SUBJECTS):
        group = zarr.create_group(f"{path}/{i}.zarr", overwrite=True)
        options: dict[str, Any] = {"shape": (edge,) * 3, "chunks": (CHUNK,) * 3}
        image = group.create_array("t1", dtype="float32", **options)
        label = group.create_array("label", dtype="uint8", **options)
        for corner in random.integers(0, edge // CHUNK, (STORED, 3)).tolist():
            box = tuple(slice(c * CHUNK, c * CHUNK + CHUNK) for c in corner)
            values = random.standard_normal((CHUNK,) * 3, np.float32)
            image[box], label[box] = values, (values > 2.9).astype(np.uint8)
    return {"edge": edge}


def _transform() -> Any:
    return torchio.Compose(
        [
            torchio.Flip(axes=(0, 1, 2), flip_probability=0.5),
            torchio.Affine(scales=(0.9, 1.1), degrees=(-10.0, 10.0)),
            torchio.Gamma(log_gamma=(-0.3, 0.3)),
            torchio.Noise(std=(0.0, 0.1)),
        ]
    )


def _queue(library: Any, subjects: list[Any], patch: int, seed: int | None) -> Any:
    options: dict[str, Any] = {
        "max_length": MAX_LENGTH,
        "patches_per_volume": PATCHES_PER_VOLUME,
        "transform": _transform(),
    }
    sampler: dict[str, Any] = {"label_name": "label", "label_probabilities": {0: 1, 1: 500}}
    if library is oocpatch:
        sampler |= {"seed": seed}
    return library.Queue(subjects, library.LabelSampler(subjects[0], patch, **sampler), **options)


def _on_disk(path: str) -> list[oocpatch.Subject]:
    return [
        oocpatch.Subject(**{name: Path(path) / f"{i}.zarr" / name for name in ("t1", "label")}) for i in range(SUBJECTS)
    ]


def train(path: str, steps: int, seed: int, patch: int, workers: int) -> dict[str, Any]:
    """Train a small network: seconds, memory of this process and its workers, and a digest of all patches."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(
        torch.nn.Conv3d(1, 8, 4, stride=2, padding=1), torch.nn.ReLU(), torch.nn.ConvTranspose3d(8, 2, 4, 2, padding=1)
    )
    optimizer = torch.optim.Adam(net.parameters())
    queue = _queue(oocpatch, _on_disk(path), patch, seed)
    queue.patch_sampler.prepare()
    loader = oocpatch.SubjectsLoader(queue, batch_size=2, num_workers=workers)
    digest, memory, done = hashlib.sha256(), _Memory(), 0
    started = time.perf_counter()
    while done < steps:
        for batch in loader:
            for data in (batch.t1.data, batch.label.data):
                digest.update(data.numpy().tobytes())
            digest.update(repr(batch.patch_location).encode())
            loss = torch.nn.functional.cross_entropy(net(batch.t1.data), batch.label.data[:, 0].long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            memory.step = done
            if done == steps:
                break
    seconds = time.perf_counter() - started
    readings = memory.stop()
    early = [value for step, value in readings if steps / 4 <= step < steps / 2]
    late = [value for step, value in readings if step >= steps * 3 / 4]
    return {
        "seconds": seconds,
        "early": statistics.median(early or [0]),
        "late": statistics.median(late or [0]),
        "peak": max((value for _, value in readings), default=0),
        "digest": digest.hexdigest(),
    }


class _Memory:
    """Readings of the memory of this process and its children, shared pages counted once, with the step of each."""

    def __init__(self) -> None:
        self.step = 0
        self._readings: list[tuple[int, int]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._ended.wait(0.2):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # it has just ended
                    continue
            self._readings.append((self.step, total))

    def stop(self) -> list[tuple[int, int]]:
        self._ended.set()
        self._thread.join()
        return self._readings


def draw(path: str, *, library: str, place: str, seconds: float, patch: int, workers: int) -> dict[str, Any]:
    """Patches per second of a queue with transforms, from the first batch on."""
    module = torchio if library == "TorchIO" else oocpatch
    if place == "from disk":
        subjects: list[Any] = _on_disk(path)
    else:
        random = np.random.default_rng(0)
        images = [torch.from_numpy(random.standard_normal((1, *[IN_MEMORY] * 3), np.float32)) for _ in range(SUBJECTS)]
        wrap = (torchio.ScalarImage, torchio.LabelMap) if module is torchio else (torch.as_tensor, torch.as_tensor)
        subjects = [module.Subject(t1=wrap[0](t1), label=wrap[1]((t1 > 2.9).to(torch.uint8))) for t1 in images]
    loader = module.SubjectsLoader(_queue(module, subjects, patch, 0), batch_size=2, num_workers=workers)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    next(batches)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        count += len(next(batches).t1.data)
    return {"rate": count / (time.perf_counter() - started)}


if __name__ == "__main__":
    answer(make_study, train, draw)
