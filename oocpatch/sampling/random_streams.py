"""Random streams: draw number `i` of an epoch is a pure function of seed, epoch and `i`.

So draws can be divided: of `W` workers, worker `w` makes the draws with `i % W == w`, and together they make the draws
of a single process. Workers are those of a `DataLoader`, in each of the ranks of `torch.distributed`.

```text
 draw          0   1   2   3   4   5   6   7
 one process   a   b   c   d   e   f   g   h
 worker 0      a       c       e       g
 worker 1          b       d       f       h
```
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import get_worker_info

Item = TypeVar("Item")


def stream(seed: int, *key: int) -> np.random.Generator:
    """Return the random generator of a key; the streams of different keys are independent.

    >>> float(stream(0, 1, 2).random()) == float(stream(0, 1, 2).random())
    True
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


@dataclass(frozen=True, slots=True)
class Share:
    """The part of the work of one of `count` workers.

    >>> list(Share(1, 3).of(range(8)))
    [1, 4, 7]
    """

    index: int = 0
    count: int = 1

    def of(self, items: Iterable[Item]) -> Iterator[Item]:
        return itertools.islice(items, self.index, None, self.count)


class EpochCounter:
    """Seed, epoch and share of each pass over a sampler or a queue, the same in all processes of the pass.

    Epochs count up from 0, or from the epoch of the last `set_epoch`. Each process counts for itself, so workers that
    live for one pass always make the first; `set_epoch` in their parent process reaches all workers, also persistent
    ones.

    Args:
        seed: None takes another seed from torch's generator for each pass.

    Raises:
        ValueError: for a seed that is not an int of at least 0.

    >>> epochs = EpochCounter(seed=7)
    >>> epochs.begin(), epochs.begin()
    ((7, 0), (7, 1))
    >>> epochs.set_epoch(5)
    >>> epochs.begin(), epochs.begin()
    ((7, 5), (7, 6))
    """

    _last_set, _process, _passes = -1, 0, 0
    """Last `set_epoch`, id and passes of this process, which counts for itself."""

    def __init__(self, seed: int | None) -> None:
        self.seed = None if seed is None else natural_number("seed", seed)
        self._ranks = Share()
        # the epoch of the last `set_epoch`, and the number of its calls
        self._shared = torch.zeros(2, dtype=torch.int64, device="cpu")
        self._shared.share_memory_()  # type: ignore[no-untyped-call] # torch gives it no type

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass.

        Raises:
            ValueError: for an epoch that is not an int of at least 0.
        """
        self._shared[0] = natural_number("epoch", epoch)
        self._shared[1] += 1

    def announce(self) -> None:
        """Count a pass that workers of this process make, and set its epoch for them."""
        if self.seed is not None:
            self.set_epoch(self._count())
            self._last_set, self._passes = int(self._shared[1]), 0

    def begin(self) -> tuple[int, int]:
        """Begin a pass and return its seed and epoch, the same in all workers of a `DataLoader`."""
        worker = get_worker_info()
        if self.seed is None and worker is not None:
            return worker.seed - worker.id, self._count()
        return self.begin_alone()

    def begin_alone(self) -> tuple[int, int]:
        """Begin a pass of this process alone and return its seed and epoch."""
        if self.seed is None:
            # not counted: the same torch.manual_seed must give the same patches
            return int(torch.empty((), dtype=torch.int64, device="cpu").random_()), int(self._shared[0])
        return self.seed, self._count()

    def share(self, *, ranks: bool = True) -> Share:
        """Return this process' share of a pass that the ranks of `torch.distributed` share, or else make each alone."""
        rank = self._rank() if ranks else Share()
        worker = get_worker_info()
        if worker is None:
            return rank
        return Share(rank.index * worker.num_workers + worker.id, rank.count * worker.num_workers)

    def _count(self) -> int:
        epoch, times_set = self._shared.tolist()
        if (times_set, os.getpid()) != (self._last_set, self._process):
            self._last_set, self._process, self._passes = times_set, os.getpid(), 0
        else:
            self._passes += 1
        return int(epoch) + self._passes

    def _rank(self) -> Share:
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return Share(distributed.get_rank(), distributed.get_world_size())
        return self._ranks

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker does not know the rank of its parent.
        return {"seed": self.seed, "_shared": self._shared, "_ranks": self._rank()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._shared.share_memory_()  # type: ignore[no-untyped-call] # torch gives it no type


def natural_number(name: str, value: Any, least: int = 0, *, alternative: str = "") -> int:
    """Check that an argument is an int of at least `least`, and return it; the error names an alternative.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} must be an int of at least {least}{alternative}, got {value!r}")
    return int(value)
