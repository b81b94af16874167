"""Parts of values: what an object is made of, down to values whose content tells them apart."""

from __future__ import annotations

import contextlib
import copyreg
import enum
import functools
import hashlib
import importlib
import importlib.util
import io
import operator
import os
import pathlib
import pickletools
import random
import re
import sys
import types
import weakref
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import google_crc32c
import numpy as np
import torch
from torch import nn

from oocpatch.models.onnx import OnnxSession
from oocpatch.models.source_code import bytecode, code_usage

Parts = tuple[str, list[tuple[str, object]]]
"""A token that tells one value from another, and the values that it is made of, by name."""

# Named, not read: their versions are recorded with the run.
LIBRARIES = frozenset({"torch", "numpy", "builtins", "oocpatch"}) | sys.stdlib_module_names
# Locks, logs, threads and files: what a model waits for or reports to, and nothing that it computes with.
_HANDLES = {"threading", "_thread", "logging", "multiprocessing", "concurrent", "queue", "io", "_io", "weakref", "tqdm"}
_STORES = {"zarr", "h5py", "netCDF4", "dask"}  # they read what lies elsewhere
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")  # private, since torch has no public list of them
_MODULE_STATE = frozenset(vars(nn.Module()))
PLAIN: Any = bool | int | float | complex | str | bytes | bytearray | types.NoneType | types.EllipsisType | range
VALUES: Any = PLAIN | tuple | list | set | frozenset | Mapping | torch.Tensor | np.ndarray | np.generic
UNREAD = "unread"
MISSING = object()


class Reading:
    """The walk that values are read for, as their readers see it."""

    sources = True
    names = frozenset[str]()  # globals and attributes that functions of the model name

    def digest(self, value: object) -> str:  # noqa: ARG002 - for subclasses
        """Return the digest of a part of the model, by which parts without an order are sorted."""
        return ""

    def is_state(self, owner: object, name: str) -> bool:  # noqa: ARG002 - for subclasses
        """Return True for what the model writes while it computes."""
        return False

    def note_texts(self, *texts: str) -> None:
        """Look for the files of these names, or in the folders of these names."""

    def note_source(self, file: str, *, is_named: bool) -> None:
        """Name folders by their place beside a source file; look for files there if its code names it."""

    def relative(self, path: str) -> str:
        """Return the path of a folder beside the source from there, since both may move; any other text as it is."""
        return path


@functools.singledispatch
def parts_of(value: object, walk: Reading) -> Parts:
    """Return what an object is made of, as `pickle` takes it apart."""
    kind = type(value)
    if hasattr(value, "__wrapped__"):  # a function in a cache, a static method
        return _name(kind), [("__wrapped__", value.__wrapped__)]
    if package_of(kind) in _HANDLES or kind.__module__.startswith("torch._dynamo"):  # the latter: the compiler's
        return _name(kind), []
    is_opaque = kind.__module__.startswith("torch._") or package_of(kind) in _STORES
    try:
        reducer = copyreg.dispatch_table.get(kind, operator.methodcaller("__reduce_ex__", 4))
        reduced: Any = () if is_opaque else reducer(value)
    except Exception:  # noqa: BLE001 - whatever it raises, the value cannot be taken apart so
        reduced = () if not getattr(value, "__dict__", None) else (kind, (), vars(value))
    if not reduced:
        return UNREAD, [("class", kind)]
    if isinstance(reduced, str):
        return f"{_name(kind)} {getattr(value, '__module__', None)}.{reduced}", []
    function, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
    if walk.sources and package_of(kind) not in LIBRARIES:  # what it holds, and not what it would tell pickle
        state = object.__getstate__(value) or state
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):  # of a class with slots
        state = {**(state[0] or {}), **state[1]}
    attributes = _attributes(value, state or {}, walk) if isinstance(state, dict | None) else [("state", state)]
    return "", [("class", kind), *_indexed((function, *arguments, *(items or ()), *(pairs or ()))), *attributes]


def _indexed(values: Iterable[object]) -> list[tuple[str, object]]:
    return [(f"[{index}]", value) for index, value in enumerate(values)]


def _attributes(value: object, state: Mapping[Any, object], walk: Reading) -> list[tuple[str, object]]:
    """Return the attributes that no call writes."""
    return sorted((str(name), item) for name, item in state.items() if not walk.is_state(value, str(name)))


def _list(value: list[Any], walk: Reading) -> Parts:
    return "", [part for part in _indexed(value) if not walk.is_state(value, part[0])]


def _mapping(value: Mapping[Any, object], walk: Reading) -> Parts:
    factory = getattr(value, "default_factory", None)
    parts: list[tuple[str, object]] = [] if factory is None else [("factory", factory)]
    for number, key in enumerate(value):
        if not walk.is_state(value, f"[{key!r}]"):  # others may have an address in their text
            parts += ("key", key), (f"[{key!r:.80}]" if isinstance(key, PLAIN) else f"[{number}]", value[key])
    return "", parts


def _set(value: Iterable[Any], walk: Reading) -> Parts:
    # The order of a set of strings differs from process to process.
    return "", _indexed(sorted(value, key=walk.digest))


def _path(value: str | pathlib.PurePath, walk: Reading) -> Parts:
    """Return the content of the file that a path or a text names; else the text."""
    text = os.fspath(value)
    if walk.sources and (isinstance(value, pathlib.PurePath) or "." in text or "/" in text):
        if digest := file_digest(text):
            return (UNREAD, [("size", digest)]) if digest.startswith(LARGE) else (f"file {digest}", [])
        walk.note_texts(text)
        text = walk.relative(text)
    return repr(text), []


def _generator(generator: Any, _: Reading) -> Parts:
    """Return the seed of a generator of random numbers: what it was made with, and not how far it is."""
    if isinstance(generator, torch.Generator):
        return "", [("seed", generator.initial_seed())]
    sequence = getattr(getattr(generator, "bit_generator", None), "seed_seq", None)
    if not isinstance(sequence, np.random.SeedSequence):
        return UNREAD, [("class", type(generator))]
    kind = type(generator.bit_generator).__name__
    return kind, [("entropy", sequence.entropy), ("spawn_key", sequence.spawn_key)]


def _module(module: nn.Module, walk: Reading) -> Parts:
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
    counted = {n for n, t in state if t.ndim == 0 and not t.is_floating_point() and walk.is_state(module, n)}
    state = [item for item in state if item[0] not in counted]  # others are weights, whoever writes them
    return "", [*own, *_attributes(module, attributes, walk), *children, *state]


def _tensor(tensor: torch.Tensor, _: Reading) -> Parts:
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


def _array(value: Any, _: Reading) -> Parts:
    array = np.ascontiguousarray(value)
    token = f"{array.dtype.descr if array.dtype.names else array.dtype.str} {np.shape(value)}"
    if array.dtype.hasobject:
        return token, [("items", array.tolist())]
    data = array.reshape(-1).view(np.uint8)
    data.flags.writeable = False  # google_crc32c takes only what cannot change under it
    return f"{token} {google_crc32c.value(data):08x}", [("mask", getattr(value, "mask", None))]


def _script(model: Any, _: Reading) -> Parts:
    """Return code, constants and state of TorchScript, as they would be saved."""
    parts: list[tuple[str, bytes]] = []
    with zipfile.ZipFile(io.BytesIO(model.save_to_buffer())) as archive:
        for name in filter(_SCRIPT.match, archive.namelist()):
            content = archive.read(name)
            if name.endswith((".py", ".pkl")):
                content = _NUMBERED.sub("", _script_text(name, content)).encode()
            parts.append((_NUMBERED.sub("", name), content))
    return "", sorted(parts)


def _script_text(name: str, content: bytes) -> str:
    """Return code or a pickle as text that is the same in each process."""
    if name.endswith(".pkl"):
        return "\n".join(f"{step.name} {argument}" for step, argument, _ in pickletools.genops(content))
    return _CONSTANTS.sub(lambda lines: "".join(sorted(lines[0].splitlines(keepends=True))), content.decode())


_SCRIPT = re.compile(r"[^/]+/(code/.*\.py|(data|constants)(\.pkl|/.*))$")
_CONSTANTS = re.compile(r"(?:^.* : Final\[.*\n)+", re.MULTILINE)  # in an order that differs from process to process
_NUMBERED = re.compile(r"___torch_mangle_\d+\.?|cuda:\d+")  # classes by the order of their loading, and devices


def _function(function: types.FunctionType, walk: Reading) -> Parts:
    """Return what a function computes with: code, defaults, closure, and the globals that it uses."""
    package, code = package_of(function), function.__code__
    if package in LIBRARIES:
        wrapped, registry = getattr(function, "__wrapped__", None), getattr(function, "registry", None)
        cells = () if wrapped is not None else function.__closure__ or ()
        parts = [("registry", registry)] if registry is not None else [("cell", cell_content(cell)) for cell in cells]
        return f"{package}.{code.co_qualname}", [("__wrapped__", wrapped), *parts]  # __qualname__ is the wrapped one's
    usage = code_usage(code, sources=walk.sources)
    if walk.sources and is_own(function.__module__):
        walk.note_source(code.co_filename, is_named="__file__" in usage.globals)
        texts = [text for text in usage.texts if (repr(text),) not in usage.outputs]
        walk.note_texts(*(f"./{text}" if usage.names & _FILE_READERS else text for text in texts))
    parts = [
        ("code", usage.source.encode("utf-8", "surrogatepass") or bytecode(code, function.__doc__)),
        ("defaults", function.__defaults__),
        ("kwdefaults", function.__kwdefaults__),
        *_attributes(function, vars(function), walk),
    ]
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        content = cell_content(cell)
        if name != "__class__" and content is not MISSING and not walk.is_state(cell, name):  # the first: of super()
            parts.append((name, content))
    if walk.sources and usage.names & {"environ", "getenv"}:
        parts.append(("environment", {text: os.environ[text] for text in sorted(usage.texts & os.environ.keys())}))
    names = function.__globals__
    for name in sorted((usage.globals & names.keys()) - _MODULE_NAMES):
        if not walk.is_state(names, name):
            parts.append((name, _named(names[name], package)))
    for name in sorted(usage.imports):
        with contextlib.suppress(Exception):  # as the call would raise it
            parts.append((name, _imported(name, names.get("__package__"))))
    return "", parts


_FILE_READERS = {"open", "load", "loadtxt", "genfromtxt", "fromfile", "memmap", "imread", "read_text", "read_bytes"}
_MODULE_NAMES = {"__file__", "__name__", "__spec__", "__package__", "__path__", "__doc__", "__builtins__"}


def _imported(name: str, package: str | None) -> types.ModuleType:
    """Return the module that a function imports when it is called; of what is installed, only the name."""
    name = importlib.util.resolve_name(name, package)
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None or _is_installed(name, spec.origin):  # None: a function or class of a module
            return types.ModuleType(name)
    return importlib.import_module(name)


def _named(value: Any, reader: str) -> Any:
    """Return a global of a package; of a class or function that another installed one defines, the name."""
    is_foreign = isinstance(value, type | types.FunctionType) and package_of(value) != reader
    return _name(value) if is_foreign and not is_own(value.__module__) else value


def _module_members(module: types.ModuleType, walk: Reading) -> Parts:
    """Return what the functions of the model name of a module of the user's."""
    if not is_own(module.__name__):
        return module.__name__, []
    names = sorted((walk.names & vars(module).keys()) - _MODULE_NAMES)
    package = module.__name__.split(".", maxsplit=1)[0]
    values = vars(module)
    return "", [(name, _named(values[name], package)) for name in names if not walk.is_state(values, name)]


def _class(kind: type, walk: Reading) -> Parts:
    """Return the members of a class and of its bases, as far as they are the user's; else its name."""
    own = [base for base in kind.__mro__ if package_of(base) not in LIBRARIES]
    members = [(base, name, value) for base in own for name, value in sorted(vars(base).items())]
    listed: Mapping[str, Any] = kind.__members__ if isinstance(kind, enum.EnumMeta) else {}
    values = [(name, member.value) for name, member in listed.items() if own]
    parts = [
        (f"{base.__name__}.{name}", value)
        for base, name, value in members
        if _is_member(base, name, value) and not walk.is_state(base, name)
    ]
    libraries: list[object] = [_name(base) for base in kind.__mro__ if base not in own]
    libraries += [type(kind)] if is_own(type(kind).__module__) else []
    return kind.__name__ if own else _name(kind), [("bases", libraries), *values, *parts]


def _is_member(kind: type, name: str, value: object) -> bool:
    """Return True for what a class defines, and False for what Python adds to it."""
    function = getattr(value, "__func__", getattr(value, "fget", value))
    if isinstance(function, types.FunctionType):  # those that a dataclass generates follow from its fields
        is_generated = name in _GENERATED and function.__code__.co_filename == "<string>"
        return not (
            is_generated or name.startswith("__annotate") or (name[0] == "_" and package_of(function) in LIBRARIES)
        )
    if isinstance(value, functools.partialmethod):
        return True
    is_enum = isinstance(kind, enum.EnumMeta) and (name in kind.__members__ or name.startswith("_"))
    return not (is_enum or name.startswith("__") or name == "_abc_impl")


_GENERATED = {"__init__", "__repr__", "__eq__", "__hash__", "__lt__", "__le__", "__gt__", "__ge__", "__replace__"}


def is_own(module: str | None) -> bool:
    """Return True for modules of the user's own: no package manager installed them."""
    # in another process, __main__ is the script that started it
    return module == "__main__" or not _is_installed(
        module or "", getattr(sys.modules.get(module or ""), "__file__", "")
    )


def _is_installed(module: str, file: str | None) -> bool:
    folders = pathlib.PurePath(file or "").parts
    return module.split(".", maxsplit=1)[0] in LIBRARIES or bool({"site-packages", "dist-packages"} & {*folders})


def cell_content(cell: types.CellType) -> Any:
    """Return what a variable that a function closes over has as its value."""
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return MISSING


LARGE = "bytes:"
_LARGE_BYTES = 8 << 30  # half a minute at least


def file_digest(path: str) -> str:
    """Return the digest of a file's content, for a large one its size after `LARGE`.

    It is empty if there is no such file, or nothing in it, as in one that is there as a sign.
    """
    try:
        size = os.path.getsize(path) if os.path.isfile(path) else 0  # noqa: PTH113, PTH202 - texts are many
        if not 0 < size < _LARGE_BYTES:
            return f"{LARGE}{size}" if size else ""
        with open(path, "rb") as stream:  # noqa: PTH123
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (OSError, ValueError):
        return ""


def package_of(value: Any) -> str:
    """Return the package that a class or a function comes from; for a wrapper, that of the wrapper."""
    name = value.__globals__.get("__name__") if isinstance(value, types.FunctionType) else value.__module__
    return (name or "").split(".")[0]


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


_READERS: tuple[tuple[Any, Callable[[Any, Reading], Parts]], ...] = (
    (PLAIN, lambda value, _: (repr(value), [])),
    (str | pathlib.PurePath, _path),
    (tuple, lambda value, _: ("", _indexed(value))),
    (list, _list),
    (set | frozenset, _set),
    (Mapping, _mapping),
    (weakref.WeakKeyDictionary | weakref.WeakValueDictionary, lambda _, __: ("", [])),
    (np.random.Generator | np.random.RandomState | random.Random | torch.Generator, _generator),
    (np.ndarray | np.generic, _array),
    (torch.Tensor, _tensor),
    (torch.utils.hooks.RemovableHandle, lambda _, __: ("", [])),  # numbered by a process's hooks
    (types.ModuleType, _module_members),
    (functools.partial, lambda p, _: ("", [("func", p.func), ("args", p.args), ("keywords", p.keywords)])),
    (property, lambda value, _: ("", [("fget", value.fget)])),
    (functools.cached_property, lambda value, _: ("", [("func", value.func)])),
    (types.CodeType, lambda value, _: ("", _indexed(bytecode(value)))),
    (types.FunctionType, _function),
    (type, _class),
    (nn.Module, _module),
    (OnnxSession, lambda session, _: (session.digest, [])),
    (torch.jit.ScriptModule | torch.jit.ScriptFunction, _script),
)
for _kinds, _reader in _READERS:
    parts_of.register(_kinds, _reader)
