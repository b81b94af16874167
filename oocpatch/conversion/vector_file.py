"""Vectors of patches as one HDF5 file: an AnnData, or the features and coordinates that CLAM and TRIDENT read.

```text
 .h5      features (patches, D)    coords (patches, 2): x and y of the first pixel, at the slide's largest level
 .h5ad    X        (patches, D)    obsm["spatial"]: the middle of each patch in the units of the volume, x first
```

Rows are copied some at a time, so memory does not grow with their number.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from oocpatch.errors import PlanTooLarge
from oocpatch.outputs.record import OutputRecord, find_output
from oocpatch.outputs.row_arrays import LOOPS, STARTS
from oocpatch.planning.plan import human
from oocpatch.storage.paths import StoragePath, output_path
from oocpatch.volumes.volume import Volume

Array = npt.NDArray[Any]

ROWS = 4096
"""Rows that are copied at a time, if they fit the memory limit."""

MAGNIFICATION = ("objective-power", "AppMag")
"""Attributes of a slide that have its magnification at the largest level: OpenSlide's, and that of an SVS."""


@dataclass(frozen=True)
class Vectors:
    """The vectors of an output, to be exported.

    Attributes:
        path: the output.
        record: its record.
        head: name of the vectors.
    """

    path: StoragePath
    record: OutputRecord
    head: str

    @classmethod
    def of(cls, volume: Any) -> Vectors:
        """Return the vectors at the path of an output, or of an output and a head, `out.zarr/features`.

        Raises:
            ValueError: if there are none, or those of several heads.
        """
        place = output_path("volume", volume) if isinstance(volume, str | os.PathLike) else None
        places = [] if place is None else [place, place.parent]
        for path in places:
            record = None
            with contextlib.suppress(ValueError):  # of other data
                record = find_output(path)
            if record is not None:
                heads = vector_heads(record)
                name = places[0].name if path is not place else heads[0] if len(heads) == 1 else ""
                if name not in heads:
                    shown = (
                        ", ".join(f"{path}/{head}" for head in heads)
                        or "none; a volume is exported as .ome.tif or .nii"
                    )
                    raise ValueError(f"volume must be vectors of patches for an HDF5 file, {path} has: {shown}")
                if not record.complete:
                    raise ValueError(f"the output at {path} is not complete: finish its run first, then export it")
                return cls(path, record, name)
        given = type(volume).__name__ if place is None else place
        raise ValueError(f"volume must be the path of an output with vectors of patches, got {given}")

    @property
    def identity(self) -> list[Any]:
        """The values by which these vectors differ from others."""
        files = self.record.details["files"]
        names = (self.head, STARTS, LOOPS)
        return [self.record.run_id, {n: crc for n, crc in files.items() if n.partition("/")[0] in names}]

    def array(self, name: str) -> zarr.Array[Any]:
        """Return an array of the output."""
        return zarr.open_array(self.path.store(), path=name, mode="r")


def vector_heads(record: OutputRecord) -> list[str]:
    """Return the names of the vectors in an output."""
    return [name for name in record.details.get("rows", ()) if name not in {STARTS, LOOPS}]


def check_slide_patches(sizes: Sequence[int], *, is_looped: bool) -> None:
    """Refuse patches whose places an .h5 of CLAM and TRIDENT cannot hold.

    Raises:
        ValueError: if they are not squares of one picture.
    """
    if len(sizes) != 2 or len(set(sizes)) > 1 or is_looped:
        raise ValueError(
            f"vectors go into an .h5 of CLAM and TRIDENT only from square patches of a slide, got patches of "
            f"{' x '.join(map(str, sizes))}{' along looped axes' if is_looped else ''}; write an .h5ad"
        )


class VectorWriter:
    """Writes vectors to a file.

    Args:
        vectors: the vectors.
        mark: text for the file's attribute `oocpatch`.
        limit: bytes that writing may take.
        is_anndata: whether to write an AnnData.

    Raises:
        PlanTooLarge: if not even a row fits the limit.
        ValueError: if the patches do not fit the format.
    """

    def __init__(self, vectors: Vectors, *, mark: str, limit: int, is_anndata: bool) -> None:
        self._vectors, self._mark, self._is_anndata = vectors, mark, is_anndata
        self._rows = vectors.array(vectors.head)
        self._starts = vectors.array(STARTS)
        self._facts: dict[str, Any] = dict(self._starts.attrs)
        needed = 4 * self._rows.chunks[0] * self._rows.shape[1] * self._rows.dtype.itemsize
        if needed > limit:
            raise PlanTooLarge(
                f"copying rows needs {human(needed, up=True)} but max_memory is {human(limit)}; raise it"
            )
        self._step = max(self._rows.chunks[0], min(ROWS, limit * self._rows.chunks[0] // needed))
        self._coords = {} if is_anndata else self._slide()

    @property
    def count(self) -> int:
        """Number of vectors."""
        return int(self._rows.shape[0])

    def write(self, path: Path, advance: Callable[[int], None]) -> None:
        """Write the file."""
        h5py = importlib.import_module("h5py")
        with h5py.File(path, "w") as file:
            file.attrs["oocpatch"] = self._mark
            (self._anndata if self._is_anndata else self._features)(file, h5py.string_dtype(), advance)

    def _parts(self, advance: Callable[[int], None]) -> Iterator[tuple[slice, Array]]:
        for at in range(0, self.count, self._step):
            part = slice(at, min(at + self._step, self.count))
            yield part, np.asarray(self._starts[part])
            advance(part.stop - part.start)

    def _slide(self) -> dict[str, Any]:
        """Return the attributes of the coordinates of a slide, by the names that CLAM and TRIDENT have for them.

        Raises:
            ValueError: if patches are not square, or it is not known how large the largest level is.
        """
        sizes, details = self._facts["patch_size"], self._vectors.record.details
        check_slide_patches(sizes, is_looped=LOOPS in details["rows"])
        settings: Mapping[str, Any] = details.get("settings", {})
        level, factor, volume = slide_levels(settings, tuple(details["plan"]["shape"]))
        shape = tuple(details["plan"]["shape"]) if volume is None else volume.shape
        known = {} if volume is None else volume.source.attrs
        attributes = {
            "patch_size": sizes[0],
            "patch_level": level,
            "patch_size_level0": round(sizes[0] * factor),
            "overlap": self._facts["patch_overlap"][0],
            "downsample": factor,
            "level0_height": shape[0],
            "level0_width": shape[1],
            "name": Path(str(settings.get("volume", self._vectors.path)).partition("::")[0]).stem,
        }
        if found := [known[name] for name in MAGNIFICATION if name in known]:
            magnification = float(found[0])
            attributes |= {"level0_magnification": magnification, "target_magnification": magnification / factor}
        return attributes

    def _features(self, file: Any, _text: Any, advance: Callable[[int], None]) -> None:
        features = file.create_dataset("features", self._rows.shape, self._rows.dtype)
        coords = file.create_dataset("coords", (self.count, 2), np.int64)
        coords.attrs.update(self._coords)
        for part, starts in self._parts(advance):
            features[part] = self._rows[part]
            coords[part] = np.rint(starts[:, ::-1] * self._coords["downsample"])

    def _anndata(self, file: Any, text: Any, advance: Callable[[int], None]) -> None:
        count, length = self._rows.shape
        axes: Sequence[str] = self._facts["axes"]
        columns = {f"start_{axis}": (self._starts, i) for i, axis in enumerate(axes)}
        if LOOPS in self._vectors.record.details["rows"]:
            loops = self._vectors.array(LOOPS)
            names: Any = loops.attrs["axes"]
            columns |= {str(axis): (loops, i) for i, axis in enumerate(names)}
        _described(file, "anndata", "0.1.0")
        obs, var = (_described(file.create_group(name), "dataframe", "0.2.0") for name in ("obs", "var"))
        for frame, names, size in ((obs, list(columns), count), (var, [], length)):
            frame.attrs["_index"] = "_index"
            frame.attrs.create("column-order", np.array(names, dtype=object), dtype=text)
            _described(frame.create_dataset("_index", (size,), text), "string-array", "0.2.0")
        var["_index"][:] = np.arange(length).astype(str).astype(object)
        for name in ("obsm", "varm", "obsp", "varp", "layers", "uns"):
            _described(file.create_group(name), "dict", "0.1.0")
        x = _described(file.create_dataset("X", (count, length), self._rows.dtype), "array", "0.2.0")
        spatial = _described(file["obsm"].create_dataset("spatial", (count, len(axes)), np.float64), "array", "0.2.0")
        for name in columns:
            _described(obs.create_dataset(name, (count,), np.int64), "array", "0.2.0")
        affine, middle = np.array(self._facts["affine"]), (np.array(self._facts["patch_size"]) - 1) / 2
        for part, starts in self._parts(advance):
            x[part] = self._rows[part]
            obs["_index"][part] = np.arange(part.start, part.stop).astype(str).astype(object)
            for name, (array, column) in columns.items():
                obs[name][part] = np.asarray(array[part])[:, column]
            spatial[part] = ((starts + middle) @ affine[:-1, :-1].T + affine[:-1, -1])[:, ::-1]


def _described(item: Any, kind: str, version: str) -> Any:
    """Give an item of an AnnData the attributes by which it is read."""
    item.attrs.update({"encoding-type": kind, "encoding-version": version})
    return item


def slide_levels(settings: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[int, float, Volume | None]:
    """Return the level that a run read, pixels of the largest one per pixel, and the slide, if it is still there.

    Raises:
        ValueError: if another level was read, and the slide cannot be opened any more.
    """
    address = str(settings.get("volume", ""))
    named = re.search(r"::level=(\d+)", address)
    level = int(named[1] if named else settings.get("level", 0))
    is_scaled = bool(level or settings.get("spacing"))
    try:
        volume = Volume(re.sub(r"::level=\d+", "", address), settings.get("axes"))
    except Exception as error:
        if is_scaled:
            raise ValueError(
                f"the coordinates of an .h5 are pixels of the largest level, which is not the one that is read, and "
                f"{address} cannot be opened to look at it: put it back, or write an .h5ad"
            ) from error
        return level, 1.0, None
    return level, round(volume.shape[-1] / shape[-1], 3) if is_scaled else 1.0, volume


def mark_in(path: Path) -> str:
    """Return the mark of an exported file.

    Raises:
        KeyError, OSError: if it has none.
    """
    with importlib.import_module("h5py").File(path) as file:
        return str(file.attrs["oocpatch"])
