"""Run torch models over volumes that do not fit in memory: patch by patch, blended, resumable, exact."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from oocpatch.xarray_accessor import arrange

if TYPE_CHECKING:
    from oocpatch.aggregation.aggregator import PatchAggregator
    from oocpatch.conversion.convert import convert
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
    from oocpatch.linting.finding import Finding
    from oocpatch.linting.lint import LintReport, lint
    from oocpatch.models.wrappers import NumpyModel
    from oocpatch.planning.grid import PatchGrid, PatchLocation
    from oocpatch.planning.plan import Plan
    from oocpatch.run.predict import plan, predict
    from oocpatch.run.status import RunStatus, status
    from oocpatch.sampling.grid_sampler import GridSampler
    from oocpatch.sampling.loader import SubjectsLoader
    from oocpatch.sampling.queue import Queue
    from oocpatch.sampling.subject import Subject
    from oocpatch.sampling.uniform import UniformSampler
    from oocpatch.sampling.weighted import LabelSampler, WeightedSampler
    from oocpatch.verification.checksums import Damage, Verification, verify
    from oocpatch.verification.compare import CheckReport, check
    from oocpatch.visualization.html_report import report
    from oocpatch.visualization.picture import view
    from oocpatch.volumes.volume import Volume

__version__ = "0.1.0"

_HOMES = {
    "oocpatch.verification.compare": ("CheckReport", "check"),
    "oocpatch.conversion.convert": ("convert",),
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
    "oocpatch.aggregation.aggregator": ("PatchAggregator",),
    "oocpatch.models.wrappers": ("NumpyModel",),
    "oocpatch.linting.finding": ("Finding",),
    "oocpatch.linting.lint": ("LintReport", "lint"),
    "oocpatch.visualization.html_report": ("report",),
    "oocpatch.visualization.picture": ("view",),
    "oocpatch.planning.grid": ("PatchGrid", "PatchLocation"),
    "oocpatch.planning.plan": ("Plan",),
    "oocpatch.run.status": ("RunStatus", "status"),
    "oocpatch.run.predict": ("plan", "predict"),
    "oocpatch.sampling.grid_sampler": ("GridSampler",),
    "oocpatch.sampling.loader": ("SubjectsLoader",),
    "oocpatch.sampling.queue": ("Queue",),
    "oocpatch.sampling.uniform": ("UniformSampler",),
    "oocpatch.sampling.subject": ("Subject",),
    "oocpatch.sampling.weighted": ("LabelSampler", "WeightedSampler"),
    "oocpatch.volumes.volume": ("Volume",),
    "oocpatch.verification.checksums": ("Damage", "Verification", "verify"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BlockFailed",
    "CheckReport",
    "ClusterLost",
    "CorruptData",
    "Damage",
    "Finding",
    "GridSampler",
    "LabelSampler",
    "LintReport",
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
    "lint",
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
