"""The door: `python -m benchmarks speed | memory | ledger | flush | profile | sampling | slide`."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks import flush, ledger, memory, profile, sampling, slide, speed


def main() -> None:
    """Run the benchmark that was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="speed | memory | ledger | flush | profile | sampling | slide")
    for benchmark in (speed, memory, ledger, flush, profile, sampling, slide):
        name = benchmark.__name__.rpartition(".")[2]
        verb = verbs.add_parser(name, help=benchmark.__doc__, description=benchmark.__doc__)
        verb.add_argument("--directory", type=Path, help="where the volumes go (default: a temporary directory)")
        verb.add_argument("--patch-size", type=int, default=96)
        verb.add_argument("--overlap-mode", default="hann")
        verb.add_argument("--workers", type=int, help="default: the planner's choice")
        verb.add_argument("--json", action="store_true", help="print JSON instead of a table")
        benchmark.add_arguments(verb)
        verb.set_defaults(run=benchmark.run)
    arguments = parser.parse_args()
    if arguments.directory is not None:
        arguments.directory.mkdir(parents=True, exist_ok=True)
        arguments.run(arguments)
    else:
        with tempfile.TemporaryDirectory(prefix="oocpatch-benchmark-") as folder:
            arguments.directory = Path(folder)
            arguments.run(arguments)


if __name__ == "__main__":
    main()
