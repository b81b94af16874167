"""Models and probes that several runs of a process have in common: many small volumes cost little more than patches."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

from oocpatch.models.probe import Probe

Loaded = TypeVar("Loaded")

MOST_PROBES = 16
"""Probes that are kept per model; the oldest goes first."""

_LOADED: ContextVar[dict[str, Any] | None] = ContextVar("_LOADED", default=None)
_PROBES: weakref.WeakKeyDictionary[Any, dict[str, Probe]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def loaded_once() -> Iterator[None]:
    """Let the runs of a block load each spec once; files of models that change meanwhile are not read again."""
    token = _LOADED.set({})
    try:
        yield
    finally:
        _LOADED.reset(token)


def loaded(key: tuple[Any, ...], load: Callable[[], Loaded]) -> Loaded:
    """Return what was loaded for these arguments, which are specs and plain values, within `loaded_once`, else load it.

    >>> with loaded_once():
    ...     print(loaded(("a", 1), list) is loaded(("a", 1), list), loaded(("a", 1), list) is loaded(("a", 2), list))
    True False
    >>> loaded(("a", 1), list) is loaded(("a", 1), list)
    False
    """
    models = _LOADED.get()
    if models is None:
        return load()
    if repr(key) not in models:
        models[repr(key)] = load()
    model: Loaded = models[repr(key)]
    return model


def probed(models: Sequence[Any], key: tuple[Any, ...], probe: Callable[[], Probe]) -> Probe:
    """Return the probe of the same model objects that an earlier run of this process made, else make it.

    Args:
        models: the models; the first is kept as long as its user keeps it.
        key: all that the probe depends on, the fingerprint of the models included.
        probe: makes it.
    """
    try:
        probes = _PROBES.setdefault(models[0], {})
    except TypeError:  # an object without hash, or without room for a weak reference
        return probe()
    name = repr((*key, [id(model) for model in models[1:]]))
    if name not in probes:
        made = probe()
        while len(probes) >= MOST_PROBES:
            del probes[next(iter(probes))]
        probes[name] = made
    return probes[name]
