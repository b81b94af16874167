"""A campaign on objects, for anyone to start: `python -m tests.laws.campaign_objects --volumes 300`.

Random volumes of one to four axes (noise, also where it percolates, classes, blobs, spirals, combs) are labelled with
every connectivity and several shapes of blocks by the pieces of `oocpatch.label`, every tenth one also by the whole of
it, and compared with `scipy.ndimage.label`, renumbered by first voxels. Exits with 1 if one result is wrong.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import oocpatch
from oocpatch.planning.labelling import Labelling
from tests.support.objects import label_in_blocks, oracle, shapes_of_objects

KINDS = ("noise", "classes", "blobs", "spiral", "comb")
LONGEST = {1: 300, 2: 60, 3: 24, 4: 10}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=300)
    parser.add_argument("--blocks", type=int, default=3, help="shapes of blocks per volume and connectivity")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    random, began = np.random.default_rng(asked.seed), time.monotonic()
    done = wrong = whole = 0
    for number in range(asked.volumes):
        ndim = number % 4 + 1
        shape = tuple(int(n) for n in random.integers(1, LONGEST[ndim] + 1, ndim))
        kind, density = KINDS[number % len(KINDS)], float(random.choice([0.05, 0.2, 0.3116, 0.5927, 0.8]))
        values = shapes_of_objects(kind, shape, int(random.integers(1 << 30)), density)
        for connectivity in range(1, ndim + 1):
            rule = Labelling(None, connectivity, per_class=bool(random.integers(2)), min_size=int(random.integers(4)))
            expected, count = oracle(values, rule)
            for _ in range(asked.blocks):
                block = tuple(int(random.integers(max(1, n // 5), n + 1)) for n in shape)
                labels, found = label_in_blocks(values, rule, block)
                done += 1
                if found != count or not np.array_equal(labels, expected):
                    wrong += 1
                    print(f"wrong: {kind} {shape} seed {asked.seed} volume {number}, {rule}, blocks {block}")
            if number % 10 == 0:
                whole += 1
                wrong += not _is_right(values, rule, block, expected, count)
    seconds = time.monotonic() - began
    print(f"{asked.volumes} volumes, {done} times in blocks, {whole} whole runs: {wrong} wrong, {seconds:.0f} s")
    return 1 if wrong else 0


def _is_right(values: np.ndarray, rule: Labelling, block: tuple[int, ...], expected: np.ndarray, count: int) -> bool:
    """Return whether the whole of `oocpatch.label` gives what is expected."""
    with tempfile.TemporaryDirectory() as folder:
        labels = oocpatch.label(
            values,
            Path(folder, "labels.zarr"),
            axes="wzyx"[-values.ndim :],
            connectivity=rule.connectivity,
            per_class=rule.per_class,
            min_size=rule.min_size,
            block_shape=block,
            output_chunks=tuple(max(1, b // 2) for b in block),
            workers=2,
            progress=False,
        )
        return bool(labels.attrs["objects"] == count and np.array_equal(labels.values, expected))


if __name__ == "__main__":
    sys.exit(main())
