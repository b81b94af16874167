"""Options, settings and versions of a run: how a parameter is described, and what a run records about itself."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oocpatch.system import is_url, peak_memory

LIBRARIES = ("oocpatch", "torch", "zarr", "zarrs", "dask", "xarray", "numpy")

QUIET = frozenset({"resume", "overwrite", "progress", "client", "processes"})
"""Arguments that do not change the result."""

_version = functools.cache(importlib.metadata.version)


def option(
    default: Any = dataclasses.MISSING,
    *,
    check: str | None = None,
    identity: bool | str = False,
    kind: str = "text",
    choices: Sequence[str] = (),
    metavar: str | None = None,
    help: str,  # noqa: A002 - as click calls it
) -> Any:
    """Return the dataclass field of one option of a run: all that is to be known about a parameter, in one place.

    Args:
        default: its default; without one the option is required.
        check: name of its check; see `configuration.checks`.
        identity: whether runs with other values are different runs; a text names the function in `configuration.checks`
            whose result is compared.
        kind: how the option is typed on the command line; see `cli.types`.
        choices: the values that the command line takes.
        metavar: the placeholder that the command line shows.
        help: one imperative sentence, for the command line and the table of options in the docs.

    >>> @dataclasses.dataclass
    ... class Options:
    ...     fill: float = option(0.0, kind="float", help="Set the value of the padding.")
    >>> Options().fill, dataclasses.fields(Options)[0].metadata["kind"]
    (0.0, 'float')
    """
    typed = {"kind": kind, "choices": choices, "metavar": metavar}
    metadata = {"check": check, "identity": identity, "help": help, **typed}
    return dataclasses.field(default=default, metadata=metadata)


class DefaultText(str):
    """A default value that is equal to the same text given by a caller, and told from it by its type."""

    __slots__ = ()


class DefaultNumber(int):
    """A default value that is equal to the same number given by a caller, and told from it by its type.

    >>> DefaultNumber(1) == 1, is_given(DefaultNumber(1)), is_given(1)
    (True, False, True)
    """

    __slots__ = ()


def is_given(value: Any) -> bool:
    """Return whether a caller gave this value; None is no value."""
    return value is not None and not isinstance(value, (DefaultText, DefaultNumber))


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries that results depend on."""
    installed = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            installed[name] = _version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def run_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call as JSON: paths become absolute, objects are described.

    >>> run_settings({"patch_size": (8, 8), "model": len})
    {'patch_size': [8, 8], 'model': '<builtin_function_or_method len>'}
    """
    return {
        name: _absolute(value) if name in ("volume", "output", "mask", "workspace", "export") else _plain(value)
        for name, value in arguments.items()
        if value is not None and name not in QUIET
    }


def _absolute(value: Any) -> Any:
    if isinstance(value, (str, os.PathLike)):
        text = os.fspath(value)
        return text if is_url(text) else str(Path(os.path.expanduser(text)).absolute())  # noqa: PTH111 - as `storage.paths`
    if isinstance(value, Mapping):
        return {str(name): _absolute(each) for name, each in value.items()}
    return [_absolute(each) for each in value] if isinstance(value, (list, tuple)) else _plain(value)


def _plain(value: Any) -> Any:
    """Return a value as JSON; numpy is not imported for its types, as the command line's help does not wait for it."""
    module = type(value).__module__
    if isinstance(value, (str, bool, int, float)) or value is None:
        # JSON has neither NaN nor infinities
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value
    if isinstance(value, type) and value.__module__ == "numpy":
        return value.__name__
    if module == "numpy" and value.shape == ():
        return _plain(value.item())
    if dataclasses.is_dataclass(value) and not callable(value):  # such as a grid
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, os.PathLike) or module == "numpy.dtypes" else _described(value)


def _described(value: Any) -> str:
    """Describe an object by its type, shape and name; one of the package's own by its fields."""
    if dataclasses.is_dataclass(value) and type(value).__module__.startswith("oocpatch.") and not callable(value):
        return repr(value)
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape:
        return f"<{type(value).__name__} of shape {' x '.join(map(str, shape))}>"
    name = getattr(value, "__qualname__", None)
    return f"<{type(value).__name__}{f' {name}' if name else ''}>"


def run_facts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a finished run records in its output; the peak is that of the process since its start."""
    return {
        "settings": dict(settings),
        "versions": versions(),
        "process_peak_memory": peak_memory(),
    }
