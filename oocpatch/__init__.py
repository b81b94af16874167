"""Run torch models over volumes that do not fit in memory: patch by patch, blended, resumable, exact.

The public names are listed in `__init__.pyi` and loaded when they are first used. Importing the package has two side
effects: it sets `THP_MEM_ALLOC_ENABLE=1` unless it is set, and where xarray is imported already, it registers the
accessor of `oocpatch.xarray`.
"""

from __future__ import annotations

import importlib
import os
import sys

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# Torch then asks for huge pages where the kernel leaves that to programs: the memory of a network's layers is mapped
# anew for each patch, and touching it page by page took a third of the time. Torch reads it once, before its first
# tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if "xarray" in sys.modules:
    importlib.import_module("oocpatch.xarray")
