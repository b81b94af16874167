"""Drawings of plans and grids as SVG: blocks, seams and patches in sections through the volume.

Of many blocks the first ones are drawn. Pictures of results are made by `visualization`.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator, Sequence

from oocpatch.planning.blocks import BlockGrid
from oocpatch.planning.grid import GridAxis, PatchGrid

SIDE = 300
"""Longest side of a section, in pixels."""

MOST = 16
"""Most blocks, and most patches, drawn along an axis."""

GAP, TOP, CAPTION, FOOT = 28, 16, 22, 40

STYLE = """\
<style>
.paper{fill:#ffffff}.text{font:13px sans-serif;fill:#1f2328}.small{font:11px sans-serif;fill:#59636e}
.even{fill:#dbe9f9}.odd{fill:#eef4fb}.core{stroke:#0b57a4;stroke-width:1}.seam{fill:#f0883e;fill-opacity:.55}
.patch{fill:none;stroke:#1a7f37;stroke-width:.8;stroke-opacity:.55}.first{fill:#1a7f37;fill-opacity:.22}
.volume{fill:none;stroke:#1f2328;stroke-width:1.5}.sweep{stroke:#1f2328;stroke-width:1.5}
</style>"""


def draw_plan(blocks: BlockGrid, names: Sequence[str], spatial: int) -> str:
    """Draw sections through the last three of the spatial axes: cores, their seams, and the patches of one block.

    >>> grid = PatchGrid.of((64, 64), (16, 16), (8, 8))
    >>> svg = draw_plan(BlockGrid.of(grid, (32, 32), (8, 8), 0, crop=False), "yx", 2)
    >>> svg.count('class="core'), svg.count('class="patch')
    (4, 16)
    """
    panels = [_blocks(blocks, pair, names) for pair in _pairs(len(names), spatial)]
    seams = any('class="seam"' in elements for _, _, elements in panels)
    seam = [("seam", "seam, kept for the neighbour")] if seams else []
    return _figure(panels, [("even core", "core of a block"), *seam, ("patch first", "patch")])


def draw_grid(grid: PatchGrid) -> str:
    """Draw sections through the last three axes with the patches."""
    ndim = len(grid.axes)
    names = [f"axis {a}" for a in range(ndim)]
    return _figure([_patches(grid, pair, names) for pair in _pairs(ndim, ndim)], (("patch first", "patch"),))


def _pairs(ndim: int, spatial: int) -> list[tuple[int, ...]]:
    """Return the axes of each section, down and across."""
    shown = range(ndim - min(3, spatial), ndim)
    return [(shown[0],)] if len(shown) == 1 else list(reversed(list(itertools.combinations(shown, 2))))


Section = tuple[float, float, str]
"""Width, height and elements."""


class _Viewport:
    """The scale of a section, from voxels to pixels: its axes, down and across, and the span of voxels drawn of each.

    A section of one axis is drawn as a band.
    """

    def __init__(self, axes: tuple[int, ...], spans: dict[int, tuple[int, int]]) -> None:
        self.axes = axes
        self.spans = {a: spans[a] for a in axes}
        self.scale = SIDE / max(b - a for a, b in self.spans.values())

    def size(self) -> tuple[float, float]:
        lengths = [(b - a) * self.scale for a, b in self.spans.values()]
        return lengths[-1], lengths[0] if len(lengths) == 2 else SIDE / 6

    def rect(self, kind: str, *spans: tuple[int, int]) -> str:
        """Return a box of voxels, clipped to the section."""
        edges = []
        for axis, (a, b) in zip(self.axes, spans, strict=True):
            low, high = self.spans[axis]
            edges.append(((max(a, low) - low) * self.scale, (min(b, high) - low) * self.scale))
        (top, bottom), (left, right) = edges if len(edges) == 2 else ((0.0, SIDE / 6), edges[0])
        if right <= left or bottom <= top:
            return ""
        place = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}"'
        return f'<rect class="{kind}" {place}/>'


def _blocks(blocks: BlockGrid, pair: tuple[int, ...], names: Sequence[str]) -> Section:
    """Draw the blocks of a section, their seams, and the patches of the middle one."""
    axes = [blocks.axes[a] for a in pair]
    counts = [min(a.count, MOST) for a in axes]
    whole = all(c == a.count for c, a in zip(counts, axes, strict=True))
    low = [min(0, a.grid.first) for a in axes]
    stops = [a.grid.length if c == a.count else a.core(c - 1)[1] for c, a in zip(counts, axes, strict=True)]
    viewport = _Viewport(pair, dict(zip(pair, zip(low, stops, strict=True), strict=True)))
    parts = []
    for position in itertools.product(*map(range, counts)):
        kind = "odd" if sum(position) % 2 else "even"
        parts.append(viewport.rect(f"core {kind}", *(a.core(i) for a, i in zip(axes, position, strict=True))))
    for position in itertools.product(*map(range, counts)):
        cores = [a.core(i) for a, i in zip(axes, position, strict=True)]
        halos = [(stop, stop + a.spill(i)) for a, i, (_, stop) in zip(axes, position, cores, strict=True)]
        for offset in itertools.product((0, 1), repeat=len(pair)):
            if any(offset):
                spans = (h if o else c for o, h, c in zip(offset, halos, cores, strict=True))
                parts.append(viewport.rect("seam", *spans))
    middle = [c // 2 if c > 2 else 0 for c in counts]
    chosen = [a.patches(i)[:MOST] for a, i in zip(axes, middle, strict=True)]
    parts += _outlines(viewport, [a.grid for a in axes], chosen)
    drawn = "x".join(str(c) for c in counts)
    text = f"{'x'.join(str(a.count) for a in axes)} blocks" + ("" if whole else f", the first {drawn} drawn")
    swept = f", swept along {names[blocks.sweep]}" if blocks.sweep in pair else ""
    return _section(viewport, parts, names, f"{text}{swept}")


def _patches(grid: PatchGrid, pair: tuple[int, ...], names: Sequence[str]) -> Section:
    """Draw the patches of a section."""
    axes = [grid.axes[a] for a in pair]
    counts = [min(a.count, MOST) for a in axes]
    spans = {}
    for number, axis, count in zip(pair, axes, counts, strict=True):
        first, last = axis.start(0), axis.start(count - 1) + axis.patch
        spans[number] = (min(0, first), max(axis.length, last) if count == axis.count else last)
    viewport = _Viewport(pair, spans)
    inside = [(0, a.length) for a in axes]
    parts = [viewport.rect("odd", *inside), *_outlines(viewport, axes, [range(c) for c in counts])]
    parts.append(viewport.rect("volume", *inside))
    drawn = "" if all(c == a.count for c, a in zip(counts, axes, strict=True)) else ", the first drawn"
    return _section(viewport, parts, names, f"{'x'.join(str(a.count) for a in axes)} patches{drawn}")


def _outlines(viewport: _Viewport, axes: Sequence[GridAxis], chosen: Sequence[Sequence[int]]) -> Iterator[str]:
    """Return the outlines of patches, the first one filled."""
    for number, index in enumerate(itertools.product(*chosen)):
        spans = [(a.start(i), a.start(i) + a.patch) for a, i in zip(axes, index, strict=True)]
        yield viewport.rect("patch" if number else "patch first", *spans)


def _section(viewport: _Viewport, parts: Sequence[str], names: Sequence[str], text: str) -> Section:
    """Put a caption above a section: its axes, a text, its extents."""
    width, height = viewport.size()
    size = " x ".join(str(stop - start) for start, stop in viewport.spans.values())
    caption = f"{' down, '.join(names[a] for a in viewport.axes)} across: {text}"
    text = f'<text class="small" x="0" y="-6">{html.escape(caption)} ({size} voxels)</text>'
    return width, height, "".join((text, *parts))


def _figure(panels: Sequence[Section], legend: Sequence[tuple[str, str]]) -> str:
    """Put sections side by side, with a legend below, as the text of an SVG file."""
    column = SIDE + 90
    height = TOP + CAPTION + max(h for _, h, _ in panels) + FOOT
    width = GAP + column * len(panels)
    parts = [f'<rect class="paper" width="{width}" height="{height:.0f}"/>']
    for number, (_, _, elements) in enumerate(panels):
        parts.append(f'<g transform="translate({GAP + column * number},{TOP + CAPTION})">{elements}</g>')
    x = GAP
    for kind, label in legend:
        y = height - 24
        parts.append(f'<rect class="key {kind.replace("core", "")}" x="{x}" y="{y:.0f}" width="14" height="14"/>')
        parts.append(f'<text class="small" x="{x + 20}" y="{y + 11:.0f}">{html.escape(label)}</text>')
        x += 40 + 7 * len(label)
    view = f'viewBox="0 0 {width} {height:.0f}" width="{width}" height="{height:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {view}>{STYLE}{"".join(parts)}</svg>'
