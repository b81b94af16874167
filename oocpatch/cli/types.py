"""Values and options on the command line. The options of a run are made of the configuration's fields.

Values come as text, or as TOML has them: numbers, lists, tables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import click

from oocpatch.configuration.options import OPTIONS
from oocpatch.planning.choices import WORKS

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def size(value: Any) -> int | tuple[int, ...] | dict[str, int]:
    """Read `96`, the same on every axis, `32,96,96`, one per axis, or `z=32,y=96,x=96`, by their names.

    >>> size("32,96"), size([32, 96]), size({"z": 8})
    ((32, 96), (32, 96), {'z': 8})
    """
    if isinstance(value, Mapping):
        value = ",".join(f"{name}={number}" for name, number in value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str):
        value = ",".join(map(str, value))
    parts = [part.rpartition("=") for part in str(value).split(",")]
    names = [name.strip() for name, _, _ in parts if name]
    try:
        sizes = tuple(int(number) for _, _, number in parts)
    except ValueError:
        sizes = ()
    if not sizes or (names and len(set(names)) != len(sizes)):
        forms = "96 or 32,96,96 or z=32,y=96,x=96"
        raise click.BadParameter(f"sizes are whole numbers of voxels, such as {forms}, got {value!r}.")
    if names:
        return dict(zip(names, sizes, strict=True))
    return sizes if len(sizes) > 1 else sizes[0]


def size_or_auto(value: Any) -> int | str | tuple[int, ...] | dict[str, int]:
    """Read a size, or `auto`."""
    return "auto" if value == "auto" else size(value)


def size_or_none(value: Any) -> int | str | tuple[int, ...] | dict[str, int]:
    """Read a size, or `none`."""
    return "none" if value == "none" else size(value)


def spacing(value: Any) -> Any:
    """Read `0.5` or `0.5um`, the same on every axis, `2,0.5,0.5`, one per axis, or `z=2,y=0.5,x=0.5`, by their names.

    >>> spacing("0.5um"), spacing("2,0.5"), spacing("z=2,y=500nm")
    ('0.5um', [2, 0.5], {'z': 2, 'y': '500nm'})
    """
    if isinstance(value, Mapping):
        return dict(value)
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
    names, _, texts = zip(*(str(part).rpartition("=") for part in parts), strict=True)
    values = [text if text.strip()[-1:].isalpha() else number(text) for text in texts]
    if any(names):
        return dict(zip(names, values, strict=True))
    return values if len(values) > 1 else values[0]


def classes(value: Any) -> dict[int, Any]:
    """Read names of classes, and colours if they have some.

    >>> classes("1=Tumor:#c80000,2=Immune cells")
    {1: ('Tumor', '#c80000'), 2: 'Immune cells'}
    """
    pairs = value.items() if isinstance(value, Mapping) else (part.partition("=")[::2] for part in value.split(","))
    try:
        named = {int(number): name for number, name in pairs}
    except ValueError:
        raise click.BadParameter(f"classes are names by numbers, such as 1=Tumor,2=Stroma, got {value!r}.") from None
    split = {number: name.partition(":")[::2] if isinstance(name, str) else name for number, name in named.items()}
    return {number: tuple(pair) if pair[1] else pair[0] for number, pair in split.items()}


def volumes(_context: object, _parameter: object, text: str) -> str | list[str] | dict[str, str]:
    """Read the path or URL of a volume, several as `t1.zarr,t2.zarr`, or named ones as `image=a.zarr,prior=b.zarr`.

    >>> volumes(None, None, "a.zarr"), volumes(None, None, "a.zarr,b.zarr"), volumes(None, None, "image=a,prior=b")
    ('a.zarr', ['a.zarr', 'b.zarr'], {'image': 'a', 'prior': 'b'})
    >>> volumes(None, None, "image=a,image=b")
    Traceback (most recent call last):
    click.exceptions.BadParameter: each volume needs a name of its own, got 'image=a,image=b'.
    """
    parts = text.split(",")
    if len(parts) == 1 or os.path.lexists(text):
        return text
    if not all(parts):
        raise click.BadParameter(f"volumes are separated by single commas, got {text!r}.")
    pairs = [part.partition("=") for part in parts]
    if all(name.strip().isidentifier() and path for name, _, path in pairs):
        named = {name.strip(): path for name, _, path in pairs}
        if len(named) < len(pairs):
            raise click.BadParameter(f"each volume needs a name of its own, got {text!r}.")
        return named
    return parts


def box(value: Any) -> list[tuple[int | None, int | None]]:
    """Read `START:STOP` per axis; either may be left out.

    >>> box("16:64,:,:128")
    [(16, 64), (None, None), (None, 128)]
    """
    if not isinstance(value, str):
        return [(start, stop) for start, stop in value]
    spans = []
    for text in value.split(","):
        start, colon, stop = text.partition(":")
        try:
            span = (int(start) if start else None, int(stop) if stop else None)
        except ValueError:
            colon = ""
        if not colon:
            raise click.BadParameter(f"a box is START:STOP per axis, such as 16:64,:,0:128, got {value!r}.")
        spans.append(span)
    return spans


def part(value: Any) -> tuple[int, int]:
    """Read `3/16`: the third of sixteen parts.

    >>> part("3/16"), part([3, 16])
    ((3, 16), (3, 16))
    """
    number, count = value if not isinstance(value, str) else value.partition("/")[::2]
    try:
        return int(number), int(count)
    except ValueError:
        raise click.BadParameter(f"parts are I/N, such as 3/16, got {value!r}.") from None


def json_or_text(value: Any) -> Any:
    """Read JSON if it is that, else the text itself.

    >>> json_or_text("3"), json_or_text("[1, 2]"), json_or_text("unet")
    (3, [1, 2], 'unet')
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def pairs(_context: object, _parameter: object, texts: tuple[str, ...]) -> dict[str, Any]:
    """Read `NAME=VALUE` pairs."""
    for text in texts:
        if not text.partition("=")[0].isidentifier() or "=" not in text:
            raise click.BadParameter(f"arguments are NAME=VALUE, such as depth=3, got {text!r}.")
    return {name: json_or_text(value) for name, _, value in (text.partition("=") for text in texts)}


def one_or_more(_context: object, _parameter: object, texts: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """Return one value as it is, several as a tuple."""
    return (texts[0] if len(texts) == 1 else texts) if texts else None


def number(value: str | float) -> int | float:
    """Read an integer if it is one, so that it stays exact, else a float."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    raise click.BadParameter(f"expected a number, got {value!r}.")


def work(value: str | float) -> float | str:
    """Read `light`, `heavy` or a number of operations."""
    return value if value in WORKS else number(value)


def names(value: Any) -> Any:
    """Read names of axes: `zyx`, or a list of them."""
    return value if isinstance(value, str) else tuple(value)


def per_head(allowed: Collection[str] = ()) -> Callable[[Any], str | dict[str, str]]:
    """Return a reader of `hann`, the same for every head, or `scores=hann,labels=crop`, one per head.

    Args:
        allowed: the values that are known; empty: any.
    """

    def read(value: Any) -> str | dict[str, str]:
        if isinstance(value, Mapping):
            value = ",".join(f"{head}={one}" for head, one in value.items())
        parts = [part.rpartition("=") for part in value.split(",")]
        unknown = [one for _, _, one in parts if allowed and one.partition(":")[0] not in allowed]
        if unknown or (len(parts) > 1 and not all(head for head, _, _ in parts)):
            expected = f"one of {', '.join(allowed)}" if allowed else "a value"
            raise click.BadParameter(f"expected {expected}, or one per head such as scores={value}, got {value!r}.")
        return {head: one for head, _, one in parts} if parts[0][0] else str(value)

    return read


READERS: dict[str, Any] = {
    "int": int,
    "float": float,
    "size": size,
    "size_or_auto": size_or_auto,
    "size_or_none": size_or_none,
    "spacing": spacing,
    "box": box,
    "part": part,
    "json": json_or_text,
    "number": number,
    "work": work,
    "names": names,
}


Command = TypeVar("Command", bound=Callable[..., Any])


def run_options(
    names: Sequence[str] = tuple(OPTIONS), *, optional: Collection[str] = ()
) -> Callable[[Command], Command]:
    """Return a decorator that gives a command the options of a run.

    Args:
        names: names of the options, in order; what only Python can pass is left out.
        optional: names of options that the command does not require.
    """

    def decorate(command: Command) -> Command:
        for name in reversed(names):
            field = OPTIONS[name]
            if field.metadata["kind"] != "none":
                command = _run_option(field, required=name not in optional)(command)
        return command

    return decorate


def _run_option(field: dataclasses.Field[Any], *, required: bool) -> Callable[[Command], Command]:
    """Return the decorator of one option, made of its field."""
    facts, kind = field.metadata, field.metadata["kind"]
    missing = field.default is dataclasses.MISSING
    flag = f"--{field.name.replace('_', '-')}"
    settings: dict[str, Any] = {
        "required": missing and required,
        **({} if missing else {"default": field.default}),
        "show_default": not missing and field.default not in (None, False),
        "metavar": facts["metavar"],
        "help": facts["help"],
    }
    if kind in ("many", "pairs"):
        settings |= {"multiple": True, "callback": one_or_more if kind == "many" else pairs}
    elif kind == "switch":
        flag = f"{flag}/--no-{flag[2:]}"
    elif kind == "flag":
        settings["is_flag"] = True
    elif kind == "choice":
        settings |= {"type": click.Choice(facts["choices"]), "default": field.default or None}
    elif kind == "per_head":
        settings["type"] = per_head(facts["choices"])
        settings["metavar"] = facts["metavar"] or f"[{'|'.join(facts['choices'])}]"
    else:
        settings["type"] = READERS.get(kind, str)
    return click.option(flag, field.name, **settings)


class UserPath(click.Path):
    """A path, with the home directory for a leading `~`: no shell expands it after `=` or in a variable."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path of a text."""
        return super().convert(os.path.expanduser(value), param, ctx)  # noqa: PTH111 - as `storage.paths`
