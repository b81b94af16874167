"""The door: `python -m benchmarks VERB`; `python -m benchmarks --help` lists the verbs."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import (
    content,
    drawings,
    flush,
    gpu,
    instances,
    ledger,
    many,
    memory,
    networks,
    nnunet,
    object_tables,
    objects,
    peers,
    profile,
    report,
    sampling,
    slide,
    speed,
    training,
    workers,
)
from benchmarks.measure import TaskFailed


def main(words: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line, or `words` instead of it, asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for benchmark in (
        speed,
        memory,
        networks,
        ledger,
        content,
        flush,
        many,
        profile,
        sampling,
        training,
        slide,
        instances,
        nnunet,
        gpu,
        object_tables,
        objects,
        workers,
    ):
        verb = _verb(verbs, benchmark)
        verb.add_argument("--directory", type=Path, help="where the volumes go (default: a temporary directory)")
        verb.add_argument("--patch-size", type=int, default=96)
        verb.add_argument("--overlap-mode", default="hann")
        verb.add_argument("--workers", type=int, help="default: the planner's choice")
        verb.add_argument("--json", action="store_true", help="print JSON instead of a table")
        benchmark.add_arguments(verb)
        verb.set_defaults(run=lambda arguments, run=benchmark.run: _in_directory(run, arguments))
    for command in (report, peers, drawings):
        verb = _verb(verbs, command)
        command.add_arguments(verb)
        verb.set_defaults(run=command.run)
    arguments = parser.parse_args(words)
    try:
        arguments.run(arguments)
    except TaskFailed as failure:
        raise SystemExit(f"a task of the benchmark failed: {failure}") from failure


def _verb(verbs: Any, module: ModuleType) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(
        module.__name__.rpartition(".")[2], help=module.__doc__, description=module.__doc__
    )
    return verb


def _in_directory(run: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> None:
    """Run with the directory that was given, or with one that is removed afterwards."""
    if arguments.directory is not None:
        arguments.directory.mkdir(parents=True, exist_ok=True)
        run(arguments)
        return
    with tempfile.TemporaryDirectory(prefix="oocpatch-benchmark-") as folder:
        arguments.directory = Path(folder)
        run(arguments)


if __name__ == "__main__":
    main()
