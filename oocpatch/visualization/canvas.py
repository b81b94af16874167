"""Draw panels with captions as a PNG. Pillow is optional: install `oocpatch[view]`."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.system import import_extra

PAPER, INK, MUTED = (13, 17, 23), (230, 237, 243), (139, 148, 158)
GAP, TOP, CAPTION, FOOT = 24, 76, 26, 34


@dataclass(frozen=True)
class Panel:
    """A picture, `(H, W, 3)` of 0 to 1, a caption above it, and letters at its left, right, upper and lower side."""

    picture: npt.NDArray[Any]
    caption: str
    ends: str = ""


@dataclass(frozen=True)
class Figure:
    """Rows of panels.

    Attributes:
        rows: panels from left to right; those of one column have one width.
        title, subtitle: above all.
        legend: colours and what they stand for.
    """

    rows: tuple[tuple[Panel, ...], ...]
    title: str
    subtitle: str
    legend: tuple[tuple[tuple[int, int, int], str], ...] = ()

    def png(self) -> bytes:
        """Return the figure as a PNG.

        Raises:
            ValueError: without Pillow.
        """
        names = ("PIL.Image", "PIL.ImageDraw", "PIL.ImageFont")
        image, draw, font = (import_extra(name, "view", "drawing a picture") for name in names)
        fonts = {size: font.load_default(size) for size in (14, 16, 22)}
        widths = self._columns()
        text_width = max(int(fonts[size].getlength(text)) for text, size in ((self.title, 22), (self.subtitle, 14)))
        width = max(text_width, sum(widths) + GAP * (len(widths) - 1)) + 2 * GAP
        lines = self._legend_lines(fonts[14], width - 2 * GAP)
        y = TOP + sum(max(p.picture.shape[0] for p in row) + CAPTION + 12 for row in self.rows)
        height = y + FOOT * len(lines) + GAP // 2
        canvas = image.new("RGB", (width, height), PAPER)
        pen = draw.Draw(canvas)
        pen.text((GAP, 16), self.title, INK, fonts[22])
        pen.text((GAP, 46), self.subtitle, MUTED, fonts[14])
        for (left, top), panel in self.corners():
            pen.text((left, top - 6), panel.caption, INK, fonts[16], anchor="ls")
            canvas.paste(image.fromarray(np.uint8(np.rint(255 * np.clip(panel.picture, 0, 1)))), (left, top))
            height, width = panel.picture.shape[:2]
            places = ((4, height // 2, "lm"), (width - 4, height // 2, "rm"), (width // 2, 4, "ma"))
            for letter, (x, down, anchor) in zip(panel.ends, (*places, (width // 2, height - 4, "md")), strict=False):
                pen.text(
                    (left + x, top + down), letter, INK, fonts[14], anchor=anchor, stroke_width=2, stroke_fill=PAPER
                )
        for line in lines:
            x = GAP
            for colour, text in line:
                pen.rectangle((x, y + 4, x + 14, y + 18), fill=colour)
                pen.text((x + 20, y + 17), text, MUTED, fonts[14], anchor="ls")
                x += 44 + int(fonts[14].getlength(text))
            y += FOOT
        stream = io.BytesIO()
        canvas.save(stream, "PNG", optimize=True)
        return stream.getvalue()

    def corners(self) -> list[tuple[tuple[int, int], Panel]]:
        """Return x and y of the panels' upper left corners in the PNG, each with its panel."""
        corners, y = [], TOP
        for row in self.rows:
            x = GAP
            for panel, width in zip(row, self._columns(), strict=False):
                corners.append(((x, y + CAPTION), panel))
                x += width + GAP
            y += max(p.picture.shape[0] for p in row) + CAPTION + 12
        return corners

    def _columns(self) -> list[int]:
        count = max(map(len, self.rows))
        return [max(row[i].picture.shape[1] for row in self.rows if i < len(row)) for i in range(count)]

    def _legend_lines(self, font: Any, width: int) -> list[list[tuple[tuple[int, int, int], str]]]:
        lines: list[list[tuple[tuple[int, int, int], str]]] = []
        used = width + 1
        for colour, text in self.legend:
            needed = 44 + int(font.getlength(text))
            if used + needed > width:
                lines.append([])
                used = 0
            lines[-1].append((colour, text))
            used += needed
        return lines
