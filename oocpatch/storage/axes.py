"""Axes by name: which is the channel, which are looped over, which are spatial."""

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

    >>> axes = Axes(("t", "y", "x", "c"))
    >>> axes.channel, axes.looped, axes.spatial
    (3, (0,), (1, 2))
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"axes must have different names, got {self.names}")
        channels = [n for n in self.names if n.lower() in CHANNEL_NAMES]
        if len(channels) > 1:
            raise ValueError(f"axes must have at most one channel axis, got {self.names}")
        if not self.spatial:
            raise ValueError(f"axes must have at least one spatial axis, got {self.names}")

    @property
    def channel(self) -> int | None:
        """Position of the channel axis."""
        return next((i for i, n in enumerate(self.names) if n.lower() in CHANNEL_NAMES), None)

    @property
    def looped(self) -> tuple[int, ...]:
        """Positions of the axes that are looped over, such as time."""
        return tuple(i for i, n in enumerate(self.names) if n.lower() in LOOP_NAMES)

    @property
    def spatial(self) -> tuple[int, ...]:
        """Positions of the spatial axes."""
        return tuple(i for i, n in enumerate(self.names) if n.lower() not in CHANNEL_NAMES | LOOP_NAMES)

    @property
    def order(self) -> tuple[int, ...]:
        """Positions of looped and spatial axes, in the order of boxes."""
        return self.looped + self.spatial


def resolve_axes(axes: str | Sequence[str] | None, names: Sequence[str | None] | None, ndim: int) -> Axes:
    """The axes of an array: as asked for, else by its dimension names, else by its number of axes.

    Raises:
        ValueError: when the axes asked for do not fit, or there is no default.

    >>> resolve_axes("yxc", None, 3).names
    ('y', 'x', 'c')
    """
    if axes is not None:
        wanted = tuple(axes)
        if len(wanted) != ndim:
            raise ValueError(f"axes must name each of the {ndim} axes of the volume, got {axes!r}")
        return Axes(wanted)
    if names is not None and all(names) and not all(str(n).startswith("dim_") for n in names):
        return Axes(tuple(str(n) for n in names))
    if ndim not in DEFAULTS:
        raise ValueError(f"axes must be given for a volume of {ndim} axes (for example axes='tczyx')")
    return Axes(tuple(DEFAULTS[ndim]))
