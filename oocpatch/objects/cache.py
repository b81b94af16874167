"""A cache of what was read last, by its bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


@dataclass
class Cache(Generic[Item]):
    """The items that were used last, up to a number of bytes, and at least so many of them.

    >>> cache = Cache(10)
    >>> [cache.get(n, lambda: (n, 6)) for n in (1, 2, 3)], cache.get(2, lambda: (-2, 6)), cache.get(1, lambda: (-1, 6))
    ([1, 2, 3], 2, -1)
    """

    limit: int
    least: int = 2
    _items: OrderedDict[Any, tuple[Item, int]] = field(default_factory=OrderedDict)
    _size: int = 0

    def get(self, key: Any, load: Callable[[], tuple[Item, int]]) -> Item:
        """Return an item; if it is not there, `load` returns it with its bytes."""
        if key in self._items:
            self._items.move_to_end(key)
        else:
            self._items[key] = load()
            self._size += self._items[key][1]
            while self._size > self.limit and len(self._items) > self.least:
                self._size -= self._items.popitem(last=False)[1][1]
        return self._items[key][0]
