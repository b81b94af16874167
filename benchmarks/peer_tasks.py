"""What other libraries do with the same job, each used as its documentation recommends for it.

Runs in the environments that `python -m benchmarks peers` makes. Each function imports its library itself: not every
environment has every one. All go from Zarr to Zarr; those that work in memory read the volume first and write the
result last, and `inference` tells the seconds in between.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import zarr

from benchmarks.contest import KNOWN, LEVEL, Job, Run, chunks_of, contend, until_first_patch
from benchmarks.measure import answer
from benchmarks.models import CHANNELS, alone, network

Network = Callable[[Job], torch.nn.Module]


def _volume(task: Job) -> torch.Tensor:
    """The whole volume in memory, `(channel, *spatial)`, float32 as networks want it."""
    volume = torch.from_numpy(np.asarray(zarr.open_array(task.source, mode="r")[...]))
    return (volume.permute(2, 0, 1) if task.image else volume[None]).float()


def _output(task: Job, channels: int) -> Any:
    """An empty array for the result, `(channel, *spatial)`, float32."""
    shape = zarr.open_array(task.source, mode="r").shape
    spatial = shape[:2] if task.image else shape
    return zarr.create_array(
        task.target, shape=(channels, *spatial), chunks=(1, *(task.chunk,) * len(spatial)), dtype="float32",
        compressors=zarr.codecs.ZstdCodec(level=LEVEL),
    )  # fmt: skip


def _write(task: Job, result: torch.Tensor) -> None:
    _output(task, len(result))[...] = result.numpy()


def monai_in_memory(net: Network) -> Run:
    """MONAI's `SlidingWindowInferer`; its smooth blending is `gaussian`."""
    from monai.inferers import SlidingWindowInferer  # noqa: PLC0415

    def run(task: Job) -> dict[str, Any]:
        volume, model = _volume(task), net(task)
        started = time.perf_counter()
        inferer = SlidingWindowInferer(
            task.patch, 1, task.overlap / task.patch, mode="gaussian" if task.overlap else "constant"
        )
        # It multiplies the network's output in place, which for an identity is the volume itself.
        separate = torch.clone if task.model in KNOWN else lambda patches: patches
        with torch.no_grad():
            result = inferer(volume[None], lambda patches: separate(model(patches)))
        seconds = time.perf_counter() - started
        _write(task, result[0])
        return {"inference": seconds}

    return run


def monai_on_disk(net: Network) -> Run:
    """MONAI's `PatchInferer` with its `ZarrAvgMerger`, fed with patches that are read as they are needed."""
    from monai.inferers import PatchInferer, ZarrAvgMerger  # noqa: PLC0415

    def run(task: Job) -> None:
        source = zarr.open_array(task.source, mode="r")

        def patches() -> Iterator[tuple[torch.Tensor, tuple[int, ...]]]:
            for corner in task.corners:
                patch = torch.from_numpy(source[tuple(slice(a, a + task.patch) for a in corner)])
                yield (patch.permute(2, 0, 1) if task.image else patch[None])[None].float(), corner

        spatial = source.shape[:2] if task.image else source.shape
        shape = (1, CHANNELS[task.model], *spatial)
        stores = {"value_store": f"{task.target}-values", "count_store": f"{task.target}-counts"}
        inferer = PatchInferer(
            merger_cls=ZarrAvgMerger, merged_shape=shape, cropped_shape=shape, store=task.target,
            chunks=(1, 1, *(task.chunk,) * len(spatial)), **stores,
        )  # fmt: skip
        with torch.no_grad():
            inferer(patches(), net(task))
        for store in stores.values():
            shutil.rmtree(store)

    return run


def torchio_in_memory(net: Network) -> Run:
    """TorchIO's `GridSampler`, a `DataLoader`, and its `PatchAggregator` with hann."""
    import torchio  # noqa: PLC0415

    def run(task: Job) -> dict[str, Any]:
        volume, model = _volume(task), net(task)
        started = time.perf_counter()
        # Three axes are all it knows: an image is a volume of one layer.
        flat = (lambda size, thickness: (thickness, size, size)) if task.image else (lambda size, _: (size,) * 3)
        subject = torchio.Subject(t1=torchio.ScalarImage(volume[:, None] if task.image else volume))
        sampler = torchio.GridSampler(subject, flat(task.patch, 1), flat(task.overlap, 0))
        mode = "hann" if task.overlap else "crop"
        aggregator = torchio.PatchAggregator(subject.spatial_shape, mode, flat(task.overlap, 0))
        with torch.no_grad():
            for batch in torchio.SubjectsLoader(sampler, batch_size=1):
                aggregator.add_batch(model(batch.t1.data), batch.metadata["patch_location"])
        result = aggregator.get_output()
        seconds = time.perf_counter() - started
        _write(task, result[:, 0] if task.image else result)
        return {"inference": seconds}

    return run


def patchly_on_disk(net: Network) -> Run:
    """The `GridSampler` and `Aggregator` of patchly, by chunks, on zarr 2; its smooth blending is `gaussian`."""
    import numcodecs  # noqa: PLC0415
    from patchly import Aggregator, GridSampler  # noqa: PLC0415

    # For each chunk it says that it works without threads, as the output is a Zarr array.
    warnings.simplefilter("ignore")

    def run(task: Job) -> None:
        source, model = zarr.open_array(task.source, mode="r"), net(task)
        spatial = source.shape[:2] if task.image else source.shape
        channels = 0 if task.model == "identity" else CHANNELS[task.model]
        target = zarr.create(
            ((channels, *spatial) if channels else spatial), dtype="float32", store=task.target,
            chunks=((1,) if channels else ()) + (task.chunk,) * len(spatial), compressor=numcodecs.Zstd(LEVEL),
        )  # fmt: skip
        sampler = GridSampler(
            source, spatial, (task.patch,) * len(spatial), (task.patch - task.overlap,) * len(spatial),
            chunk_size=np.minimum(spatial, 2 * task.patch // task.chunk * task.chunk),
        )  # fmt: skip
        weights = "gaussian" if task.overlap else "avg"
        aggregator = Aggregator(sampler, output=target, weights=weights, spatial_first=not channels)
        with torch.no_grad():
            for patch, box in sampler:
                tensor = torch.from_numpy(np.ascontiguousarray(patch))
                tensor = tensor.permute(2, 0, 1) if task.image else tensor[None]
                result = model(tensor[None].float())[0].numpy()
                aggregator.append(result if channels else result[0], box)
        aggregator.get_output()

    return run


def dask_overlap(net: Network, *, cut: bool) -> Run:
    """`dask.array.map_overlap`, which crops and does not blend.

    Args:
        net: makes the network.
        cut: rechunk so that patches have the size and the overlap that is asked for; without it the blocks are the
            array's chunks, and the overlap is what the patch is larger than a chunk.
    """
    import dask.array as da  # noqa: PLC0415

    def run(task: Job) -> None:
        model = net(task)
        size = task.patch - task.overlap if cut else task.chunk
        depth = task.overlap // 2 if cut else (task.patch - task.chunk) // 2
        if task.model == "unet":  # its patches have sides of 8, at least 16, also in the run before
            size, depth = max(16, size // 8 * 8), depth // 8 * 8

        def predict(patch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            tensor = torch.from_numpy(np.ascontiguousarray(patch))
            with torch.no_grad():
                result = model((tensor.permute(2, 0, 1) if task.image else tensor)[None].float())[0]
            return (result.permute(1, 2, 0) if task.image else result).numpy()

        volume = da.from_zarr(task.source)
        volume = volume if task.image else volume[None]
        channel = 2 if task.image else 0
        axes = [axis for axis in range(volume.ndim) if axis != channel]
        volume = volume.rechunk(dict.fromkeys(axes, size))
        options = {"depth": dict.fromkeys(axes, depth), "boundary": "none"}
        # other channels: the blocks that the function gives, before they are trimmed
        chunks = list(da.overlap.overlap(volume, **options).chunks)
        chunks[channel] = (CHANNELS[task.model],)
        meta = np.empty((0,) * volume.ndim, np.float32)
        torch.set_num_threads(1)  # of a call; dask calls as often at a time as there are cores
        result = da.map_overlap(predict, volume, **options, chunks=tuple(chunks), dtype="float32", meta=meta)
        result = result.rechunk({**dict.fromkeys(axes, task.chunk), channel: 1})
        codec = zarr.codecs.ZstdCodec(level=LEVEL)
        options = {"shape": result.shape, "chunks": result.chunksize, "dtype": "float32", "compressors": codec}
        result.to_zarr(zarr.create_array(task.target, **options))

    return run


def naive(net: Network) -> Run:
    """What one writes first: `+=` on arrays on disk, patch by patch, then a division chunk by chunk."""

    def run(task: Job) -> None:
        source, model = zarr.open_array(task.source, mode="r"), net(task)
        channels = CHANNELS[task.model]
        target = _output(task, channels)
        arrays = {
            name: zarr.create_array(f"{task.target}-{name}", shape=shape, chunks=target.chunks, dtype="float32")
            for name, shape in (("sums", target.shape), ("weights", (1, *target.shape[1:])))
        }
        window = _hann(task.patch, target.ndim - 1) if task.overlap else np.ones((task.patch,) * (target.ndim - 1))
        window = window.astype(np.float32)
        with torch.no_grad():
            for corner in task.corners:
                box = tuple(slice(a, a + task.patch) for a in corner)
                patch = torch.from_numpy(source[box])
                patch = patch.permute(2, 0, 1) if task.image else patch[None]
                arrays["sums"][:, *box] += model(patch[None].float())[0].numpy() * window
                arrays["weights"][0, *box] += window
        for box in chunks_of(target):
            target[box] = arrays["sums"][box] / arrays["weights"][:, *box[1:]]
        for name in arrays:
            shutil.rmtree(f"{task.target}-{name}")

    return run


def _hann(size: int, axes: int) -> np.ndarray[Any, Any]:
    """The Hann window without its zeros, along each axis."""
    one = np.hanning(size + 2)[1:-1]
    window = np.ones(())
    for _ in range(axes):
        window = np.multiply.outer(window, one)
    return window


PEERS: dict[str, Callable[..., Run]] = {
    run.__name__: run
    for run in (monai_in_memory, monai_on_disk, torchio_in_memory, patchly_on_disk, dask_overlap, naive)
}


def peer(name: str, *, zarrs: bool = False, options: dict[str, Any] | None = None, **job: Any) -> dict[str, Any]:
    """Measure a peer.

    Args:
        name: which one.
        zarrs: have zarr-python's chunks coded by zarrs.
        options: the peer's own.
        **job: fields of a `Job`.
    """
    if zarrs:
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    return contend(PEERS[name](lambda task: network(task.model), **(options or {})), **job)


def first_patch(name: str, options: dict[str, Any] | None = None, **job: Any) -> dict[str, Any]:
    """Seconds that a peer takes from the call until the network gets its first patch."""
    return until_first_patch(lambda clock: PEERS[name](lambda _: clock, **(options or {})), **job)


def bare(*, side_by_side: bool = False, **job: Any) -> dict[str, Any]:
    """The network over the same patches of a volume in memory, and nothing else: neither blending nor files.

    Each call has all threads of torch, or with `side_by_side` one, and as many calls run at a time as there were.
    """

    def run(task: Job) -> dict[str, Any]:
        volume, model = _volume(task), network(task.model)
        patches = (volume[None, :, *(slice(a, a + task.patch) for a in corner)] for corner in task.corners)
        started = time.perf_counter()
        with alone(model, torch.get_num_threads() if side_by_side else 1) as call:
            call(patches)
        return {"inference": time.perf_counter() - started}

    return contend(run, compare=False, **job)


if __name__ == "__main__":
    answer(peer, first_patch, bare)
