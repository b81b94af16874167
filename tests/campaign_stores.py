"""A long campaign on object stores, for anyone to start: `python -m tests.campaign_stores --lives 50`.

In each life a small run reads a volume and writes an output in a bucket of a server that is killed and started again,
frozen, or told to misbehave, and the run itself is killed, at random times, until the output is complete. Its bytes are
then compared with those of a local run, and nothing may be left behind. Exits with 1 if one life is wrong.
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

from tests.children import Children, report
from tests.crash_child import Job
from tests.small_run import all_patches, patch_calls, small_run, undisturbed
from tests.stores import Bucket, served

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
    asked = parser.parse_args()
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
            options = {**local.options, "workspace": str(workspace)}
            job = dataclasses.replace(local, volume=volume, output=bucket.url(name), options=options)
            Path(job.log).unlink(missing_ok=True)
            live(children, job, bucket, generator, tally)
            found = bucket.digests(f"{name}/prediction/")
            found.pop("oocpatch.ledger")
            left = [key for key in bucket.objects() if key.startswith(f"{name}.")]
            wrong += found != expected or bool(left) or workspace.exists()
            tally["patches computed twice"] += len(patch_calls(job)) - patches
    told = ", ".join(f"{count} {what}" for what, count in sorted(tally.items()))
    print(f"{asked.lives} lives: {told}; {wrong} wrong, {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
