"""The command line: one verb, one job. stdout is data, stderr is logs and progress.

Exit codes: 0 done; 1 some blocks failed, or a check did; 2 bad usage or bad input; 3 refused (plan too large, other
run, output taken); 130 interrupted. Options are the parameters of `oocpatch.predict`.

Heavy libraries are imported inside the commands: `oocpatch --help` imports neither torch nor zarr nor dask.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

if TYPE_CHECKING:
    from oocpatch.planning.plan import Plan

FAILED, BAD_INPUT, REFUSED, INTERRUPTED = 1, 2, 3, 130

Command = TypeVar("Command", bound=Callable[..., Any])


def size(text: str | int) -> int | tuple[int, ...]:
    """Read `96`, the same on every axis, or `32,96,96`, one per axis."""
    try:
        sizes = tuple(int(part) for part in str(text).split(","))
    except ValueError:
        raise click.BadParameter(f"sizes are whole numbers of voxels, such as 96 or 32,96,96, got {text!r}.") from None
    return sizes if len(sizes) > 1 else sizes[0]


def size_or_auto(text: str | int) -> int | str | tuple[int, ...]:
    """Read a size, or `auto`."""
    return "auto" if text == "auto" else size(text)


def setting(text: str) -> Any:
    """Read JSON if it is that, else the text itself.

    >>> setting("3"), setting("[1, 2]"), setting("unet")
    (3, [1, 2], 'unet')
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def settings(_context: object, _parameter: object, texts: tuple[str, ...]) -> dict[str, Any]:
    """Read `NAME=VALUE` pairs."""
    for text in texts:
        if not text.partition("=")[0].isidentifier() or "=" not in text:
            raise click.BadParameter(f"arguments are NAME=VALUE, such as depth=3, got {text!r}.")
    return {name: setting(value) for name, _, value in (text.partition("=") for text in texts)}


def one_or_more(_context: object, _parameter: object, texts: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """One value as it is, several as a tuple."""
    return (texts[0] if len(texts) == 1 else texts) if texts else None


def number(text: str | float) -> int | float:
    """Read an integer if it is one, so that it stays exact, else a float."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    raise click.BadParameter(f"expected a number, got {text!r}.")


def per_head(names: str = "") -> Callable[[str], str | dict[str, str]]:
    """Read `hann`, the same for every head, or `scores=hann,labels=crop`, one per head; of the given names, if any."""
    allowed = names.split()

    def read(text: str) -> str | dict[str, str]:
        parts = [part.rpartition("=") for part in text.split(",")]
        unknown = [value for _, _, value in parts if allowed and value not in allowed]
        if unknown or (len(parts) > 1 and not all(name for name, _, _ in parts)):
            told = f"one of {', '.join(allowed)}" if allowed else "a value"
            raise click.BadParameter(f"expected {told}, or one per head such as scores={text}, got {text!r}.")
        return {name: value for name, _, value in parts} if parts[0][0] else text

    return read


class _Commands(click.Group):
    """A group whose commands end in one line and an exit code, never in a traceback for a user's mistake."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except KeyboardInterrupt:
            _fail("interrupted; what is finished is kept, the same command continues", INTERRUPTED)
        except Exception as error:
            code = _exit_code(error)
            if code is None:
                raise
            _fail(f"{error}" or type(error).__name__, code)


def _exit_code(error: Exception) -> int | None:
    """None for what is not the user's mistake: a traceback then helps whoever mends it."""
    from oocpatch import errors

    if isinstance(error, (errors.PlanTooLarge, errors.RunMismatch, errors.OutputExists, errors.OutputBusy)):
        return REFUSED
    if isinstance(error, (errors.BlockFailed, errors.CorruptData)):
        return FAILED
    if isinstance(error, (errors.OocpatchError, ValueError, TypeError, OSError)):
        return BAD_INPUT
    return None


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
    _option("--batch-size", type=size_or_auto, default=1, help="Patches per call of the model; auto: chosen."),
    _option("--device", default="auto", help="Where the model runs: cpu, cuda, cuda:1."),
    _option("--autocast", is_flag=True, help="Run the model in mixed precision."),
    _option(
        "--postprocess",
        type=per_head("argmax softmax sigmoid"),
        metavar="[argmax|softmax|sigmoid]",
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
    _option("--output-chunks", type=size, help="Chunk shape of the output; default: the planner's choice."),
    _option("--output-shards", type=size, help="Shard shape of the output; default: no shards."),
    _option("--output-fill", type=number, default=0, help="Value of voxels that no patch covered."),
    _option(
        "--max-memory", metavar="SIZE", default="auto", help="Bound on the memory that the run adds, such as 2GiB."
    ),
    _option("--mask", metavar="ZARR", help="Skip patches without a nonzero voxel in this mask, of any resolution."),
    _option("--skip-empty", is_flag=True, help="Skip patches of which nothing was ever written."),
    _option("--max-disk", metavar="SIZE", help="Bound on the workspace; default: none."),
    _option("--block-shape", type=size, help="Voxels of one unit of work; default: the planner's choice."),
    _option("--workspace", metavar="DIRECTORY", help="Where unfinished work lies; default: beside the output."),
    _option("--workers", type=int, help="Blocks computed at a time; default: the planner's choice."),
    _option("--resume/--no-resume", default=True, help="Continue an unfinished run."),
    _option("--overwrite", is_flag=True, help="Replace what oocpatch wrote here before."),
    _option("--allow-nonfinite", is_flag=True, help="Keep the model's NaN and infinity instead of failing the block."),
)

_json_option = _option("--json", "as_json", is_flag=True, help="Print JSON.")
_progress_option = _option(
    "--progress",
    type=_one_of("auto bar none"),
    default="auto",
    help="Progress on stderr; auto: a bar on a terminal.",
)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="oocpatch")
def main() -> None:
    """Patch-based deep learning on volumes larger than memory."""


@main.command()
@click.argument("volume", metavar="IN")
@click.argument("output", metavar="OUT")
@_model_options
@_patch_options
@_run_options
@_json_option
def plan(volume: str, output: str, *, as_json: bool, **options: Any) -> None:
    """Show what predict would do with the same arguments: patches, blocks, memory, disk. Reads metadata only."""
    made = _plan(volume, output, options)
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
    made = _plan(volume, output, {**options, "progress": progress})
    _log(str(made))
    try:
        made.run()
    except BlockFailed as error:
        if as_json:
            failed = {str(block): message for block, message in error.failures.items()}
            click.echo(_as_json({"output": output, "complete": False, "failed": failed}))
        raise
    report = {
        "output": output,
        "complete": True,
        "seconds": round(time.monotonic() - start, 3),
        "patches": made.patches,
        "blocks": made.blocks,
        "uncovered_voxels": _uncovered_voxels(output),
    }
    line = "{output}: {seconds:.1f} s, {patches} patches, {uncovered_voxels} uncovered voxels"
    click.echo(_as_json(report) if as_json else line.format(**report))


def _uncovered_voxels(output: str) -> int:
    from oocpatch.storage.output import inspect_output

    record = inspect_output(Path(output))
    return int(record.details["uncovered_voxels"]) if record is not None else 0


def _plan(volume: str, output: str, options: dict[str, Any]) -> Plan:
    import oocpatch

    return oocpatch.plan(volume, output=output, **options)


@main.command()
@click.argument("output", metavar="OUT")
@_json_option
def status(output: str, *, as_json: bool) -> None:
    """Say how far the run that writes OUT is."""
    from oocpatch.progress import status as status_of

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
    from oocpatch.demo import run_demo

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
        from oocpatch.verifying import verify

        report = verify(volume, repair=repair)
    elif options["model"] is None or options["patch_size"] is None or repair:
        raise click.UsageError("To compare, check needs --model and --patch-size; to verify an output, neither.")
    else:
        from oocpatch.checking import check as run_check

        report = run_check(volume, **options)
    click.echo(report.to_json() if as_json else str(report))
    if not report.passed:
        if repair:
            _log("what is damaged is marked as not done: the same predict command computes it anew")
        raise click.exceptions.Exit(FAILED)


for _parameter in check.params:
    if _parameter.name in ("model", "patch_size"):
        _parameter.required = False  # nothing is computed to verify an output


if __name__ == "__main__":
    main()
