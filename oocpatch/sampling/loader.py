"""Batches: patches stacked by a `DataLoader` or a `SubjectsLoader`.

```text
 patch.t1.data (C, *patch)  ... B of them ...  -->  batch.t1.data (B, C, *patch)
 patch.patch_location                          -->  batch.patch_location, a list
 patch.age                                     -->  batch.age, a list
```
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.utils.data import DataLoader, default_collate

# The documentation of `default_collate` names this map as the place to register types; torch has no public name for it.
from torch.utils.data._utils.collate import default_collate_fn_map

from oocpatch.sampling.random_streams import EpochCounter
from oocpatch.sampling.subject import LoadedVolume, Subject


@dataclass(slots=True, eq=False)
class VolumeBatch:
    """One volume of a batch.

    Attributes:
        data: tensor `(B, C, *patch)`.
    """

    data: torch.Tensor

    def __repr__(self) -> str:
        return f"VolumeBatch({tuple(self.data.shape)}, {self.data.dtype})"


@dataclass(slots=True, eq=False)
class SubjectsBatch:
    """Patches stacked volume by volume, and metadata as lists with one value per patch.

    Both are attributes and items: `batch.t1.data`, `batch["t1"]`, `batch.patch_location`.

    >>> a, b = (Subject(t1=torch.full((1, 2, 2), i), age=40 + i) for i in range(2))
    >>> batch = SubjectsBatch.of([a, b])
    >>> batch.t1.data.shape, batch.age, len(batch)
    (torch.Size([2, 1, 2, 2]), [40, 41], 2)
    """

    images: dict[str, VolumeBatch]
    metadata: dict[str, list[Any]]

    @classmethod
    def of(cls, subjects: Sequence[Subject]) -> Self:
        """Stack subjects.

        Raises:
            ValueError: if their names or shapes differ, or a volume is not in memory.
        """
        first = subjects[0]
        for subject in subjects:
            if subject.images.keys() != first.images.keys() or subject.metadata.keys() != first.metadata.keys():
                raise ValueError(
                    "the subjects of a batch must have the same names, got "
                    f"{[*first.images, *first.metadata]} and {[*subject.images, *subject.metadata]}"
                )
        return cls(
            {name: VolumeBatch(_stack(name, [subject[name] for subject in subjects])) for name in first.images},
            {name: [subject[name] for subject in subjects] for name in first.metadata},
        )

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and name not in self.__slots__ and (name in self.images or name in self.metadata):
            return self[name]
        raise AttributeError(f"the batch has no {name!r}")

    def __getitem__(self, name: str) -> Any:
        return self.images[name] if name in self.images else self.metadata[name]

    def __repr__(self) -> str:
        volumes = ", ".join(f"{name} {tuple(volume.data.shape)}" for name, volume in self.images.items())
        return f"SubjectsBatch({volumes}; {', '.join(self.metadata) or 'no metadata'})"

    def __len__(self) -> int:
        """Return the number of patches."""
        return len(next(iter(self.images.values())).data)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the tensors in place, as `torch.Tensor.to` does, and return the batch."""
        return self._each(lambda data: data.to(*args, **kwargs))

    def pin_memory(self) -> Self:
        """Pin the tensors in place, for `DataLoader(pin_memory=True)`, and return the batch."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Change the tensor of each volume."""
        for volume in self.images.values():
            volume.data = change(volume.data)
        return self


def _stack(name: str, volumes: Sequence[Any]) -> torch.Tensor:
    """Stack volumes in memory of one shape."""
    if not all(isinstance(volume, LoadedVolume) for volume in volumes):
        raise ValueError(f"the volumes of a batch must be in memory, but {name!r} is not; load() it, or use a sampler")
    shapes = sorted({tuple(volume.data.shape) for volume in volumes})
    if len(shapes) > 1:
        raise ValueError(
            f"the volumes of a batch must have one shape, got {' and '.join(map(str, shapes))} for {name!r}"
        )
    stacked: torch.Tensor = default_collate([volume.data for volume in volumes])  # in shared memory, in a worker
    return stacked


default_collate_fn_map[Subject] = lambda subjects, **_: SubjectsBatch.of(subjects)


class SubjectsLoader(DataLoader[Any]):
    """A `DataLoader` of patches, with the arguments of `torch.utils.data.DataLoader`.

    A plain one works as well. This one also counts its passes for seeded samplers and queues: with a plain one, workers
    that are started for each pass all draw the patches of the first, unless `set_epoch` is called.

    >>> from oocpatch.sampling.uniform import UniformSampler
    >>> sampler = UniformSampler(Subject(t1=torch.zeros(1, 9, 9)), patch_size=4, num_patches=3)
    >>> [tuple(batch.t1.data.shape) for batch in SubjectsLoader(sampler, batch_size=2)]
    [(2, 1, 4, 4), (1, 1, 4, 4)]
    """

    def __iter__(self) -> Any:
        epochs = getattr(self.dataset, "epochs", None)
        if self.num_workers and isinstance(epochs, EpochCounter):
            epochs.announce()
        return super().__iter__()
