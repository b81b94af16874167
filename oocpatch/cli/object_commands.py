"""Commands on objects: what people count and measure in a result."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from oocpatch.cli import cluster_options
from oocpatch.cli.config_file import config_option
from oocpatch.cli.types import number, run_options

LABEL_OPTIONS = (
    *(
        "axes",
        "level",
        "max_memory",
        "block_shape",
        "workers",
        "processes",
        "part",
        "workspace",
        "resume",
        "overwrite",
        "update",
    ),
    *("check_input", "output_chunks", "output_shards", "output_dtype", "output_format", "progress"),
)
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
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Compute on a Dask cluster: tcp://HOST:PORT, file:scheduler.json, or slurm:cores=4,memory=16GB.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def label(volume: str, output: str, *, as_json: bool, **options: Any) -> None:
    """Label the connected components of the volume IN and write their ids to OUT; run again to continue."""
    import oocpatch

    start = time.monotonic()
    with cluster_options.client_of({**options, "device": "cpu"}, lambda text: click.echo(text, err=True)) as arguments:
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


COMMANDS = (label,)
