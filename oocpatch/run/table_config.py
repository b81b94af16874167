"""The configuration of a call that makes a table of objects: its arguments, checked before any voxel is read."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace
from typing import Any

from oocpatch.configuration.run_config import RunConfig
from oocpatch.errors import OutputExists
from oocpatch.objects.columns import TableSchema, checked_properties
from oocpatch.objects.table_files import check_format, properties_for
from oocpatch.objects.table_input import VoxelGrid, channel_names, checked_classes, open_intensity, open_labels
from oocpatch.outputs.record import table_record
from oocpatch.provenance import run_settings
from oocpatch.storage.paths import LocalPath, local_path
from oocpatch.volumes.volume import Volume, refuse_overlap

FRAME = "table"
"""Name of the file that a table is in before it is returned."""


def table_config(
    labels: Any,
    output: Any,
    *,
    intensity: Any,
    properties: Any,
    spacing: Any,
    axes: Any,
    level: Any,
    classes: Any,
    **options: Any,
) -> RunConfig:
    """Check the arguments of `objects`.

    Without an output, the output is one in a directory for temporary files.

    Raises:
        ValueError, TypeError: with the rule and the value.
        OutputExists: if there is something at the output that oocpatch did not write.
    """
    target = LocalPath(tempfile.gettempdir()) / FRAME if output is None else local_path("output", output)
    suffix = "" if output is None else check_format(target.name)
    if options["workspace"] is not None:
        local_path("workspace", options["workspace"])
    if output is None and options["part"] is not None:
        raise ValueError("output must be a file for a part of a run, got None")
    volume = open_labels(labels, axes, level)
    of_intensity = open_intensity(intensity, volume, level)
    if suffix == ".geojson" and volume.spatial_ndim != 2:
        raise ValueError(
            f"output must be a table such as .parquet for {volume.spatial_ndim} spatial axes, since GeoJSON has "
            f"polygons in the plane, got {target}"
        )
    has_intensity = of_intensity is not None
    columns = checked_properties(properties, volume.spatial_ndim, has_intensity=has_intensity)
    if classes is not None and suffix != ".geojson":
        raise ValueError(f"classes must be None but for .geojson, got {classes!r}")
    named = checked_classes(classes, of_intensity or volume) if suffix == ".geojson" else ()
    columns = properties_for(suffix, columns, has_intensity=has_intensity, has_classes=bool(named))
    schema = replace(_schema(volume, of_intensity, VoxelGrid.of(volume, spacing), columns), classes=named)
    config = RunConfig.of(
        volume, "identity", target, patch_size=1, overlap_mode="crop", output_format="zarr", device="cpu", **options
    )
    if of_intensity is not None:
        refuse_overlap("output", target, of_intensity)
    if output is not None and target.exists() and not table_record(target).is_file():
        raise OutputExists(
            f"output must be a new path or a table that oocpatch wrote, but {target} holds other data; choose another "
            "path, or delete it"
        )
    parameters = {
        "labels": volume.signature,
        "intensity": None if of_intensity is None else [of_intensity.signature, *schema.channels],
        "axes": [*volume.axes.names],
        "spacing": [list(schema.scale), list(schema.offset), list(schema.units)],
        "properties": list(schema.properties),
        **({"classes": [list(one) for one in named]} if named else {}),
    }
    asked = {"intensity": intensity, "properties": properties, "spacing": spacing, "axes": axes, "level": level}
    asked |= {} if classes is None else {"classes": dict(classes)}
    settings = run_settings({"labels": labels, "output": output, **asked, **options})
    return replace(config, parameters=parameters, settings=settings, table=asdict(schema), intensity=of_intensity)


def _schema(labels: Volume, intensity: Volume | None, grid: VoxelGrid, properties: tuple[str, ...]) -> TableSchema:
    """Return the columns of a table."""
    looped = len(labels.shape) - labels.spatial_ndim
    indices = [name for name, n in zip(labels.names[:looped], labels.shape, strict=False) if n > 1]
    indices += [str(labels.channel_axis)] if labels.channels > 1 else []
    return TableSchema(
        axes=labels.names[looped:],
        scale=grid.scale,
        offset=grid.offset,
        units=grid.units,
        is_physical=grid.is_physical,
        indices=tuple(indices),
        properties=properties,
        channels=channel_names(intensity),
        label_dtype=str(labels.dtype),
        intensity_dtype="u1" if intensity is None else intensity.dtype.str,
        wide=max(labels.shape) >= 2**31,
    )
