"""A command of `oocpatch` for a process that is forked and not started, so that nothing is imported for it again."""

from __future__ import annotations

import sys

from oocpatch.cli.main import main as command_line


def main(*arguments: str) -> None:
    """Do what `oocpatch ARGUMENTS...` does, and exit as it does."""
    sys.argv = ["oocpatch", *arguments]
    command_line()
