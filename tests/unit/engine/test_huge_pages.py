"""Promise: what a model allocates lies in huge pages, unless the user decided otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CHILD = """
import oocpatch, torch
tensor = torch.ones(8 << 20)
address = tensor.data_ptr() + (4 << 20)
inside = False
for line in open("/proc/self/smaps"):
    fields = line.split()
    if "-" in fields[0] and not fields[0].endswith(":"):
        low, high = (int(n, 16) for n in fields[0].split("-"))
        inside = low <= address < high
    elif inside and fields[0] == "VmFlags:":
        print("hg" in fields)
"""


@pytest.mark.skipif(not THP.exists(), reason="the kernel has no transparent huge pages")
@pytest.mark.parametrize(("value", "asked"), [(None, "True"), ("0", "False")], ids=["default", "switched off"])
def test_tensors_ask_for_huge_pages_unless_the_user_says_no(value: str | None, asked: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    if value is not None:
        environment["THP_MEM_ALLOC_ENABLE"] = value
    done = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == asked
