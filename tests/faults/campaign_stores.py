"""A long campaign on object stores, for anyone to start: `python -m tests.faults.campaign_stores --lives 50`.

In each life a small run reads a volume and writes an output in a bucket of a server that is killed and started again,
frozen, or told to misbehave, and the run itself is killed, at random times, until the output is complete. Its workspace
is in the bucket, in every other life on the disk. Its bytes are then compared with those of a local run, and nothing
may be left behind.

With `--every-change`, a tiny run is killed before each change of what is in the bucket instead, and resumed. Exits with
1 if one life is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.support.children import Children, report
from tests.support.crash_child import Job, make_volume
from tests.support.small_run import TINY, all_patches, patch_calls, small_run, undisturbed
from tests.support.stores import Bucket, killed_before, served

FAULTS = (
    {"every": 2, "status": 503},
    {"every": 3, "status": 500},
    {"every": 3, "drop": True},
    {"every": 3, "drop": "late"},
    {"every": 1, "status": 503},
)


def harm(bucket: Bucket, generator: random.Random, tally: Counter[str]) -> None:
    """Let something happen to the server, for up to a second."""
    what = generator.choice(["server killed", "server frozen", "misbehaved"])
    tally[what] += 1
    if what == "server killed":
        bucket.kill()
    elif what == "server frozen":
        bucket.signal(signal.SIGSTOP)
    else:
        bucket.behave(**generator.choice(FAULTS))
    time.sleep(generator.uniform(0, 1))
    if what == "server killed":
        bucket.start()
    elif what == "server frozen":
        bucket.signal(signal.SIGCONT)
    else:
        bucket.behave()


def live(children: Children, job: Job, bucket: Bucket, generator: random.Random, tally: Counter[str]) -> None:
    """Start the run again and again, and let things happen, until it is complete."""
    code = None
    while code != 0:
        pid = children.start(job)
        while (code := children.poll(pid, generator.uniform(0, 1.5))) is None:
            if generator.random() < 0.5:
                code = children.kill(pid)
                tally["runs killed"] += code == -signal.SIGKILL
                break
            harm(bucket, generator, tally)
        if code == 1:
            tally[f"ended with {report(job).error}, and went on"] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lives", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every-change", action="store_true")
    asked = parser.parse_args()
    return every_change() if asked.every_change else lives(asked)


def every_change() -> int:
    """Kill a tiny run before each change, and resume it."""
    began, wrong, change, killed = time.monotonic(), [], 0, True
    with (
        tempfile.TemporaryDirectory(prefix="oocpatch-campaign-") as folder,
        served(Path(folder, "server")) as bucket,
        Children() as children,
    ):
        make_volume(Path(folder, "volume.zarr"), (16,), (8,))
        job = Job(f"{folder}/volume.zarr", "", f"{folder}/log", f"{folder}/report", options=TINY)
        assert children.run(dataclasses.replace(job, output=bucket.url("whole.zarr"))) == 0
        expected = bucket.digests("whole.zarr/prediction/")
        while killed:
            name = f"{change}.zarr"
            one = dataclasses.replace(job, output=bucket.url(name))
            killed = killed_before(children, bucket, one, change)
            code = children.run(one)
            left = [key for key in bucket.objects() if key.startswith(f"{name}.")]
            if code or left or bucket.digests(f"{name}/prediction/") != expected:
                wrong.append(f"before change {change}: {report(one).message or left}")
            change += killed
    print(*wrong, sep="\n")
    print(f"killed before each of {change} changes: {len(wrong)} wrong, {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


def lives(asked: argparse.Namespace) -> int:
    """Run lives of random faults."""
    generator, tally, patches = random.Random(asked.seed), Counter[str](), len(all_patches())
    began, wrong = time.monotonic(), 0
    with (
        tempfile.TemporaryDirectory(prefix="oocpatch-campaign-") as folder,
        served(Path(folder, "server")) as bucket,
        Children() as children,
    ):
        local, workspace = dataclasses.replace(small_run(Path(folder)), delay=0.004), Path(folder, "work")
        expected = undisturbed(children, local)
        expected.pop("oocpatch.ledger")
        volume = bucket.upload(Path(local.volume), "volume.zarr")
        for life in range(asked.lives):
            name = f"life {life}.zarr"
            options = {**local.options, **({"workspace": str(workspace)} if life % 2 else {})}
            job = dataclasses.replace(local, volume=volume, output=bucket.url(name), options=options)
            Path(job.log).unlink(missing_ok=True)
            live(children, job, bucket, generator, tally)
            found = bucket.digests(f"{name}/prediction/")
            found.pop("oocpatch.ledger")
            left = [key for key in bucket.objects() if key.startswith(f"{name}.")]
            wrong += found != expected or bool(left) or workspace.exists()
            tally["patches computed twice"] += len(patch_calls(job)) - patches
    listed = ", ".join(f"{count} {what}" for what, count in sorted(tally.items()))
    print(f"{asked.lives} lives: {listed}; {wrong} wrong, {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
