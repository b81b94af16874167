"""Map values to colours: greys for intensities, heat for scores, one colour per label."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Colour = tuple[int, int, int]

PALETTE = (
    (63, 185, 130), (247, 90, 160), (250, 180, 60), (88, 166, 255), (188, 140, 255), (255, 123, 94),
    (86, 211, 224), (214, 214, 92), (160, 120, 80), (230, 160, 210),
)  # fmt: skip
"""Colours of the labels 1 to 10."""

HEAT = ((0, 0.25, 0.5, 0.75, 1), ((8, 8, 24), (84, 22, 109), (187, 55, 84), (249, 140, 10), (252, 253, 190)))

GREENS = ((0, 0.25, 0.5, 0.75, 1), ((255, 240, 130), (190, 220, 90), (90, 190, 80), (0, 140, 85), (0, 90, 70)))
"""For slides: no stain looks like that."""

FEW_LABELS = 64
"""Integers that take no more different values are taken for labels."""


def label_colours(labels: Array) -> Array:
    """Return the colours `(N, 3)` of labels, of 0 to 1; 0 is black, and each colour is a function of the label alone.

    Labels beyond the palette have colours by the bits of a hash (splitmix64): objects that lie side by side have
    numbers with some small difference, which must not give similar colours.
    """
    bits = np.asarray(labels).astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    hue, grey, dark = ((bits >> np.uint64(shift) & np.uint64(0xFFFF))[:, None] / 0x10000 for shift in (0, 16, 32))
    sectors = (np.array([5, 3, 1]) + 6 * hue) % 6
    colours = (1 - 0.3 * dark) * (1 - (0.9 - 0.45 * grey) * np.clip(np.minimum(sectors, 4 - sectors), 0, 1))
    few = np.flatnonzero((labels >= 0) & (labels <= len(PALETTE)))
    colours[few] = np.array([(0, 0, 0), *PALETTE])[labels[few].astype(np.intp)] / 255
    return np.asarray(colours)


def label_colour(label: int) -> Colour:
    """Return the colour of a label; 0 is background.

    >>> label_colour(1), label_colour(0), label_colour(12345)
    ((63, 185, 130), (0, 0, 0), (183, 40, 156))
    """
    red, green, blue = np.rint(255 * label_colours(np.array([label]))[0]).astype(int).tolist()
    return red, green, blue


def labels_to_rgb(labels: Array) -> Array:
    """Map integers `(H, W)` to colours `(H, W, 3)` of 0 to 1."""
    values, index = np.unique(labels, return_inverse=True)
    return np.asarray(label_colours(values)[index.reshape(labels.shape)])


def outlines(labels: Array) -> Array:
    """Return where labels `(H, W)` other than 0 have a neighbour with another value."""
    edges: Array = np.zeros(labels.shape, np.bool_)
    for one, other in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differ = labels[one] != labels[other]
        edges[one] |= differ
        edges[other] |= differ
    return np.asarray(edges & (labels != 0))


def window_of(planes: list[Array]) -> tuple[float, float]:
    """Return the values shown as black and white: the darkest hundredth and the brightest half percent lie outside."""
    values = np.concatenate([p[np.isfinite(p)].astype(np.float64).reshape(-1) for p in planes])
    if not values.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(values, (1, 99.5)))
    if high <= low:
        low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low, low + 1.0)


def scaled(values: Array, window: tuple[float, float]) -> Array:
    """Scale the values of a window to 0 to 1."""
    low, high = window
    return np.asarray(np.clip((np.nan_to_num(values.astype(np.float64)) - low) / (high - low), 0, 1))


def grey(values: Array, windows: list[tuple[float, float]], colours: list[Colour]) -> Array:
    """Map `(C, H, W)` to greys, several channels to a mix of colours, `(H, W, 3)`; with a window each, or one."""
    each = windows * len(values) if len(windows) == 1 else windows
    level = np.stack([scaled(v, window) for v, window in zip(values, each, strict=True)])
    return np.repeat(level[0][..., None], 3, axis=-1) if len(level) == 1 else mixed(level, colours)


def mixed(levels: Array, colours: list[Colour]) -> Array:
    """Mix channels of 0 to 1 into one picture, each in its colour."""
    return np.asarray(np.clip(np.einsum("chw,cd->hwd", levels, np.array(colours) / 255), 0, 1))


def heat(level: Array, *, bright: bool = False) -> Array:
    """Map `(H, W)` of 0 to 1 to colours from dark to bright; over a bright picture, from yellow to dark green."""
    places, colours = GREENS if bright else HEAT
    return np.stack([np.interp(level, places, np.array(c) / 255) for c in zip(*colours, strict=True)], axis=-1)


def laid_over(below: Array, above: Array, opacity: Array) -> Array:
    """Blend a picture over another one, `(H, W, 3)` each."""
    return np.asarray(below * (1 - opacity[..., None]) + above * opacity[..., None])
