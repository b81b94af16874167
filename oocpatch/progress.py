"""Progress: how much of a task is done, shown on stderr. The only module that imports tqdm.

```text
 auto    a bar on a terminal and in a notebook; elsewhere a line every ten seconds, and nothing for tasks that are
         quicker
 bar     a bar: in a notebook a widget, or text where ipywidgets is missing
 plain   lines: at the start, every ten seconds, at the end
 json    a JSON object per line: at the start, every second, at the end
 none    nothing
```
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class TaskDone:
    """An event of a run: patches of a block are computed or skipped.

    Attributes:
        block: index of the block.
        patches: number of patches.
        bytes: share of the volume's bytes.
    """

    block: int
    patches: int
    bytes: float


OnProgress = Callable[[TaskDone], None]
"""A function that receives the events of a run, from any thread."""

DISPLAYS = ("auto", "bar", "plain", "json", "none")
PLAIN_SECONDS, JSON_SECONDS = 10.0, 1.0


def display_of(progress: str | bool | OnProgress) -> str:
    """Return the name of the display that an argument `progress` asks for; none for a function of events.

    Raises:
        ValueError: when there is no such display.
    """
    if callable(progress):
        return "none"
    if progress not in (*DISPLAYS, True, False):
        raise ValueError(f"progress must be one of {', '.join(map(repr, DISPLAYS))}, got {progress!r}")
    if isinstance(progress, bool):
        return "bar" if progress else "none"
    if progress == "auto":
        return "bar" if sys.stderr.isatty() or _in_notebook() else "auto"
    return progress


def _in_notebook() -> bool:
    """Return True where stderr goes to the front end of a Jupyter kernel."""
    return type(sys.stderr).__module__.startswith("ipykernel.")


@functools.cache
def _bar_class() -> Any:
    """Return the class of bars: widgets in a notebook that has them, else text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the choice is experimental, and that widgets are missing
        return importlib.import_module("tqdm.autonotebook").tqdm


@dataclass
class ProgressCounter:
    """Number of units that are done, and their rate.

    Attributes:
        verb: name of the task.
        unit: name of the units, in the plural.
        total: number of units.
        resumed: number of units that were done by earlier calls.
        bytes_each: bytes of the volume per unit.
        clock: returns seconds; for tests.

    >>> clock = iter([0.0, 4.0, 4.0]).__next__
    >>> counter = ProgressCounter("predict", "patches", 100, resumed=20, bytes_each=5e5, clock=clock)
    >>> counter.add(40)
    >>> counter.line()
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
        """Count units that are done."""
        self.done += count

    def facts(self) -> dict[str, float | str | None]:
        """Return the state as numbers."""
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
        """Return the state as a line of text."""
        facts = self.facts()
        before = f", {self.resumed / max(1, self.total):.0%} from before" if self.resumed else ""
        part = self.done / max(1, self.total)
        text = f"{self.verb}: {self.done:,} of {self.total:,} {self.unit} ({part:.0%}{before})"
        if facts["seconds_left"] is None:
            return text
        speed = f"{facts['per_second']:,.1f} {self.unit}/s, {facts['megabytes_per_second']:,.1f} MB/s"
        return f"{text}, {speed}, {_clock(int(float(facts['seconds_left'])))} left"


def _clock(seconds: int) -> str:
    """Format seconds as hours, minutes and seconds.

    >>> _clock(65), _clock(3725)
    ('1:05', '1:02:05')
    """
    minutes = seconds // 60
    hours = f"{minutes // 60}:{minutes % 60:02}" if minutes >= 60 else str(minutes)
    return f"{hours}:{seconds % 60:02}"


@contextlib.contextmanager
def show_progress(
    progress: str | bool | OnProgress,
    verb: str,
    unit: str,
    total: int,
    *,
    resumed: int = 0,
    bytes_each: float = 0.0,
    delay: float = 0.0,
) -> Iterator[Callable[[int], None]]:
    """Show the progress of a task, as long as the `with` block lasts.

    Args:
        progress: the display, as an argument `progress` names it.
        verb: name of the task.
        unit: name of the units, in the plural.
        total: number of units.
        resumed: number of units that were done by earlier calls.
        bytes_each: bytes of the volume per unit.
        delay: seconds until a bar appears.

    Yields:
        A function of the number of units that were done since it was called last; any thread may call it.
    """
    display, lock = display_of(progress), threading.Lock()
    counter = ProgressCounter(verb, unit, total, resumed, bytes_each)
    if display in ("bar", "none"):
        disable = display == "none"
        settings = {"total": total, "initial": resumed, "unit": f" {unit}", "desc": verb, "delay": delay}
        with _bar_class()(**settings, disable=disable) as bar:

            def update_bar(count: int) -> None:
                with lock:
                    counter.add(count)
                    if not bar.disable:
                        bar.set_postfix_str(f"{counter.facts()['megabytes_per_second']} MB/s", refresh=False)
                    bar.update(count)

            yield update_bar
        return
    pause = JSON_SECONDS if display == "json" else PLAIN_SECONDS
    lines = 0 if display == "auto" else _print_line(display, counter)
    next_at = time.monotonic() + pause

    def print_line(count: int) -> None:
        nonlocal lines, next_at
        with lock:
            counter.add(count)
            if time.monotonic() >= next_at:
                lines += _print_line(display, counter)
                next_at = time.monotonic() + pause

    yield print_line
    if lines:
        _print_line(display, counter)


def _print_line(display: str, counter: ProgressCounter) -> int:
    """Print a line; return how many lines that are."""
    sys.stderr.write(f"{json.dumps(counter.facts()) if display == 'json' else counter.line()}\n")
    sys.stderr.flush()
    return 1
