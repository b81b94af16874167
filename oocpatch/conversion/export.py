"""Export: a volume or a result as one file that other programs open, streamed within a memory limit.

```text
 volume --pieces in the order of the file--> NAME.partial --rename--> NAME
```

The header of the file has a mark: that it was exported, and of what. By it, the same call knows that there is nothing
to do, and `overwrite` that the file may be replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from oocpatch.conversion import nifti_file, tiff_file, vector_file
from oocpatch.conversion.geometry import spatial_axes
from oocpatch.errors import OutputExists, RunMismatch
from oocpatch.outputs.record import ATTRIBUTE
from oocpatch.planning.arguments import memory_limit
from oocpatch.progress import OnProgress, show_progress
from oocpatch.storage.locks import locked
from oocpatch.storage.paths import LocalPath, StoragePath, local_path, output_path
from oocpatch.system import import_extra
from oocpatch.volumes.affine import spacing_along
from oocpatch.volumes.ome_metadata import ome_attributes
from oocpatch.volumes.volume import Volume, refuse_overlap

MARK = "oocpatch export"
"""Start of the mark in the header of a file."""

LABEL_ATTRIBUTES = frozenset({"flag_values", "flag_meanings", "objects"})
"""Attributes that only labels have."""

FILES = {".nii": "nifti", ".nii.gz": "nifti", ".ome.tif": "tiff", ".ome.tiff": "tiff", ".tif": "tiff", ".tiff": "tiff"}
FILES |= {".h5": "hdf5", ".h5ad": "hdf5"}
"""Formats by the endings of their files."""

LIBRARIES = {"nifti": "nibabel", "tiff": "tifffile", "hdf5": "h5py"}


def export(
    volume: Any,
    path: str | os.PathLike[str],
    *,
    axes: str | None = None,
    level: int | str = 0,
    labels: bool | None = None,
    max_memory: int | float | str = "auto",
    overwrite: bool = False,
    progress: str | bool | OnProgress = "auto",
) -> Path:
    """Write a volume or a result of `predict` as one NIfTI, OME-TIFF or HDF5 file, streamed within a memory limit.

    The same call again returns at once if the file has this volume. An interrupted call leaves no file at `path`.

    - `.nii`, `.nii.gz`: axes `x`, `y`, `z`, then time, then channels. The affine is that of the input, corrected where
      the volume was scaled, cropped or flipped; without one it comes from the coordinates.
    - `.ome.tif`, `.ome.tiff`, `.tif`, `.tiff`: axes time, channel, `z`, `y`, `x`, with physical sizes, in tiles, with a
      pyramid. Pictures of three 8-bit channels are RGB.
    - `.h5`, `.h5ad`: vectors of patches. An `.h5` has the datasets `features` and `coords` that CLAM and TRIDENT read,
      an `.h5ad` is an AnnData with the middle of each patch in `obsm["spatial"]`.

    Args:
        volume: as for `predict`; for vectors the path of the output, or of the output and a head, `out.zarr/features`.
        path: file to write; it does not exist, or the same call wrote it.
        axes: names of the volume's axes, e.g. `"zyx"`.
        level: level of the pyramid of a slide, a TIFF or an OME-Zarr; 0 is the largest.
        labels: whether values are labels, so that the levels of a pyramid hold only values that were there. None: where
            the run, the metadata or the attributes say so; of other integers, those of 32 and 64 bits.
        max_memory: limit in bytes of what the export adds to this process; `"auto"`: a quarter of the machine's.
        overwrite: replace a file that was exported before.
        progress: as for `predict`.

    Returns:
        The path of the file.

    Raises:
        ValueError, TypeError: for bad arguments, and volumes that the format cannot hold.
        OutputExists: if the file is there, and was not exported, or it cannot be told of what.
        OutputBusy: if another call is writing it.
        RunMismatch: if another volume was exported to it.
        PlanTooLarge: if not even a few rows of the volume fit the memory limit.

    >>> import tempfile, nibabel
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = export(np.arange(24, dtype=np.int16).reshape(2, 3, 4), f"{folder}/out.nii.gz", progress=False)
    ...     image = nibabel.load(file)
    ...     print(image.shape, image.dataobj[3, 2, 1])
    (4, 3, 2) 23
    """
    target = local_path("path", path)
    if format_of("path", target) == "hdf5":
        return _export_vectors(volume, target, memory_limit(max_memory), overwrite=overwrite, progress=progress)
    if isinstance(volume, Volume):
        data = volume if axes is None else Volume(volume.source, axes)
    else:
        data = Volume(volume, axes, level)
    check_exportable("path", target, data)
    limit = memory_limit(max_memory)
    place = _place(volume, data)
    attributes = _attributes_around(place)
    _refuse_unfinished(data, attributes)
    is_labels = _are_labels(data, attributes, place) if labels is None else labels
    identity = _identity(data, level, attributes, labels=is_labels)
    if target.exists() and not _may_write(target, identity, overwrite=overwrite):
        return Path(target)
    writer: nifti_file.NiftiWriter | tiff_file.TiffWriter
    mark = f"{MARK} {identity}"
    if format_of("path", target) == "nifti":
        is_packed = target.name.lower().endswith(".gz")
        writer = nifti_file.NiftiWriter(data, labels=is_labels, mark=mark, limit=limit, is_packed=is_packed)
    else:
        writer = tiff_file.TiffWriter(data, labels=is_labels, mark=mark, limit=limit)
    total, itemsize = int(np.prod(data.source.shape, dtype=object)), data.dtype.itemsize
    display = show_progress(progress, "export", "voxels", total, bytes_each=itemsize)
    return _write(target, identity, writer.write, display, overwrite=overwrite)


def _export_vectors(
    volume: Any, target: LocalPath, limit: int, *, overwrite: bool, progress: str | bool | OnProgress
) -> Path:
    """Write the vectors of an output."""
    _require_library(target)
    target.check_writable("path")
    vectors = vector_file.Vectors.of(volume)
    identity = _digest(vectors.identity)
    if target.exists() and not _may_write(target, identity, overwrite=overwrite):
        return Path(target)
    is_anndata = target.name.lower().endswith(".h5ad")
    writer = vector_file.VectorWriter(vectors, mark=f"{MARK} {identity}", limit=limit, is_anndata=is_anndata)
    display = show_progress(progress, "export", "vectors", writer.count)
    return _write(target, identity, writer.write, display, overwrite=overwrite)


def _write(
    target: LocalPath,
    identity: str,
    write: Callable[[Path, Callable[[int], None]], None],
    display: AbstractContextManager[Callable[[int], None]],
    *,
    overwrite: bool,
) -> Path:
    """Write a file whole or not at all; nothing if another call has just written it."""
    partial = target.with_name(f"{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f"{target.name}.partial.lock"), str(target)):
        if target.exists() and not _may_write(target, identity, overwrite=overwrite):
            return Path(target)
        try:
            with display as advance:
                write(Path(partial), advance)
            with partial.open("r+b") as file:  # Windows flushes only what may be written
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return Path(target)


def check_exportable(name: str, path: LocalPath, volume: Volume) -> None:
    """Refuse a file that cannot be written, and a volume that its format cannot hold; only metadata is read.

    Args:
        name: name of the parameter that the path comes from.
        path: the file.
        volume: the volume, or one of the same axes.

    Raises:
        ValueError: in that case.
    """
    file_format = format_of(name, path)
    _require_library(path)
    refuse_overlap(name, path, volume)
    path.check_writable(name)
    if file_format == "hdf5":
        return
    for axis in spatial_axes(volume).values():
        spacing_along(volume.source, axis)
    if len(volume.axes.looped) > 1:
        raise ValueError(
            f"export writes at most one axis of time, got {', '.join(volume.axes.names[a] for a in volume.axes.looped)}"
        )


def _require_library(path: LocalPath) -> None:
    file_format = format_of("path", path)
    import_extra(LIBRARIES[file_format], file_format, f"writing {path.name}")


def format_of(name: str, path: LocalPath) -> str:
    """Return the format of a file by its ending.

    Raises:
        ValueError: if it is none that can be written; it names the parameter.
    """
    lower = path.name.lower()
    for suffix, file_format in FILES.items():
        if lower.endswith(suffix) and lower != suffix:
            return file_format
    other = "`convert` and `predict` write Zarr, `objects` GeoJSON and tables"
    raise ValueError(f"{name} must end in one of {', '.join(FILES)}, got {path}; {other}")


def _place(volume: Any, data: Volume) -> StoragePath | None:
    """Return where the array of a volume is stored; None for one in memory."""
    if data.source.location is not None:
        return data.source.location
    address = getattr(volume, "encoding", {}).get("source")
    return output_path("volume", address) if isinstance(address, str) else None


def _attributes_around(place: StoragePath | None) -> dict[str, Any]:
    """Return the attributes of the groups around an array: the record of a run, and those of an OME-Zarr."""
    for folder in [] if place is None else [place, *place.parents[:2]]:
        try:
            attributes = json.loads((folder / "zarr.json").read_text())["attributes"]
        except (OSError, ValueError, KeyError):
            continue
        if ATTRIBUTE in attributes or ome_attributes(attributes).keys() & {"multiscales", "image-label"}:
            return dict(attributes)
    return {}


def _record(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    record = attributes.get(ATTRIBUTE)
    return record if isinstance(record, Mapping) else {}


def _refuse_unfinished(data: Volume, attributes: Mapping[str, Any]) -> None:
    """Refuse a result of which parts are missing.

    Raises:
        ValueError: in that case.
    """
    if _record(attributes).get("complete") is False or data.source.attrs.get("complete") is False:
        place = f" at {data.source.location}" if data.source.location is not None else ""
        raise ValueError(f"the output{place} is not complete: finish its run first, then export it")


def are_labels(volume: Any, data: Volume) -> bool:
    """Return whether the values of a volume that a user passed, and that is open as `data`, are labels."""
    place = _place(volume, data)
    return _are_labels(data, _attributes_around(place), place)


def _are_labels(data: Volume, attributes: Mapping[str, Any], place: StoragePath | None) -> bool:
    if data.dtype.kind == "f":
        return False
    if data.dtype.kind == "b" or "image-label" in ome_attributes(attributes) or LABEL_ATTRIBUTES & {*data.source.attrs}:
        return True
    details = _record(attributes).get("details") or {}
    if details.get("objects"):
        return True
    heads = details.get("plan", {}).get("heads")
    if heads and place is not None:
        names = {path.name for path in (place, *place.parents)}
        own = [head for head in heads if len(heads) == 1 or head["name"] in names]
        return any(head.get("labels") for head in own)
    return data.dtype.itemsize >= 4


def _identity(data: Volume, level: int | str, attributes: Mapping[str, Any], *, labels: bool) -> str:
    """Return a digest of the content that is exported, and of how; `-` where only reading all of it would tell."""
    record = _record(attributes)
    content: Any
    if record and data.source.array is not None and data.source.location is not None:
        content = [record.get("run_id"), (record.get("details") or {}).get("files"), data.source.location.name]
    elif data.source.units is not None or not data.source.chunked:  # a few tags, or memory
        content = data.fingerprint
    else:
        return "-"
    coords = {name: np.asarray(v.values).astype(str).tolist() for name, v in sorted(data.source.coords.items())}
    affine = str(data.source.attrs.get("affine"))
    facts = [content, list(data.axes.names), list(data.axes.roles), str(level), labels, coords, affine]
    return _digest(facts)


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]


def mark_of(path: LocalPath) -> str | None:
    """Return the mark of an exported file; None for any other file."""
    if path.is_symlink() or not path.is_file():
        return None
    try:
        read = {"nifti": nifti_file.description_of, "tiff": tiff_file.software_of, "hdf5": vector_file.mark_in}
        text = read[format_of("path", path)](Path(path))
    except Exception:  # noqa: BLE001 - of any other file, in any state
        return None
    return text if text.startswith(f"{MARK} ") else None


def _may_write(target: LocalPath, identity: str, *, overwrite: bool) -> bool:
    """Return whether a file that is there is to be replaced; False: it has the volume already.

    Raises:
        OutputExists: if it was not exported, or it cannot be told of what.
        RunMismatch: if it has another volume.
    """
    mark = mark_of(target)
    if mark is None:
        raise OutputExists(
            f"path must be a new file or one that export wrote, but {target} is something else; choose another path, "
            "or move it away"
        )
    if overwrite:
        return True
    if identity == "-" or mark == f"{MARK} -":
        raise OutputExists(
            f"{target} is there, and only reading the whole volume would tell whether it was exported from it; pass "
            "overwrite=True to replace it"
        )
    if mark != f"{MARK} {identity}":
        raise RunMismatch(
            f"{target} was exported from another volume, level or axes, or the volume has changed since; choose "
            "another path, or replace it with overwrite=True",
            ("volume",),
        )
    return False
