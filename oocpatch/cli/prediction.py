"""The runs of `predict`: of one volume, or of each one that a pattern matches, with the model loaded once."""

from __future__ import annotations

import glob
import json
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from oocpatch.system import is_url


def predicted(
    volume: Any, output: str, arguments: Mapping[str, Any], log: Callable[[str], None] | None, *, as_json: bool = False
) -> tuple[dict[str, Any], str]:
    """Run a model over one volume; return a report of the run, and a line that says the same.

    Args:
        volume: the volume.
        output: where the result is written.
        arguments: the other arguments of `predict`.
        log: shows the plan; None: it is not shown.
        as_json: print the blocks that failed as JSON, if some did, before the error is raised.
    """
    import oocpatch

    start = time.monotonic()
    planned = oocpatch.plan(volume, output=output, **arguments)
    was_complete = not (arguments.get("overwrite") or arguments.get("update")) and _counts(output) is not None
    if log is not None:
        log(str(planned))
    try:
        planned.run()
    except oocpatch.BlockFailed as error:
        if as_json:
            click.echo(json.dumps({"output": output, "complete": False, "failed": failed_blocks(error)}, indent=1))
        raise
    seconds = round(time.monotonic() - start, 3)
    counts = _counts(output)
    report = {"output": output, "complete": counts is not None, "seconds": seconds}
    line = "{output}: {seconds:.1f} s, this part is done, others are not"
    if counts is not None:
        report |= {"patches": planned.patches, "blocks": planned.blocks, **counts}
        report |= {"export": arguments["export"]} if arguments.get("export") is not None else {}
        line = "{output}: was complete, " if was_complete else "{output}: {seconds:.1f} s, "
        line += "{patches} patches, {uncovered_voxels:,} uncovered voxels"
        if counts["nonfinite_voxels"]:
            line += ", {nonfinite_voxels} that are NaN or infinite"
        if isinstance(counts.get("objects"), int):
            line += ", {objects} objects"
    return report, line.format(**report)


def failed_blocks(error: Any) -> dict[str, str]:
    """Return the messages of blocks that failed, by their index."""
    return {str(block): message for block, message in error.failures.items()}


def _counts(output: str) -> dict[str, Any] | None:
    """Return the numbers of uncovered and of non-finite voxels, and of objects; None while parts are not done.

    There are objects of a model that returns them: a list with several indices of time, a dict with several heads.
    """
    from oocpatch.outputs.record import inspect_output
    from oocpatch.storage.paths import output_path

    record = inspect_output(output_path("output", output))
    if record is None or not record.complete:
        return None
    counts: dict[str, Any] = {n: int(record.details.get(n, 0)) for n in ("uncovered_voxels", "nonfinite_voxels")}
    if objects := record.details.get("objects"):
        single = {None: objects} if isinstance(objects, list) else objects
        numbers = {head: found[0] if len(found) == 1 else found for head, found in single.items()}
        counts["objects"] = numbers.get(None, numbers)
    return counts


@dataclass(frozen=True, slots=True)
class VolumePattern:
    """A pattern of paths, such as `scans/*.nii.gz`, or `scans/*.h5::/data` for a part of each file."""

    text: str

    @classmethod
    def of(cls, volume: Any) -> VolumePattern | None:
        """Return the pattern that an argument is; None for a path that exists, a URL, and several volumes."""
        is_path = isinstance(volume, str) and not is_url(volume) and not os.path.lexists(volume)
        return cls(volume) if is_path and glob.has_magic(volume.partition("::")[0]) else None

    def runs(self, folder: str, arguments: Mapping[str, Any]) -> dict[str, str]:
        """Return the output of each volume, named after it in a folder; what lies in that folder is no volume.

        Args:
            folder: path or URL of the folder.
            arguments: the other arguments of `predict`.

        Raises:
            click.UsageError: when nothing matches, two outputs would be one, or an argument is for one volume only.
        """
        from oocpatch.storage.paths import expand_home

        pattern, separator, part = self.text.partition("::")
        here = Path(expand_home(folder)).absolute()
        matches = [Path(path) for path in sorted(glob.glob(expand_home(pattern), recursive=True))]  # noqa: PTH207 - absolute patterns, too
        paths = [path for path in matches if here not in (path.absolute(), *path.absolute().parents)]
        if not paths:
            raise click.UsageError(f"a pattern must match a volume, but {self.text!r} matches none: check the path.")
        if here.is_file() or (here / "zarr.json").exists() or (here / ".zgroup").exists():
            raise click.UsageError(f"with a pattern, OUT must be a folder for the results, and {folder!r} is not one.")
        if not str(arguments.get("export") or ".").startswith("."):
            raise click.UsageError("with a pattern, --export must be an ending for the name of each result: .nii.gz")
        runs: dict[str, str] = {}
        for path in paths:
            output = f"{folder.rstrip('/')}/{result_name(path.name)}"
            if output in runs.values():
                other = next(volume for volume, taken in runs.items() if taken == output)
                raise click.UsageError(
                    f"volumes of a pattern must have different names, but the results of {other} and {path} would "
                    f"both be {output}: run them with two patterns and two folders."
                )
            runs[f"{path}{separator}{part}"] = output
        return runs


def result_name(name: str) -> str:
    """Return the name of the result of a volume.

    >>> result_name("a.nii.gz"), result_name("b.ome.zarr"), result_name("c.v2")
    ('a.zarr', 'b.zarr', 'c.v2.zarr')
    """
    from oocpatch.volumes.formats.spec import SUFFIXES

    suffixes = (".zarr", *(suffix for of_format in SUFFIXES.values() for suffix in of_format))
    for suffix in sorted(suffixes, key=len, reverse=True):
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            name = name[: -len(suffix)]
            break
    return f"{name.removesuffix('.ome')}.zarr"


def exported(arguments: Mapping[str, Any], output: str) -> dict[str, Any]:
    """Return the arguments of a volume of a pattern, with the file of its result for the ending to export.

    >>> exported({"export": ".nii.gz"}, "labels/anna.zarr")
    {'export': 'labels/anna.nii.gz'}
    """
    ending = arguments.get("export")
    return {**arguments, **({} if ending is None else {"export": output.removesuffix(".zarr") + ending})}


def predict_each(
    runs: Mapping[str, str],
    arguments: Mapping[str, Any],
    log: Callable[[str], None],
    describe: Callable[[Exception], str | None],
) -> Sequence[dict[str, Any]]:
    """Run a model over volumes, one after the other, and return a report of each; one that fails stops no other.

    Args:
        runs: the output of each volume.
        arguments: the other arguments of `predict`.
        log: shows which volume it is, and the first plan.
        describe: returns the message of an error; None for a fault of the program.

    Raises:
        ClusterLost, DeviceLost: which would stop the other volumes as well.
    """
    from oocpatch import errors
    from oocpatch.models.reuse import loaded_once

    reports: list[dict[str, Any]] = []
    with loaded_once():
        for number, (volume, output) in enumerate(runs.items(), start=1):
            log(f"{number} of {len(runs)}: {volume} -> {output}")
            try:
                report, _ = predicted(volume, output, exported(arguments, output), log if number == 1 else None)
            except (errors.ClusterLost, errors.DeviceLost):
                raise
            except Exception as error:  # noqa: BLE001 - the others are to be done whatever it is
                message = describe(error) or "".join(traceback.format_exception(error))
                log(f"{volume} failed: {message}")
                report = {"output": output, "complete": False, "error": message}
                if isinstance(error, errors.BlockFailed):
                    report["failed"] = failed_blocks(error)
            reports.append({"volume": volume, **report})
    return reports
