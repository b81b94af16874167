"""The tests that need no torch, which comes for one Python only where its builds for others are gigabytes.

pytest -p tests.without_torch tests/unit/planning

Importing torch skips the module or the test that does it, whether torch is installed or not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

import pytest


class NoTorch(MetaPathFinder):
    """Skips what imports torch."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name == "torch":
            pytest.skip("needs torch", allow_module_level=True)


def pytest_load_initial_conftests() -> None:
    """Begin before the package is imported; only a plugin that `-p` names is asked so early."""
    sys.meta_path.insert(0, NoTorch())
