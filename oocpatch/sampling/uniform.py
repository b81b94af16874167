"""Random samplers: patches of a subject for training.

Draw number `i` of an epoch depends only on seed, epoch and `i`, so workers can divide the draws (see `random_streams`).
Corners that are drawn together lie in one region, aligned to the chunks, so that their patches can be read at once:

```text
 chunks     |       |       |       |       |
 region             * * * *             corners: any voxel of it
 patches            [   ]
                       [   ]            all of them in two chunks
                          [   ]
```
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from oocpatch.planning.arguments import per_axis
from oocpatch.planning.box import Box, Ints, ceil_to
from oocpatch.planning.grid import PatchLocation
from oocpatch.sampling.random_streams import EpochCounter, natural_number, stream
from oocpatch.sampling.subject import Subject, as_subject, read_patches, volumes_of
from oocpatch.volumes.volume import Volume


class UniformSampler(IterableDataset[Subject]):
    """Random patches; all corners at which the patch lies in the volume are equally likely.

    An `IterableDataset` for a `DataLoader`, whose workers (and the ranks of `torch.distributed`) divide the patches:
    together they yield the patches of a single process. Also callable on any other subject.

    Args:
        subject: subject to draw patches from.
        patch_size: in voxels.
        num_patches: patches per epoch; None: endless.
        seed: the same seed gives the same patches, with any number of workers. Each pass is another epoch with other
            patches, counted in each process; `set_epoch` sets it. None: torch's generator decides.

    Raises:
        ValueError: for a patch larger than the volume, or a negative number of patches.

    >>> sampler = UniformSampler(Subject(t1=np.arange(10)), patch_size=4, num_patches=2, seed=0)
    >>> [patch.patch_location.index for patch in sampler]
    [(2,), (0,)]
    """

    def __init__(
        self,
        subject: Subject,
        patch_size: int | Sequence[int],
        num_patches: int | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        self.subject = as_subject(subject)
        self.patch_size = per_axis("patch_size", patch_size, self.subject.spatial_names, least=1)
        self.num_patches = _num_patches(num_patches)
        self.epochs = EpochCounter(seed)
        self.check(self.subject)

    def __repr__(self) -> str:
        number = "no end of" if self.num_patches is None else f"{self.num_patches:,}"
        return f"{type(self).__name__}({number} patches of {self.patch_size} from {self.subject})"

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass, also in workers that are running."""
        self.epochs.set_epoch(epoch)

    def __iter__(self) -> Iterator[Subject]:
        self.begin_pass()
        seed, epoch = self.epochs.begin()
        numbers = itertools.count() if self.num_patches is None else range(self.num_patches)
        return self._patches(self.subject, (seed, epoch), self.epochs.share().of(numbers))

    def __call__(self, subject: Subject, num_patches: int | None = None) -> Iterator[Subject]:
        """Draw random patches of a subject, all of them in this process.

        Args:
            subject: any subject that the sampler fits.
            num_patches: default: that of the sampler.
        """
        subject = as_subject(subject)
        self.check(subject)
        self.begin_pass()
        number = self.num_patches if num_patches is None else _num_patches(num_patches)
        numbers = iter(itertools.count() if number is None else range(number))
        return self._patches(subject, self.epochs.begin_alone(), numbers)

    def _patches(self, subject: Subject, epoch: tuple[int, int], numbers: Iterator[int]) -> Iterator[Subject]:
        for number in numbers:
            [corner] = self.draw(subject, stream(*epoch, number))
            yield read_patches(subject, [PatchLocation(corner, self.patch_size)])[0]

    def begin_pass(self) -> None:
        """Take notice of maps that have changed since the last pass; a uniform sampler has none."""

    def check(self, subject: Subject) -> None:
        """Refuse a subject that the sampler does not fit, from its metadata.

        Raises:
            ValueError: in that case.
        """
        shape = subject.spatial_shape
        if len(shape) != len(self.patch_size) or any(p > n for p, n in zip(self.patch_size, shape, strict=True)):
            raise ValueError(
                f"patch_size must not be larger than the volume, got {self.patch_size} for a volume of shape {shape}"
            )

    def draw(self, subject: Subject, random: np.random.Generator, count: int = 1) -> list[Ints]:
        """Draw the corners of random patches in one region, so that their patches can be read at once.

        Each by itself has the distribution of a single draw.
        """
        shape = subject.spatial_shape
        whole = Box((0,) * len(shape), tuple(n - p + 1 for n, p in zip(shape, self.patch_size, strict=True)))
        first = _uniform(whole, random)
        region = self._region(subject, first)
        return [first, *(_uniform(region, random) for _ in range(count - 1))]

    def _region(self, subject: Subject, corner: Ints) -> Box:
        """Return the region of the corners that are drawn together with one.

        All its patches lie in at most two chunks per axis, or in more if a patch is longer than a chunk.
        """
        volumes = [volume for volume in volumes_of(subject).values() if isinstance(volume, Volume)]
        chunks = [max(chunks) for chunks in zip(*(volume.chunks for volume in volumes), strict=True)] or self.patch_size
        start, stop = [], []
        for c, n, p, chunk in zip(corner, subject.spatial_shape, self.patch_size, chunks, strict=True):
            step = ceil_to(p, chunk)
            start.append(c // step * step)
            stop.append(min(c // step * step + step, n - p + 1))
        return Box(tuple(start), tuple(stop))


def _uniform(box: Box, random: np.random.Generator) -> Ints:
    """Draw a voxel of a box."""
    return tuple(int(random.integers(a, b)) for a, b in zip(box.start, box.stop, strict=True))


def _num_patches(value: Any) -> int | None:
    """Check a number of patches per epoch, or None for no end."""
    return None if value is None else natural_number("num_patches", value, alternative=", or None for no end")
