"""Run torch models over volumes that do not fit in memory: patch by patch, blended, resumable, exact."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oocpatch.checking import CheckReport, check
    from oocpatch.errors import (
        BlockFailed,
        CorruptData,
        OocpatchError,
        OutputBusy,
        OutputExists,
        PlanTooLarge,
        RunMismatch,
    )
    from oocpatch.planning.grid import PatchGrid, PatchLocation
    from oocpatch.planning.plan import Plan
    from oocpatch.run import RunStatus, plan, predict, status
    from oocpatch.storage.volume import Volume

__version__ = "0.1.0"

_HOMES = {
    "oocpatch.checking": ("CheckReport", "check"),
    "oocpatch.errors": (
        "BlockFailed",
        "CorruptData",
        "OocpatchError",
        "OutputBusy",
        "OutputExists",
        "PlanTooLarge",
        "RunMismatch",
    ),
    "oocpatch.planning.grid": ("PatchGrid", "PatchLocation"),
    "oocpatch.planning.plan": ("Plan",),
    "oocpatch.run": ("RunStatus", "plan", "predict", "status"),
    "oocpatch.storage.volume": ("Volume",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BlockFailed",
    "CheckReport",
    "CorruptData",
    "OocpatchError",
    "OutputBusy",
    "OutputExists",
    "PatchGrid",
    "PatchLocation",
    "Plan",
    "PlanTooLarge",
    "RunMismatch",
    "RunStatus",
    "Volume",
    "check",
    "plan",
    "predict",
    "status",
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
