"""A call for a fresh process that makes a table, and may die at a chosen change of the disk."""

from __future__ import annotations

import json
import sys
from typing import Any

import oocpatch
from tests.support.crash_child import ChangeCounter


def main(labels: str, output: str, watch: str, die_before: int | None, options: dict[str, Any]) -> None:
    """Print the number of changes of the disk below `watch`."""
    counter = ChangeCounter(watch, die_before)
    counter.install()
    oocpatch.objects(labels, output, progress=False, **options)
    sys.stdout.write(json.dumps({"changes": counter.changes}))
