"""NIfTI and similar formats by nibabel: one array in Fortran order, voxel sizes, an affine."""

from __future__ import annotations

import logging
import math
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import xarray

from oocpatch.system import expect_random_reads
from oocpatch.volumes.formats.raw import PIECE, read_box, row_chunk
from oocpatch.volumes.formats.spec import FileMetadata, FileSpec, UnreadableError, import_reader, to_json
from oocpatch.volumes.ome_metadata import coordinate

logger = logging.getLogger("oocpatch")

NAMES = ("x", "y", "z", "t", "c")

CHANNELS = "channels"
"""`intent_name` of a file that `export` wrote whose fourth axis is that of channels; in others it is time."""

PACKED = (".gz", ".bz2", ".mgz")


class NiftiFile:
    """A NIfTI file, with the axes of nibabel: `x`, `y`, `z`, and `t` and `c` where the file has them.

    A compressed file cannot be read in parts: it is unpacked to a temporary file, piece by piece, when it is first
    read. The temporary file has no name and disappears with the process. Values that the header scales are float32, or
    float64 where float32 does not hold the stored numbers.
    """

    def __init__(self, spec: FileSpec) -> None:
        nibabel = import_reader("nibabel", "nifti", spec)
        image = nibabel.load(spec.address)
        data = image.dataobj
        if not hasattr(data, "offset") or data.order != "F":
            raise UnreadableError(
                f"{spec.address} must hold one array that nibabel can map, got {type(image).__name__}"
            )
        self._shape = tuple(int(n) for n in data.shape)
        self._stored = np.dtype(image.get_data_dtype())
        self._scaling = float(data.slope), float(data.inter)
        self._offset = int(data.offset)
        self._path = Path(image.file_map["image"].filename)
        self._is_packed = self._path.name.lower().endswith(PACKED)
        self._files = [str(holder.filename) for holder in image.file_map.values() if holder.filename]
        self._unpack = nibabel.openers.ImageOpener
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        shape, scaled = self._shape, self._scaling != (1.0, 0.0)
        end = self._offset + math.prod(shape) * self._stored.itemsize
        if not self._is_packed and self._path.stat().st_size < end:
            raise UnreadableError(
                f"volume cannot be read: {self._path} ends too early: it must have {end} bytes, "
                f"got {self._path.stat().st_size}"
            )
        self._dtype = np.result_type(self._stored, np.float32) if scaled else self._stored
        names = NAMES[: len(shape)] if len(shape) <= len(NAMES) else None
        attrs = _attrs(image)
        if len(shape) == 4 and attrs.get("intent_name") == CHANNELS:
            del attrs["intent_name"]
            names = (*NAMES[:3], "c")
        self.metadata = FileMetadata(
            shape=shape,
            dtype=self._dtype,
            chunks=(row_chunk(shape[0], self._stored), *(1,) * (len(shape) - 1)),
            names=names,
            coords=_coords(image, names or (), shape),
            attrs=attrs,
            chunked=False,
        )

    def read(self, selection: tuple[slice, ...]) -> npt.NDArray[Any]:
        """Read the voxels of a selection."""
        values = read_box(self._descriptor(), self._offset, self._shape[::-1], self._stored, selection[::-1]).T
        if self._scaling == (1.0, 0.0):
            return values
        slope, inter = self._scaling
        return np.asarray(values * np.float64(slope) + np.float64(inter), self._dtype)

    def files(self) -> list[str]:
        """Return the file, or the pair of a header and an image."""
        return self._files

    def close(self) -> None:
        """Close the file; an unpacked copy is deleted."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _descriptor(self) -> int:
        with self._lock:
            if self._file is None:
                self._file = self._unpacked() if self._is_packed else self._path.open("rb")
            return self._file.fileno()

    def _unpacked(self) -> IO[bytes]:
        logger.info(
            "%s is compressed as a whole: unpacking to a temporary file in %s; `oocpatch convert` makes a Zarr of it",
            self._path, tempfile.gettempdir(),
        )  # fmt: skip
        file = tempfile.TemporaryFile(prefix="oocpatch-")  # noqa: SIM115 (closed with this object)
        try:
            with self._unpack(self._path) as packed:
                while piece := packed.read(PIECE):
                    file.write(piece)
            file.flush()
            expect_random_reads(file.fileno())
        except BaseException:
            file.close()
            raise
        return file


def _coords(image: Any, names: tuple[str, ...], shape: tuple[int, ...]) -> dict[str, xarray.Variable]:
    """Return coordinates: positions in the world if the affine is diagonal, else multiples of the voxel size."""
    zooms = [float(z) for z in image.header.get_zooms()]
    affine = np.asarray(image.affine, np.float64)
    units = image.header.get_xyzt_units() if hasattr(image.header, "get_xyzt_units") else ("mm", "sec")
    is_diagonal = bool(np.allclose(affine[:3, :3], np.diag(np.diag(affine[:3, :3]))))
    coords = {}
    for axis, (name, size, zoom) in enumerate(zip(names, shape, zooms, strict=False)):
        unit = units[0 if axis < 3 else 1]
        step, start = zoom, 0.0
        if axis < 3 and is_diagonal:
            step, start = affine[axis, axis], affine[axis, 3]
        elif axis < 3 and not math.isclose(
            size_of_voxel := float(np.linalg.norm(affine[:3, axis])), zoom, rel_tol=1e-4
        ):
            step = size_of_voxel  # the affine counts where the header contradicts it
        if name != "c" and step:
            unit = None if unit == "unknown" else unit
            coords[name] = coordinate(name, size, _shortest(step), _shortest(start), unit)
    return coords


def _shortest(value: float) -> float:
    """Return the shortest decimal number that is stored as the same float32.

    >>> _shortest(float(np.float32(1.2)))
    1.2
    """
    return float(str(np.float32(value)))


def _attrs(image: Any) -> dict[str, Any]:
    names = [name for name in ("descrip", "intent_name") if name in image.header]
    texts = {name: to_json(image.header[name].tobytes()) for name in names}
    affine = np.asarray(image.affine, np.float64).tolist()
    return {"affine": affine, **{name: text for name, text in texts.items() if text}}
