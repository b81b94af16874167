"""The queue: a shuffle buffer of patches from many subjects, read in the background.

Patches are drawn region by region. The buffer and the regions being read have at most `max_length` patches together:

```text
                      drawn and read, by threads             shuffle buffer
 subjects --> order --> region --> patches --+-- transformed --> [ # # # # # # # ] --> one at random
                    --> region --> patches --+
                        <- regions_in_flight ->
                        <---------------- at most max_length patches --------------->
```

The patches and their order depend only on the seed and the counts, not on the speed of the threads.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import IterableDataset, Sampler, get_worker_info

from oocpatch.planning.grid import PatchLocation
from oocpatch.planning.plan import human
from oocpatch.sampling.grid_sampler import GridSampler
from oocpatch.sampling.images import LoadedVolume
from oocpatch.sampling.random_streams import EpochCounter, natural_number, stream
from oocpatch.sampling.subject import Subject, as_subject, read_patches, volumes_of
from oocpatch.sampling.transforms import PatchTransform
from oocpatch.sampling.uniform import UniformSampler

DRAWS, SUBJECTS, PATCHES, TRANSFORMS = range(4)
"""Keys of the random streams of an epoch: patches, order of subjects, order of patches, transforms of patches."""


@dataclass(frozen=True, slots=True)
class Region:
    """Several patches of one subject that are drawn and read together."""

    subject: int
    """Index of the subject."""
    visit: int
    """Number of subjects before it in the epoch."""
    number: int
    """Number of the region within the visit."""
    count: int
    """Number of patches."""


class Queue(IterableDataset[Subject]):
    """A buffer of patches from many subjects, in random order.

    An `IterableDataset` for a `DataLoader`, whose workers share out the patches, as do the ranks of `torch.distributed`
    when there is no `subject_sampler`. Threads usually do: `num_workers` here, none in the loader.

    Args:
        subjects: where patches come from; read only patch by patch.
        patch_sampler: a uniform, weighted, label or grid sampler; its own subject plays no part.
        max_length: patches in memory at most, those under way included; workers of a loader divide them up.
        patches_per_volume: patches of each subject in an epoch: the first ones of a grid. None: all patches of a grid,
            or the `num_patches` of a random sampler.
        num_workers: threads that read; 0: patches are read when they are needed.
        shuffle_subjects: whether each epoch takes the subjects in another order.
        shuffle_patches: whether patches leave the buffer in random order, else in the order of reading.
        transform: a function of a patch (a `Subject`) that gives a patch, or a transform of TorchIO, such as
            `tio.Compose`. It is applied in the thread that iterates; the seed of each draw sets the global generators
            of torch, numpy and Python for it, and they are put back. Label maps are TorchIO's, volumes of booleans,
            and the one that `LabelSampler` draws by; TorchIO's transforms take all other volumes for intensities, with
            a warning where these are integers beside other volumes.
        subject_sampler: gives the indices of an epoch's subjects, as `DistributedSampler` does; then `shuffle_subjects`
            must be False.
        seed: the same seed, the same patches in each epoch (see `set_epoch`). None: the seed of `patch_sampler`, else
            `torch.manual_seed` governs.
        patches_per_region: patches drawn together from a region as large as a chunk, or as a patch if that is larger,
            and read at once. Each alone has its sampler's distribution, and more than one reads less, but they are
            from nearby places. Those of a grid are consecutive.
        regions_in_flight: regions read at a time at most; default: one per thread.

    Raises:
        ValueError: for subjects that the sampler does not fit, numbers that do not fit each other, or a transform of
            TorchIO that needs the whole volume.
        TypeError: for a sampler of another kind.

    >>> subjects = [Subject(t1=np.full((8, 8), i)) for i in range(3)]
    >>> queue = Queue(subjects, UniformSampler(subjects[0], 4), max_length=4, patches_per_volume=2, seed=0)
    >>> sorted(int(patch.t1.data[0, 0, 0]) for patch in queue), queue.patches_per_epoch, queue.max_memory_pretty
    ([0, 0, 1, 1, 2, 2], 6, '512 B')
    """

    def __init__(  # noqa: PLR0917 - the order of TorchIO's parameters
        self,
        subjects: Sequence[Subject],
        patch_sampler: UniformSampler | GridSampler,
        max_length: int = 300,
        patches_per_volume: int | None = 10,
        num_workers: int = 0,
        shuffle_subjects: bool = True,
        shuffle_patches: bool = True,
        transform: Callable[[Subject], Subject] | None = None,
        subject_sampler: Sampler[int] | None = None,
        *,
        seed: int | None = None,
        patches_per_region: int = 1,
        regions_in_flight: int | None = None,
    ) -> None:
        if isinstance(subjects, Subject):  # type: ignore[unreachable]
            raise TypeError("subjects must be a sequence of subjects, got one Subject; pass [subject]")
        if not isinstance(patch_sampler, UniformSampler | GridSampler):
            raise TypeError(f"patch_sampler must be a uniform, weighted, label or grid sampler, got {patch_sampler!r}")
        if patches_per_volume is not None:
            patches_per_volume = natural_number("patches_per_volume", patches_per_volume, 1, alternative=", or None")
        elif isinstance(patch_sampler, UniformSampler) and patch_sampler.num_patches is None:
            raise ValueError("patches_per_volume must be an int when patch_sampler has no num_patches, got None")
        if subject_sampler is not None and shuffle_subjects:
            raise ValueError("shuffle_subjects must be False when there is a subject_sampler, which gives the order")
        self.subjects = subjects
        if not all(type(subject) is Subject for subject in subjects):
            self.subjects = [as_subject(subject, f"subject {index}") for index, subject in enumerate(subjects)]
        self.patch_sampler = patch_sampler
        self.max_length = natural_number("max_length", max_length, 1)
        self.patches_per_volume = patches_per_volume
        self.num_workers = natural_number("num_workers", num_workers)
        self.shuffle_subjects = shuffle_subjects
        self.shuffle_patches = shuffle_patches
        self.transform = transform
        names = getattr(patch_sampler, "label_name", ())
        labels = frozenset([names] if isinstance(names, str) else names)
        self.subject_sampler = subject_sampler
        self.patches_per_region = natural_number("patches_per_region", patches_per_region, 1)
        in_flight = max(1, num_workers) if regions_in_flight is None else regions_in_flight
        self.regions_in_flight = natural_number("regions_in_flight", in_flight, 1)
        if seed is None and isinstance(patch_sampler, UniformSampler):
            seed = patch_sampler.epochs.seed
        self.epochs = EpochCounter(seed)
        self._check_room(self.max_length)
        if not len(subjects):
            raise ValueError("subjects must hold at least one subject, got none")
        self._transform = None if transform is None else PatchTransform.of(transform, labels, self.subjects[0])
        for index, subject in enumerate(self.subjects):
            try:
                if isinstance(patch_sampler, GridSampler):
                    patch_sampler.over(subject)
                else:
                    patch_sampler.check(subject)
            except ValueError as error:
                raise ValueError(f"subject {index}: {error}") from error

    @property
    def num_subjects(self) -> int:
        """Subjects per epoch.

        Raises:
            TypeError: if `subject_sampler` has no length.
        """
        if self.subject_sampler is None:
            return len(self.subjects)
        if not isinstance(self.subject_sampler, Sized):
            raise TypeError("subject_sampler must have a length, to know the number of subjects")
        return len(self.subject_sampler)

    @property
    def patches_per_epoch(self) -> int:
        """Number of patches of an epoch, over all workers.

        At most that many where a `subject_sampler` chooses among grids of different lengths.
        """
        lengths = [self._patches_per_visit(index) for index in range(len(self.subjects))]
        return sum(lengths) if self.subject_sampler is None else self.num_subjects * max(lengths)

    @property
    def max_memory(self) -> int:
        """Bytes of a full buffer, before any transform."""
        per_voxel = max(
            sum(
                volume.channels * (volume.data if isinstance(volume, LoadedVolume) else volume).dtype.itemsize
                for volume in volumes_of(subject).values()
            )
            for subject in self.subjects
        )
        return self.max_length * math.prod(self.patch_sampler.patch_size) * per_voxel

    @property
    def max_memory_pretty(self) -> str:
        """`max_memory` as a text such as `1.5 GiB`."""
        return human(self.max_memory)

    def __repr__(self) -> str:
        number = "all" if self.patches_per_volume is None else f"{self.patches_per_volume:,}"
        subjects = f"{len(self.subjects):,} subjects, {number} patches of each"
        return f"Queue({subjects}, at most {self.max_length:,} here: {self.max_memory_pretty})"

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass, also in workers that are running."""
        self.epochs.set_epoch(epoch)

    def __iter__(self) -> Iterator[Subject]:
        if isinstance(self.patch_sampler, UniformSampler):
            self.patch_sampler.begin_pass()
        seed, epoch = self.epochs.begin()
        share = self.epochs.share(ranks=self.subject_sampler is None)
        worker = get_worker_info()
        room = self.max_length if worker is None else self.max_length // worker.num_workers
        self._check_room(room)
        shuffle = stream(seed, epoch, PATCHES, share.index) if self.shuffle_patches else None
        regions = share.of(self._regions(seed, epoch))
        read, transform = (functools.partial(step, seed, epoch) for step in (self._read, self._transformed))
        return self._buffered(regions, read, transform, room, shuffle)

    def _buffered(
        self,
        regions: Iterator[Region],
        read: Callable[[Region], list[Subject]],
        transform: Callable[[Region, list[Subject]], list[Subject]],
        room: int,
        shuffle: np.random.Generator | None,
    ) -> Iterator[Subject]:
        """Yield the patches of all regions, with at most `room` of them in memory at any time."""
        buffer: deque[Subject] = deque()
        in_flight: deque[tuple[Region, Callable[[], list[Subject]]]] = deque()  # regions, whose patches are waited for
        in_memory = 0  # patches in the buffer and in flight
        region = next(regions, None)
        with contextlib.ExitStack() as stack:
            pool = None
            if self.num_workers:
                pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="oocpatch-queue")
                stack.callback(pool.shutdown, cancel_futures=True)
            while region is not None or in_flight or buffer:
                fits = region is not None and in_memory + region.count <= room
                if region is not None and fits and len(in_flight) < self.regions_in_flight:
                    wait = pool.submit(read, region).result if pool else functools.partial(read, region)
                    in_flight.append((region, wait))
                    in_memory += region.count
                    region = next(regions, None)
                elif in_flight and (fits or region is None or not buffer):
                    done, wait_for = in_flight.popleft()
                    buffer.extend(transform(done, wait_for()))
                else:
                    if shuffle is not None:
                        chosen = int(shuffle.integers(len(buffer)))
                        buffer[0], buffer[chosen] = buffer[chosen], buffer[0]
                    in_memory -= 1
                    yield buffer.popleft()

    def _regions(self, seed: int, epoch: int) -> Iterator[Region]:
        """Yield all regions of an epoch, in order."""
        for visit, subject in enumerate(self._order(seed, epoch)):
            length, most = self._patches_per_visit(subject), self.patches_per_region
            for number, first in enumerate(range(0, length, most)):
                yield Region(subject, visit, number, min(most, length - first))

    def _order(self, seed: int, epoch: int) -> list[int]:
        """Return the indices of the subjects of an epoch, in order."""
        random = stream(seed, epoch, SUBJECTS)
        if self.subject_sampler is not None:
            # All workers must get the same order from a sampler that uses torch's generator.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(random.integers(2**63)))
                return list(self.subject_sampler)
        every = len(self.subjects)
        return random.permutation(every).tolist() if self.shuffle_subjects else list(range(every))

    def _read(self, seed: int, epoch: int, region: Region) -> list[Subject]:
        """Draw and read the patches of a region."""
        subject, sampler = self.subjects[region.subject], self.patch_sampler
        if isinstance(sampler, GridSampler):
            first = region.number * self.patches_per_region
            return sampler.over(subject, region.subject).read(slice(first, first + region.count))
        random = stream(seed, epoch, DRAWS, region.visit, region.number)
        try:
            corners = sampler.draw(subject, random, region.count)
        except ValueError as error:  # about this subject's map, which is first read now
            raise ValueError(f"subject {region.subject}: {error}") from error
        return read_patches(subject, [PatchLocation(corner, sampler.patch_size, region.subject) for corner in corners])

    def _transformed(self, seed: int, epoch: int, region: Region, patches: list[Subject]) -> list[Subject]:
        """Transform the patches of a region, each with the randomness of its draw."""
        if self._transform is None:
            return patches
        key = epoch, TRANSFORMS, region.visit, region.number
        return [self._transform(patch, stream(seed, *key, i)) for i, patch in enumerate(patches)]

    def _patches_per_visit(self, index: int) -> int:
        """Return the number of patches of a subject in an epoch."""
        sampler = self.patch_sampler
        limit = len(sampler.over(self.subjects[index])) if isinstance(sampler, GridSampler) else sampler.num_patches
        return min(number for number in (limit, self.patches_per_volume) if number is not None)

    def _check_room(self, room: int) -> None:
        if room < self.patches_per_region:
            worker = get_worker_info()
            share = "" if worker is None else f" for each of {worker.num_workers} workers of the loader"
            raise ValueError(
                f"max_length must be at least patches_per_region{share}, "
                f"got {self.max_length} and {self.patches_per_region}"
            )
