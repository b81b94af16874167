"""The oracle: `predict` in memory, in numpy, written from the public contract alone.

Nothing here imports the package. It holds everything at once, sums in float64 and takes patches one by one, so it is
checked by reading it next to the contract.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def window(mode: str, n: int) -> Array:
    """The blending weights of one axis of length `n`."""
    if mode == "hann":
        return np.hanning(n + 2)[1:-1]
    if mode in ("gaussian", "monai"):
        return np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2)
    if mode == "nnunet":
        return np.exp(-0.5 * ((np.arange(n) - n // 2) / (n / 8)) ** 2)
    if mode in ("average", "crop"):
        return np.ones(n)
    raise ValueError(f"no such mode: {mode!r}")


def starts(n: int, patch: int, overlap: int, *, even: bool = False) -> list[int]:
    """Patch starts along one axis of length `n >= patch`: the last moved back to the border, or all spaced evenly."""
    if even:
        count = -(-(n - patch) // (patch - overlap)) + 1
        return [int(np.round((n - patch) / max(1, count - 1) * i)) for i in range(count)]
    return [*range(0, n - patch, patch - overlap), n - patch]


def frame(
    volume: Array,
    patch: tuple[int, ...],
    overlap: tuple[int, ...],
    padding_mode: str | None,
    fill: float,
    *,
    even: bool = False,
) -> tuple[Array, tuple[slice, ...]]:
    """`volume (C, *spatial)` padded, and where the volume lies in it.

    It grows by `overlap // 2` on each side if there is a padding mode, and at its end to at least one patch; with even
    starts only to one patch, at both ends.
    """
    grow = [o // 2 if padding_mode else 0 for o in overlap]
    if even:
        grow = [max(0, p - n) // 2 for n, p in zip(volume.shape[1:], patch, strict=True)]
    widths = [(g, g + max(0, p - n - 2 * g)) for g, n, p in zip(grow, volume.shape[1:], patch, strict=True)]
    how: dict[str, Any] = {"constant_values": fill} if padding_mode == "constant" else {}
    padded = np.pad(volume, [(0, 0), *widths], mode=padding_mode or "edge", **how)  # type: ignore[call-overload]
    return padded, tuple(slice(g, g + n) for g, n in zip(grow, volume.shape[1:], strict=True))


def predict(
    volume: Array,
    model: Callable[[Array], Array],
    *,
    patch: tuple[int, ...],
    overlap: tuple[int, ...],
    mode: str,
    padding_mode: str | None = None,
    fill: float = 0.0,
    even: bool = False,
) -> Array:
    """Blend what `model`, `(C, *patch)` to `(C', *patch)`, makes of `volume (C, *spatial)`.

    Returns:
        `(C', *spatial)`: float64, or for `crop` the model's own values and dtype.
    """
    padded, inside = frame(volume, patch, overlap, padding_mode, fill, even=even)
    axes = list(zip(padded.shape[1:], patch, overlap, strict=True))
    weight = functools.reduce(np.multiply.outer, [window(mode, p) for p in patch])
    weight = weight.clip(1e-3) if mode == "monai" else weight
    weights = np.zeros(padded.shape[1:])
    sums: Array = np.zeros(0)
    for corner in itertools.product(*(starts(*axis, even=even) for axis in axes)):
        box = tuple(slice(s, s + p) for s, p in zip(corner, patch, strict=True))
        values = model(padded[(slice(None), *box)])
        if not sums.size:
            sums = np.zeros((len(values), *weights.shape), values.dtype if mode == "crop" else np.float64)
        if mode == "crop":
            trim = [(o // 2 * (s > 0), o // 2 * (s + p < n)) for s, (n, p, o) in zip(corner, axes, strict=True)]
            kept = tuple(slice(low, p - high) for (low, high), p in zip(trim, patch, strict=True))
            sums[(slice(None), *box)][(slice(None), *kept)] = values[(slice(None), *kept)]
            weights[box][kept] = 1
        else:
            sums[(slice(None), *box)] += values * weight
            weights[box] += weight
    assert (weights > 0).all()
    return (sums if mode == "crop" else sums / weights)[(slice(None), *inside)]
