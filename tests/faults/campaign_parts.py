"""Parts of one run that start at the same time, many times: `python -m tests.faults.campaign_parts --trials 30`.

Each trial starts three parts within a few hundredths of a second in a place where nothing is. None of them may warn or
fail, the last one leaves nothing beside the output, and the bytes are those of one call. Exits with 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import zarr

import oocpatch
from tests.support.children import file_digests

PARTS = 3


def net(patches: torch.Tensor) -> torch.Tensor:
    """Return patches with a weight for each voxel, which shows one that ends up in a wrong place."""
    return patches * torch.linspace(0.5, 1, patches.shape[-1])


def start(folder: Path, name: str, number: int, pause: float) -> int:
    """Fork a process for a part, whose warnings and errors go to a file; return its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    with (folder / f"log-{number}").open("wb") as log:
        os.dup2(log.fileno(), 2)
    try:
        time.sleep(pause)
        run(folder, name, (number, PARTS) if number else None)
        code = 0
    except BaseException:  # noqa: BLE001 - the parent reads it
        traceback.print_exc()
    os._exit(code)


def run(folder: Path, name: str, part: tuple[int, int] | None) -> None:
    """Run one part, or all."""
    settings = {"patch_size": 32, "patch_overlap": 16, "block_shape": 32, "progress": False, "model_id": "net"}
    oocpatch.predict(folder / "volume.zarr", net, folder / name, part=part, **settings)


def trial(folder: Path, generator: random.Random) -> str:
    """Run all parts at the same time; return what is wrong."""
    pids = {start(folder, "out", number, generator.uniform(0, 0.1)): number for number in range(1, PARTS + 1)}
    codes = {number: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid, number in pids.items()}
    said = " ".join((folder / f"log-{number}").read_text().strip() for number in codes).strip()
    left = sorted(path.name for path in folder.glob("out*"))
    is_same = left == ["out"] and file_digests(folder / "out/prediction") == file_digests(folder / "whole/prediction")
    shutil.rmtree(folder / "out", ignore_errors=True)
    return "" if is_same and not said and not any(codes.values()) else f"{codes} {left} {is_same} {said[-500:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    generator, wrong = random.Random(asked.seed), 0
    with tempfile.TemporaryDirectory(prefix="oocpatch-parts-") as name:
        folder = Path(name)
        data = np.random.default_rng(0).random((96, 128), dtype=np.float32)
        zarr.create_array(folder / "volume.zarr", data=data, chunks=(32, 32))
        if os.waitpid(start(folder, "whole", 0, 0.0), 0)[1]:
            raise RuntimeError((folder / "log-0").read_text())
        for number in range(asked.trials):
            if problem := trial(folder, generator):
                print(f"trial {number}: {problem}", flush=True)
                wrong += 1
    print(
        f"{asked.trials} trials of {PARTS} parts that start together: {wrong} with a warning, an error or other bytes"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
