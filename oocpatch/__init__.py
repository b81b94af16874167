"""Run torch models over volumes that do not fit in memory: patch by patch, blended, resumable, exact.

The public names are listed in `__init__.pyi` and loaded when they are first used. Where TorchIO is installed, its other
classes (images, transforms) are names of the package, too: programs written for it change an import and nothing else.

Importing the package has two side effects: it sets `THP_MEM_ALLOC_ENABLE=1` unless it is set, and where xarray is
imported already, it registers the accessor of `oocpatch.xarray`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import lazy_loader

__version__ = "0.1.0"

_public_name, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    try:
        return _public_name(name)
    except AttributeError:
        # Classes begin with a capital: other names are asked for by tools, and must not cost the import of TorchIO.
        if not name[:1].isupper() or importlib.util.find_spec("torchio") is None:
            raise
        if name not in (torchio := importlib.import_module("torchio")).__all__:
            raise
        return getattr(torchio, name)


class _Package(types.ModuleType):
    """The package, whose function `objects` stays one when its folder of that name is imported."""

    @property
    def objects(self) -> Callable[..., Any]:
        """The function that makes tables of objects."""
        function: Callable[..., Any] = importlib.import_module("oocpatch.run.object_table").objects
        return function

    @objects.setter
    def objects(self, folder: types.ModuleType) -> None:
        """Ignore the folder, which the import system sets as an attribute; it is imported by its full name."""


sys.modules[__name__].__class__ = _Package

# Torch then asks for huge pages where the kernel leaves that to programs: the memory of a network's layers is mapped
# anew for each patch, and touching it page by page took a third of the time. Torch reads it once, before its first
# tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if "xarray" in sys.modules:
    importlib.import_module("oocpatch.xarray")
