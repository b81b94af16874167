"""The networks that contenders run; for every environment, so without oocpatch."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.measure import tell


class FirstTwo(torch.nn.Module):
    """Two channels out of an image's three: as quick as the identity, and its result is known, too."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """The first two of at least two channels."""
        return patches[:, :2].float()


class Clock(torch.nn.Module):
    """Tells the seconds since it was made when it sees a patch of the volume, and ends the process."""

    def __init__(self, **record: Any) -> None:
        super().__init__()
        self.started, self.record = time.perf_counter(), record

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Never returns, except for zeros: those are not from the volume but a question about shapes."""
        if patches.any():
            tell({"first": time.perf_counter() - self.started, **self.record})
            os._exit(0)
        return patches


class UNet3d(torch.nn.Module):
    """A U-Net of four levels in three dimensions, with instance norm and a skip per level, as they are in use.

    Args:
        channels: of the input.
        classes: channels of the output.
        width: channels of the first level, doubled with each: 5.6 million parameters with 32, 1.4 with 16.
    """

    def __init__(self, channels: int = 1, classes: int = 3, width: int = 32) -> None:
        super().__init__()
        widths = [width << level for level in range(4)]
        self.down = torch.nn.ModuleList(_block(a, b) for a, b in itertools.pairwise([channels, *widths]))
        pairs = list(itertools.pairwise(widths))[::-1]
        self.up = torch.nn.ModuleList(torch.nn.ConvTranspose3d(b, a, 2, stride=2) for a, b in pairs)
        self.merge = torch.nn.ModuleList(_block(2 * a, a) for a, _ in pairs)
        self.head = torch.nn.Conv3d(width, classes, 1)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Scores `(B, classes, *patch)` of patches whose sides are multiples of 8."""
        skips: list[torch.Tensor] = []
        values = patches
        for level, block in enumerate(self.down):
            values = block(values if level == 0 else torch.nn.functional.max_pool3d(values, 2))
            skips.append(values)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            values = merge(torch.cat([skips.pop(), up(values)], dim=1))
        scores: torch.Tensor = self.head(values)
        return scores


def _block(channels: int, width: int) -> torch.nn.Module:
    """Two convolutions, each with its norm and its activation."""
    layers: list[torch.nn.Module] = []
    for given in (channels, width):
        layers += [torch.nn.Conv3d(given, width, 3, padding=1), torch.nn.InstanceNorm3d(width, affine=True)]
        layers.append(torch.nn.LeakyReLU(0.01, inplace=True))
    return torch.nn.Sequential(*layers)


CHANNELS = {"identity": 1, "two": 2, "layers": 3, "unet": 3}
"""Channels of each network's output."""


def network(name: str) -> torch.nn.Module:
    """A network by its name.

    Args:
        name: `identity`, `two` (first two channels), `layers` (three convolutions of eight channels, three classes),
            `unet` (2.2 million parameters).
    """
    if name == "identity":
        return torch.nn.Identity()
    if name == "two":
        return FirstTwo()
    torch.manual_seed(0)
    if name == "unet":
        return UNet3d(width=20).eval()
    layers: list[torch.nn.Module] = []
    for channels in (1, 8, 8):
        layers += [torch.nn.Conv3d(channels, 8, 3, padding=1), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Conv3d(8, 3, 1)).eval()


@contextmanager
def alone(model: torch.nn.Module, calls: int) -> Iterator[Callable[[Iterable[torch.Tensor]], None]]:
    """A function that calls a network on each of some batches: so many at a time, which share torch's threads."""

    def call(batch: torch.Tensor) -> None:
        with torch.no_grad():
            model(batch)

    def call_all(batches: Iterable[torch.Tensor]) -> None:
        for _ in pool.map(call, batches):
            pass

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(calls, initializer=torch.set_num_threads, initargs=(threads // calls,)) as pool:
        yield call_all
    torch.set_num_threads(threads)  # which is the setting of all threads in some builds
