"""A long campaign of random kills, for anyone to start: `python -m tests.faults.campaign_kills --kills 200`.

Small runs are killed at random times until they are complete, and their bytes compared with those of a run that nothing
disturbed: in threads, in parts, in worker processes of one machine, and on a cluster, where the victim is a worker
(killed, or frozen and thawed later), all workers, the scheduler, or the client. With `--every-change`, a tiny run dies
before each change of the disk instead, and is run again; those of `label` and `objects`, and one whose scores are
resampled, too. Exits with 1 if one result is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import dask
import psutil

from tests.support.children import ROOT, Children, file_digests, report
from tests.support.cluster_child import CONFIG
from tests.support.clusters import Fork, SmallCluster
from tests.support.crash_child import Job, make_volume
from tests.support.small_run import (
    TINY,
    all_patches,
    die_and_resume,
    fresh,
    job_in,
    labelling_job,
    patch_calls,
    prediction,
    resampling_job,
    small_run,
    table_job,
    undisturbed,
)

PATCHES = len(all_patches())


@dataclasses.dataclass
class Tally:
    """What a campaign has seen in one way to run."""

    kills: Counter[str] = dataclasses.field(default_factory=Counter)
    runs: int = 0
    wrong: int = 0
    computed: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        kills = sum(self.kills.values())
        lost = (self.computed - PATCHES * self.runs) / max(1, kills)
        listed = ", ".join(f"{count} {name}" for name, count in sorted(self.kills.items()))
        wrong = f"{self.wrong} wrong, {lost:.1f} patches lost a kill"
        return f"{kills} kills ({listed}), {self.runs} runs, {wrong}, {self.seconds:.0f} s"


def in_threads(folder: Path, kills: int, generator: random.Random, *, parts: int = 1) -> Tally:
    """Runs in this machine's threads, as one call or as several parts at a time."""
    tally = Tally()
    with Children() as children:
        job = dataclasses.replace(small_run(folder), delay=0.004)
        began = time.monotonic()
        expected = undisturbed(children, job)
        duration = time.monotonic() - began
        while sum(tally.kills.values()) < kills:
            fresh(job)
            calls = [job] if parts == 1 else [_part(job, number, parts) for number in range(1, parts + 1)]
            left = {children.start(call): call for call in calls}
            while left:
                pid = generator.choice(list(left))
                code = children.poll(pid, generator.uniform(0, duration / parts))
                if code is None:
                    code = children.kill(pid)
                call = left.pop(pid)
                if code == -signal.SIGKILL:
                    tally.kills["drivers"] += 1
                    left[children.start(call)] = call
                elif code:
                    raise AssertionError(report(call).message)
            tally.runs += 1
            tally.wrong += prediction(job) != expected or bool(list(Path(job.watch).glob("out?*")))
            tally.computed += len(patch_calls(job))
    return tally


def _part(job: Job, number: int, count: int) -> Job:
    options = {**job.options, "part": [number, count]}
    return dataclasses.replace(job, options=options, report=f"{job.report}-{number}")


def on_cluster(folder: Path, kills: int, generator: random.Random) -> Tally:
    """Runs on a scheduler and two workers of which any may die or freeze."""
    tally = Tally()
    with dask.config.set(CONFIG), Children() as children:
        fork = Fork(children, folder)
        while sum(tally.kills.values()) < kills:
            place = folder / f"run{tally.runs}"
            place.mkdir()
            small = SmallCluster(fork, place)
            expected = small.expected()
            small.behave(delay=0.01)
            _disturb(fork, small, tally, generator)
            tally.runs += 1
            tally.wrong += small.digests() != expected or bool(list(place.glob("out.*")))
            tally.computed += len(small.calls())
            fork.kill_all()
    return tally


def _disturb(fork: Fork, small: SmallCluster, tally: Tally, generator: random.Random) -> None:
    small.add(2)
    frozen: list[int] = []
    client = 0
    while True:
        if not client:
            client = fork.start("client", str(small.folder / "report"), small.address, small.arguments())
        code = _after(fork, client, small, generator.randint(1, 12))
        if code == 0 and (small.folder / "report").read_text() == "done":
            break
        if code is not None:  # the scheduler is lost, or one block lost its worker three times: the same call continues
            client = 0
            continue
        victim = generator.choice(["workers", "workers", "frozen", "all workers", "schedulers", "clients"])
        tally.kills[victim] += 1
        if victim == "clients":
            fork.kill(client)
            client = 0
        elif victim == "schedulers":
            fork.kill_all()
            client, frozen, small.workers = 0, [], []
            small.scheduler, small.address = fork.scheduler()
            small.add(2)
        else:
            unlucky = small.workers[:1] if victim in ("workers", "frozen") else list(small.workers)
            for pid in unlucky:
                small.workers.remove(pid)
                if victim == "frozen":
                    os.kill(pid, signal.SIGSTOP)
                    frozen.append(pid)
                else:
                    fork.kill(pid)
            small.add(len(unlucky))
            if frozen and generator.random() < 0.5:
                os.kill(frozen.pop(0), signal.SIGCONT)
    for pid in frozen:  # after the run
        os.kill(pid, signal.SIGCONT)
    time.sleep(1.5 if frozen else 0)


def _after(fork: Fork, client: int, small: SmallCluster, more: int) -> int | None:
    """Wait for so many patches, or ten seconds; the exit code of the client if it has ended."""
    seen, deadline, code = len(small.calls()), time.monotonic() + 10, None
    while code is None and len(small.calls()) < seen + more and time.monotonic() < deadline:
        time.sleep(0.005)
        code = fork.poll(client)
    return code


def in_processes(folder: Path, kills: int, generator: random.Random) -> Tally:
    """The command with `--processes`, of whose processes any may die."""
    tally = Tally()
    job = small_run(folder)
    control = folder / "control"
    control.write_text('{"delay": 0.02}')
    command = [sys.executable, "-m", "oocpatch", "predict", job.volume, job.output, "--patch-size", "8"]
    command += ["--patch-overlap", "4", "--block-shape", "8", "--output-chunks", "4"]
    command += ["--model", "tests.support.cluster_child:scripted", "--model-args", f"control={control}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    log = Path(f"{control}.log")

    def start(*more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*command, *more], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    assert start().wait() == 0
    expected = file_digests(Path(job.output) / "prediction")
    while sum(tally.kills.values()) < kills:
        fresh(job)
        log.unlink(missing_ok=True)
        driver = start("--processes", "--workers", "2")
        while True:
            enough = _computed(log) + generator.randint(1, 12)
            while driver.poll() is None and _computed(log) < enough:
                time.sleep(0.02)
            code = driver.poll()
            if code == 0:
                break
            if code not in (None, 1, -signal.SIGKILL):  # 1: a block was killed three times, and named
                raise AssertionError(f"the command ended with {code}")
            if code is None:
                _kill_one_of(driver, tally, generator)
                if driver.poll() is None:
                    continue
                driver.wait()
            driver = start("--processes", "--workers", "2")
        tally.runs += 1
        tally.wrong += file_digests(Path(job.output) / "prediction") != expected
        tally.computed += _computed(log)
    return tally


def _computed(log: Path) -> int:
    """Patches that were computed, without the probe."""
    lines = log.read_text().splitlines() if log.exists() else []
    return sum(line.count(",") for line in lines if ", 0.0" not in line)


def _kill_one_of(driver: subprocess.Popen[bytes], tally: Tally, generator: random.Random) -> None:
    workers = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # one that was killed before may not be gone yet
            workers += [process] if "spawn_main" in " ".join(process.cmdline()) else []
    victim = generator.choice([driver.pid, *(p.pid for p in workers)])
    tally.kills["drivers" if victim == driver.pid else "workers"] += 1
    os.kill(victim, signal.SIGKILL)
    if victim == driver.pid:
        driver.wait()
        psutil.wait_procs(workers, timeout=30)


WAYS: dict[str, Callable[[Path, int, random.Random], Tally]] = {
    "threads": in_threads,
    "parts": lambda folder, kills, generator: in_threads(folder, kills, generator, parts=3),
    "cluster": on_cluster,
    "processes": in_processes,
}


def every_change(folder: Path, mode: str) -> int:
    """Let a tiny run die before each of its changes of the disk; return their number."""
    if mode in {"label", "objects"}:
        job = labelling_job(folder, (16, 16)) if mode == "label" else table_job(folder)
    elif mode == "resampled":
        job = resampling_job(folder)
    elif mode == "predict and label":
        make_volume(folder / "volume.zarr", (16,), (8,))
        job = job_in(folder, **TINY, postprocess="label:7.5")
    else:
        make_volume(folder / "volume.zarr", (16,), (8,))
        job = job_in(folder, **TINY, **({"model_id": mode} if mode == "vectors" else {"overlap_mode": mode}))
    with Children() as children:
        assert children.run(job) == 0
        expected, changes = prediction(job), report(job).changes
        for number in range(changes):
            die_and_resume(children, job, expected, number)
    return changes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in all, shared out to the ways")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--every-change", action="store_true")
    asked = parser.parse_args()
    modes = ("hann", "crop", "instances", "label", "resampled", "vectors", "predict and label", "objects")
    for mode in modes if asked.every_change else ():
        with tempfile.TemporaryDirectory(prefix="oocpatch-campaign-") as folder:
            print(f"{mode}: died before each of {every_change(Path(folder), mode)} changes", flush=True)
    if asked.every_change:
        return 0
    wrong = 0
    for way in asked.ways:
        with tempfile.TemporaryDirectory(prefix="oocpatch-campaign-") as folder:
            began = time.monotonic()
            tally = WAYS[way](Path(folder), -(-asked.kills // len(asked.ways)), random.Random(f"{asked.seed}{way}"))
            tally.seconds = time.monotonic() - began
        print(f"{way}: {tally}", flush=True)
        wrong += tally.wrong
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
