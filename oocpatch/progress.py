"""Telling how far something is, on stderr: a bar on a terminal, lines elsewhere, JSON for programs.

```text
 auto    a bar on a terminal; elsewhere a line every ten seconds, and nothing about what is quicker
 bar     a bar
 plain   lines: at the start, every ten seconds, at the end
 json    a JSON object per line: at the start, every second, at the end
 none    nothing
```
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tqdm import tqdm

DISPLAYS = ("auto", "bar", "plain", "json", "none")
PLAIN_SECONDS, JSON_SECONDS = 10.0, 1.0


def display_of(progress: str | bool) -> str:
    """How to tell.

    Raises:
        ValueError: when it is none of the known ways.
    """
    if progress not in (*DISPLAYS, True, False):
        raise ValueError(f"progress must be one of {', '.join(map(repr, DISPLAYS))}, got {progress!r}")
    if isinstance(progress, bool):
        return "bar" if progress else "none"
    if progress == "auto":
        return "bar" if sys.stderr.isatty() else "auto"
    return progress


@dataclass
class ProgressCounter:
    """How much is done, and how fast it goes.

    Attributes:
        verb: what goes on.
        unit: what is counted, in the plural.
        total: how many there are.
        resumed: how many were done before.
        bytes_each: bytes of the volume that one stands for.
        clock: seconds; for tests.

    >>> clock = iter([0.0, 4.0, 4.0]).__next__
    >>> tally = ProgressCounter("predict", "patches", 100, resumed=20, bytes_each=5e5, clock=clock)
    >>> tally.add(40)
    >>> tally.line()
    'predict: 60 of 100 patches (60%, 20% from before), 10.0 patches/s, 5.0 MB/s, 0:04 left'
    """

    verb: str
    unit: str
    total: int
    resumed: int = 0
    bytes_each: float = 0.0
    clock: Callable[[], float] = time.monotonic
    done: int = 0
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()
        self.done = self.resumed

    def add(self, count: int) -> None:
        """So many more are done."""
        self.done += count

    def facts(self) -> dict[str, float | str | None]:
        """What a line tells, as numbers."""
        seconds = self.clock() - self.started
        rate = (self.done - self.resumed) / seconds if seconds > 0 else 0.0
        return {
            "event": "progress",
            "verb": self.verb,
            "unit": self.unit,
            "done": self.done,
            "total": self.total,
            "resumed": self.resumed,
            "seconds": round(seconds, 3),
            "per_second": round(rate, 3),
            "megabytes_per_second": round(rate * self.bytes_each / 1e6, 3),
            "seconds_left": round((self.total - self.done) / rate, 1) if rate > 0 else None,
        }

    def line(self) -> str:
        """What a line tells, in words."""
        facts = self.facts()
        before = f", {self.resumed / max(1, self.total):.0%} from before" if self.resumed else ""
        part = self.done / max(1, self.total)
        told = f"{self.verb}: {self.done:,} of {self.total:,} {self.unit} ({part:.0%}{before})"
        if facts["seconds_left"] is None:
            return told
        speed = f"{facts['per_second']:,.1f} {self.unit}/s, {facts['megabytes_per_second']:,.1f} MB/s"
        return f"{told}, {speed}, {_clock(int(float(facts['seconds_left'])))} left"


def _clock(seconds: int) -> str:
    """Hours, minutes and seconds.

    >>> _clock(65), _clock(3725)
    ('1:05', '1:02:05')
    """
    minutes = seconds // 60
    hours = f"{minutes // 60}:{minutes % 60:02}" if minutes >= 60 else str(minutes)
    return f"{hours}:{seconds % 60:02}"


@contextlib.contextmanager
def show_progress(
    progress: str | bool, verb: str, unit: str, total: int, *, resumed: int = 0, bytes_each: float = 0.0
) -> Iterator[Callable[[int], None]]:
    """Tell how far something is, by a function that is told how many more are done, from any thread."""
    way, lock = display_of(progress), threading.Lock()
    tally = ProgressCounter(verb, unit, total, resumed, bytes_each)
    if way in ("bar", "none"):
        with tqdm(total=total, initial=resumed, unit=f" {unit}", desc=verb, disable=way == "none") as bar:

            def show(count: int) -> None:
                with lock:
                    tally.add(count)
                    if not bar.disable:
                        bar.set_postfix_str(f"{tally.facts()['megabytes_per_second']} MB/s", refresh=False)
                    bar.update(count)

            yield show
        return
    pause = JSON_SECONDS if way == "json" else PLAIN_SECONDS
    told = 0 if way == "auto" else _say(way, tally)
    after = time.monotonic() + pause

    def tell(count: int) -> None:
        nonlocal after, told
        with lock:
            tally.add(count)
            if time.monotonic() >= after:
                told += _say(way, tally)
                after = time.monotonic() + pause

    yield tell
    if told:
        _say(way, tally)


def _say(way: str, tally: ProgressCounter) -> int:
    sys.stderr.write(f"{json.dumps(tally.facts()) if way == 'json' else tally.line()}\n")
    sys.stderr.flush()
    return 1
