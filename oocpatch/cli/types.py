"""Values on the command line: sizes, JSON, one value for all heads or one for each."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import click


def size(text: str | int) -> int | tuple[int, ...] | dict[str, int]:
    """Read `96`, the same on every axis, `32,96,96`, one per axis, or `z=32,y=96,x=96`, by their names."""
    parts = [part.rpartition("=") for part in str(text).split(",")]
    names = [name.strip() for name, _, _ in parts if name]
    try:
        sizes = tuple(int(number) for _, _, number in parts)
    except ValueError:
        sizes = ()
    if not sizes or (names and len(set(names)) != len(sizes)):
        told = "96 or 32,96,96 or z=32,y=96,x=96"
        raise click.BadParameter(f"sizes are whole numbers of voxels, such as {told}, got {text!r}.")
    if names:
        return dict(zip(names, sizes, strict=True))
    return sizes if len(sizes) > 1 else sizes[0]


def box(text: str) -> list[tuple[int | None, int | None]]:
    """Read `START:STOP` per axis; either may be left out.

    >>> box("16:64,:,:128")
    [(16, 64), (None, None), (None, 128)]
    """
    spans = []
    for part in text.split(","):
        start, colon, stop = part.partition(":")
        try:
            assert colon
            spans.append((int(start) if start else None, int(stop) if stop else None))
        except (AssertionError, ValueError):
            raise click.BadParameter(f"a box is START:STOP per axis, such as 16:64,:,0:128, got {text!r}.") from None
    return spans


def size_or_auto(text: str | int) -> int | str | tuple[int, ...] | dict[str, int]:
    """Read a size, or `auto`."""
    return "auto" if text == "auto" else size(text)


def setting(text: str) -> Any:
    """Read JSON if it is that, else the text itself.

    >>> setting("3"), setting("[1, 2]"), setting("unet")
    (3, [1, 2], 'unet')
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def settings(_context: object, _parameter: object, texts: tuple[str, ...]) -> dict[str, Any]:
    """Read `NAME=VALUE` pairs."""
    for text in texts:
        if not text.partition("=")[0].isidentifier() or "=" not in text:
            raise click.BadParameter(f"arguments are NAME=VALUE, such as depth=3, got {text!r}.")
    return {name: setting(value) for name, _, value in (text.partition("=") for text in texts)}


def one_or_more(_context: object, _parameter: object, texts: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """One value as it is, several as a tuple."""
    return (texts[0] if len(texts) == 1 else texts) if texts else None


def number(text: str | float) -> int | float:
    """Read an integer if it is one, so that it stays exact, else a float."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    raise click.BadParameter(f"expected a number, got {text!r}.")


def per_head(names: str = "") -> Callable[[str], str | dict[str, str]]:
    """Read `hann`, the same for every head, or `scores=hann,labels=crop`, one per head; of the given names, if any."""
    allowed = names.split()

    def read(text: str) -> str | dict[str, str]:
        parts = [part.rpartition("=") for part in text.split(",")]
        unknown = [value for _, _, value in parts if allowed and value.partition(":")[0] not in allowed]
        if unknown or (len(parts) > 1 and not all(name for name, _, _ in parts)):
            told = f"one of {', '.join(allowed)}" if allowed else "a value"
            raise click.BadParameter(f"expected {told}, or one per head such as scores={text}, got {text!r}.")
        return {name: value for name, _, value in parts} if parts[0][0] else text

    return read
