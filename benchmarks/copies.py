"""The yardstick: copies of a Zarr array, chunk by chunk, with what there is to do that quickly."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import zarr

from benchmarks.contest import LEVEL, Job, chunks_of, contend
from benchmarks.measure import answer


def copy_by_chunks(source_path: Any, target_path: Any, threads: int) -> None:
    """Copy a Zarr array, a chunk at a time on each of some threads."""
    source = zarr.open_array(source_path, mode="r")
    target = _like(source, target_path)

    def move(box: tuple[slice, ...]) -> None:
        target[box] = source[box]

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(move, chunks_of(source)):
            pass


def zarr_python(threads: int, **job: Any) -> dict[str, Any]:
    """zarr-python, a chunk at a time on each of some threads."""

    def run(task: Job) -> None:
        copy_by_chunks(task.source, task.target, threads)

    return contend(run, **job)


def zarrs(chunks: int, **job: Any) -> dict[str, Any]:
    """zarr-python with its chunks coded by zarrs, whose threads share a slab of some chunks' thickness."""
    import zarrs as _  # noqa: F401, PLC0415  # setting a pipeline that is not there fails only when it is used

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})

    def run(task: Job) -> None:
        source = zarr.open_array(task.source, mode="r")
        target = _like(source, task.target)
        step = chunks * source.chunks[0]
        for start in range(0, source.shape[0], step):
            target[start : start + step] = source[start : start + step]

    return contend(run, **job)


def tensorstore(**job: Any) -> dict[str, Any]:
    """TensorStore: one write from one array to the other, cut into parts by its own threads."""
    import tensorstore as ts  # noqa: PLC0415  # an extra

    def run(task: Job) -> None:
        source = zarr.open_array(task.source, mode="r")
        _like(source, task.target)
        arrays = [
            ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}, open=True).result()
            for path in (task.source, task.target)
        ]
        arrays[1].write(arrays[0]).result()

    return contend(run, **job)


def _like(source: zarr.Array[Any], path: Any) -> zarr.Array[Any]:
    return zarr.create_array(
        path,
        shape=source.shape,
        chunks=source.chunks,
        dtype=source.dtype,
        compressors=zarr.codecs.ZstdCodec(level=LEVEL),
    )


if __name__ == "__main__":
    answer(zarr_python, zarrs, tensorstore)
