"""Volumes and ways to cut them, drawn for laws: any shape, patch, overlap, border, chunks, memory and workers."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
import zarr
from hypothesis import assume, settings
from hypothesis import strategies as st

import oocpatch
from tests.support import oracle

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]

MODES = ("crop", "average", "hann", "gaussian")
PADDINGS = (None, "constant", "edge", "reflect", "symmetric", "wrap")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
LONGEST = {1: 40, 2: 18, 3: 11, 4: 6}
"""Longest axis of the volumes drawn, by number of axes: big enough for several blocks, small enough for hundreds."""
MOST_CHUNKS = {1: 8, 2: 4, 3: 3, 4: 2}
"""Most chunks along an axis, by number of axes."""
MOST_PATCHES = 120


def law(examples: int) -> settings:
    """So many examples, thirty times as many to explore; all else as the profile says."""
    return settings(max_examples=examples * (30 if settings.get_current_profile_name() == "explore" else 1))


@dataclass(frozen=True)
class Case:
    """One volume and one way to cut it."""

    shape: tuple[int, ...]
    patch: tuple[int, ...]
    overlap: tuple[int, ...]
    mode: str
    padding: str | None
    channels: int | None = None
    channel_last: bool = False
    chunks: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def axes(self) -> str:
        spatial = "wzyx"[-len(self.shape) :]
        if self.channels is None:
            return spatial
        return spatial + "c" if self.channel_last else "c" + spatial

    @property
    def even(self) -> bool:
        """Whether patches are spaced evenly."""
        return self.options.get("patch_starts") == "even"

    @property
    def patches(self) -> int:
        padded = self.padding is not None and not self.even
        grown = [n + 2 * (o // 2) * padded for n, o in zip(self.shape, self.overlap, strict=True)]
        axes = zip(grown, self.patch, self.overlap, strict=True)
        return math.prod(len(oracle.starts(max(n, p), p, o)) for n, p, o in axes)

    @property
    def coverage(self) -> int:
        """No voxel lies in more patches than this."""
        closer = 1 + self.even  # evenly spaced, patches may be half a stride apart
        return math.prod(-(-p // max(1, (p - o) // closer)) + 1 for p, o in zip(self.patch, self.overlap, strict=True))

    def rounding(self, largest: float) -> float:
        """Bound on the error of float32 sums and weights, for model outputs up to `largest`.

        One rounding per patch added, a few per axis for the windows, a few for product and division.
        """
        return float(np.finfo(np.float32).eps) * (self.coverage + 3 * len(self.shape) + 4) * largest

    def predict(self, data: Array, model: Any, root: Path, name: str = "out", **more: Any) -> xr.DataArray:
        """Run `oocpatch.predict` on `data (C, *spatial)`, stored as the case says."""
        path = root / "volume.zarr"
        if not path.exists():
            stored = data[0] if self.channels is None else np.moveaxis(data, 0, -1) if self.channel_last else data
            chunks = (*self.chunks,)
            if self.channels is not None:
                chunks = (*chunks, 1) if self.channel_last else (1, *chunks)
            zarr.create_array(path, data=np.ascontiguousarray(stored), chunks=chunks)
        arguments = {
            "axes": self.axes,
            "patch_size": self.patch,
            "patch_overlap": self.overlap,
            "overlap_mode": self.mode,
            "padding_mode": self.padding,
            "progress": False,
        }
        return oocpatch.predict(path, model, root / name, **{**arguments, **self.options, **more})


def sizes(longest: int, ndim: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(1, longest)] * ndim)


@st.composite
def chunks_of(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Chunks of any length, some longer than the volume; not so many that a law takes minutes to write them."""
    most = MOST_CHUNKS[len(shape)]
    return tuple(draw(st.integers(-(-n // most), n + 2)) for n in shape)


@st.composite
def cases(draw: st.DrawFn, modes: tuple[str, ...] = MODES) -> Case:
    """Any volume of one to four axes, any patch (smaller or larger), any overlap (even or odd), any storage."""
    ndim = draw(st.integers(1, 4))
    longest = LONGEST[ndim]
    shape, patch = draw(sizes(longest, ndim)), draw(sizes(longest // 2 + 2, ndim))
    overlap = tuple(draw(st.integers(0, p - 1)) for p in patch)
    options: dict[str, Any] = {"batch_size": draw(st.integers(1, 5)), "workers": draw(st.sampled_from((1, 2)))}
    if draw(st.booleans()):
        options["output_chunks"] = draw(chunks_of(shape))
        if draw(st.booleans()):
            options["output_shards"] = tuple(c * draw(st.integers(1, 3)) for c in options["output_chunks"])
    # Left alone, the planner makes one block of a small volume: most cases ask for several.
    limit = draw(st.sampled_from(("blocks", "blocks", "memory", "auto")))
    if limit == "blocks":
        # A block is made of whole chunks of the output, which are large unless told otherwise.
        options.setdefault("output_chunks", tuple(-(-n // MOST_CHUNKS[ndim]) for n in shape))
        options["block_shape"] = draw(sizes(longest // 2 + 2, ndim))
    if limit == "memory":
        options["max_memory"] = "2MiB"
    options["patch_starts"] = draw(st.sampled_from(("regular", "regular", "even")))
    channels = draw(st.sampled_from((None, None, 1, 2, 3)))
    case = Case(
        shape,
        patch,
        overlap,
        draw(st.sampled_from(modes)),
        draw(st.sampled_from(PADDINGS)),
        channels,
        channels is not None and draw(st.booleans()),
        draw(chunks_of(shape)),
        options,
    )
    while case.patches > MOST_PATCHES:
        case = Case(**{**vars(case), "overlap": tuple(o // 2 for o in case.overlap)})
        assume(any(case.overlap) or case.patches <= MOST_PATCHES)
    return case


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """An empty directory per example; a pytest fixture would be shared by all examples of a law."""
    with tempfile.TemporaryDirectory(prefix="oocpatch-law-") as directory:
        yield Path(directory)


def random_values(dtype: str, shape: tuple[int, ...]) -> Array:
    """The whole range of `dtype`, so that one wrong bit, cast or place shows."""
    generator, kind = np.random.default_rng(0), np.dtype(dtype)
    if kind.kind == "b":
        return generator.random(shape) < 0.5
    if kind.kind in "iu":
        info = np.iinfo(kind)
        return generator.integers(info.min, info.max, shape, dtype=kind, endpoint=True)
    return (generator.standard_normal(shape) * 100).astype(kind)


def small_integers(shape: tuple[int, ...]) -> Array:
    """Float32 whose sums are exact in any order, no two near voxels alike."""
    return ((np.arange(math.prod(shape)) * 37 % 101) - 50).reshape(shape).astype(np.float32)


def position_model(patch: Array) -> Array:
    """Depends on the place within the patch and on every voxel of it: `(C, *patch)` to `(C + 1, *patch)`."""
    ramp = (np.arange(patch[0].size, dtype=np.float32) / patch[0].size + 0.5).reshape(patch.shape[1:])
    mean = patch.mean(axis=tuple(range(1, patch.ndim)), keepdims=True, dtype=np.float64).astype(np.float32)
    return np.concatenate([patch * ramp + mean, (patch[:1] - 3 * ramp)]).astype(np.float32)


def positional(patches: torch.Tensor) -> torch.Tensor:
    """`position_model` as a predictor of batches."""
    import torch  # noqa: PLC0415 - see tests.without_torch

    return torch.from_numpy(np.stack([position_model(patch) for patch in patches.numpy()]))


def channel_first(result: xr.DataArray, case: Case) -> Array:
    """The result as `(C, *spatial)`, whose order of axes is part of the promise."""
    spatial = tuple(case.axes.replace("c", ""))
    values = result.values
    if result.dims == spatial:
        return values[np.newaxis]
    assert result.dims[1:] == spatial
    return values
