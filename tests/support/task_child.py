"""A task of a benchmark in a process that is forked and not started, so that nothing is imported for it again."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any


def main(module: str, task: str, arguments: dict[str, Any]) -> None:
    """Print what `module.task(**arguments)` returns as JSON."""
    sys.stdout.write(json.dumps(getattr(importlib.import_module(module), task)(**arguments)))
