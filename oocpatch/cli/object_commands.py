"""Commands on objects: what people count and measure in a result."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from oocpatch.cli.cluster_options import client_of, scheduler_option
from oocpatch.cli.config_file import config_option
from oocpatch.cli.types import classes, json_option, number, run_options, spacing

OBJECTS_OPTIONS = (
    *("axes", "level", "max_memory", "block_shape", "workers", "processes", "part", "workspace"),
    *("resume", "overwrite", "update", "check_input", "progress"),
)
"""The options of a run that `objects` takes."""

LABEL_OPTIONS = (*OBJECTS_OPTIONS, "output_chunks", "output_shards", "output_dtype", "output_format")
"""The options of a run that `label` takes."""


@click.command()
@click.argument("volume", metavar="IN")
@click.argument("output", metavar="OUT")
@click.option("--threshold", type=number, metavar="NUMBER", help="Count voxels above this as foreground; else nonzero.")
@click.option(
    "--connectivity", type=int, default=1, show_default=True, help="Let voxels touch in so many axes at once."
)
@click.option("--per-class", is_flag=True, help="Keep voxels of different labels apart.")
@click.option("--min-size", type=int, default=0, show_default=True, help="Drop objects of fewer voxels.")
@run_options(LABEL_OPTIONS)
@config_option
@scheduler_option
@json_option
def label(volume: str, output: str, *, as_json: bool, **options: Any) -> None:
    """Label the connected components of the volume IN and write their ids to OUT; run again to continue."""
    import oocpatch

    start = time.monotonic()
    with client_of({**options, "device": "cpu"}, lambda text: click.echo(text, err=True)) as arguments:
        del arguments["device"]
        result = oocpatch.label(volume, output, **arguments)
    report = {
        "output": output,
        "complete": bool(result.attrs.get("complete", True)),
        "seconds": round(time.monotonic() - start, 3),
    }
    line = "{output}: {seconds:.1f} s, this part is done, others are not"
    if report["complete"]:
        report["objects"] = result.attrs["objects"]
        line = "{output}: {seconds:.1f} s, {objects} objects"
    click.echo(json.dumps(report, indent=1) if as_json else line.format(**report))


@click.command()
@click.argument("labels", metavar="LABELS")
@click.argument("output", metavar="OUT")
@click.option("--intensity", metavar="IN", help="Measure the channels of this volume in each object, too.")
@click.option(
    "--properties",
    metavar="NAMES",
    default="area,bbox,centroid",
    show_default=True,
    help="Compute these columns: also equivalent_diameter, axis_major_length, orientation, principal_axes.",
)
@click.option(
    "--spacing",
    type=spacing,
    metavar="SIZES",
    help="Size of a voxel: 0.5, or per axis 2,0.5,0.5; default: from the coordinates.",
)
@click.option(
    "--classes",
    type=classes,
    metavar="VALUE=NAME[:COLOUR],...",
    help="Name the classes in a .geojson: 1=Tumor:#c80000,2=Stroma; of labels, or with --intensity of its values.",
)
@run_options(OBJECTS_OPTIONS)
@config_option
@scheduler_option
@json_option
def objects(labels: str, output: str, *, as_json: bool, properties: str, **options: Any) -> None:
    """Measure the objects of LABELS and write a row for each to OUT: .parquet, .csv, .geojson or .h5ad."""
    import oocpatch

    start = time.monotonic()
    with client_of({**options, "device": "cpu"}, lambda text: click.echo(text, err=True)) as arguments:
        del arguments["device"]
        names = tuple(name.strip() for name in properties.split(","))
        path = oocpatch.objects(labels, output, properties=names, **arguments)
    seconds = round(time.monotonic() - start, 3)
    report: dict[str, Any] = {"output": output, "complete": path is not None, "seconds": seconds}
    line = "{output}: {seconds:.1f} s, this part is done, others are not"
    if path is not None:
        from oocpatch.outputs.record import inspect_output

        record = inspect_output(path)
        report["objects"] = 0 if record is None else record.details["objects"]
        line = "{output}: {seconds:.1f} s, {objects} objects"
    click.echo(json.dumps(report, indent=1) if as_json else line.format(**report))


COMMANDS = (label, objects)
