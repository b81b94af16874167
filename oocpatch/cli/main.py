"""The command line: one verb, one job. stdout is data, stderr is logs and progress.

Exit codes: 0 done; 1 some blocks failed, a cluster was lost, or a check failed; 2 bad usage or bad input; 3 refused
(plan too large, other run, output taken); 130 interrupted, by Ctrl-C or SIGTERM. Options are the parameters of
`oocpatch.predict`.

Heavy libraries are imported inside the commands: `oocpatch --help` imports neither torch nor zarr nor dask.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from oocpatch.cli import cluster_options as cli_where
from oocpatch.cli import file_commands as cli_files
from oocpatch.cli.config_file import config_option, from_environment
from oocpatch.cli.types import box, number, one_or_more, per_head, setting, settings, size, size_or_auto

if TYPE_CHECKING:
    from oocpatch.planning.plan import Plan

FAILED, BAD_INPUT, REFUSED, INTERRUPTED = 1, 2, 3, 130

Command = TypeVar("Command", bound=Callable[..., Any])


class _Commands(click.Group):
    """A group whose commands end in one line and an exit code, never in a traceback for a user's mistake."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with cli_where.terminable():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except KeyboardInterrupt:
            _fail("interrupted; what is finished is kept, the same command continues", INTERRUPTED)
        except Exception as error:
            code = _exit_code(error)
            if code is None:
                raise
            _fail(_told(error), code)


def _exit_code(error: Exception) -> int | None:
    """None for what is not the user's mistake: a traceback then helps whoever mends it."""
    from oocpatch import errors

    if isinstance(error, (errors.PlanTooLarge, errors.RunMismatch, errors.OutputExists, errors.OutputBusy)):
        return REFUSED
    if isinstance(error, (errors.BlockFailed, errors.ClusterLost, errors.CorruptData)):
        return FAILED
    if isinstance(error, (errors.OocpatchError, ValueError, TypeError, OSError)):
        return BAD_INPUT
    return None


def _told(error: Exception) -> str:
    """The message, and what to do where the system knows only what is wrong."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{error}: the disk of the output or workspace is full; what is finished is kept: make room, and the "
            "same command continues"
        )
    return str(error) or type(error).__name__


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"oocpatch: {' '.join(message.split())}", err=True)
    raise click.exceptions.Exit(code)


def _log(message: str) -> None:
    click.echo(message, err=True)


def _as_json(record: object) -> str:
    return json.dumps(record, indent=1, default=str)


def _one_of(names: str) -> click.Choice[str]:
    return click.Choice(names.split())


_option = functools.partial(click.option, show_default=True)


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)

    return decorate


_model_options = _options(
    click.option(
        "--model",
        required=True,
        multiple=True,
        callback=one_or_more,
        metavar="SPEC",
        help="package.module:name, file.py:name, .pt2, .pt, .onnx, identity; several times: the mean of all.",
    ),
    click.option(
        "--weights",
        multiple=True,
        callback=one_or_more,
        metavar="FILE",
        help="State dict or safetensors to load into the model; several times: a model with each, and their mean.",
    ),
    click.option(
        "--model-args",
        multiple=True,
        callback=settings,
        metavar="NAME=VALUE",
        help="Argument of the factory that the spec names, as JSON or text; several times for several.",
    ),
    click.option("--trust-pickle", is_flag=True, help="Let model and weights files run code while they are unpickled."),
    _option(
        "--preprocess",
        type=setting,
        metavar="[zscore|percentile|scale|JSON]",
        help='Done to patches first; with arguments as JSON: {"name": "percentile", "low": 1, "high": 99}.',
    ),
    _option(
        "--augment",
        type=setting,
        metavar="[flips|rotations|all|JSON]",
        help='The mean over turned patches; of some axes as JSON: {"name": "rotations", "axes": ["y", "x"]}.',
    ),
)

_patch_options = _options(
    click.option(
        "--patch-size", type=size_or_auto, required=True, help="Voxels: 96, or per axis 32,96,96; auto: chosen."
    ),
    _option("--patch-overlap", type=size, default=0, help="Voxels that adjacent patches share, in total."),
    _option(
        "--overlap-mode",
        type=per_head("crop average hann gaussian max vote"),
        metavar="[crop|average|hann|gaussian|max|vote]",
        default="hann",
        help="How patches are blended; HEAD=MODE,... for several outputs.",
    ),
    _option("--num-classes", type=int, help="Number of labels that are voted on."),
    _option(
        "--padding-mode",
        type=_one_of("constant edge reflect symmetric wrap"),
        help="Grow the volume by half an overlap.",
    ),
    _option("--fill", type=float, default=0.0, help="Value of the padding 'constant'."),
    _option("--axes", metavar="NAMES", help="Axes of the volume, such as zyx or tczyx; default: its dimension names."),
    _option("--level", metavar="LEVEL", default="0", help="Level of an OME-Zarr's pyramid: its number, or its path."),
    _option("--batch-size", type=size_or_auto, default=1, help="Patches per call of the model; auto: chosen."),
    _option("--device", default="auto", help="Where the model runs: cpu, cuda, cuda:1."),
    _option("--autocast", is_flag=True, help="Run the model in mixed precision."),
    _option("--channels-last", is_flag=True, help="Put patches and weights into the memory format of that name."),
    _option(
        "--compile",
        type=_one_of("default reduce-overhead max-autotune"),
        help="Compile the model with torch, in this mode.",
    ),
    _option(
        "--postprocess",
        type=per_head("argmax softmax sigmoid threshold"),
        metavar="[argmax|softmax|sigmoid|threshold|threshold:NUMBER]",
        help="Applied to the blended result; HEAD=NAME,... for several outputs.",
    ),
    _option(
        "--output-dtype",
        type=per_head(),
        metavar="DTYPE",
        help="Default: float32; the model's for crop; the smallest for argmax.",
    ),
)

_run_options = _options(
    config_option,
    _option("--output-chunks", type=size, help="Chunk shape of the output; default: the planner's choice."),
    _option("--output-shards", type=size, help="Shard shape of the output; default: no shards."),
    _option(
        "--output-format",
        type=_one_of("auto zarr ome-zarr ome-zarr-0.4"),
        default="auto",
        help="An OME-Zarr has a pyramid; auto: as IN is.",
    ),
    _option("--output-fill", type=number, default=0, help="Value of voxels that no patch covered."),
    _option(
        "--max-memory", metavar="SIZE", default="auto", help="Bound on the memory that the run adds, such as 2GiB."
    ),
    _option("--mask", metavar="ZARR", help="Skip patches without a nonzero voxel in this mask, of any resolution."),
    _option("--skip-empty", is_flag=True, help="Skip patches of which nothing was ever written."),
    _option(
        "--box",
        type=box,
        metavar="START:STOP,...",
        help="Compute only the patches that meet this box, in voxels per spatial axis; 16:64,:,0:128.",
    ),
    _option("--max-disk", metavar="SIZE", help="Bound on the workspace; default: none."),
    _option("--block-shape", type=size, help="Voxels of one unit of work; default: the planner's choice."),
    _option(
        "--workspace", metavar="PLACE", help="Where unfinished work lies, a path or a URL; default: beside the output."
    ),
    _option(
        "--workers", type=int, help="Blocks, or worker processes, at a time; default: the planner's choice, or all."
    ),
    _option("--processes", is_flag=True, help="Compute in --workers processes of this machine instead of threads."),
    _option(
        "--scheduler",
        metavar="ADDRESS",
        help="Compute on a Dask cluster: tcp://HOST:PORT, file:scheduler.json, or slurm:cores=4,memory=16GB.",
    ),
    _option(
        "--part",
        type=cli_where.part,
        metavar="I/N",
        help="Compute only part I of N; the last part finishes the output.",
    ),
    _option("--resume/--no-resume", default=True, help="Continue an unfinished run."),
    _option("--overwrite", is_flag=True, help="Replace what oocpatch wrote here before."),
    _option("--allow-nonfinite", is_flag=True, help="Keep the model's NaN and infinity instead of failing the block."),
)

_json_option = _option("--json", "as_json", is_flag=True, help="Print JSON.")
_progress_option = _option(
    "--progress",
    type=_one_of("auto bar plain json none"),
    default="auto",
    help="Progress on stderr; auto: a bar on a terminal, else a line now and then; json: an object per line.",
)


@click.group(
    name="oocpatch",  # as `dask` knows it
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="oocpatch")
def main() -> None:
    """Patch-based deep learning on volumes larger than memory."""


@main.command()
@click.argument("volume", metavar="IN")
@click.argument("output", metavar="OUT")
@_model_options
@_patch_options
@_run_options
@click.option("--draw", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.svg", help="Draw the plan, too.")
@_json_option
def plan(volume: str, output: str, *, as_json: bool, draw: Path | None, **options: Any) -> None:
    """Show what predict would do with the same arguments: patches, blocks, memory, disk. Reads metadata only."""
    made = _plan(volume, output, cli_where.as_planned(options))
    if draw is not None:
        draw.write_text(made.draw())
    click.echo(made.to_json() if as_json else str(made))


@main.command()
@click.argument("volume", metavar="IN")
@click.argument("output", metavar="OUT")
@_model_options
@_patch_options
@_run_options
@_progress_option
@_json_option
def predict(volume: str, output: str, *, as_json: bool, progress: str, **options: Any) -> None:
    """Run a model over the volume IN and write the result to OUT; run again to continue or to retry what failed."""
    from oocpatch.errors import BlockFailed

    start = time.monotonic()
    with cli_where.client_of(options, _log) as given:
        made = _plan(volume, output, {**given, "progress": progress})
        _log(str(made))
        try:
            made.run()
        except BlockFailed as error:
            if as_json:
                failed = {str(block): message for block, message in error.failures.items()}
                click.echo(_as_json({"output": output, "complete": False, "failed": failed}))
            raise
    seconds = round(time.monotonic() - start, 3)
    counts = _counts(output)
    report = {"output": output, "complete": counts is not None, "seconds": seconds}
    line = "{output}: {seconds:.1f} s, this part is done, others are not"
    if counts is not None:
        report |= {"patches": made.patches, "blocks": made.blocks, **counts}
        line = "{output}: {seconds:.1f} s, {patches} patches, {uncovered_voxels} uncovered voxels"
        if counts["nonfinite_voxels"]:
            line += ", {nonfinite_voxels} that are NaN or infinite"
    click.echo(_as_json(report) if as_json else line.format(**report))


def _counts(output: str) -> dict[str, int] | None:
    """What is to be known about the voxels; None while parts of the run are not done."""
    from oocpatch.outputs.record import inspect_output
    from oocpatch.storage.paths import output_path

    record = inspect_output(output_path("output", output))
    if record is None or not record.complete:
        return None
    return {name: int(record.details.get(name, 0)) for name in ("uncovered_voxels", "nonfinite_voxels")}


def _plan(volume: str, output: str, options: dict[str, Any]) -> Plan:
    import oocpatch

    return oocpatch.plan(volume, output=output, **options)


@main.command()
@click.argument("output", metavar="OUT")
@_json_option
def status(output: str, *, as_json: bool) -> None:
    """Say how far the run that writes OUT is."""
    from oocpatch.run.status import status as status_of

    found = status_of(output)
    click.echo(found.to_json() if as_json else str(found))


@main.command()
@click.argument("directory", required=False, type=click.Path(file_okay=False, path_type=Path))
@click.option("--size", type=click.IntRange(min=1), help="Edge of the volume in voxels.")
@click.option("--max-memory", metavar="SIZE", help="Bound on the memory the run adds.")
@click.option("--keep/--no-keep", default=True, show_default=True, help="Leave the volumes where they are.")
@_progress_option
@_json_option
def demo(*, as_json: bool, progress: str, **options: Any) -> None:
    """Make a volume larger than its memory limit, find the nuclei in it, and draw the result. Needs no network."""
    from oocpatch.cli.demo import run_demo

    given = {name: value for name, value in options.items() if value is not None or name == "directory"}
    report = run_demo(**given, progress=progress, log=_log)
    if as_json:
        click.echo(_as_json(dataclasses.asdict(report)))


@main.command()
@click.argument("volume", metavar="IN|OUT")
@_model_options
@_patch_options
@click.option("--boxes", type=click.IntRange(min=1), default=3, show_default=True, help="Boxes to compare.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which boxes.")
@click.option(
    "--repair", is_flag=True, help="Without a model: let the same predict command compute anew what is damaged."
)
@_json_option
def check(volume: str, *, as_json: bool, repair: bool, **options: Any) -> None:
    """Verify the output OUT: read it all again. With a model: compare predict with a plain computation on boxes of IN.

    An output is compared with the checksums that were taken while it was written. Else predict runs on a few random
    boxes of the volume IN.
    """
    report: Any
    if options["model"] is None and options["patch_size"] is None:
        from oocpatch.verification.checksums import verify

        report = verify(volume, repair=repair)
    elif options["model"] is None or options["patch_size"] is None or repair:
        raise click.UsageError("To compare, check needs --model and --patch-size; to verify an output, neither.")
    else:
        from oocpatch.verification.compare import check as run_check

        report = run_check(volume, **options)
    click.echo(report.to_json() if as_json else str(report))
    if not report.passed:
        if repair:
            _log("what is damaged is marked as not done: the same predict command computes it anew")
        raise click.exceptions.Exit(FAILED)


for _parameter in check.params:
    if _parameter.name in ("model", "patch_size"):
        _parameter.required = False  # nothing is computed to verify an output

for _command in cli_files.COMMANDS:
    main.add_command(_command)
from_environment(main, "OOCPATCH")


if __name__ == "__main__":
    main()
