"""The pictures of `docs/performance.md`, from what `benchmarks.report` has measured. Needs the extra `benchmarks`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.measure import MIB
from benchmarks.tables import memory_by_edge, ratios
from benchmarks.workloads import WORKLOADS

OURS, OTHERS, COPY = "#1b6ca8", "#b8b8b8", "#6f6f6f"


def draw(directory: Path, results: dict[str, Any]) -> None:
    """Draw `speed.svg` and `memory.svg`, as far as there are figures.

    Raises:
        SystemExit: matplotlib is not there.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise SystemExit("the plots need matplotlib: pip install 'oocpatch[benchmarks]'") from error
    mpl.use("svg")
    # Text as text, and the same names each time: a small file, and one that changes only where figures do.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "oocpatch", "font.size": 9})
    directory.mkdir(parents=True, exist_ok=True)
    _speed(directory / "speed.svg", results)
    _memory(directory / "memory.svg", results)


def _speed(file: Path, results: dict[str, Any]) -> None:
    """A bar for each contender of each workload that has a copy to be compared with."""
    import matplotlib.pyplot as plt  # noqa: PLC0415

    bars: dict[str, list[tuple[str, float, str]]] = {}
    for name, workload in WORKLOADS.items():
        for contender in workload.contenders if workload.against == "copy" else ():
            if times := ratios(results, name, contender.name):
                colour = {"ours": OURS, "copy": COPY}.get(contender.kind, OTHERS)
                bars.setdefault(name, []).append((contender.name, statistics.median(times), colour))
    if not bars:
        return
    heights = [len(rows) for rows in bars.values()]
    figure, axes = plt.subplots(
        len(bars), 1, figsize=(7.5, 0.24 * sum(heights) + 0.7 * len(bars)), height_ratios=heights, squeeze=False,
        sharex=True, layout="constrained",
    )  # fmt: skip
    for (name, rows), axis in zip(bars.items(), axes[:, 0], strict=True):
        rows = sorted(rows, key=lambda row: -row[1])  # noqa: PLW2901
        axis.barh([row[0] for row in rows], [row[1] for row in rows], color=[row[2] for row in rows])
        for place, (_, times, _) in enumerate(rows):
            axis.text(times * 1.05, place, f"{times:.1f}" if times >= 10 else f"{times:.2f}", va="center", fontsize=8)
        axis.set_title(WORKLOADS[name].title, fontsize=9, loc="left")
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.axvline(1, color=COPY, linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("times the best copy")
    axes[-1, 0].xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes[-1, 0].set_xlim(right=axes[-1, 0].get_xlim()[1] * 1.5)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _memory(file: Path, results: dict[str, Any]) -> None:
    """A line for each contender, over the edge of the volume."""
    import matplotlib.pyplot as plt  # noqa: PLC0415

    lines = memory_by_edge(results)
    if not lines:
        return
    figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for name, found in lines.items():
        ours = name.startswith("oocpatch")
        axis.plot(
            list(found), [bytes_ / MIB for bytes_ in found.values()], marker="o", label=name,
            linewidth=2.5 if ours else 1.2, linestyle="-" if ours else "--",
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    edges = sorted({edge for found in lines.values() for edge in found})
    axis.set_xticks(edges, [f"{edge}³" for edge in edges])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axis.set_ylabel("MiB added")
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
