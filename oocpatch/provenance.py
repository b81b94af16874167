"""What a run writes down about itself: its settings, and the versions of what it used."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

LIBRARIES = ("oocpatch", "torch", "zarr", "zarrs", "dask", "xarray", "numpy")

QUIET = frozenset({"resume", "overwrite", "progress"})
"""Arguments that say nothing about the result."""


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def run_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call as JSON can hold them; paths become absolute, what is no plain value is described.

    >>> run_settings({"patch_size": (8, 8), "model": len, "output_dtype": np.float64})
    {'patch_size': [8, 8], 'model': '<builtin_function_or_method len>', 'output_dtype': 'float64'}
    """
    return {
        name: _absolute(value) if name in ("volume", "output", "mask", "workspace") else _told(value)
        for name, value in arguments.items()
        if value is not None and name not in QUIET
    }


def _absolute(value: Any) -> Any:
    if isinstance(value, (str, os.PathLike)):
        text = os.fspath(value)
        return text if "://" in text else str(Path(text).absolute())
    return _told(value)


def _told(value: Any) -> Any:
    if isinstance(value, (str, bool, int, float)) or value is None:
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return str(np.dtype(value))
    if isinstance(value, Mapping):
        return {str(k): _told(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_told(v) for v in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else _described(value)


def _described(value: Any) -> str:
    """An object in words."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape:
        return f"<{type(value).__name__} of shape {' x '.join(map(str, shape))}>"
    name = getattr(value, "__qualname__", None)
    return f"<{type(value).__name__}{f' {name}' if name else ''}>"


def run_facts(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into the output's attributes when a run is done. The peak is the whole process', since its start."""
    return {
        "settings": dict(asked),
        "versions": versions(),
        "process_peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
