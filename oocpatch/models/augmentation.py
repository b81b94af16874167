"""Augmentation: flips and right-angle rotations of patches, and their inverses for the outputs.

```text
      patch         flipped along x        exchanged y, x and flipped: a quarter turn
     a b               b a                     b d
     c d               d c                     a c
```

A transform exchanges axes first, and then flips. Axes are exchanged only if patches are as long along both, so that a
transformed patch has the shape of a patch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from oocpatch.planning.box import Ints

SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
"""Dtypes that torch cannot flip, and those of the same size that it can."""

AUGMENTATIONS = ("flips", "rotations", "all")


@dataclass(frozen=True, slots=True)
class FlipRotate:
    """A flip, a rotation, or both.

    Attributes:
        order: for each spatial axis of the transformed patch, the axis it comes from.
        flipped: spatial axes of the transformed patch that run backwards.

    >>> quarter = FlipRotate((1, 0), (0,))
    >>> quarter.apply(torch.tensor([[[[1, 2], [3, 4]]]])).tolist()
    [[[[2, 4], [1, 3]]]]
    """

    order: Ints
    flipped: Ints

    @property
    def is_identity(self) -> bool:
        return not self.flipped and self.order == tuple(range(len(self.order)))

    def apply(self, patches: torch.Tensor) -> torch.Tensor:
        """Return transformed patches `(B, C, *patch)`; the same tensor for the identity."""
        if self.is_identity:
            return patches
        permuted = patches.permute(0, 1, *(2 + axis for axis in self.order))
        # contiguous, as every other batch is: a network may compute otherwise with strides
        return _flipped(permuted, self.flipped).contiguous()

    def invert(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the outputs for transformed patches as those for the patches: of any scale, or vectors."""
        if self.is_identity or outputs.ndim == 2:
            return outputs
        origin = sorted(range(len(self.order)), key=lambda axis: self.order[axis])
        return _flipped(outputs, self.flipped).permute(0, 1, *(2 + axis for axis in origin))


def _flipped(patches: torch.Tensor, axes: Ints) -> torch.Tensor:
    """Return patches that run backwards along spatial axes."""
    signed = SIGNED.get(patches.dtype, patches.dtype)
    return patches.view(signed).flip([2 + axis for axis in axes]).view(patches.dtype)


@dataclass(frozen=True, slots=True)
class Augmentation:
    """A set of flips and rotations over whose outputs is averaged.

    Attributes:
        name: `"flips"`, `"rotations"` or `"all"`.
        axes: names of the spatial axes that it may use.
    """

    name: str
    axes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the dict by which users ask for it."""
        return {"name": self.name, "axes": list(self.axes)}


def checked_augmentation(
    augment: str | Sequence[str] | Mapping[str, Any] | None, axes: Sequence[str]
) -> Augmentation | None:
    """Check the argument `augment` of `predict`.

    Args:
        augment: `"flips"`, `"rotations"` or `"all"`, of all spatial axes; names of axes to flip; a dict of a name and
            of the axes it may use; or `"none"`, as None.
        axes: names of the spatial axes.

    Raises:
        ValueError, TypeError: for anything else.

    >>> checked_augmentation(["x"], "zyx"), checked_augmentation({"name": "rotations", "axes": "yx"}, "zyx")
    (Augmentation(name='flips', axes=('x',)), Augmentation(name='rotations', axes=('y', 'x')))
    """
    if augment is None or augment == "none":
        return None
    if isinstance(augment, str):
        augment = {"name": augment}
    elif isinstance(augment, Sequence):
        augment = {"name": "flips", "axes": augment}
    if not isinstance(augment, Mapping):
        raise TypeError(f"augment must be a name, names of axes or a dict, got {type(augment).__name__}")
    if augment.get("name") not in AUGMENTATIONS or augment.keys() - {"name", "axes"}:
        raise ValueError(
            f"augment must be one of {', '.join(AUGMENTATIONS)}, or names of axes to flip, "
            f"or a dict with name and axes, got {augment.get('name', dict(augment))!r}"
        )
    chosen = [str(axis) for axis in augment.get("axes", axes)]
    if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(axes):
        raise ValueError(f"augment must name spatial axes of the volume ({', '.join(axes)}), got {', '.join(chosen)}")
    return Augmentation(augment["name"], tuple(axis for axis in axes if axis in chosen))


def flips_and_rotations(
    augmentation: Augmentation | None, axes: Sequence[str], patch_size: Ints
) -> tuple[FlipRotate, ...]:
    """Return the transforms of an augmentation, the identity first.

    Args:
        augmentation: the checked argument.
        axes: names of the spatial axes.
        patch_size: in voxels per spatial axis; axes of equal size may be exchanged.

    Raises:
        ValueError: for rotations where no two axes may be exchanged.

    >>> checked = [checked_augmentation(name, "zyx") for name in ("flips", "rotations", "all")]
    >>> [len(flips_and_rotations(augment, "zyx", (8, 8, 8))) for augment in checked]
    [8, 24, 48]
    >>> [len(flips_and_rotations(augment, "zyx", (4, 8, 8))) for augment in checked]
    [8, 8, 16]
    """
    ndim = len(axes)
    order = tuple(range(ndim))
    if augmentation is None:
        return (FlipRotate(order, ()),)
    used = [axis for axis in order if axes[axis] in augmentation.axes]
    orders = [order]
    if augmentation.name != "flips":
        orders = [other for other in itertools.permutations(order) if _is_allowed(other, used, patch_size)]
    if augmentation.name == "rotations" and len(orders) == 1:
        raise ValueError(
            "rotations exchange axes along which patches are equally long, and there are none: "
            f"got patch_size {patch_size} along {', '.join(axes)}, and augment may use "
            f"{', '.join(augmentation.axes)}; make patch_size equal along two of them, or use augment='flips'"
        )
    flips = [axes for count in range(len(used) + 1) for axes in itertools.combinations(used, count)]
    transforms = [FlipRotate(order, flipped) for order in orders for flipped in flips]
    return tuple(t for t in transforms if augmentation.name != "rotations" or _is_rotation(t))


def _is_allowed(order: Ints, used: Sequence[int], patch_size: Ints) -> bool:
    """Return True if an order exchanges nothing but used axes of equal size."""
    return all(a == b or (a in used and b in used and patch_size[a] == patch_size[b]) for a, b in enumerate(order))


def _is_rotation(transform: FlipRotate) -> bool:
    """Return True for a rotation, whose matrix has the determinant 1, and False for a mirror image."""
    exchanges = sum(a > b for a, b in itertools.combinations(transform.order, 2))
    return (exchanges + len(transform.flipped)) % 2 == 0
