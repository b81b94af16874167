"""What `benchmarks.sampling` measures; each task in a process of its own."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchio
import zarr
from zarr.storage import LocalStore

from benchmarks.measure import answer, measured
from oocpatch import GridSampler, LabelSampler, Queue, Subject, UniformSampler, WeightedSampler

NAMES = ("t1", "label")


def make_study(path: str, size: int, chunk: int) -> dict[str, Any]:
    """A cube of random float32, which does not compress, and labels of which one voxel in twenty is not 0."""
    group = zarr.create_group(path, overwrite=True)
    random = np.random.default_rng(0)
    for name, dtype in zip(NAMES, ("float32", "uint8"), strict=True):
        array = group.create_array(name, shape=(size,) * 3, chunks=(chunk,) * 3, dtype=dtype)
        for start in range(0, size, chunk):
            slab = random.random((min(chunk, size - start), size, size), dtype=np.float32)
            labels = np.digitize(slab, (0.95, 0.975))
            array[start : start + chunk] = slab if name == "t1" else labels.astype(np.uint8)
    return {}


def sample(
    path: str, patch: int, seconds: float, *, kind: str, place: str = "disk", threads: int = 0, together: int = 1
) -> dict[str, Any]:
    """Draw for some seconds: patches per second, seconds until the first one, and memory added."""
    shutil.rmtree(f"{path}.oocpatch-masses", ignore_errors=True)
    read = {name: zarr.open_array(f"{path}/{name}", mode="r") for name in NAMES}
    arrays = {name: array[:] for name, array in read.items()} if place != "disk" else {}
    with measured() as usage:
        started = time.perf_counter()
        if kind == "plain":
            patches = _plain(read, patch)
        elif place == "torchio":
            patches = _torchio(arrays, patch, kind)
        else:
            sources = arrays or {name: Path(path) / name for name in NAMES}
            patches = _oocpatch(Subject(**sources), patch, kind, threads, together)
        next(patches)
        first = time.perf_counter() - started
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            next(patches)
            count += 1
        rate = count / (time.perf_counter() - started)
    return {"rate": rate, "first": first, "peak": usage.peak}


def _plain(read: dict[str, Any], patch: int) -> Iterator[Any]:
    random = np.random.default_rng(0)
    size = read["t1"].shape[0]
    while True:
        box = tuple(slice(a, a + patch) for a in random.integers(0, size - patch + 1, 3).tolist())
        yield [array[box] for array in read.values()]


def _oocpatch(subject: Subject, patch: int, kind: str, threads: int, together: int) -> Iterator[Any]:
    if kind == "grid":
        sampler = GridSampler(subject, patch, patch // 4 * 2)
        return _shuffled(sampler)
    samplers: dict[str, Callable[[], Any]] = {
        "uniform": lambda: UniformSampler(subject, patch),
        "weighted": lambda: WeightedSampler(subject, patch, "label"),
        "label": lambda: LabelSampler(subject, patch, "label", {1: 1, 2: 3}),
    }
    if kind != "queue":
        return iter(samplers[kind]())
    options = {"max_length": 64, "patches_per_volume": 64, "num_workers": threads, "patches_per_region": together}
    queue = Queue([subject] * 4, samplers["uniform"](), **options)
    return itertools.chain.from_iterable(itertools.repeat(queue))


def _torchio(arrays: dict[str, Any], patch: int, kind: str) -> Iterator[Any]:
    subject = torchio.Subject(
        t1=torchio.ScalarImage(torch.from_numpy(arrays["t1"])[None]),
        label=torchio.LabelMap(torch.from_numpy(arrays["label"])[None]),
    )
    if kind == "grid":
        sampler = torchio.GridSampler(subject, patch, patch // 4 * 2)
        return _shuffled(sampler)
    samplers: dict[str, Callable[[], Any]] = {
        "uniform": lambda: torchio.UniformSampler(subject, patch),
        "weighted": lambda: torchio.WeightedSampler(subject, patch, "label"),
        "label": lambda: torchio.LabelSampler(subject, patch, "label", {1: 1, 2: 3}),
    }
    if kind != "queue":
        return iter(samplers[kind]())
    queue = torchio.Queue([subject] * 4, samplers["uniform"](), max_length=64, patches_per_volume=64)
    return itertools.chain.from_iterable(itertools.repeat(queue))


def _shuffled(sampler: Any) -> Iterator[Any]:
    random = np.random.default_rng(0)
    while True:
        yield sampler[int(random.integers(len(sampler)))]


class CountingStore(LocalStore):
    """Counts the chunks that are read."""

    reads = 0

    async def get(self, key: str, *arguments: Any, **options: Any) -> Any:
        found = await super().get(key, *arguments, **options)
        CountingStore.reads += found is not None
        return found


def amplification(path: str, patch: int) -> dict[str, Any]:
    """Bytes of chunks that are decoded per byte of patches, by how many patches are drawn together."""
    array = zarr.open_array(CountingStore(f"{path}/t1", read_only=True), mode="r")
    subject = Subject(t1=array)
    found = {}
    for together in (1, 2, 4, 8, 16, 32):
        sampler = UniformSampler(subject, patch)
        queue = Queue([subject], sampler, 64, 192, seed=0, patches_per_region=together)
        CountingStore.reads = 0
        patches = sum(1 for _ in queue)
        found[str(together)] = CountingStore.reads * np.prod(array.chunks) / (patches * patch**3)
    return {"amplification": found}


if __name__ == "__main__":
    answer(make_study, sample, amplification)
