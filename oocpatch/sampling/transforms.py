"""Transforms of patches: plain functions, and those of TorchIO, each seeded by its draw.

```text
 patch --> tio.Subject --> transform, with the generators of the draw --> tio.Subject --> patch
```

Random transforms draw from the global generators of torch, numpy and Python, so these are set before each patch and put
back after it. That is why a queue transforms patches in the thread that iterates over it and not in those that read.
"""

from __future__ import annotations

import contextlib
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from oocpatch.sampling.images import (
    WIDER,
    LoadedVolume,
    affine_of_image,
    is_label_map,
    is_torchio_image,
)
from oocpatch.sampling.subject import Subject, volumes_of
from oocpatch.volumes.volume import Volume

GEOMETRY = "it gives a shape or a place to the whole volume"
CONTENT = "what it does depends on all voxels of the volume"
WHOLE = {
    "CropOrPad": GEOMETRY,
    "EnsureShapeMultiple": GEOMETRY,
    "HistogramStandardization": CONTENT,
    "KeepLargestComponent": CONTENT,
    "Pad": GEOMETRY,
    "PCA": CONTENT,
    "Resample": GEOMETRY,
    "Resize": GEOMETRY,
    "SequentialLabels": CONTENT,
    "ToReferenceSpace": GEOMETRY,
}
"""Transforms of TorchIO that need the whole volume, and why."""


@dataclass(frozen=True, slots=True)
class PatchTransform:
    """A transform of patches.

    Attributes:
        function: a transform of TorchIO, or a function of a patch.
        labels: names of volumes that hold labels, besides those that say so themselves.

    >>> def brighter(patch):
    ...     patch.t1 = patch.t1.data + torch.rand(())
    ...     return patch
    >>> patches = [Subject(t1=torch.zeros(1, 4, 4)) for _ in range(2)]
    >>> one, other = (PatchTransform.of(brighter)(patch, np.random.default_rng(0)) for patch in patches)
    >>> torch.equal(one.t1.data, other.t1.data)
    True
    """

    function: Callable[[Any], Any]
    labels: frozenset[str] = frozenset()

    @classmethod
    def of(cls, transform: Any, labels: frozenset[str] = frozenset(), subject: Subject | None = None) -> Self:
        """Return a checked transform.

        Warns of volumes of a subject that may hold labels and do not say so: TorchIO's transforms interpolate them.

        Raises:
            TypeError: if it cannot be called.
            ValueError: if it, or a part of it, needs the whole volume.
        """
        if not callable(transform):
            raise TypeError(f"transform must be a function of a patch, or one of TorchIO, got {transform!r}")
        if is_torchio_transform(transform):
            _refuse_whole(transform)
            unknown = [] if subject is None else _unknown_integers(subject, labels)
            if unknown:
                warnings.warn(
                    f"transform takes the integers of {', '.join(unknown)} for intensities, which it may interpolate; "
                    "if they are labels, use LabelMap(path or tensor) in the subject, else ScalarImage(path or tensor)",
                    stacklevel=3,
                )
        return cls(transform, labels)

    def __call__(self, patch: Subject, generator: np.random.Generator) -> Any:
        """Transform a patch with the randomness of a generator.

        Raises:
            TypeError: if the transform returns nothing.
        """
        with seeded(int(generator.integers(2**63))):
            if is_torchio_transform(self.function):
                return from_torchio(self.function(to_torchio(patch, self.labels)), patch)
            result = self.function(patch)
        if result is None:
            raise TypeError("transform must return the patch, got None")
        is_theirs = type(result) is not Subject and isinstance(result, _torchio("Subject"))
        return from_torchio(result, patch) if is_theirs else result


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python, and put them back at the end.

    >>> with seeded(0):
    ...     first = torch.rand(())
    >>> with seeded(0):
    ...     print(torch.rand(()) == first)
    tensor(True)
    """
    generators = [torch.default_generator]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call] # torch gives it no type
        generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
    states = [generator.get_state() for generator in generators]
    of_numpy, of_python = np.random.get_state(), random.getstate()  # noqa: NPY002 - what transforms use
    try:
        for generator in generators:
            generator.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        np.random.set_state(of_numpy)  # noqa: NPY002
        random.setstate(of_python)


def is_torchio_transform(value: Any) -> bool:
    """Return whether a value is a transform of TorchIO, or of a class derived from one."""
    return any(c.__name__ == "Transform" and c.__module__.startswith("torchio.") for c in type(value).__mro__)


def _unknown_integers(subject: Subject, labels: frozenset[str]) -> list[str]:
    """Return the names of volumes of integers, beside others, of which nobody has said whether they hold labels."""
    volumes = {} if len(subject.images) == 1 else volumes_of(subject)
    unknown = []
    for name, volume in volumes.items():
        is_float = volume.dtype.kind == "f" if isinstance(volume, Volume) else volume.data.dtype.is_floating_point
        if not (is_float or is_torchio_image(subject.images[name]) or subject.is_label(name) or name in labels):
            unknown.append(name)
    return unknown


def _refuse_whole(transform: Any) -> None:
    """Refuse a transform that needs the whole volume, also within others.

    Raises:
        ValueError: naming it.
    """
    names = [c.__name__ for c in type(transform).__mro__]
    reason = next((WHOLE[name] for name in names if name in WHOLE), None)
    if "Spatial" in names and transform.target is not None:
        reason = GEOMETRY
    if "OneHot" in names and transform.num_classes < 1:
        raise ValueError(f"OneHot must have num_classes, since a patch need not have all labels, got {transform}")
    if reason is not None:
        raise ValueError(
            f"transform is applied to patches, but {names[0]} needs the whole volume: {reason}; "
            f"apply it to the volumes first, and store them"
        )
    for part in getattr(transform, "transforms", ()):
        _refuse_whole(part)


def to_torchio(patch: Subject, labels: frozenset[str] = frozenset()) -> Any:
    """Return a patch as a subject of TorchIO; axes of length 1 are added up to three.

    Images of TorchIO stay as they are. Others become `LabelMap`s where they hold labels, else `ScalarImage`s.

    Raises:
        ValueError: for more than three spatial axes, or volumes that are not in memory.
    """
    images = {}
    for name, image in patch.images.items():
        if not is_torchio_image(image):
            if not isinstance(image, LoadedVolume) or image.data.ndim > 4:
                raise ValueError(
                    f"TorchIO's transforms need volumes in memory, of three spatial axes at most, got {image} as {name}"
                )
            kind = _torchio("LabelMap" if name in labels or patch.is_label(name) else "ScalarImage")
            data = image.data.to(WIDER.get(image.data.dtype, image.data.dtype))
            data = data[(..., *(None,) * (4 - data.ndim))]
            image = kind(data, affine=_embedded(affine_of_image(image), 3))  # noqa: PLW2901
        images[name] = image
    subject = _torchio("Subject")(**images, **patch.metadata)
    subject.applied_transforms = list(patch.applied_transforms)
    return subject


def from_torchio(subject: Any, patch: Subject) -> Subject:
    """Return a subject of TorchIO, which a patch has become, as a patch with volumes of the same kinds as before.

    Raises:
        ValueError: if an axis that was added is longer than 1 now.
    """
    ndim = len(next(iter(patch.images.values())).data.shape) - 1
    stay = all(is_torchio_image(image) for image in patch.images.values())
    images: dict[str, Any] = {}
    for name, image in subject.images.items():
        if stay or is_torchio_image(patch.images.get(name)):
            images[name] = image
            continue
        if any(n != 1 for n in image.data.shape[1 + ndim :]):
            raise ValueError(f"transform must not add axes to a patch of {ndim}, got {tuple(image.data.shape)}")
        data = image.data.reshape(image.data.shape[: 1 + ndim])
        images[name] = LoadedVolume(data, _embedded(affine_of_image(image), ndim), is_label_map(image))
    result = Subject(**images, **subject.metadata)
    result.applied_transforms = [*_earlier(patch, subject), *subject.applied_transforms]
    return result


def _earlier(patch: Subject, subject: Any) -> list[Any]:
    """Return the history of a patch where the transform dropped it, as TorchIO's do."""
    before = patch.applied_transforms
    return [] if before == subject.applied_transforms[: len(before)] else before


def _embedded(affine: np.ndarray[Any, Any], ndim: int) -> np.ndarray[Any, Any]:
    """Return an affine for another number of axes, whose additional ones have a spacing of 1.

    >>> _embedded(np.array([[2.0, 5.0], [0.0, 1.0]]), 2).tolist()
    [[2.0, 0.0, 5.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    embedded, n = np.eye(ndim + 1), min(ndim, len(affine) - 1)
    embedded[:n, :n], embedded[:n, -1] = affine[:n, :n], affine[:n, -1]
    return embedded


def _torchio(name: str) -> Any:
    """Return a class of TorchIO, which whoever has an object of it has imported; without TorchIO no type has it."""
    torchio = sys.modules.get("torchio")
    return () if torchio is None else getattr(torchio, name)
