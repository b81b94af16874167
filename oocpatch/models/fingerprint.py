"""Fingerprints of models: digests that are equal in every process that loads the same model.

Outputs of two models must never be mixed in one result, so a fingerprint reads everything that a model computes with:
code, parameters, constants, configuration. It must not change by itself either, or no run could be resumed, so it reads
no memory address, no path of a source file, and nothing that the model writes while it computes (a counter, a log).
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import hashlib
import io
import operator
import pathlib
import pickletools
import re
import sys
import types
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import torch
from torch import nn

from oocpatch.models.onnx import OnnxSession
from oocpatch.models.source_code import bytecode, code_usage

Parts = tuple[str, list[tuple[str, object]]]
"""A token that tells one value from another, and the values that it is made of, by name."""

# Named, not read: their versions are recorded with the run.
_LIBRARIES = frozenset({"torch", "numpy", "builtins", "oocpatch"}) | sys.stdlib_module_names
# Locks, logs, threads and files: what a model waits for or reports to, and nothing that it computes with.
_HANDLES = {"threading", "_thread", "logging", "multiprocessing", "concurrent", "queue", "io", "_io", "weakref", "tqdm"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")  # private, since torch has no public list of them
_MODULE_STATE = frozenset(vars(nn.Module()))
_PLAIN: Any = bool | int | float | complex | str | bytes | bytearray | types.NoneType | types.EllipsisType | range
_VALUES: Any = _PLAIN | tuple | list | set | frozenset | Mapping | torch.Tensor | np.ndarray | np.generic
_UNREAD = "unread"


class Fingerprint(NamedTuple):
    """The fingerprint of a model."""

    digest: str  # the same for two models that compute the same
    unread: tuple[str, ...]  # places of values that cannot be read, such as `model.config.handle`


def model_fingerprint(model: object, *, sources: bool = True) -> str:
    """Return the digest of a model's fingerprint; see `read_fingerprint`.

    >>> model_fingerprint(nn.Softplus(1.0)) == model_fingerprint(nn.Softplus(2.0))
    False
    """
    return read_fingerprint(model, sources=sources).digest


def read_fingerprint(model: object, *, sources: bool = True) -> Fingerprint:
    """Read everything that a model computes with.

    Modules are read with their submodules, parameters, buffers, hooks and attributes; functions with their code,
    defaults, closures and the globals that they use; files by their content; other objects as `pickle` takes them
    apart. Attributes and variables that the code writes during a call are state, and not read.

    Args:
        model: a module, a function, or a part of one.
        sources: whether code is read from its source where that is at hand, so that versions of Python agree; else
            from its bytecode, so that processes agree of which not all have the source.

    >>> read_fingerprint(functools.partial(max, key=(letter for letter in "ab"))).unread
    ("model.keywords['key']",)
    """
    walk = _Walk(sources)
    walk.read("model", model)
    return Fingerprint(walk.hash.hexdigest(), tuple(walk.unread))


def callables_of(model: object) -> list[Any]:
    """Return the objects that a model may call, networks and others: the model itself and all that it reaches."""
    reached: dict[int, object] = {}
    rest, called = [model], [model]
    while rest:
        value = rest.pop()
        if id(value) in reached or isinstance(value, _PLAIN | torch.Tensor | np.ndarray | np.generic):
            continue
        reached[id(value)] = value
        if callable(value) and not isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
            called.append(value)
        rest += [part for _, part in _parts(value, True)[1]]
    return called


class _Walk:
    """A walk over a value and all that it is made of, which hashes the token of each part."""

    def __init__(self, sources: bool) -> None:
        self.unread: list[str] = []
        self.hash = hashlib.sha256()
        self._sources = sources
        # The objects are kept alive: a freed one's id would be given to another.
        self._seen: dict[int, tuple[str, object]] = {}

    def read(self, path: str, value: object) -> None:
        if id(value) in self._seen:
            self._hash_token("again", self._seen[id(value)][0])
            return
        self._seen[id(value)] = path, value
        token, parts = _parts(value, self._sources)
        if token == _UNREAD:
            self.unread.append(path)
        self._hash_token(type(value).__name__, f"{len(parts)} {token}")
        for name, part in parts:
            self._hash_token("part", name)
            self.read(f"{path}{name}" if name.startswith("[") else f"{path}.{name}", part)
        if isinstance(value, _VALUES):  # compared by content: a copy in its place is the same
            del self._seen[id(value)]

    def _hash_token(self, kind: str, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        self.hash.update(f"{kind}:{len(data)}:".encode() + data)


@functools.singledispatch
def _parts(value: object, sources: bool) -> Parts:
    """Return what an object is made of, as `pickle` takes it apart."""
    kind = type(value)
    if hasattr(value, "__wrapped__"):  # a function in a cache, a static method
        return _name(kind), [("__wrapped__", value.__wrapped__)]
    if _package(kind) in _HANDLES or kind.__module__.startswith("torch._dynamo"):  # the latter: the compiler's
        return _name(kind), []
    try:
        reducer = copyreg.dispatch_table.get(kind, operator.methodcaller("__reduce_ex__", 4))
        reduced: Any = () if kind.__module__.startswith("torch._") else reducer(value)
    except Exception:  # noqa: BLE001 - whatever it raises, the value cannot be taken apart
        reduced = ()
    if not reduced:
        return _UNREAD, [("class", kind)]
    if isinstance(reduced, str):
        return f"{_name(kind)} {getattr(value, '__module__', None)}.{reduced}", []
    function, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):  # of a class with slots
        state = {**(state[0] or {}), **state[1]}
    attributes = _attributes(kind, state, sources) if isinstance(state, dict) else [("state", state)]
    return "", [("class", kind), *_indexed((function, *arguments, *(items or ()), *(pairs or ()))), *attributes]


def _indexed(values: Iterable[object]) -> list[tuple[str, object]]:
    return [(f"[{index}]", value) for index, value in enumerate(values)]


def _attributes(kind: type, state: Mapping[Any, object], sources: bool) -> list[tuple[str, object]]:
    """Return the attributes that no call writes: not `forward`, `__call__`, nor a method that they name."""
    names, written = ["forward", "__call__"], set[str]()
    methods = [vars(base) for base in kind.__mro__ if _package(base) not in _LIBRARIES]
    for name in names:
        for member in (members[name] for members in methods if name in members):
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if isinstance(function, types.FunctionType):
                usage = code_usage(function.__code__, sources=sources)
                written |= usage.written_attributes
                names += usage.names - set(names)
    return sorted((str(name), value) for name, value in state.items() if name not in written)


def _set(value: Iterable[Any], sources: bool) -> Parts:
    # The order of a set of strings differs from process to process.
    return "", _indexed(sorted(value, key=lambda item: model_fingerprint(item, sources=sources)))


def _module(module: nn.Module, sources: bool) -> Parts:
    members = module.named_modules(remove_duplicate=False)
    children: list[tuple[str, object]] = [(name, child) for name, child in members if name and "." not in name]
    if [name for name, _ in children] == ["_orig_mod"]:  # of torch.compile: the rest is the compiler's
        return "compiled", children
    attributes = {name: value for name, value in vars(module).items() if name not in _MODULE_STATE}
    own: list[tuple[str, object]] = [("class", type(module)), *((n, [*vars(module)[n].values()]) for n in _HOOKS)]
    if isinstance(module, torch.fx.GraphModule):  # the rest is the compiler's: places in sources, symbols, empty hooks
        attributes = {name: item for name, item in attributes.items() if isinstance(item, torch.Tensor)}
        own = [("code", module.code)]
    tensors = (module.named_parameters, module.named_buffers)
    state = [item for named in tensors for item in named(recurse=False, remove_duplicate=False)]
    return "", [*own, *_attributes(type(module), attributes, sources), *children, *state]


def _tensor(tensor: torch.Tensor, _: bool) -> Parts:
    if nn.parameter.is_lazy(tensor) or tensor.is_meta:
        return f"{tensor.dtype}", []
    token, tensor = f"{tensor.dtype} {tensor.layout} {tuple(tensor.shape)}", tensor.detach()
    if tensor.is_quantized:
        return f"{token} {tensor.qscheme()}", [("values", tensor.dequantize())]
    if tensor.layout is not torch.strided:
        coordinates: torch.Tensor = tensor.to_sparse_coo().coalesce()  # type: ignore[no-untyped-call]  # as torch has it
        return token, [("indices", coordinates.indices()), ("values", coordinates.values())]
    plain = tensor.resolve_conj().resolve_neg().cpu().contiguous()
    return token, [("values", plain.reshape(-1).view(torch.uint8).numpy())]


def _array(value: Any, _: bool) -> Parts:
    array = np.ascontiguousarray(value)
    token = f"{array.dtype.str} {np.shape(value)}"
    if array.dtype.hasobject:
        return token, [("items", array.tolist())]
    data = array.reshape(-1).view(np.uint8)
    data.flags.writeable = False  # google_crc32c takes only what cannot change under it
    return f"{token} {google_crc32c.value(data):08x}", [("mask", getattr(value, "mask", None))]


def _script(model: Any, _: bool) -> Parts:
    """Return code, constants and state of TorchScript, as they would be saved."""
    texts: list[tuple[str, object]] = []
    with zipfile.ZipFile(io.BytesIO(model.save_to_buffer())) as archive:
        for name in filter(_SCRIPT.match, archive.namelist()):
            text = archive.read(name).decode("latin-1")
            text = _CONSTANTS.sub(lambda lines: "".join(sorted(lines[0].splitlines(keepends=True))), text)
            if name.endswith(".pkl"):
                text = "\n".join(
                    f"{step.name} {argument}" for step, argument, _ in pickletools.genops(archive.read(name))
                )
            texts.append((_NUMBERED.sub("", name), _NUMBERED.sub("", text)))
    return "", sorted(texts, key=str)


_SCRIPT = re.compile(r"[^/]+/(code/.*\.py|(data|constants)(\.pkl|/.*))$")
_CONSTANTS = re.compile(r"(?:.* : Final\[.*\n)+")  # in the order of a set, which differs from process to process
_NUMBERED = re.compile(r"___torch_mangle_\d+\.?|cuda:\d+")  # classes by the order of their loading, and devices


def _function(function: types.FunctionType, sources: bool) -> Parts:
    """Return what a function computes with: code, defaults, closure, and the globals that it uses."""
    package = _package(function)
    if package in _LIBRARIES:
        wrapped = getattr(function, "__wrapped__", None)
        cells = () if wrapped is not None else function.__closure__ or ()
        name = function.__code__.co_qualname  # a wrapper has the __qualname__ of what it wraps
        return f"{package}.{name}", [("__wrapped__", wrapped), *(("cell", c.cell_contents) for c in cells)]
    code = function.__code__
    usage = code_usage(code, sources=sources)
    parts: list[tuple[str, object]] = [
        ("code", usage.source or bytecode(code, function.__doc__)),
        ("defaults", function.__defaults__),
        ("kwdefaults", function.__kwdefaults__),
        *sorted(vars(function).items()),
    ]
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        if name not in usage.written | {"__class__"}:  # super() closes over __class__
            with contextlib.suppress(ValueError):  # a name that is not bound yet
                parts.append((name, cell.cell_contents))
    for name in sorted((usage.globals & function.__globals__.keys()) - usage.written):
        parts += _global(name, function.__globals__[name], usage.names - usage.written_attributes, package)
    return "", parts


def _global(name: str, value: Any, used: frozenset[str], reader: str) -> Iterator[tuple[str, object]]:
    """Yield a global of a function; for a module of the user's, the members too that the function names."""
    is_foreign = isinstance(value, type | types.FunctionType) and _package(value) != reader
    yield name, _name(value) if is_foreign and not _is_own(value.__module__) else value
    if isinstance(value, types.ModuleType) and _is_own(value.__name__):
        for member in sorted(used & vars(value).keys()):
            yield from _global(f"{name}.{member}", vars(value)[member], used - {member}, reader)


def _class(kind: type, _: bool) -> Parts:
    """Return the members of a class and of its bases, as far as they are the user's; else its name."""
    own = [base for base in kind.__mro__ if _package(base) not in _LIBRARIES]
    members = [(base, name, value) for base in own for name, value in sorted(vars(base).items())]
    parts = [(f"{base.__name__}.{name}", value) for base, name, value in members if _is_member(name, value)]
    libraries = [_name(base) for base in kind.__mro__ if base not in own]
    return kind.__name__ if own else _name(kind), [("bases", libraries), *parts]


def _is_member(name: str, value: object) -> bool:
    """Return True for what a class defines, and False for what Python adds to it."""
    if isinstance(value, types.FunctionType):  # those that a dataclass generates follow from its fields
        return name not in _GENERATED or value.__code__.co_filename != "<string>"
    is_method = isinstance(value, staticmethod | classmethod | property)
    return is_method or not (name.startswith("__") or name == "_abc_impl")


_GENERATED = {"__init__", "__repr__", "__eq__", "__hash__", "__lt__", "__le__", "__gt__", "__ge__", "__replace__"}


def _is_own(module: str | None) -> bool:
    """Return True for modules of the user's own: no package manager installed them."""
    folders = pathlib.PurePath(getattr(sys.modules.get(module or ""), "__file__", None) or "").parts
    is_installed = (module or "").split(".")[0] in _LIBRARIES or {"site-packages", "dist-packages"} & {*folders}
    return module == "__main__" or not is_installed  # in another process, __main__ is the script that started it


def _package(value: Any) -> str:
    """Return the package that a class or a function comes from; for a wrapper, that of the wrapper."""
    name = value.__globals__.get("__name__") if isinstance(value, types.FunctionType) else value.__module__
    return (name or "").split(".")[0]


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


_READERS: tuple[tuple[Any, Callable[[Any, bool], Parts]], ...] = (
    (_PLAIN, lambda value, _: (repr(value), [])),
    (tuple | list, lambda value, _: ("", _indexed(value))),
    (set | frozenset, _set),
    (Mapping, lambda m, _: ("", [part for k in m for part in (("key", k), (f"[{k!r:.80}]", m[k]))])),
    (np.ndarray | np.generic, _array),
    (torch.Tensor, _tensor),
    (torch.utils.hooks.RemovableHandle, lambda _, __: ("", [])),  # numbered by a process's hooks
    (types.ModuleType, lambda value, _: (value.__name__, [])),
    (functools.partial, lambda p, _: ("", [("func", p.func), ("args", p.args), ("keywords", p.keywords)])),
    (property, lambda value, _: ("", [("fget", value.fget)])),
    (types.CodeType, lambda value, _: ("", _indexed(bytecode(value)))),
    (types.FunctionType, _function),
    (type, _class),
    (nn.Module, _module),
    (OnnxSession, lambda session, _: (session.digest, [])),
    (torch.jit.ScriptModule | torch.jit.ScriptFunction, _script),
)
for _kinds, _reader in _READERS:
    _parts.register(_kinds, _reader)
