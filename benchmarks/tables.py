"""The tables of `docs/performance.md`, from what `benchmarks.report` has measured; the prose around them stays."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks.contest import KNOWN
from benchmarks.measure import MIB
from benchmarks.workloads import EDGES, WORKLOADS, Contender, Workload

ROUNDING = 1e-5
"""Largest error, relative to the largest value of the volume, that is called rounding."""

Results = dict[str, Any]


def write_page(page: Path, results: Results) -> None:
    """Write the tables of a page anew, each between `<!-- table: NAME -->` and `<!-- end of table -->`."""
    tables = {"machine": machine_table(results), "targets": targets_table(results), "memory": memory_table(results)}
    for name, workload in WORKLOADS.items():
        if name == "start":
            tables[name] = start_table(results)
        elif workload.against:
            tables[name] = speed_table(results, name)
    text = page.read_text()
    places = set(re.findall(r"<!-- table: ([\w-]+) -->", text))
    if unknown := places - set(tables):
        raise SystemExit(f"{page} has places for tables that there are not: {', '.join(sorted(unknown))}")
    for name in places:
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end of table -->)"
        filled = f"\n{tables[name] or 'Not measured.'}\n\n"
        text = re.sub(pattern, lambda found, filled=filled: found[1] + filled + found[2], text, flags=re.DOTALL)
    page.write_text(text)


def ratios(results: Results, name: str, contender: str, key: str = "wall") -> list[float]:
    """In each round, how many times the yardstick's time a contender took, all in all or for one part of it."""
    workload, kept = WORKLOADS[name], results["workloads"].get(name, {"records": {}})["records"]
    yardsticks = [c.name for c in workload.contenders if c.kind == workload.against]
    found = []
    for round_, record in enumerate(kept.get(contender, [])):
        rounds = [kept[y][min(round_, len(kept[y]) - 1)] for y in yardsticks if kept.get(y)]
        # A bare model's time is the time of the model; a copy's is all it takes.
        times = [r.get("inference", r["wall"]) for r in rounds if "failed" not in r]
        if times and "failed" not in record and (key == "wall" or key in record):
            found.append(record[key] / min(times))
    return found


def speed_table(results: Results, name: str) -> str:
    """Contenders of a workload: time, memory, traffic, and whether what came out is what went in."""
    workload = WORKLOADS[name]
    yardstick = "the best copy" if workload.against == "copy" else "the network alone"
    head = ["", "seconds", f"times {yardstick}", "CPU s", "memory added", "GB read", "GB written"]
    head += ["what came out"] if workload.model in KNOWN else ["times, without reading and writing"]
    rows = []
    for contender, records in _records(results, name):
        good = [r for r in records if "failed" not in r]
        if not good:
            rows.append([contender.name, f"failed: {_escaped(records[0]['failed'])}", *[""] * (len(head) - 2)])
            continue
        times = ratios(results, name, contender.name)
        row = [
            _strong(contender, contender.name), _spread([r["wall"] for r in good]),
            _strong(contender, f"{statistics.median(times):.2f}") if times else "",
            f"{_median(good, 'cpu'):.1f}", _memory(good), _gigabytes(good, "read"), _gigabytes(good, "written"),
        ]  # fmt: skip
        inside = ratios(results, name, contender.name, "inference")
        alone = f"{statistics.median(inside):.2f}" if inside else ""
        rows.append([*row, _exactness(workload, good) if workload.model in KNOWN else alone])
    return _markdown(head, rows)


def start_table(results: Results) -> str:
    """Seconds until the first patch, after the imports, and what the imports take."""
    rows = []
    for contender, records in _records(results, "start"):
        good = [r for r in records if "failed" not in r]
        if not good:
            rows.append([contender.name, f"failed: {_escaped(records[0]['failed'])}", ""])
            continue
        first, imports = (_spread([r[key] for r in good]) for key in ("first", "imports"))
        rows.append([_strong(contender, contender.name), first, imports if _median(good, "imports") else ""])
    return _markdown(["", "seconds", "imports before"], rows)


def memory_table(results: Results) -> str:
    """Memory that is added, by the edge of the volume."""
    edges = {name: results["workloads"][name]["edge"] for name in EDGES if name in results["workloads"]}
    rows = [
        [name, *(f"{found[edge] / MIB:.0f} MiB" if edge in found else "" for edge in edges.values())]
        for name, found in memory_by_edge(results).items()
    ]
    return _markdown(["", *(f"{edge}^3" for edge in edges.values())], rows)


def memory_by_edge(results: Results) -> dict[str, dict[int, float]]:
    """Bytes that each contender adds, by the edge of the volume, for those of whom two sizes are known."""
    found: dict[str, dict[int, float]] = {}
    for name in EDGES:
        for contender, records in _records(results, name):
            good = [r["peak"] for r in records if "failed" not in r]
            if good and contender.kind != "copy":
                found.setdefault(contender.name, {})[results["workloads"][name]["edge"]] = max(good)
    return {name: edges for name, edges in found.items() if len(edges) > 1}


def targets_table(results: Results) -> str:
    """What was aimed at, and what was reached."""
    rows = []
    for name, workload in WORKLOADS.items():
        for contender, target in workload.targets.items():
            records = [r for c, r in _records(results, name) if c.name == contender]
            good = [r for r in records[0] if "failed" not in r] if records else []
            if not good:
                continue
            if workload.against:
                reached, unit = statistics.median(ratios(results, name, contender) or [float("nan")]), " times"
            else:
                reached, unit = _median(good, "first"), " s"
            met = "yes" if reached <= target else "no"
            rows.append([f"{name}: {contender}", f"{target:g}{unit}", f"{reached:.2f}{unit}", met])
    return _markdown(["", "aimed at", "reached", "met"], rows)


def machine_table(results: Results) -> str:
    """Where and with what it was measured."""
    here = results["machine"]
    where = f"{here['processor']}, {here['cores']} cores, {here['memory_gib']} GiB, {here['system']}, "
    rows = [
        ["measured", f"{results['when']}, commit {results['commit'] or 'unknown'}"],
        ["machine", where + f"Python {here['python']}"],
    ]
    titles = {"here": "oocpatch and copies", "zarr3": "peers", "zarr2": "patchly"}
    rows += [
        [titles[name], ", ".join(f"{library} {version}" for library, version in found.items())]
        for name, found in results["versions"].items()
    ]
    if results["shrink"] > 1:
        smaller = f"edges divided by {results['shrink']}, but not below two patches: smaller than the text says"
        rows.append(["volumes", smaller])
    rows += [["remark", results["note"]]] if results["note"] else []
    return _markdown(["", ""], rows)


def _records(results: Results, name: str) -> list[tuple[Contender, list[dict[str, Any]]]]:
    kept = results["workloads"].get(name, {"records": {}})["records"]
    return [(c, kept[c.name]) for c in WORKLOADS[name].contenders if kept.get(c.name)]


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows] if rows else []
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def _strong(contender: Contender, text: str) -> str:
    return f"**{text}**" if contender.kind == "ours" else text


def _escaped(text: str) -> str:
    return re.sub(r"[|<>`*_]", " ", text)


def _median(records: list[dict[str, Any]], key: str) -> float:
    return float(statistics.median(r[key] for r in records))


def _spread(values: list[float]) -> str:
    """The median, and how far the rounds lie apart."""
    digits = 1 if statistics.median(values) >= 10 else 2
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _memory(records: list[dict[str, Any]]) -> str:
    """The largest of the rounds, and what the plan had promised."""
    text = f"{max(r['peak'] for r in records) / MIB:.0f} MiB"
    promised = records[0].get("projected_memory")
    return f"{text} of {promised / MIB:.0f}" if promised else text


def _gigabytes(records: list[dict[str, Any]], key: str) -> str:
    return "" if records[0][key] is None else f"{_median(records, key) / 1e9:.2f}"


def _exactness(workload: Workload, records: list[dict[str, Any]]) -> str:
    largest = max(r["error"] for r in records)
    if largest == 0:
        return "the same bits"
    if largest <= ROUNDING * (255 if workload.source == "slide" else 1):
        return f"the same to {largest:.0e}"
    return f"wrong: off by {largest:.2g}, {records[0]['mean_error']:.2g} on average"
