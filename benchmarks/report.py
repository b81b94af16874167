"""All workloads with all contenders, in turns: figures go to a JSON file, and from there to tables and pictures."""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import LIBRARIES, PEERS, commit, machine, versions
from benchmarks.measure import TaskFailed, in_fresh_process, table
from benchmarks.peers import python_of
from benchmarks.sources import source
from benchmarks.tables import write_page
from benchmarks.workloads import USUAL, WORKLOADS, Contender, Workload

SLOW = 60
"""Contenders that take longer than these seconds run once."""
PATIENCE = 10
"""How many times the expected seconds a contender may take, with two minutes for nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    parser.add_argument("--results", type=Path, required=True, metavar="FILE", help="JSON; what it has is not repeated")
    parser.add_argument("--directory", type=Path, help="where the volumes go, 10 GB (default: beside the results)")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="what `peers --make-environment` made; else no peers")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=USUAL)
    parser.add_argument("--contenders", nargs="+", default=["*"], metavar="PATTERN", help="such as 'copy*' 'oocpatch*'")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-rounds", type=int, default=1, help="rounds of the peers; slow ones run once anyway")
    parser.add_argument("--most-seconds", type=float, metavar="S", help="leave out contenders that take longer")
    parser.add_argument("--shrink", type=int, default=1, help="divide the edges of the volumes, to try it out")
    parser.add_argument("--again", action="store_true", help="repeat what failed")
    parser.add_argument("--estimate", action="store_true", help="only tell how long it would take")
    parser.add_argument("--note", help="a sentence on the circumstances, for the page")
    parser.add_argument("--page", type=Path, help="Markdown file whose tables are written anew")
    parser.add_argument("--pictures", type=Path, help="directory for the plots")


def run(arguments: argparse.Namespace) -> None:
    """Measure what is missing, and write what is known."""
    cells = list(_cells(arguments))
    if arguments.estimate:
        print(_estimate(cells))
        return
    results = _open(arguments)
    directory = arguments.directory or arguments.results.parent
    directory.mkdir(parents=True, exist_ok=True)
    for number, (name, round_, contender) in enumerate(cells):
        workload = WORKLOADS[name]
        kept = results["workloads"].setdefault(name, {"edge": workload.edge(arguments.shrink), "records": {}})
        records = kept["records"].setdefault(contender.name, [])
        if len(records) > round_ and not (arguments.again and "failed" in records[round_]):
            continue
        record = _measure(arguments, directory, workload, contender)
        records[round_ : round_ + 1] = [record]
        _save(arguments.results, results)
        said = record.get("failed") or " ".join(f"{k} {record[k]:.2f}" for k in ("wall", "first") if k in record)
        print(f"{number + 1}/{len(cells)}  {name}, round {round_ + 1}: {contender.name}: {said}", file=sys.stderr)
    _save(arguments.results, results)
    if arguments.page is not None:
        write_page(arguments.page, results)
    if arguments.pictures is not None:
        from benchmarks.plots import draw  # noqa: PLC0415  # matplotlib, an extra

        draw(arguments.pictures, results)


def _cells(arguments: argparse.Namespace) -> Iterator[tuple[str, int, Contender]]:
    """Workload, round and contender, in the order in which they are measured: contenders take turns."""
    for name in arguments.workloads:
        for round_ in range(arguments.rounds):
            for contender in WORKLOADS[name].contenders:
                wanted = any(fnmatch.fnmatch(contender.name, pattern) for pattern in arguments.contenders)
                most = arguments.most_seconds
                if not wanted or (most is not None and contender.seconds > most):
                    continue
                if contender.environment != "here" and arguments.peers is None:
                    continue
                if round_ < _rounds(arguments, WORKLOADS[name], contender):
                    yield name, round_, contender


def _rounds(arguments: argparse.Namespace, workload: Workload, contender: Contender) -> int:
    rounds: int = min(arguments.rounds, arguments.peer_rounds) if contender.kind == "peer" else arguments.rounds
    return min(rounds, 1) if contender.seconds > SLOW or workload.once else rounds


def _estimate(cells: list[tuple[str, int, Contender]]) -> str:
    """About how long each workload takes at full size on two cores."""
    seconds: dict[str, float] = {}
    for name, _, contender in cells:
        seconds[name] = seconds.get(name, 0) + contender.seconds
    rows = [[name, WORKLOADS[name].title, f"{total / 60:.1f}"] for name, total in seconds.items()]
    return table(["workload", "", "minutes"], [*rows, ["all", "", f"{sum(seconds.values()) / 60:.1f}"]])


def _measure(
    arguments: argparse.Namespace, directory: Path, workload: Workload, contender: Contender
) -> dict[str, Any]:
    """One figure; a failure is a figure, too."""
    edge = workload.edge(arguments.shrink)
    module, _, task = contender.task.rpartition(".")
    job: dict[str, Any] = {}
    if task != "print_help":
        volume = source(directory, workload.source, edge, workload.chunk, contender.zarr_format)
        job = {"source": str(volume), "target": str(directory / "result.zarr"), "patch": workload.patch}
        job |= {"overlap": workload.overlap, "chunk": workload.chunk, "model": workload.model}
    python = sys.executable
    if contender.environment != "here":
        python = str(python_of(arguments.peers, contender.environment).absolute())
    try:
        return in_fresh_process(
            task, f"benchmarks.{module}", python=python, timeout=120 + PATIENCE * contender.seconds,
            **contender.arguments, **job,
        )  # fmt: skip
    except TaskFailed as failure:
        return {"failed": str(failure)[:200]}


def _open(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the file has already, or an empty beginning; figures of another machine or another size do not mix."""
    here = {"machine": machine(), "shrink": arguments.shrink}
    if arguments.results.exists():
        results: dict[str, Any] = json.loads(arguments.results.read_text())
        for key, value in here.items():
            if results[key] != value:
                raise SystemExit(
                    f"{arguments.results} has figures of {key} {results[key]}, this is {value}: name another file"
                )
    else:
        results = {**here, "versions": {}, "workloads": {}, "note": ""}
    results["when"] = f"{datetime.now(UTC):%Y-%m-%d}"
    results["commit"] = commit()
    results["note"] = arguments.note if arguments.note is not None else results["note"]
    results["versions"]["here"] = versions([library for library in LIBRARIES if library not in PEERS])
    environments = {c.environment for workload in WORKLOADS.values() for c in workload.contenders} - {"here"}
    for name in sorted(environments) if arguments.peers is not None else ():
        if not (python := python_of(arguments.peers, name).absolute()).exists():
            raise SystemExit(f"{python} is not there; make it with `python -m benchmarks peers --make-environment`")
        results["versions"][name] = in_fresh_process("versions", "benchmarks.machine", python=python)
    return results


def _save(file: Path, results: dict[str, Any]) -> None:
    """Replace the file as a whole, so that it can be stopped at any time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{time.time_ns()}")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(file)
