"""Batches: patches stacked by a `DataLoader` or a `SubjectsLoader`.

```text
 patch.t1.data (C, *patch)  ... B of them ...  -->  batch.t1.data (B, C, *patch)
 patch.patch_location                          -->  batch.patch_location, a list
 patch.age                                     -->  batch.age, a list
```
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

# The documentation of `default_collate` names this map as the place to register types; torch has no public name for it.
from torch.utils.data._utils.collate import default_collate_fn_map

from oocpatch.sampling.images import LoadedVolume, is_label_map, is_torchio_image
from oocpatch.sampling.random_streams import EpochCounter
from oocpatch.sampling.subject import Images, Subject
from oocpatch.volumes.volume import Volume


class VolumeBatch:
    """One volume of a batch.

    Args:
        data: tensor `(B, C, *patch)`.
        affines: affine of each patch; default: identities.
        make: function of a tensor and an affine that makes an image.

    >>> volume = VolumeBatch(torch.zeros(2, 1, 4, 5))
    >>> volume.data = torch.ones(2, 3, 4, 5)
    >>> volume.batch_size, volume.unbatch()[0].channels
    (2, 3)

    Raises:
        ValueError: for a tensor with fewer axes than batch, channels and one of space, or another number of affines.
    """

    def __init__(
        self, data: torch.Tensor, affines: Sequence[Any] | None = None, make: Callable[..., Any] = LoadedVolume
    ) -> None:
        self.data = data
        self.affines = [np.eye(data.ndim - 1) for _ in data] if affines is None else list(affines)
        self._make = make
        if len(self.affines) != len(data):
            raise ValueError(f"a batch must have one affine per patch, got {len(self.affines)} for {len(data)} patches")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data" and (not isinstance(value, torch.Tensor) or value.ndim < 3):
            got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"data of a batch must be a tensor (B, C, *patch), got {got}")
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"VolumeBatch({tuple(self.data.shape)}, {self.data.dtype})"

    @property
    def batch_size(self) -> int:
        """Number of patches."""
        return len(self.data)

    @property
    def device(self) -> torch.device:
        return self.data.device

    def with_data(self, data: torch.Tensor) -> VolumeBatch:
        """Return the same volume with other voxels, and without affines where the number of axes or patches differs."""
        is_same = data.ndim == self.data.ndim and len(data) == len(self.affines)
        return VolumeBatch(data, self.affines if is_same else None, self._make)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the tensor in place, and return the volume."""
        self.data = self.data.to(*args, **kwargs)
        return self

    def unbatch(self) -> list[Any]:
        """Return the images of the patches."""
        if len(self.affines) != len(self.data):
            raise ValueError(f"data must have {len(self.affines)} patches, as the batch had, got {len(self.data)}")
        return [self._make(data, affine=affine) for data, affine in zip(self.data, self.affines, strict=True)]


class SubjectsBatch:
    """Patches stacked volume by volume, and metadata as lists with one value per patch.

    Both are attributes and items, which can be set and deleted: `batch.t1.data`, `batch["t1"]`, `batch.images["t1"]`,
    `batch.patch_location`.

    >>> a, b = (Subject(t1=torch.full((1, 2, 2), i), age=40 + i) for i in range(2))
    >>> batch = SubjectsBatch.of([a, b])
    >>> batch.t1.data.shape, batch.age, batch.batch_size
    (torch.Size([2, 1, 2, 2]), [40, 41], 2)
    >>> batch.t1 = batch.t1.data + 1
    >>> [patch.t1.data.sum().item() for patch in batch.unbatch()]
    [4, 8]
    """

    _images: dict[str, VolumeBatch]
    _metadata: dict[str, list[Any]]

    def __init__(
        self,
        images: Mapping[str, VolumeBatch],
        metadata: Mapping[str, Sequence[Any]] | None = None,
        histories: Sequence[Sequence[Any]] | None = None,
    ) -> None:
        self._images = dict(images)
        self._metadata = {name: list(values) for name, values in (metadata or {}).items()}
        self._histories = histories

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
            {name: _stack(name, [subject.images[name] for subject in subjects]) for name in first.images},
            {name: [subject.metadata[name] for subject in subjects] for name in first.metadata},
            [list(subject.applied_transforms) for subject in subjects],
        )

    @property
    def images(self) -> MutableMapping[str, VolumeBatch]:
        """Volumes by name; setting or deleting one changes the batch."""
        return Images(self._images, self._set_image, self.__delitem__)

    @property
    def metadata(self) -> dict[str, list[Any]]:
        """Lists of all other values, by name."""
        return self._metadata

    @property
    def batch_size(self) -> int:
        """Number of patches.

        Raises:
            ValueError: if the volumes differ in it.
        """
        sizes = {name: len(volume.data) for name, volume in self._images.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the volumes of a batch must have one number of patches, got {sizes}")
        return next(iter(sizes.values()))

    @property
    def device(self) -> torch.device:
        """Device of the first volume."""
        return next(iter(self._images.values())).device

    def __setitem__(self, name: str, value: Any) -> None:
        if name in RESERVED_IN_BATCH or name.startswith("_"):
            raise AttributeError(f"{name!r} of a batch cannot be set; set its volumes and metadata by their names")
        if name in self._images or isinstance(value, VolumeBatch | torch.Tensor):
            self._set_image(name, value)
        elif not isinstance(value, list | tuple) or len(value) != self.batch_size:
            raise ValueError(f"{name!r} must be a tensor, or a list of one value per patch, got {type(value).__name__}")
        else:
            self._metadata[name] = list(value)

    def _set_image(self, name: str, value: Any) -> None:
        if not isinstance(value, VolumeBatch | torch.Tensor):
            got = type(value).__name__
            raise TypeError(f"{name!r} is a volume and must be a tensor (B, C, *patch) or a VolumeBatch, got {got}")
        others = [volume for other, volume in self._images.items() if other != name]
        size = len(value) if isinstance(value, torch.Tensor) else value.batch_size
        if others and size != others[0].batch_size:
            raise ValueError(f"{name!r} must have {others[0].batch_size} patches, as the batch has, got {size}")
        like = self._images.get(name, next(iter(self._images.values())))
        self._images[name] = like.with_data(value) if isinstance(value, torch.Tensor) else value
        self._metadata.pop(name, None)

    def __delitem__(self, name: str) -> None:
        if name in self._metadata:
            del self._metadata[name]
        elif list(self._images) == [name]:
            raise ValueError(f"a batch must have at least one volume, and {name!r} is its last")
        else:
            del self._images[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            self[name] = value

    def __delattr__(self, name: str) -> None:
        if name not in self:
            raise AttributeError(f"the batch has no {name!r}")
        del self[name]

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and name in self:
            return self[name]
        raise AttributeError(f"the batch has no {name!r}")

    def __getitem__(self, name: str) -> Any:
        return self._images[name] if name in self._images else self._metadata[name]

    def __contains__(self, name: object) -> bool:
        return name in self._images or name in self._metadata

    def __iter__(self) -> Iterator[str]:
        return iter(self._images)

    def __repr__(self) -> str:
        volumes = ", ".join(f"{name} {tuple(volume.data.shape)}" for name, volume in self._images.items())
        return f"SubjectsBatch({volumes}; {', '.join(self._metadata) or 'no metadata'})"

    def __len__(self) -> int:
        """Return the number of patches."""
        return self.batch_size

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the tensors in place, as `torch.Tensor.to` does, and return the batch."""
        for volume in self._images.values():
            volume.to(*args, **kwargs)
        return self

    def pin_memory(self) -> Self:
        """Pin the tensors in place, for `DataLoader(pin_memory=True)`, and return the batch."""
        for volume in self._images.values():
            volume.data = volume.data.pin_memory()
        return self

    def unbatch(self) -> list[Subject]:
        """Return the patches as subjects, whose tensors are views of the batch's."""
        images = {name: volume.unbatch() for name, volume in self._images.items()}
        patches = []
        for i in range(self.batch_size):
            metadata = {name: values[i] for name, values in self._metadata.items()}
            patch = Subject(**{name: of_patches[i] for name, of_patches in images.items()}, **metadata)
            patch.applied_transforms = list(self._histories[i]) if self._histories else []
            patches.append(patch)
        return patches


RESERVED_IN_BATCH = frozenset(name for name in dir(SubjectsBatch) if not name.startswith("_"))


def _stack(name: str, images: Sequence[Any]) -> VolumeBatch:
    """Stack images in memory of one shape."""
    if any(isinstance(image, Volume) for image in images):
        raise ValueError(f"the volumes of a batch must be in memory, but {name!r} is not; load() it, or use a sampler")
    shapes = sorted({tuple(image.data.shape) for image in images})
    if len(shapes) > 1:
        raise ValueError(
            f"the volumes of a batch must have one shape, got {' and '.join(map(str, shapes))} for {name!r}"
        )
    first = images[0]
    make = type(first) if is_torchio_image(first) else functools.partial(LoadedVolume, is_label=is_label_map(first))
    stacked = default_collate([image.data for image in images])  # in shared memory, in a worker
    return VolumeBatch(stacked, [image.affine for image in images], make)


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
