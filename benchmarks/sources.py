"""The volumes that contenders read, made once for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr

from benchmarks.measure import answer, in_fresh_process

CHUNK = 512
"""Edge of a slide's chunk in pixels."""
COLOURS = np.array([[230, 225, 235], [190, 120, 180], [90, 50, 140]], np.uint8)
"""Background, tissue and nuclei of a slide: what the three classes look like."""


def source(directory: Path, kind: str, size: int, chunk: int, zarr_format: int = 3) -> Path:
    """Path of a volume, which is made if it is not there.

    Args:
        directory: where it lies or will lie.
        kind: `random`: a cube of random float32, which does not compress; `sparse`: a cube without a stored chunk, as
            large as one likes; `slide`: an RGB image of nuclei, each chunk the same.
        size: edge in voxels.
        chunk: edge of a chunk.
        zarr_format: 2 or 3.
    """
    path = directory / f"{kind}-{size}-{chunk}-v{zarr_format}.zarr"
    if not path.exists():
        unfinished = path.with_suffix(".unfinished")
        options = {"path": str(unfinished), "size": size, "chunk": chunk, "zarr_format": zarr_format}
        in_fresh_process(f"make_{kind}", "benchmarks.sources", **options)
        unfinished.rename(path)
    return path


def make_random(path: str, size: int, chunk: int, zarr_format: int = 3, dtype: str = "float32") -> dict[str, Any]:
    """A cube of random floats, which do not compress, written slab by slab."""
    volume = _cube(path, (size,) * 3, chunk, zarr_format, dtype)
    generator = np.random.default_rng(0)
    for start in range(0, size, chunk):
        stop = min(start + chunk, size)
        volume[start:stop] = generator.random((stop - start, size, size), dtype=np.float32)
    return {"bytes": volume.nbytes}


def make_sparse(
    path: str, chunk: int, size: int = 0, shape: list[int] | None = None, zarr_format: int = 3
) -> dict[str, Any]:
    """A volume without a single stored chunk: as large as one likes, and read like any other."""
    return {"bytes": _cube(path, tuple(shape or (size,) * 3), chunk, zarr_format).nbytes}


def make_repeated(path: str, chunk: int, shape: list[int]) -> dict[str, Any]:
    """A volume of whole chunks that takes no room: one is stored, and all others are links to its file."""
    cube = _cube(path, tuple(shape), chunk, 2)
    z, y, _ = np.indices((chunk,) * 3)
    cube[:chunk, :chunk, :chunk] = z * chunk + y
    for place in np.ndindex(cube.cdata_shape):
        if any(place):
            Path(path, ".".join(map(str, place))).hardlink_to(Path(path, "0.0.0"))
    return {"bytes": cube.nbytes}


def _cube(path: str, shape: tuple[int, ...], chunk: int, zarr_format: int, dtype: str = "float32") -> zarr.Array[Any]:
    names = {"dimension_names": ("z", "y", "x")} if zarr_format == 3 else {}
    return zarr.create_array(
        path, shape=shape, chunks=(chunk,) * 3, dtype=dtype, zarr_format=zarr_format, overwrite=True, **names
    )


def make_slide(path: str, size: int, chunk: int, zarr_format: int = 3) -> dict[str, Any]:
    """An image of `tile`s, a slab of chunks at a time."""
    names = {"dimension_names": ("y", "x", "c")} if zarr_format == 3 else {}
    slide = zarr.create_array(
        path, shape=(size, size, 3), chunks=(chunk, chunk, 3), dtype="uint8", zarr_format=zarr_format,
        overwrite=True, **names,
    )  # fmt: skip
    row = np.tile(tile(), (1, -(-size // CHUNK), 1))[:, :size]
    for start in range(0, size, CHUNK):
        slide[start : start + CHUNK] = row[: min(CHUNK, size - start)]
    return {"bytes": slide.nbytes}


def tile() -> np.ndarray[Any, Any]:
    """One chunk of tissue: nuclei of a dozen pixels, and noise that does not change a class."""
    generator = np.random.default_rng(0)
    y, x = np.ogrid[:CHUNK, :CHUNK]
    labels = 1 + ((np.sin(y / 6) * np.sin(x / 7)) > 0.6)
    noise = generator.integers(-8, 9, (CHUNK, CHUNK, 3))
    return (COLOURS[labels].astype(int) + noise).astype(np.uint8)


if __name__ == "__main__":
    answer(make_random, make_repeated, make_sparse, make_slide)
