"""Run torch models over volumes that do not fit in memory: patch by patch, blended, resumable, exact."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from oocpatch.accessor import arrange

if TYPE_CHECKING:
    from oocpatch.checking import CheckReport, check
    from oocpatch.converting import convert
    from oocpatch.errors import (
        BlockFailed,
        ClusterLost,
        CorruptData,
        OocpatchError,
        OutputBusy,
        OutputExists,
        PlanTooLarge,
        RunMismatch,
    )
    from oocpatch.inference.aggregator import PatchAggregator
    from oocpatch.inference.functions import NumpyModel
    from oocpatch.looking.reporting import report
    from oocpatch.looking.viewing import view
    from oocpatch.planning.grid import PatchGrid, PatchLocation
    from oocpatch.planning.plan import Plan
    from oocpatch.progress import RunStatus, status
    from oocpatch.run import plan, predict
    from oocpatch.sampling.grid import GridSampler
    from oocpatch.sampling.loader import SubjectsLoader
    from oocpatch.sampling.queue import Queue
    from oocpatch.sampling.samplers import UniformSampler
    from oocpatch.sampling.subject import Subject
    from oocpatch.sampling.weighted import LabelSampler, WeightedSampler
    from oocpatch.storage.volume import Volume
    from oocpatch.verifying import Damage, Verification, verify

__version__ = "0.1.0"

_HOMES = {
    "oocpatch.checking": ("CheckReport", "check"),
    "oocpatch.converting": ("convert",),
    "oocpatch.errors": (
        "BlockFailed",
        "ClusterLost",
        "CorruptData",
        "OocpatchError",
        "OutputBusy",
        "OutputExists",
        "PlanTooLarge",
        "RunMismatch",
    ),
    "oocpatch.inference.aggregator": ("PatchAggregator",),
    "oocpatch.inference.functions": ("NumpyModel",),
    "oocpatch.looking.reporting": ("report",),
    "oocpatch.looking.viewing": ("view",),
    "oocpatch.planning.grid": ("PatchGrid", "PatchLocation"),
    "oocpatch.planning.plan": ("Plan",),
    "oocpatch.progress": ("RunStatus", "status"),
    "oocpatch.run": ("plan", "predict"),
    "oocpatch.sampling.grid": ("GridSampler",),
    "oocpatch.sampling.loader": ("SubjectsLoader",),
    "oocpatch.sampling.queue": ("Queue",),
    "oocpatch.sampling.samplers": ("UniformSampler",),
    "oocpatch.sampling.subject": ("Subject",),
    "oocpatch.sampling.weighted": ("LabelSampler", "WeightedSampler"),
    "oocpatch.storage.volume": ("Volume",),
    "oocpatch.verifying": ("Damage", "Verification", "verify"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BlockFailed",
    "CheckReport",
    "ClusterLost",
    "CorruptData",
    "Damage",
    "GridSampler",
    "LabelSampler",
    "NumpyModel",
    "OocpatchError",
    "OutputBusy",
    "OutputExists",
    "PatchAggregator",
    "PatchGrid",
    "PatchLocation",
    "Plan",
    "PlanTooLarge",
    "Queue",
    "RunMismatch",
    "RunStatus",
    "Subject",
    "SubjectsLoader",
    "UniformSampler",
    "Verification",
    "Volume",
    "WeightedSampler",
    "check",
    "convert",
    "plan",
    "predict",
    "report",
    "status",
    "verify",
    "view",
]


def __getattr__(name: str) -> Any:
    # Names are loaded when they are first used: `oocpatch --help` must not wait for torch.
    if name not in _HOME_OF:
        raise AttributeError(f"module 'oocpatch' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


# Torch asks for huge pages then, where the kernel leaves that to programs: a network's layers are mapped anew for each
# patch, and touching them page by page took a third of the time. It looks once, before its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

arrange()  # `array.oocpatch`, wherever xarray is imported
