"""Fingerprints of models: digests that are equal in every process that loads the same model.

Outputs of two models must never be mixed in one result, so a fingerprint reads everything that a model computes with:
code, parameters, constants, configuration. It must not change by itself either, or no run could be resumed, so it reads
no memory address, no path of a source file, and nothing that the model writes while it computes (a counter, a log).
"""

from __future__ import annotations

import enum
import functools
import hashlib
import itertools
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from oocpatch.models import source_code
from oocpatch.models.binary_content import array_parts, script_parts, tensor_parts
from oocpatch.models.onnx import OnnxSession
from oocpatch.models.source_code import Parts, package, qualified_name

# Locks, logs, threads and files: what a model waits for or reports to, and nothing that it computes with.
_HANDLES = {"threading", "_thread", "logging", "multiprocessing", "concurrent", "queue", "io", "_io", "weakref", "tqdm"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")  # private, since torch has no public list of them
_MODULE_STATE = frozenset(vars(nn.Module()))
_PLAIN: Any = bool | int | float | complex | str | bytes | bytearray | types.NoneType | types.EllipsisType | range
_VALUES: Any = _PLAIN | tuple | list | set | frozenset | Mapping | torch.Tensor | np.ndarray | np.generic
_UNREAD = "unread"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The fingerprint of a model.

    Attributes:
        digest: the same for two models that compute the same.
        unread: places of values that cannot be read, such as `model.config.handle`: one cannot be told from another.
    """

    digest: str
    unread: tuple[str, ...]


def model_fingerprint(model: Callable[..., Any], *, sources: bool = True) -> str:
    """Return the digest of a model's fingerprint; see `read_fingerprint`.

    >>> model_fingerprint(nn.Softplus(1.0)) == model_fingerprint(nn.Softplus(2.0))
    False
    """
    return read_fingerprint(model, sources=sources).digest


def read_fingerprint(model: Callable[..., Any], *, sources: bool = True) -> Fingerprint:
    """Read everything that a model computes with.

    Modules are read with their submodules, parameters, buffers, hooks and attributes; functions with their code,
    defaults, closures and the globals that they use; files by their content; other objects as `pickle` takes them
    apart. Attributes and variables that the code writes during a call are state, and not read.

    Args:
        model: a module or a function.
        sources: whether code is read from its source where that is at hand, so that versions of Python agree; else
            from its bytecode, so that processes agree of which not all have the source.

    >>> read_fingerprint(functools.partial(max, key=(letter for letter in "ab"))).unread
    ("model.keywords['key']",)
    """
    walk = _Walk(sources=sources)
    return Fingerprint(walk.hexdigest("model", model), tuple(walk.unread))


class _Walk:
    """A walk over a value and all that it is made of, which hashes the token of each part."""

    def __init__(self, *, sources: bool) -> None:
        self.unread: list[str] = []
        self._sources = sources
        self._hash = hashlib.sha256()
        self._numbers = itertools.count()
        # The objects are kept alive: a freed one's id would be given to another.
        self._seen: dict[int, tuple[int, object]] = {}

    def hexdigest(self, path: str, value: object) -> str:
        self._read(path, value)
        return self._hash.hexdigest()

    def _read(self, path: str, value: object) -> None:
        if id(value) in self._seen:
            self._hash_token("again", str(self._seen[id(value)][0]))
            return
        self._seen[id(value)] = next(self._numbers), value
        token, parts = _parts(value, self._sources)
        if token == _UNREAD:
            self.unread.append(path)
        self._hash_token(type(value).__name__, f"{len(parts)} {token}")
        for name, part in parts:
            self._hash_token("part", name)
            self._read(f"{path}{name}" if name.startswith("[") else f"{path}.{name}", part)
        if isinstance(value, _VALUES):  # compared by content: a copy in its place is the same
            del self._seen[id(value)]

    def _hash_token(self, kind: str, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        self._hash.update(f"{kind}:{len(data)}:".encode() + data)


@functools.singledispatch
def _parts(value: object, sources: bool) -> Parts:
    """Return what an object is made of, as `pickle` takes it apart."""
    kind = type(value)
    if hasattr(value, "__wrapped__"):  # a function in a cache
        return qualified_name(kind), [("__wrapped__", value.__wrapped__)]
    if package(kind) in _HANDLES:
        return qualified_name(kind), []
    try:
        reduced: Any = () if kind.__module__.startswith("torch._") else value.__reduce_ex__(4)
    except Exception:  # noqa: BLE001 - whatever it raises, the value cannot be taken apart
        reduced = ()
    if not reduced:
        return _UNREAD, [("class", kind)]
    if isinstance(reduced, str):
        return f"{qualified_name(kind)} {getattr(value, '__module__', None)}.{reduced}", []
    function, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):  # of a class with slots
        state = {**(state[0] or {}), **state[1]}
    attributes = _attributes(kind, state, sources) if isinstance(state, dict) else [("state", state)]
    return "", [("class", kind), *_indexed((function, *arguments, *(items or ()), *(pairs or ()))), *attributes]


def _indexed(values: Iterable[object]) -> list[tuple[str, object]]:
    return [(f"[{index}]", value) for index, value in enumerate(values)]


def _attributes(kind: type, state: Mapping[Any, object], sources: bool) -> list[tuple[str, object]]:
    written = source_code.written_by_calls(kind, sources=sources)
    return sorted((str(name), value) for name, value in state.items() if name not in written)


def _mapping(value: Mapping[Any, Any], _: bool) -> Parts:
    return "", [part for key, item in value.items() for part in (("key", key), (f"[{key!r:.80}]", item))]


def _set(value: Iterable[Any], sources: bool) -> Parts:
    # The order of a set of strings differs from process to process.
    return "", _indexed(sorted(_Walk(sources=sources).hexdigest("", item) for item in value))


def _module(module: nn.Module, sources: bool) -> Parts:
    members = [(name, child) for name, child in module.named_modules(remove_duplicate=False)][1:]
    children: list[tuple[str, object]] = [(name, child) for name, child in members if "." not in name]
    if [name for name, _ in children] == ["_orig_mod"]:  # of torch.compile: the rest is the compiler's
        return "compiled", children
    # state_dict leaves out buffers that are not persistent
    state = {n: v for n, v in module.state_dict().items() if "." not in n} | dict(module.named_buffers(recurse=False))
    attributes = {name: value for name, value in vars(module).items() if name not in _MODULE_STATE}
    if isinstance(module, torch.fx.GraphModule):  # the rest is the compiler's: places in sources, symbols, empty hooks
        own: list[tuple[str, object]] = [("code", module.code)]
        attributes = {name: item for name, item in attributes.items() if isinstance(item, torch.Tensor)}
    else:
        own = [("class", type(module)), *((name, list(vars(module)[name].values())) for name in _HOOKS)]
    return "", [*own, *_attributes(type(module), attributes, sources), *children, *state.items()]


_READERS: tuple[tuple[Any, Callable[[Any, bool], Parts]], ...] = (
    (_PLAIN, lambda value, _: (repr(value), [])),
    (tuple | list, lambda value, _: ("", _indexed(value))),
    (set | frozenset, _set),
    (Mapping, _mapping),
    (enum.Enum, lambda value, _: (qualified_name(type(value)), [(str(value.name), value.value)])),
    (np.ndarray | np.generic, array_parts),
    (torch.Tensor, tensor_parts),
    (torch.utils.hooks.RemovableHandle, lambda _, __: ("", [])),  # numbered by a process's hooks
    (types.ModuleType, lambda value, _: (value.__name__, [])),
    (types.MethodType, lambda value, _: ("", [("__func__", value.__func__), ("__self__", value.__self__)])),
    (functools.partial, lambda p, _: ("", [("func", p.func), ("args", p.args), ("keywords", p.keywords)])),
    (staticmethod | classmethod, lambda value, _: ("", [("__func__", value.__func__)])),
    (property, lambda value, _: ("", [("fget", value.fget)])),
    (types.CodeType, lambda value, _: ("", _indexed(source_code.bytecode(value)))),
    (types.FunctionType, lambda value, sources: source_code.function_parts(value, sources=sources)),
    (type, lambda value, sources: source_code.class_parts(value, sources=sources)),
    (nn.Module, _module),
    (OnnxSession, lambda session, _: (session.digest, [])),
    (torch.jit.ScriptModule | torch.jit.ScriptFunction, script_parts),
)
for _kinds, _reader in _READERS:
    _parts.register(_kinds, _reader)
