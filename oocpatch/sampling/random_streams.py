"""Where randomness comes from: draw number `i` of an epoch is a pure function of seed, epoch and `i`.

So draws can be shared out: of `W` workers, number `w` makes the draws with `i % W == w`, and all of them together make
what one would have made alone. Workers are those of a `DataLoader`, in each of the ranks of `torch.distributed`.

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
    """The random numbers that belong to a key; streams of different keys are independent.

    >>> float(stream(0, 1, 2).random()) == float(stream(0, 1, 2).random())
    True
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


@dataclass(frozen=True, slots=True)
class Share:
    """The part of the work that falls to one of `count` workers.

    >>> list(Share(1, 3).of(range(8)))
    [1, 4, 7]
    """

    index: int = 0
    count: int = 1

    def of(self, items: Iterable[Item]) -> Iterator[Item]:
        return itertools.islice(items, self.index, None, self.count)


class Passes:
    """Tells each pass over a sampler, or a queue, its seed, its epoch and its share, alike in all who take part.

    Epochs count up by themselves, from 0 or from what `set_epoch` last said. The count is kept in each process, so
    workers that live for one pass always make the first; `set_epoch` in the process that made them reaches all of them,
    also those that live on.

    Args:
        seed: None leaves it to torch: its generator gives each pass another seed.

    Raises:
        ValueError: for a seed that is not an int of at least 0.

    >>> passes = Passes(seed=7)
    >>> passes.begin(), passes.begin()
    ((7, 0), (7, 1))
    >>> passes.set_epoch(5)
    >>> passes.begin(), passes.begin()
    ((7, 5), (7, 6))
    """

    def __init__(self, seed: int | None) -> None:
        self.seed = None if seed is None else _natural("seed", seed)
        self._ranks = Share()
        self._board = _shared(torch.zeros(2, dtype=torch.int64))  # the epoch set, and how often one was
        self._seen, self._process, self._passes = -1, 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next pass is.

        Raises:
            ValueError: for an epoch that is not an int of at least 0.
        """
        self._board[0] = _natural("epoch", epoch)
        self._board[1] += 1

    def announce(self) -> None:
        """Count a pass that others make, in workers that this process starts, and set its epoch for them."""
        if self.seed is not None:
            self.set_epoch(self._count())
            self._seen, self._passes = int(self._board[1]), 0

    def begin(self) -> tuple[int, int]:
        """Seed and epoch of the pass that begins, the same in all workers of a `DataLoader`."""
        worker = get_worker_info()
        if self.seed is None and worker is not None:
            return worker.seed - worker.id, self._count()
        return self.begin_alone()

    def begin_alone(self) -> tuple[int, int]:
        """Seed and epoch of a pass that no other worker takes part in."""
        if self.seed is None:
            # no count: after torch.manual_seed the same must come again
            return int(torch.empty((), dtype=torch.int64).random_()), int(self._board[0])
        return self.seed, self._count()

    def share(self, *, ranks: bool = True) -> Share:
        """What falls to this process of a pass.

        Args:
            ranks: whether the ranks of `torch.distributed` share the pass, or each makes one of its own.
        """
        rank = self._rank() if ranks else Share()
        worker = get_worker_info()
        if worker is None:
            return rank
        return Share(rank.index * worker.num_workers + worker.id, rank.count * worker.num_workers)

    def _count(self) -> int:
        epoch, times_set = self._board.tolist()
        if (times_set, os.getpid()) != (self._seen, self._process):
            self._seen, self._process, self._passes = times_set, os.getpid(), 0
        else:
            self._passes += 1
        return int(epoch) + self._passes

    def _rank(self) -> Share:
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return Share(distributed.get_rank(), distributed.get_world_size())
        return self._ranks

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is spawned knows nothing of its parent's rank: it is told here.
        return {"seed": self.seed, "_board": self._board, "_ranks": self._rank()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._board = _shared(self._board)
        self._seen, self._process, self._passes = -1, 0, 0


def _shared(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.share_memory_()  # type: ignore[no-any-return, no-untyped-call] # torch gives it no type


def _natural(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise ValueError(f"{name} must be an int of at least 0, got {value!r}")
    return int(value)
