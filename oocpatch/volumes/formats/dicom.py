"""DICOM by pydicom: the slices of a series in a directory as a volume, or the picture in one file."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.errors import error_line
from oocpatch.volumes.affine import Affine, axis_scales
from oocpatch.volumes.formats.planes import read_planes
from oocpatch.volumes.formats.spec import FileMetadata, FileSpec, UnreadableError, dicom_format, import_reader
from oocpatch.volumes.ome_metadata import coordinate

NAMES = ("z", "y", "x", "c")

EQUAL = (
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "PixelRepresentation",
    "PixelSpacing",
    "ImageOrientationPatient",
)
"""Attributes that the slices of a volume have in common."""

OTHERS = (
    "ImagePositionPatient",
    "InstanceNumber",
    "Modality",
    "ModalityLUTSequence",
    "NumberOfFrames",
    "RescaleIntercept",
    "RescaleSlope",
    "SeriesDescription",
    "SeriesInstanceUID",
    "SliceThickness",
    "SpacingBetweenSlices",
)

ROUNDING = 1e-3
"""Difference of directions or of millimetres that is due to rounding."""

EVEN = 0.05
"""Difference from the distance of slices, as a part of it, that positions may have."""

DIGITS = 9
"""Decimals of an affine: positions are decimal numbers, and their mean distance is a quotient."""


class DicomFile:
    """The slices of a series along the normal of their planes, `(z, y, x)`, with `c` last where pixels have colours.

    The picture of a single file has no `z`. Slices are decoded whole. Values that the headers scale are float32, or
    float64 where float32 does not hold the stored numbers, with the scale of each slice.
    """

    def __init__(self, spec: FileSpec) -> None:
        pydicom = import_reader("pydicom", "dicom", spec)
        self._decode: Callable[[Path], Any] = import_reader("pydicom.pixels", "dicom", spec).pixel_array
        path = Path(spec.address)
        self._is_picture = path.is_file()
        slices = _series(list(_headers(pydicom, path)), spec)
        for place, header in slices:
            _check_supported(place, header)
        _check_equal(slices)
        slices, affine = _arranged(slices)
        self._paths = [place for place, _ in slices]
        self._scales = [
            (float(_value(h, "RescaleSlope", 1)), float(_value(h, "RescaleIntercept", 0))) for _, h in slices
        ]
        first = self._plane(0)  # tells whether there is a decoder
        is_scaled = any(scale != (1, 0) for scale in self._scales)
        dtype = np.result_type(first.dtype, np.float32) if is_scaled else first.dtype
        drop = int(self._is_picture)
        shape = (len(slices), *first.shape)[drop:]
        names = NAMES[drop : first.ndim + 1]
        header = slices[0][1]
        rows, columns = _value(header, "PixelSpacing", (0, 0))
        steps = axis_scales(affine) if affine is not None else ((float(columns), 0.0), (float(rows), 0.0), (0.0, 0.0))
        attrs = {"modality": _value(header, "Modality", ""), "description": _value(header, "SeriesDescription", "")}
        self.metadata = FileMetadata(
            shape=shape,
            dtype=dtype,
            chunks=(1, *first.shape)[drop:],
            names=names,
            coords={
                name: coordinate(name, size, *steps["xyz".index(name)], "mm")
                for name, size in zip(names, shape, strict=True)
                if name != "c" and steps["xyz".index(name)][0]
            },
            attrs={
                **({"affine": affine.tolist()} if affine is not None else {}),
                **{name: str(text) for name, text in attrs.items() if text},
            },
        )

    def read(self, selection: tuple[slice, ...]) -> npt.NDArray[Any]:
        """Read the voxels of a selection."""
        return read_planes(self.metadata, selection, 0 if self._is_picture else 1, self._scaled)

    def files(self) -> list[str]:
        """Return the files of the slices."""
        return [str(path) for path in self._paths]

    def close(self) -> None:
        """Do nothing: a file is open while it is read only."""

    def _scaled(self, index: tuple[int, ...], selection: tuple[slice, ...]) -> npt.NDArray[Any]:
        number = index[0] if index else 0
        values, (slope, intercept) = self._plane(number)[selection], self._scales[number]
        if self.metadata.dtype == values.dtype:
            return values
        return np.asarray(values * np.float64(slope) + np.float64(intercept))

    def _plane(self, number: int) -> npt.NDArray[Any]:
        with _named(self._paths[number]):
            return np.asarray(self._decode(self._paths[number]))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file in errors about its content."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise UnreadableError(f"volume cannot be read: {path} ({error_line(error)})") from error


def _headers(pydicom: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Yield the files that hold images, with their headers; plans, reports and other files are passed over."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if dicom_format(file))
    for file in files:
        with _named(file):
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=[*EQUAL, *OTHERS])
        if "Rows" in header:
            yield file, header


def series_files(spec: FileSpec) -> list[Path]:
    """Return the files of the series that is asked for, or of the one that a single file belongs to.

    Raises:
        UnreadableError: as `_series` does.
    """
    pydicom = import_reader("pydicom", "dicom", spec)
    path = Path(spec.address)
    if path.is_file():
        header = pydicom.dcmread(path, specific_tags=["SeriesInstanceUID"])
        path, spec = path.parent, replace(spec, part=str(_value(header, "SeriesInstanceUID", "")))
    return [file for file, _ in _series(list(_headers(pydicom, path)), spec)]


def _series(slices: list[tuple[Path, Any]], spec: FileSpec) -> list[tuple[Path, Any]]:
    """Return the slices of the series that is asked for.

    Raises:
        UnreadableError: if there is none, or several and none is chosen; the message lists them.
    """
    series: dict[str, list[tuple[Path, Any]]] = {}
    for path, header in slices:
        series.setdefault(str(_value(header, "SeriesInstanceUID", "")), []).append((path, header))
    if spec.part in series or (len(series) == 1 and not spec.part):
        return series[spec.part or next(iter(series))]
    listed = "; ".join(
        f"{spec.address}::{uid} ({len(members)} x {_value(members[0][1], 'Modality', 'image')} "
        f"{_value(members[0][1], 'SeriesDescription', '')}".rstrip()
        + ")"
        for uid, members in sorted(series.items())
    )
    raise UnreadableError(
        f"volume must be one series of DICOM, but {spec.address} holds {len(series)}"
        + (f", and none of them is {spec.part}" if spec.part else "")
        + (f"; it has {listed}" if listed else "")
    )


def _check_supported(path: Path, header: Any) -> None:
    """Refuse what this reader would read wrongly.

    Raises:
        UnreadableError: in that case; the message names the attribute.
    """
    frames = int(_value(header, "NumberOfFrames", 1))
    problem = f"NumberOfFrames is {frames}, and one image per file is read" if frames != 1 else ""
    if "ModalityLUTSequence" in header:
        problem = "values pass through a table, ModalityLUTSequence"
    if _value(header, "PhotometricInterpretation", "") == "PALETTE COLOR":
        problem = "colours are those of a palette"
    if problem:
        raise UnreadableError(f"{path} cannot be read: {problem}; convert it with a tool for DICOM")


def _check_equal(slices: list[tuple[Path, Any]]) -> None:
    """Refuse slices that do not make up a volume.

    Raises:
        UnreadableError: if an attribute differs; the message names it, and two files.
    """
    first, header = slices[0]
    for (path, other), name in itertools.product(slices[1:], EQUAL):
        a, b = _value(header, name, ""), _value(other, name, "")
        is_list = name in ("PixelSpacing", "ImageOrientationPatient") and bool(a) and bool(b)
        if not (np.allclose(a, b, atol=ROUNDING, rtol=0) if is_list else a == b):
            raise UnreadableError(
                f"the slices of a volume must have one {name}, got {a} in {first} and {b} in {path}; "
                "put the slices of one volume into a directory of their own"
            )


def _arranged(slices: list[tuple[Path, Any]]) -> tuple[list[tuple[Path, Any]], Affine | None]:
    """Return the slices in their order, and their affine: from indices x, y, z to right, anterior, superior.

    Without positions they are in the order of their numbers, and there is no affine.

    Raises:
        UnreadableError: if two are at one place, or their distances differ.
    """
    header = slices[0][1]
    orientation, spacing = _value(header, "ImageOrientationPatient", None), _value(header, "PixelSpacing", None)
    lacking = [path for path, h in slices if _value(h, "ImagePositionPatient", None) is None]
    if orientation is None or spacing is None or len(lacking) == len(slices):
        return sorted(slices, key=lambda item: (int(_value(item[1], "InstanceNumber", 0)), item[0])), None
    if lacking:
        raise UnreadableError(f"the slices of a volume must have ImagePositionPatient, got none in {lacking[0]}")
    right, down = np.asarray(orientation, np.float64).reshape(2, 3)
    normal = np.cross(right, down)
    places = [np.asarray(_value(h, "ImagePositionPatient", None), np.float64) for _, h in slices]
    order = sorted(range(len(slices)), key=lambda i: float(places[i] @ normal))
    slices, places = [slices[i] for i in order], [places[i] for i in order]
    if len(slices) > 1:
        gaps = np.diff([float(place @ normal) for place in places])
        step = float(np.median(gaps))
        if gaps.min() < ROUNDING:
            pair = int(gaps.argmin())
            raise UnreadableError(
                f"the slices of a volume must be at different places, got {slices[pair][0]} and "
                f"{slices[pair + 1][0]} at one; put those of one time or echo into a directory of their own"
            )
        pair = int(np.abs(gaps - step).argmax())
        if abs(gaps[pair] - step) > EVEN * step:
            raise UnreadableError(
                f"the slices of a volume must be evenly spaced, got {gaps[pair]:g} mm between {slices[pair][0]} and "
                f"{slices[pair + 1][0]}, and {step:g} mm between most; a slice may be missing"
            )
        along = (places[-1] - places[0]) / (len(slices) - 1)
    else:
        along = normal * float(_value(header, "SpacingBetweenSlices", _value(header, "SliceThickness", 1)))
    affine = np.eye(4)
    affine[:3] = np.stack([right * float(spacing[1]), down * float(spacing[0]), along, places[0]], axis=1)
    return slices, np.round(np.diag([-1, -1, 1, 1]) @ affine, DIGITS) + 0.0  # no -0.0


def _value(header: Any, name: str, default: Any) -> Any:
    """Return the value of an attribute, or the default where it is missing or empty."""
    value = header.get(name)
    return default if value is None or value == "" else value
