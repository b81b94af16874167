"""A campaign of random kills that counts what they cost: `python -m tests.faults.campaign_crash_cost --kills 30`.

Runs of the command in threads, in processes of this machine and on a cluster are killed at random times until they are
complete: the driver, or a worker. Patches that were computed more than once are compared with what the plan promises
for each process that dies, and the bytes with those of a run that nothing disturbed. In one case blocks are small, in
the others the whole volume is one block. Exits with 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import dask
import numpy as np
import psutil
import zarr

from tests.support.children import ROOT, Children, file_digests
from tests.support.cluster_child import CONFIG, MODEL
from tests.support.clusters import Fork

CASES = {
    "blocks-256": (256, 64, ["--patch-size", "64", "--patch-overlap", "32"]),
    "one-block-256": (256, 64, ["--patch-size", "64", "--patch-overlap", "32", "--block-shape", "256"]),
    "large-chunks-128": (128, 128, ["--patch-size", "32", "--patch-overlap", "16"]),
    "one-block-512": (512, 64, ["--patch-size", "128", "--patch-overlap", "64", "--block-shape", "512"]),
}
"""Edge of the volume, of its chunks, and options, by name."""

WORKERS = 2


@dataclass
class Tally:
    """The kills of one case in one way to run, and their cost."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    wrong: int = 0
    lost: int = 0
    allowed: int = 0

    def __str__(self) -> str:
        victims = ", ".join(f"{count} {name}" for name, count in sorted(self.kills.items()))
        kills = sum(self.kills.values())
        cost = f"{self.lost} patches lost, {self.allowed} promised at most, {self.lost / max(1, kills):.1f} a kill"
        return f"{kills} kills ({victims}), {self.runs} runs, {self.wrong} with wrong bytes; {cost}"

    @property
    def is_kept(self) -> bool:
        """Return whether bytes and promise were kept."""
        return not self.wrong and self.lost <= self.allowed


class Command:
    """The command of one case, its output, and the log of its model."""

    def __init__(self, folder: Path, case: str, delay: float) -> None:
        edge, chunk, options = CASES[case]
        self.output, control = folder / "out.zarr", folder / "control"
        self.log = Path(f"{control}.log")
        control.write_text(json.dumps({"delay": delay}))
        data = np.arange(1, edge**3 + 1, dtype=np.int32).reshape((edge,) * 3)  # a patch's first voxel tells its place
        zarr.create_array(folder / "volume.zarr", data=data, chunks=(chunk,) * 3, compressors=None)
        self.arguments = [str(folder / "volume.zarr"), str(self.output), "--model", MODEL, "--axes", "zyx"]
        self.arguments += ["--model-args", f"control={control}", *options]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}

    def start(self, verb: str, *more: str, out: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        """Start the command."""
        command = [sys.executable, "-m", "oocpatch", verb, *self.arguments, *more]
        return subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=out, stderr=subprocess.DEVNULL)

    def plan(self, *more: str) -> dict[str, int]:
        """Return the plan."""
        text, _ = self.start("plan", *more, "--json", out=subprocess.PIPE).communicate()
        plan: dict[str, int] = json.loads(text)
        return plan

    def computed(self) -> int:
        """Return the number of patches that were computed, without probes, whose voxels are zero."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return sum(first != 0 for line in lines for first in json.loads(line)[1:])

    def fresh(self) -> None:
        """Delete what a run left."""
        shutil.rmtree(self.output, ignore_errors=True)
        self.log.unlink(missing_ok=True)


@contextlib.contextmanager
def place(way: str, folder: Path) -> Iterator[tuple[Sequence[str], list[int], Fork | None]]:
    """Yield the options of a way to run, the process ids of a cluster's workers, and what starts more of them."""
    if way == "threads":
        yield [], [], None
    elif way == "processes":
        yield ["--processes", "--workers", str(WORKERS)], [], None
    else:
        with dask.config.set(CONFIG), Children() as children:
            fork = Fork(children, folder)
            _, address = fork.scheduler()
            workers = [fork.start("worker", address, 1) for _ in range(WORKERS)]
            yield ["--scheduler", address], workers, fork


def campaign(case: str, way: str, kills: int, generator: random.Random, delay: float) -> Tally:
    """Kill runs of a case until there were so many kills and the last run is complete."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="oocpatch-crash-cost-") as name:
        command = Command(Path(name), case, delay)
        if (code := command.start("predict").wait()) != 0:
            raise RuntimeError(f"the undisturbed run of {case} ended with {code}")
        expected = file_digests(command.output / "prediction")
        command.fresh()
        with place(way, Path(name)) as (options, workers, fork):
            plan = command.plan(*options)
            while sum(tally.kills.values()) < kills:
                command.fresh()
                allowed = _one_run(
                    command,
                    options,
                    workers=workers,
                    fork=fork,
                    plan=plan,
                    kills=kills,
                    tally=tally,
                    generator=generator,
                )
                tally.runs += 1
                tally.wrong += file_digests(command.output / "prediction") != expected
                tally.lost += command.computed() - plan["patches"]
                tally.allowed += allowed
    return tally


def _one_run(
    command: Command,
    options: Sequence[str],
    *,
    workers: list[int],
    fork: Fork | None,
    plan: dict[str, int],
    kills: int,
    tally: Tally,
    generator: random.Random,
) -> int:
    """Run until it is complete, with kills at random times; return the number of patches that these may cost."""
    allowed, driver = 0, command.start("predict", *options)
    while True:
        is_enough = sum(tally.kills.values()) >= kills
        target = command.computed() + generator.randint(1, max(2, plan["patches"] // 3))
        while driver.poll() is None and (is_enough or command.computed() < target):
            time.sleep(0.02)
        if driver.poll() == 0:
            return allowed
        if driver.poll() not in (None, 1):  # 1: a block lost its process three times
            raise RuntimeError(f"the command ended with {driver.returncode}")
        if driver.poll() is None:
            victims = workers or _spawned(driver.pid)
            victim = generator.choice([driver.pid, *victims])
            is_driver = victim == driver.pid
            tally.kills["drivers" if is_driver else "workers"] += 1
            # the tasks of all workers are dropped with their driver
            allowed += plan["crash_patches"] * (max(1, len(victims)) if is_driver else 1)
            if fork is not None and not is_driver:
                fork.kill(victim)
                workers.remove(victim)
                _, address = options
                workers.append(fork.start("worker", address, 1))
            else:
                os.kill(victim, signal.SIGKILL)
            if not is_driver:
                continue
            driver.wait()
            if not workers:
                psutil.wait_procs([p for p in map(_process, victims) if p is not None], timeout=30)
        driver = command.start("predict", *options)


def _process(pid: int) -> psutil.Process | None:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid)
    return None


def _spawned(driver: int) -> list[int]:
    """Return the worker processes that a driver has started."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # one that was killed before may not be gone yet
            found += [process.pid] if "spawn_main" in " ".join(process.cmdline()) else []
    return found


TRIALS = (
    *(("threads", case) for case in CASES),
    *((way, case) for way in ("processes", "cluster") for case in ("blocks-256", "large-chunks-128")),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="in all, shared out to ways and cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.03, help="seconds that a patch takes")
    parser.add_argument("--ways", nargs="+", choices=("threads", "processes", "cluster"))
    asked = parser.parse_args()
    trials = [(way, case) for way, case in TRIALS if not asked.ways or way in asked.ways]
    broken = 0
    for way, case in trials:
        began = time.monotonic()
        generator = random.Random(f"{asked.seed}{way}{case}")
        tally = campaign(case, way, -(-asked.kills // len(trials)), generator, asked.delay)
        print(f"{way}, {case}: {tally}, {time.monotonic() - began:.0f} s", flush=True)
        broken += not tally.is_kept
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
