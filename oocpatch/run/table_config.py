"""The checked arguments of a call that makes a table of objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oocpatch.objects.block_measurement import INTENSITY, LABELS
from oocpatch.objects.columns import TableSchema, checked_properties
from oocpatch.objects.table_files import check_format, properties_for
from oocpatch.objects.table_input import VoxelGrid, open_intensity, open_labels
from oocpatch.objects.table_plan import TablePlan, make_schema, make_table_plan
from oocpatch.planning.arguments import checked_part, memory_limit, positive, switch
from oocpatch.planning.box import Ints
from oocpatch.planning.plan import digest
from oocpatch.progress import OnProgress, display_of
from oocpatch.provenance import run_settings
from oocpatch.storage.locks import beside
from oocpatch.storage.paths import LocalPath, local_path
from oocpatch.volumes.volume import Volume, refuse_overlap, spatial_sizes

SWITCHES = ("processes", "resume", "overwrite", "update", "check_input")


@dataclass(frozen=True)
class TableConfig:
    """The checked arguments of a call.

    Attributes:
        plan: what a fresh run would do.
        inputs: the volumes by the names of their parameters.
    """

    plan: TablePlan
    output: LocalPath | None
    labels: Volume
    intensity: Volume | None
    block_shape: Ints | None
    workers: int | None
    processes: bool
    client: Any
    part: tuple[int, int] | None
    workspace: LocalPath | None
    resume: bool
    overwrite: bool
    update: bool
    check_input: bool
    progress: str | bool | OnProgress
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, labels: Any, output: Any, **arguments: Any) -> TableConfig:
        """Check the arguments of a call.

        Raises:
            ValueError, TypeError: with the rule and the value.
        """
        suffix = ""
        target = None if output is None else local_path("output", output)
        if target is not None:
            suffix = check_format(target.name)
            target.check_writable("output")
        volume = open_labels(labels, arguments["axes"], arguments["level"])
        intensity = open_intensity(arguments["intensity"], volume, arguments["level"])
        if suffix == ".geojson" and volume.spatial_ndim != 2:
            raise ValueError(
                f"output must be a table such as .parquet for {volume.spatial_ndim} spatial axes, since GeoJSON has "
                f"polygons in the plane, got {target}"
            )
        for other in filter(None, (volume, intensity)):
            if target is not None:
                refuse_overlap("output", target, other)
        properties = checked_properties(
            arguments["properties"], volume.spatial_ndim, has_intensity=intensity is not None
        )
        grid = VoxelGrid.of(volume, arguments["spacing"])
        schema = make_schema(
            volume, intensity, grid, properties_for(suffix, properties, has_intensity=intensity is not None)
        )
        workers = None if arguments["workers"] is None else positive("workers", arguments["workers"])
        switches = {name: switch(name, arguments[name]) for name in SWITCHES}
        is_distributed = arguments["client"] is not None or switches["processes"]
        part = _checked_part(arguments["part"], target, switches, is_distributed=is_distributed)
        if switches["processes"] and arguments["client"] is not None:
            raise ValueError("processes must be False with a client: its workers are the processes")
        if switches["processes"] and workers is None:
            raise ValueError("processes=True needs their number: pass workers=N")
        display_of(arguments["progress"])
        shape = arguments["block_shape"]
        block_shape = None if shape is None else spatial_sizes("block_shape", shape, volume, least=1)
        if arguments["client"] is not None:
            from oocpatch.execution.dask_clients import check_client  # noqa: PLC0415 - a second of imports

            check_client(arguments["client"])
        plan = make_table_plan(
            volume,
            intensity,
            schema,
            _parameters(volume, intensity, schema),
            suffix=suffix,
            block_shape=block_shape,
            max_memory=memory_limit(arguments["max_memory"]),
            workers=1 if is_distributed else workers,
        )
        return cls(
            plan=plan,
            output=target,
            labels=volume,
            intensity=intensity,
            block_shape=block_shape,
            workers=workers,
            client=arguments["client"],
            part=part,
            workspace=None if arguments["workspace"] is None else local_path("workspace", arguments["workspace"]),
            **switches,
            progress=arguments["progress"],
            settings=run_settings({"labels": labels, "output": output, **arguments}),
        )

    @property
    def inputs(self) -> dict[str, Volume]:
        """The volumes by the names of their parameters."""
        return {LABELS: self.labels, **({} if self.intensity is None else {INTENSITY: self.intensity})}

    def root(self, output: LocalPath) -> LocalPath:
        """Return the workspace of an output; others may share the directory that `workspace` names."""
        if self.workspace is None:
            return output.with_name(beside(output, "").name)
        return self.workspace / digest(["objects", str(output)])


def _checked_part(
    part: Any, output: LocalPath | None, switches: Mapping[str, bool], *, is_distributed: bool
) -> tuple[int, int] | None:
    """Return a checked part of a run.

    Raises:
        ValueError, TypeError: when it is none, or does not go with other arguments.
    """
    if part is None:
        return None
    if output is None:
        raise ValueError("output must be a file for a part of a run, got None")
    if is_distributed:
        raise ValueError("part must be None with a client or processes: parts are for jobs without a scheduler")
    if switches["update"]:
        raise ValueError("update must be False with part: update the table in one call")
    if switches["overwrite"]:
        raise ValueError("overwrite must be False with part: a part would delete the others' work; delete the table")
    return checked_part(part)


def _parameters(labels: Volume, intensity: Volume | None, schema: TableSchema) -> dict[str, Any]:
    """Return the fingerprint of a table: what says whether two runs are the same, besides the content of the input."""
    return {
        "labels": labels.signature,
        "intensity": None if intensity is None else [intensity.signature, *schema.channels],
        "axes": [*labels.axes.names],
        "spacing": [list(schema.scale), list(schema.offset), list(schema.units)],
        "properties": list(schema.properties),
    }
