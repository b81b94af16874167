"""Versions that have to do with the bytes of a result, here and in other processes."""

from __future__ import annotations

from collections.abc import Callable

MUST_AGREE, SHOULD_AGREE = ("oocpatch", "torch"), ("numpy", "python", "zarr")
"""Versions on which the bytes depend, and those on which they might."""


def versions_here() -> dict[str, str | None]:
    """The versions that have to do with the bytes of a result."""
    return asking()()


def asking() -> Callable[[], dict[str, str | None]]:
    """A function that travels by value: it also answers where oocpatch is not installed."""
    names = (*MUST_AGREE, *SHOULD_AGREE)

    def ask() -> dict[str, str | None]:
        import importlib.metadata  # noqa: PLC0415 - what travels by value brings its own imports
        import platform  # noqa: PLC0415

        def version(name: str) -> str | None:
            if name == "python":
                return platform.python_version()
            try:
                if name == "oocpatch":  # may be on the path without being installed
                    return str(importlib.import_module(name).__version__)
                return importlib.metadata.version(name).split("+")[0]
            except ImportError:
                return None

        return {name: version(name) for name in names}

    return ask


def disagreement(here: dict[str, str | None], there: dict[str, str | None], names: tuple[str, ...]) -> str:
    """The versions that differ, in words; nothing if none does."""
    return ", ".join(f"{n} {here.get(n)} here, {there.get(n)} there" for n in names if here.get(n) != there.get(n))
