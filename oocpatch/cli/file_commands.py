"""Commands that convert volumes, draw pictures and reports, and describe the machine."""

from __future__ import annotations

import functools
import json
import os
import time
import webbrowser
from pathlib import Path
from typing import Any

import click

from oocpatch.cli.types import json_option, size

_option = functools.partial(click.option, show_default=True)
_axes_option = _option(
    "--axes", metavar="NAMES", help="Name the axes of the volume, such as zyx or yxc; default: its own names."
)
_level_option = _option("--level", default="0", help="Read this level of a pyramid; 0 is the largest.")
_labels_option = _option(
    "--labels/--no-labels",
    default=None,
    help="Fill the levels of a pyramid with labels that were there, or with means; default: as the metadata say.",
)
_max_memory_option = _option(
    "--max-memory", metavar="SIZE", default="auto", help="Bound on the memory that is added, such as 2GiB."
)
_progress_option = _option(
    "--progress",
    type=click.Choice(("auto", "bar", "plain", "json", "none")),
    default="auto",
    help="Progress on stderr.",
)
KINDS = ("auto", "labels", "scores", "image", "rgb")


@click.command()
@click.argument("volume", metavar="IN")
@click.argument("output", metavar="OUT.zarr")
@_axes_option
@_level_option
@_option("--chunks", type=size, help="Chunks in voxels: 64, or per axis 32,64,64; default: the volume's.")
@_option("--shards", type=size, help="Shards in voxels, multiples of the chunks; default: none.")
@_option(
    "--levels", type=click.IntRange(min=1), help="Levels of the pyramid; 1: none; default: until one fits a chunk."
)
@_labels_option
@_max_memory_option
@_progress_option
@_option("--overwrite", is_flag=True, help="Replace what another conversion wrote.")
@json_option
def convert(volume: str, output: str, *, as_json: bool, **options: Any) -> None:
    """Stream the volume IN, of any format that can be read, into the OME-Zarr OUT.zarr; run again to continue."""
    import oocpatch

    start = time.monotonic()
    array = oocpatch.convert(volume, output, **options)
    report = {
        "output": output,
        "axes": [str(d) for d in array.dims],
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "chunks": [int(array.encoding["preferred_chunks"][d]) for d in array.dims],
        "seconds": round(time.monotonic() - start, 3),
    }
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    shape = " x ".join(map(str, array.shape))
    click.echo(f"{Path(output)}: {shape} ({', '.join(map(str, array.dims))}), {array.dtype}, {report['seconds']:.1f} s")


@click.command()
@click.argument("volume", metavar="IN")
@click.argument("path", metavar="FILE")
@_axes_option
@_level_option
@_labels_option
@_max_memory_option
@_progress_option
@_option("--overwrite", is_flag=True, help="Replace a file that was exported before.")
@json_option
def export(volume: str, path: str, *, as_json: bool, **options: Any) -> None:
    """Write the volume or result IN as FILE: .nii, .nii.gz, .ome.tif or .tif, .h5 or .h5ad for vectors."""
    import oocpatch

    start = time.monotonic()
    file = oocpatch.export(volume, path, **options)
    report: dict[str, Any] = {
        "file": str(file),
        "bytes": file.stat().st_size,
        "seconds": round(time.monotonic() - start, 3),
    }
    click.echo(json.dumps(report, indent=1) if as_json else "{file}: {bytes:,} bytes, {seconds:.1f} s".format(**report))


@click.command()
@click.argument("output", metavar="OUT")
@click.argument("picture", metavar="[PNG]", required=False)
@_option("--volume", metavar="IN", help="Draw the result over this volume; default: the input of the run.")
@_option("--no-volume", is_flag=True, help="Show the result alone.")
@_option("--head", help="Show this one of several outputs; default: the first.")
@_option(
    "--kind",
    type=click.Choice(("auto", "labels", "scores", "image", "rgb")),
    default="auto",
    help="Show values in this way.",
)
@_option("--axes", metavar="NAMES", help="Name the axes of OUT, where it has no names.")
@_option("--pixels", type=click.IntRange(min=16), default=480, help="Longest side of a panel.")
@_option("--serve", is_flag=True, help="Show it in a browser of this machine instead, with neuroglancer, until Ctrl-C.")
@_option("--port", type=click.IntRange(0, 65535), default=0, help="Serve at this port; 0: any free one.")
@_option("--browser/--no-browser", default=True, help="With --serve: open a browser where there is a desktop.")
@_option("--table", metavar="FILE", help="With --serve: show the rows of this table of objects, .parquet or .csv.")
@json_option
def view(
    output: str,
    picture: str | None,
    *,
    as_json: bool,
    no_volume: bool,
    serve: bool,
    table: str | None,
    port: int,
    browser: bool,
    **options: Any,
) -> None:
    """Draw OUT, a result or any volume that can be read, as a PNG: middle slices, over the input, and a projection."""
    options = {**options, **({"volume": False} if no_volume else {})}
    if serve:
        if picture is not None:
            raise click.UsageError("--serve draws no PNG: leave one of them out.")
        del options["pixels"]
        _serve(output, port, {**options, "table": table}, browser=browser, as_json=as_json)
        return
    if table is not None:
        raise click.UsageError("--table needs --serve: a PNG shows no table.")
    import oocpatch

    path = oocpatch.view(output, picture, **options)
    if not as_json:
        click.echo(path)
        return
    from oocpatch.visualization.display_source import open_display_source

    objects = open_display_source(output, 1, head=options["head"], axes=options["axes"]).objects
    click.echo(json.dumps({"picture": str(path), **({"objects": sum(objects)} if objects else {})}))


def _serve(output: str, port: int, options: dict[str, Any], *, browser: bool, as_json: bool) -> None:
    from oocpatch.visualization.layers import layers_of
    from oocpatch.visualization.neuroglancer import serve

    layers = layers_of(output, **options)

    def ready(url: str) -> None:
        click.echo(json.dumps({"url": url}) if as_json else url)
        click.echo("serving on this machine until Ctrl-C", err=True)
        if browser and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            webbrowser.open(url)

    serve(layers, port, ready)


@click.command()
@click.argument("output", metavar="OUT")
@click.argument("page", metavar="[HTML]", required=False)
@_option("--table", metavar="FILE", help="Draw the areas of this table of objects, .parquet or .csv.")
@json_option
def report(output: str, page: str | None, *, table: str | None, as_json: bool) -> None:
    """Write one HTML file about the run that wrote OUT: pictures, plan, time, memory, coverage, how to repeat it."""
    import oocpatch

    path = oocpatch.report(output, page, table=table)
    click.echo(json.dumps({"report": str(path)}) if as_json else str(path))


@click.command()
@json_option
def doctor(*, as_json: bool) -> None:
    """Show versions, CPU cores, memory, disk, devices and installed extras."""
    from oocpatch.cli.doctor import as_text, examine

    facts = examine(Path())
    click.echo(json.dumps(facts, indent=1) if as_json else as_text(facts))


COMMANDS = (convert, export, view, report, doctor)
