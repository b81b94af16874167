"""The command line. stdout is data; stderr is logs and progress.

Exit codes: 0 done; 1 some blocks failed, a cluster was lost, or a check failed; 2 bad usage or bad input; 3 refused
(plan too large, other run, output taken); 130 interrupted, by Ctrl-C or SIGTERM. Options of `plan`, `predict` and
`check` are the parameters of `oocpatch.predict`, made of the configuration's fields.

Heavy libraries are imported inside the commands: `oocpatch --help` imports neither torch nor zarr nor dask.
"""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path
from typing import Any, NoReturn

import click

from oocpatch.cli import cluster_options, file_commands, object_commands
from oocpatch.cli.cluster_options import scheduler_option
from oocpatch.cli.config_file import config_option, read_environment, source_of
from oocpatch.cli.prediction import VolumePattern, exported, predict_each, predicted
from oocpatch.cli.types import UserPath, json_option, run_options, volumes
from oocpatch.progress import DISPLAYS

FAILED, BAD_INPUT, REFUSED, INTERRUPTED = 1, 2, 3, 130


class _Commands(click.Group):
    """A group whose commands end in one line and an exit code, never in a traceback for a user's mistake."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with cluster_options.interrupted_by_sigterm():
                return super().invoke(ctx)
        except click.BadParameter as error:
            if not (source := source_of(ctx, error.format_message())):
                raise
            message = f"{error.message} ({source})"
            raise click.BadParameter(message, error.ctx, error.param, error.param_hint) from error
        except (click.ClickException, click.exceptions.Exit):
            raise
        except KeyboardInterrupt:
            _fail("interrupted; finished blocks are kept, and the same command continues", INTERRUPTED)
        except Exception as error:
            code = _exit_code(error)
            if code is None:
                raise
            message = _message(error)
            source = source_of(ctx, message)
            _fail(f"{message} ({source})" if source else message, code)


def _exit_code(error: Exception) -> int | None:
    """Return the exit code of an error; None for a fault of the program, which needs a traceback."""
    from oocpatch import errors

    if isinstance(error, (errors.PlanTooLarge, errors.RunMismatch, errors.OutputExists, errors.OutputBusy)):
        return REFUSED
    if isinstance(error, (errors.BlockFailed, errors.ClusterLost, errors.DeviceLost, errors.CorruptData)):
        return FAILED
    if isinstance(error, (errors.OocpatchError, ValueError, TypeError, OSError)):
        return BAD_INPUT
    return None


def _message(error: Exception) -> str:
    """Return the message of an error, with what to do for errors of the system."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{error}: the disk of the output or workspace is full; finished blocks are kept: make room, and the "
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


CHECK_OPTIONS = (
    *("model", "weights", "model_args", "trust_pickle", "preprocess", "augment", "axes", "level"),
    *(
        "patch_size",
        "patch_overlap",
        "patch_starts",
        "overlap_mode",
        "num_classes",
        "match",
        "padding_mode",
        "fill",
        "batch_size",
    ),
    *("device", "autocast", "channels_last", "compile", "eval_mode", "postprocess", "output_dtype"),
)
"""The options of a run that `check` takes."""


@click.group(
    name="oocpatch",  # as `dask` knows it
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="oocpatch")
def main() -> None:
    """Patch-based deep learning on volumes larger than memory."""


@main.command()
@click.argument("volume", metavar="IN[,IN...]", callback=volumes)
@click.argument("output", metavar="OUT")
@run_options()
@config_option
@scheduler_option
@click.option("--draw", type=UserPath(dir_okay=False, path_type=Path), metavar="FILE.svg", help="Draw the plan, too.")
@json_option
def plan(volume: Any, output: str, *, as_json: bool, draw: Path | None, **options: Any) -> None:
    """Show what predict would do with the same arguments: patches, blocks, memory, disk. Reads metadata only."""
    import oocpatch

    with cluster_options.as_planned(options) as planned_options:
        arguments = planned_options
        if (pattern := VolumePattern.of(volume)) is not None:
            runs = pattern.runs(output, arguments)
            volume, output = next(iter(runs.items()))
            arguments = exported(arguments, output)
            _log(f"1 of {len(runs)}: {volume} -> {output}")
        planned = oocpatch.plan(volume, output=output, **arguments)
    if draw is not None:
        draw.write_text(planned.draw())
    click.echo(planned.to_json() if as_json else str(planned))


@main.command()
@click.argument("volume", metavar="IN[,IN...]", callback=volumes)
@click.argument("output", metavar="OUT")
@run_options()
@config_option
@scheduler_option
@json_option
def predict(volume: Any, output: str, *, as_json: bool, **options: Any) -> None:
    """Run a model over the volume IN and write the result to OUT; run again to continue or to retry what failed.

    Several volumes of one grid are channels: t1.zarr,t2.zarr; or inputs of the model: image=a.zarr,prior=b.zarr. A
    pattern in quotes, such as `scans/*.nii.gz`, is a run for each volume, with results in the folder OUT.
    """
    with cluster_options.client_of(options, _log) as arguments:
        if (pattern := VolumePattern.of(volume)) is None:
            report, line = predicted(volume, output, arguments, _log, as_json=as_json)
            click.echo(_as_json(report) if as_json else line)
            return
        reports = predict_each(pattern.runs(output, arguments), arguments, _log, _described)
    failed, complete = [r for r in reports if "error" in r], sum(r["complete"] for r in reports)
    if as_json:
        click.echo(_as_json(reports))
    else:
        lines = [f"{report['volume']}: {report['error']}" for report in failed]
        click.echo("\n".join([f"{output}: {complete} of {len(reports)} volumes are complete", *lines]))
    if failed:
        _fail(f"{len(failed)} of {len(reports)} volumes failed; the same command tries these again", FAILED)


def _described(error: Exception) -> str | None:
    """Return the message of an error, on one line; None for a fault of the program, which needs a traceback."""
    return None if _exit_code(error) is None else " ".join(_message(error).split())


@main.command()
@click.argument("output", metavar="OUT")
@json_option
def status(output: str, *, as_json: bool) -> None:
    """Show how far the run that writes OUT is."""
    import oocpatch

    state = oocpatch.status(output)
    if as_json or state.state != "absent":
        click.echo(state.to_json() if as_json else str(state))
    if state.state == "absent":
        _fail(f"OUT must be an output of oocpatch, complete or begun, but nothing is at {state.output}", 2)


@main.command()
@click.argument("directory", required=False, type=UserPath(file_okay=False, path_type=Path))
@click.option("--size", type=click.IntRange(min=1), help="Edge of the volume in voxels.")
@click.option("--max-memory", metavar="SIZE", help="Bound on the memory the run adds.")
@click.option("--keep/--no-keep", default=True, show_default=True, help="Leave the volumes where they are.")
@click.option("--progress", type=click.Choice(DISPLAYS), default="auto", show_default=True, help="Show progress.")
@json_option
def demo(*, as_json: bool, **options: Any) -> None:
    """Make a volume larger than its memory limit, find the nuclei in it, and draw the result. Needs no network."""
    from oocpatch.cli.demo import run_demo

    arguments = {name: value for name, value in options.items() if value is not None or name == "directory"}
    report = run_demo(**arguments, log=_log)
    if as_json:
        click.echo(_as_json(dataclasses.asdict(report)))


@main.command()
@click.argument("volume", metavar="IN|OUT")
@run_options(CHECK_OPTIONS, optional=("model", "patch_size"))
@click.option("--boxes", type=click.IntRange(min=1), default=3, show_default=True, help="Number of boxes to compare.")
@click.option("--seed", type=int, default=0, show_default=True, help="Draw the boxes with this seed.")
@click.option("--repair", is_flag=True, help="Let the same predict command compute damaged blocks anew.")
@json_option
def check(volume: str, *, as_json: bool, repair: bool, **options: Any) -> None:
    """Verify the output OUT by reading all of it; with a model, compare predict with a plain computation on IN.

    An output is compared with the checksums that were taken while it was written. Else predict runs on a few random
    boxes of the volume IN. A model package alone, such as bioimageio:PATH, is compared with its own test tensors.
    """
    import oocpatch

    report: Any
    if options["model"] is None and _is_package(volume):
        report = oocpatch.check(volume, **options)
    elif options["model"] is None and options["patch_size"] is None:
        report = oocpatch.verify(volume, repair=repair)
    elif options["model"] is None or (options["patch_size"] is None and not _is_package(options["model"])) or repair:
        raise click.UsageError("To compare, check needs --model and --patch-size; to verify an output, neither.")
    else:
        report = oocpatch.check(volume, **options)
    click.echo(report.to_json() if as_json else str(report))
    if not report.passed:
        if repair:
            _log("damaged blocks are marked as not done: the same predict command computes them anew")
        raise click.exceptions.Exit(FAILED)


def _is_package(model: Any) -> bool:
    """Return whether a model spec names a package, which has a patch size."""
    from oocpatch.models.packages.package import PackageSpec

    return PackageSpec.of(model) is not None


for _command in (*object_commands.COMMANDS, *file_commands.COMMANDS):
    main.add_command(_command)
for _command in main.commands.values():
    read_environment(_command)


if __name__ == "__main__":
    main()
