"""A process that was forked from one with threads computes the same values, or says why it cannot; it never hangs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).parent.parent / "support/fork_child.py"
RIGHT = [
    "shards", "an array in memory", "output with shards", "one worker", "two workers", "a network",
    "a network with two workers", "a complete run of the parent", "a result of the parent", "a volume of the parent",
    "patches", "a grandchild", "a pyramid", "convert", "normalization", "multiprocessing.Pool", "ProcessPoolExecutor",
]  # fmt: skip


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    command = [sys.executable, str(CHILD), str(tmp_path_factory.mktemp("forks"))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.parametrize("task", RIGHT)
def test_a_forked_process_computes_the_values_of_its_parent(answers: dict[str, str], task: str) -> None:
    assert answers[task] == "right"


def test_a_forked_process_refuses_a_library_whose_threads_it_has_lost(answers: dict[str, str]) -> None:
    assert answers["n5"].startswith("RuntimeError:")
    assert "forked from one that has used tensorstore" in answers["n5"]
    assert "multiprocessing_context='spawn'" in answers["n5"]
