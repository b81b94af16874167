"""Roles of axes by their names: channel, looped over, or spatial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CHANNEL_NAMES = frozenset({"c", "channel", "channels"})
LOOP_NAMES = frozenset({"t", "time", "frame"})
DEFAULTS = {1: "x", 2: "yx", 3: "zyx", 4: "czyx", 5: "tczyx"}


@dataclass(frozen=True, slots=True)
class Axes:
    """The roles of an array's axes.

    Attributes:
        names: one name per axis of the array, in its order.
        roles: one name per axis that determines its role; default: `names`.
        sequence: positions of the axes of boxes, in their order; default: looped axes, then spatial ones.
        is_default: whether the names follow from the number of axes, since nobody gave any.

    >>> axes = Axes(("t", "y", "x", "c"))
    >>> axes.channel, axes.looped, axes.spatial
    (3, (0,), (1, 2))
    """

    names: tuple[str, ...]
    roles: tuple[str, ...] = ()
    sequence: tuple[int, ...] = ()
    is_default: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "roles", tuple(n.lower() for n in self.roles or self.names))
        got = f"got {''.join(self.names) if all(len(n) == 1 for n in self.names) else self.names!r}"
        if len(set(self.roles)) != len(self.roles) or len(set(self.names)) != len(self.names):
            raise ValueError(f"axes must have different names, {got}")
        if sum(n in CHANNEL_NAMES for n in self.roles) > 1:
            raise ValueError(f"axes must have at most one channel axis, {got}")
        if not self.spatial:
            raise ValueError(f"axes must have at least one spatial axis, {got}")

    @property
    def channel(self) -> int | None:
        """Position of the channel axis, if there is one."""
        return next((i for i, n in enumerate(self.roles) if n in CHANNEL_NAMES), None)

    @property
    def looped(self) -> tuple[int, ...]:
        """Positions of the axes that are looped over, such as time."""
        return tuple(i for i, n in enumerate(self.roles) if n in LOOP_NAMES)

    @property
    def spatial(self) -> tuple[int, ...]:
        """Positions of the spatial axes."""
        return tuple(i for i, n in enumerate(self.roles) if n not in CHANNEL_NAMES | LOOP_NAMES)

    @property
    def order(self) -> tuple[int, ...]:
        """Positions of looped and spatial axes, in the order of boxes."""
        return self.sequence or self.looped + self.spatial


def resolve_axes(
    axes: str | Sequence[str] | None,
    names: Sequence[str | None] | None,
    ndim: int,
    roles: tuple[str, ...] | None = None,
) -> Axes:
    """Return the axes of an array; dimensions that have names keep them.

    Args:
        axes: the user's argument; determines the roles.
        names: names of the array's dimensions, if it has any.
        ndim: number of axes; determines names and roles if there is nothing else.
        roles: roles of the named dimensions, if they are not their names.

    Raises:
        ValueError: if `axes` does not fit the array, or there is no default for `ndim`.

    >>> resolve_axes("yxc", None, 3).names
    ('y', 'x', 'c')
    >>> resolve_axes("cyx", ("stain", "height", "width"), 3).names
    ('stain', 'height', 'width')
    """
    own = None
    if names is not None and all(names) and not all(str(n).startswith("dim_") for n in names):
        own = tuple(str(n) for n in names)
    if axes is not None:
        requested = tuple(str(n) for n in axes)
        if len(requested) != ndim:
            raise ValueError(f"axes must name each of the {ndim} axes of the volume, got {axes!r}")
        Axes(requested)  # an error must name the user's axes, not those of the array
        return Axes(own if own is not None and len(set(own)) == len(own) else requested, requested)
    if own is not None:
        if len(set(own)) < len(own):
            raise ValueError(f"axes must be given for a volume that names its axes {', '.join(own)}")
        return Axes(own, roles or ())
    if ndim not in DEFAULTS:
        raise ValueError(f"axes must be given for a volume of {ndim} axes (for example axes='tczyx')")
    return Axes(tuple(DEFAULTS[ndim]), is_default=True)
