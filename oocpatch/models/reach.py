"""The objects that a model reaches, and those that its calls write, by following its code from object to object."""

from __future__ import annotations

import collections
import functools
import inspect
import pathlib
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from oocpatch.models.source_code import Chain, code_usage
from oocpatch.models.value_parts import LIBRARIES, MISSING, PLAIN, VALUES, Reading, cell_content, package_of, parts_of

_CONTAINERS = (list, dict, set, bytearray, collections.deque)


def callables_of(model: object) -> list[Any]:
    """Return what a model may call: the model, and all networks and objects of the user's classes that it reaches.

    >>> net = nn.ReLU()
    >>> net in callables_of(functools.partial(max, key=[net]))
    True
    """
    reached = Survey(model).reached.values()
    plain = type | types.FunctionType | types.ModuleType
    own = (value for value in reached if not isinstance(value, plain) and package_of(type(value)) not in LIBRARIES)
    networks = (value for value in reached if isinstance(value, nn.Module))
    return [model, *own, *(module for network in networks for module in network.modules())]  # TorchScript's, too


class Survey(Reading):
    """All that a model reaches, and what of it a call of the model writes.

    Attributes:
        reached: objects by their id; kept, since a freed one's id would be given to another.
        names: globals and attributes that its functions name.
        state: id of an object, a class or a namespace, and name of the attribute, item or variable that is written.
    """

    def __init__(self, model: object, *, sources: bool = True) -> None:
        self.sources = sources
        self.reached: dict[int, object] = {}
        self.state: set[tuple[int, str]] = set()
        self.names = frozenset[str]()
        self._followed: set[tuple[int, int]] = set()
        rest, modules, count = [model], list[types.ModuleType](), -1
        while rest or count < len(self.names):
            if not rest:  # of modules, what the functions name that were found by now
                count, rest = len(self.names), [part for module in modules for _, part in parts_of(module, self)[1]]
                continue
            value = rest.pop()
            if id(value) in self.reached or isinstance(value, PLAIN | torch.Tensor | np.ndarray | np.generic):
                continue
            self.reached[id(value)] = value
            if isinstance(value, types.ModuleType):
                modules.append(value)
            elif isinstance(value, types.FunctionType):
                self._follow(value, None)
            elif not isinstance(value, type) and package_of(type(value)) not in LIBRARIES:
                for name in ("forward", "__call__"):
                    self._follow_method(value, name)
                members = [item for base in type(value).__mro__ for item in vars(base).items()]
                self.state |= {(id(value), name) for name, m in members if isinstance(m, functools.cached_property)}
            rest += [part for _, part in parts_of(value, self)[1]]

    def _follow_method(self, receiver: Any, name: str) -> None:
        kind = receiver if isinstance(receiver, type) else type(receiver)
        for base in kind.__mro__ if not isinstance(receiver, types.ModuleType) else ():
            member = vars(base).get(name)
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if isinstance(function, types.FunctionType):
                self._follow(function, kind if isinstance(member, classmethod) else receiver)

    def _follow(self, function: types.FunctionType, receiver: Any) -> None:
        """Note what a function writes, and follow the methods that it may call."""
        if package_of(function) in LIBRARIES or (id(function), id(receiver)) in self._followed:
            return
        self._followed.add((id(function), id(receiver)))
        usage = code_usage(function.__code__, sources=self.sources)
        for chain in usage.writes | usage.fills:
            self._note(function, receiver, chain)
        for chain in usage.outputs:
            if isinstance(next(_resolved(function, receiver, chain), None), str | pathlib.PurePath):
                self._note(function, receiver, chain)
        self.names |= usage.names
        for *path, name in usage.calls:
            for owner in [receiver] if path == ["super()"] else _resolved(function, receiver, tuple(path)):
                self._follow_method(owner, name)

    def _note(self, function: types.FunctionType, receiver: Any, chain: Chain) -> None:
        *path, name = chain
        if not path:
            cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
            self.state.add((id(cells.get(name, function.__globals__)), name))
            return
        for owner in _resolved(function, receiver, tuple(path)):
            if name == "[Ellipsis]" or (name == "[*]" and isinstance(owner, _CONTAINERS)):
                self._note(function, receiver, tuple(path))
            elif name.startswith("[") and not isinstance(owner, VALUES):
                self._follow_method(owner, "__setitem__")
            else:
                kinds = owner.__mro__ if isinstance(owner, type) else type(owner).__mro__
                holders = [vars(owner) if isinstance(owner, types.ModuleType) else owner]
                holders += [kind for kind in kinds if name in vars(kind) and package_of(kind) not in LIBRARIES]
                self.state |= {(id(holder), name) for holder in holders}


def _resolved(function: types.FunctionType, receiver: Any, chain: Chain) -> Iterator[Any]:
    """Yield the values that a chain of a function leads to now, as far as they are known."""
    code, name = function.__code__, chain[0] if chain else ""
    value = MISSING
    if receiver is not None and code.co_argcount and name == code.co_varnames[0]:
        value = receiver
    elif name in code.co_freevars:
        value = cell_content((function.__closure__ or ())[code.co_freevars.index(name)])
    elif name not in code_usage(code).variables:
        value = function.__globals__.get(name, MISSING)
    values = [value]
    for step in chain[1:]:
        values = [item for value in values for item in _step(value, step)]
    yield from (value for value in values if value is not MISSING)


def _step(value: Any, step: str) -> Iterator[Any]:
    if isinstance(value, dict | list | tuple | nn.ModuleList | nn.Sequential) and step.startswith("["):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        yield from (item for key, item in pairs if step in ("[*]", f"[{key!r}]"))
    elif step == "__class__":
        yield type(value)
    elif not step.startswith("["):
        yield _attribute(value, step)


def _attribute(value: Any, name: str) -> Any:
    """Return an attribute without running code of the user's for it."""
    if isinstance(value, nn.Module):  # private, but what torch has instead runs code, too
        for registered in (value._modules, value._parameters, value._buffers):  # noqa: SLF001
            if name in registered:
                return registered[name]
    member = inspect.getattr_static(value, name, MISSING)
    return getattr(value, name, MISSING) if isinstance(member, types.MemberDescriptorType) else member
