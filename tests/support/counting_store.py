"""A Zarr store in memory that notes what is read."""

from __future__ import annotations

from typing import Any

from zarr.storage import MemoryStore


class CountingStore(MemoryStore):
    """Notes the key of every read that found something."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.reads: list[str] = []

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        found = await super().get(key, prototype, byte_range)
        if found is not None:
            self.reads.append(key)
        return found
