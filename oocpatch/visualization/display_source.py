"""Open volumes and results for display: at the smallest level of a pyramid that still fills the picture."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import numpy as np
import zarr

from oocpatch.outputs.output import open_result
from oocpatch.outputs.record import OutputRecord, array_path, inspect_output
from oocpatch.storage.paths import StoragePath, output_path
from oocpatch.system import is_url
from oocpatch.volumes.formats.spec import WITH_LEVELS, UnreadableError, parse_address
from oocpatch.volumes.ome_metadata import ome_attributes
from oocpatch.volumes.volume import Volume


@dataclass(frozen=True)
class DisplaySource:
    """A volume, or a head of the output of a run, to display.

    Attributes:
        volume: the volume at the level that is shown.
        spacing: size of a voxel per looped and spatial axis, at that level; only ratios matter.
        level: number of the level; 0 is the finest.
        record: the record in the output; None for other volumes.
        head: name of the head; None for other volumes.
    """

    volume: Volume
    spacing: tuple[float, ...]
    level: int = 0
    record: OutputRecord | None = None
    head: str | None = None

    @property
    def is_labels(self) -> bool | None:
        """True when the run's settings give labels; None where they leave it open."""
        if self.record is None or self.head is None:
            return None
        parameters = self.record.parameters
        settings = [parameters.get(name) for name in ("postprocess", "overlap_mode")]
        settings = [value.get(self.head) if isinstance(value, dict) else value for value in settings]
        is_labelled = "connectivity" in parameters  # by `label`
        return True if is_labelled or {"argmax", "vote", "instances"}.intersection(map(str, settings)) else None

    @property
    def objects(self) -> list[int]:
        """Numbers of objects, of each index of time; none where the values are not ids of objects, or not yet."""
        counts = {} if self.record is None else self.record.details.get("objects", {})
        return list(counts.get(self.head, []) if isinstance(counts, dict) else counts)


def open_display_source(source: Any, pixels: int, *, head: str | None = None, axes: Any = None) -> DisplaySource:
    """Open a volume at the smallest level with so many voxels on its longest axis, or a head of the output of a run.

    Raises:
        ValueError: when it cannot be read, or there is no such head.
    """
    levels = display_levels(source, head=head, axes=axes)
    best = next(levels)
    if best.record is not None:
        return best
    for level in levels:
        if max(level.volume.shape[-level.volume.spatial_ndim :]) < pixels:
            break
        best = level
    return best


def display_levels(source: Any, *, head: str | None = None, axes: Any = None) -> Iterator[DisplaySource]:
    """Yield the levels of a volume, or of a head of the output of a run, the finest first.

    Raises:
        ValueError: when it cannot be read, or there is no such head.
    """
    record = record_of(source)
    if record is None:
        if head is not None:
            raise ValueError(f"head must be None unless the source is the output of a run, got {head!r}")
        yield from _levels(source, axes)
        return
    path, heads = output_path("output", source), list(record.details["heads"])
    has_rows = bool(record.details.get("rows"))
    if not heads:
        raise ValueError(f"{path} has no picture: the model gave a vector per patch; export it as .h5 or .h5ad")
    chosen = heads[0] if head is None else head
    if chosen not in heads:
        raise ValueError(f"head must be one of {', '.join(heads)}, got {chosen!r}")
    if record.complete and not record.details["tree"] and len(heads) == 1 and not has_rows:
        volume = Volume(str(path), axes)
    elif record.complete:
        result = open_result(path)
        volume = Volume(result[chosen] if chosen not in getattr(result, "children", {}) else result[chosen][chosen])
    else:  # coordinates come last, and only the aspect ratio needs them
        volume = Volume(zarr.open_array(path.store(), path=array_path(record, chosen), mode="r"))
    yield DisplaySource(volume, spacing_of(volume), 0, record, chosen)
    if record.complete and record.details.get("pyramids"):  # before that coarser levels are missing
        group = array_path(record, chosen).rpartition("scale0/")[0].strip("/")
        for level in _multiscale(path / group if group else path)[1:]:
            yield replace(level, record=record, head=chosen)


def record_of(source: Any) -> OutputRecord | None:
    """Return the record in the output of a run; None for anything else."""
    path = folder_of(source)
    try:
        return None if path is None else inspect_output(path)
    except ValueError:
        return None


def folder_of(source: Any) -> StoragePath | None:
    """Return the directory or prefix in an object store that a source names; None for anything else."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    try:
        path = output_path("source", source)
        return path if path.is_dir() else None
    except ValueError:  # a URL of something else
        return None


def local_name(output: str | os.PathLike[str]) -> str:
    """Return the start of the names of files about an output: its path, or for a URL its name alone.

    >>> local_name("results/out.zarr/"), local_name("s3://bucket/results/out.zarr")
    ('results/out.zarr', 'out.zarr')
    """
    name = os.fspath(output)
    return name.rstrip("/").rpartition("/")[2] if is_url(name) else str(PurePath(name))


def _levels(source: Any, axes: Any) -> Iterator[DisplaySource]:
    """Yield the levels of a pyramid, the finest first; one where there is no pyramid."""
    if isinstance(source, (str, os.PathLike)):
        spec = parse_address(str(source))
        if spec is not None and spec.format in WITH_LEVELS and "level=" not in str(source):
            for level in itertools.count():
                try:
                    volume = Volume(f"{source}::level={level}", axes)
                except UnreadableError:
                    if not level:
                        raise
                    return
                yield DisplaySource(volume, spacing_of(volume), level)
        folder = folder_of(source) if spec is None else None
        if folder is not None and (levels := _multiscale(folder)):
            yield replace(levels[0], volume=Volume(source, axes))  # with its coordinates and channels
            yield from levels[1:]
            return
    volume = source if isinstance(source, Volume) else Volume(source, axes)
    yield DisplaySource(volume, spacing_of(volume))


def _multiscale(path: StoragePath) -> list[DisplaySource]:
    """Return the levels of an OME-Zarr; none where it is not one."""
    try:
        group = zarr.open_group(path.store(), mode="r")
    except (OSError, ValueError):
        return []
    multiscales: Any = ome_attributes(group.attrs.asdict()).get("multiscales")
    if not multiscales:
        return []
    levels = []
    names = [a["name"] if isinstance(a, dict) else str(a) for a in multiscales[0].get("axes", ())]
    for level, dataset in enumerate(multiscales[0]["datasets"]):
        scales = [t["scale"] for t in dataset.get("coordinateTransformations", ()) if t.get("type") == "scale"]
        volume = Volume(zarr.open_array(path.store(), path=dataset["path"], mode="r"), names or None)
        scale = dict(zip(names, scales[0], strict=True)) if scales else {}
        levels.append(DisplaySource(volume, tuple(float(scale.get(n, 1)) or 1.0 for n in volume.names), level))
    return levels


def spacing_of(volume: Volume) -> tuple[float, ...]:
    """Return voxel sizes by the coordinates; ones where some spatial axis has none."""
    steps = []
    for name in volume.names:
        coordinate = volume.source.coords.get(name)
        step = 0.0
        if coordinate is not None and coordinate.ndim == 1 and coordinate.dtype.kind in "iuf" and coordinate.size > 1:
            step = abs(float(np.diff(coordinate.values[:2].astype(np.float64))[0]))
        steps.append(step if np.isfinite(step) else 0.0)
    spatial = steps[-volume.spatial_ndim :]
    return tuple(steps) if all(spatial) else (1.0,) * len(steps)
