"""What makes two models the same: a digest that is equal in every process that loads them.

Outputs of two models must never be mixed in one result, so the digest reads everything that a model computes with:
code, parameters, constants, configuration. It must also not change by itself, or no run could be resumed, so it reads
no memory address, no path of a source file, and nothing that the model writes while it computes (a counter, a log).
"""

from __future__ import annotations

import dataclasses
import dis
import enum
import functools
import hashlib
import pathlib
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import google_crc32c
import numpy as np
import torch
from torch import nn

from oocpatch.models.input_spec import ModelFile
from oocpatch.models.onnx import OnnxSession
from oocpatch.models.wrappers import Function

# Classes and functions of these are named, not read: their versions are recorded with the run.
_NOT_READ = frozenset({"torch", "numpy", "builtins"}) | sys.stdlib_module_names
_MUTATORS = frozenset({
    *("append", "appendleft", "extend", "insert", "add", "update", "setdefault", "sort"),
    *("pop", "popleft", "popitem", "remove", "discard", "clear"),
})  # fmt: skip
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
# TorchScript numbers the classes of a process in the order in which they were loaded.
_MANGLED = re.compile(r"___torch_mangle_\d+\.?")
_MODULE_STATE = frozenset(vars(nn.Module()))
_PLAIN: Any = bool | int | float | complex | str | bytes | types.NoneType | types.EllipsisType | range
_NAMED: Any = torch.dtype | torch.device | torch.layout | torch.memory_format | pathlib.PurePath | bytearray
_CONTAINERS: Any = list | dict | set | bytearray
# Kinds that compare by what they hold; every other object is read once, and then referred to.
_VALUES: Any = (
    _PLAIN | _NAMED | _CONTAINERS | tuple | frozenset | slice | Mapping | torch.Tensor | np.ndarray | np.generic
)


def model_fingerprint(model: Callable[..., Any]) -> str:
    """Digest that says whether two models are the same, stable across processes and places.

    For a module, it reads the classes and code of all submodules, the `repr`, plain attributes, parameters and buffers;
    for TorchScript and exported programs, code, constants and state; for functions, code, defaults, closure and, of the
    globals they use, plain values, tensors and what can be called; for callable objects, the class's code and the
    attributes. What the code itself assigns during a call is state and not read; nor are lists, dicts and sets where
    the code changes any in place.

    >>> model_fingerprint(nn.ReLU()) == model_fingerprint(nn.ReLU())
    True
    >>> model_fingerprint(nn.Softplus(1.0)) == model_fingerprint(nn.Softplus(2.0))
    False
    """
    return _digest_of(model)


def _digest_of(value: object) -> str:
    digest = _Digest()
    digest.feed(value)
    return digest.hexdigest()


class _Digest:
    """A hash over values of many kinds, each fed with its kind and length, so that no two sequences collide."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        # The objects are kept alive: a freed one's id would be given to another.
        self._seen: dict[int, tuple[int, object]] = {}

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def feed(self, value: object) -> None:
        """Feed any value; what cannot be read is fed as its type's name."""
        if isinstance(value, _VALUES):
            self._read(value)
        elif id(value) in self._seen:
            self._token("again", str(self._seen[id(value)][0]))
        else:
            self._see(value)
            self._read(value)

    def _see(self, value: object) -> None:
        self._seen.setdefault(id(value), (len(self._seen), value))

    def _token(self, kind: str, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        self._hash.update(f"{kind}:{len(data)}:".encode() + data)

    def _items(self, kind: str, values: Iterable[object]) -> None:
        values = list(values)
        self._token(kind, str(len(values)))
        for value in values:
            self.feed(value)

    # One reader per kind of value. Most specific class wins.

    @functools.singledispatchmethod
    def _read(self, value: object) -> None:
        """An object of no kind below."""
        compiled = getattr(value, "_torchdynamo_orig_callable", None)
        if compiled is not None:
            self._items("compiled", (compiled,))
        elif _is_read(type(value)) and (callable(value) or dataclasses.is_dataclass(value)):
            self.feed(type(value))
            self._attributes(value)
        elif callable(value) and hasattr(value, "__wrapped__"):
            self._items(_name(type(value)), (value.__wrapped__,))
        else:
            self._token("object", _name(value if hasattr(value, "__qualname__") else type(value)))

    @_read.register(_PLAIN)
    def _(self, value: object) -> None:
        self._token(type(value).__name__, _ADDRESS.sub("", repr(value)))

    @_read.register(_NAMED)
    def _(self, value: object) -> None:
        self._token(type(value).__name__, str(value))

    @_read.register(tuple | list)
    def _(self, value: Iterable[object]) -> None:
        self._items(type(value).__name__, value)

    @_read.register(set | frozenset)
    def _(self, value: Iterable[object]) -> None:
        # The order of a set of strings differs from process to process.
        self._items(type(value).__name__, sorted(_digest_of(item) for item in value))

    @_read.register
    def _(self, value: Mapping) -> None:  # type: ignore[type-arg]  # dispatch takes the bare class
        self._items(type(value).__name__, [part for item in value.items() for part in item])

    @_read.register
    def _(self, value: slice) -> None:
        self._items("slice", (value.start, value.stop, value.step))

    @_read.register
    def _(self, value: enum.Enum) -> None:
        self._token("enum", f"{_name(type(value))}.{value.name}")

    @_read.register
    def _(self, value: types.ModuleType) -> None:
        self._token("import", value.__name__)

    @_read.register
    def _(self, value: types.MethodType) -> None:
        self._items("method", (value.__func__, value.__self__))

    @_read.register
    def _(self, value: functools.partial) -> None:  # type: ignore[type-arg]  # dispatch takes the bare class
        self._items("partial", (value.func, value.args, value.keywords))

    @_read.register(staticmethod | classmethod)
    def _(self, value: object) -> None:
        self._items(type(value).__name__, (getattr(value, "__func__", None),))

    @_read.register
    def _(self, value: property) -> None:
        self._items("property", (value.fget,))

    @_read.register
    def _(self, value: torch.Tensor) -> None:
        if nn.parameter.is_lazy(value):
            self._token("tensor", "not initialized")
            return
        self._token("tensor", f"{value.dtype} {tuple(value.shape)} {value.layout}")
        tensor = value.detach()
        if tensor.is_sparse:
            tensor = tensor.coalesce()
            self._items("sparse", (tensor.indices(), tensor.values()))
        elif tensor.layout is not torch.strided:
            self.feed(tensor.to_sparse(layout=torch.sparse_coo))
        elif tensor.is_quantized:
            self._items("quantized", (str(tensor.qscheme()), tensor.int_repr(), tensor.dequantize()))
        elif not tensor.is_meta:
            plain = tensor.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
            self._checksum(plain.view(torch.uint8).numpy())

    @_read.register(np.ndarray | np.generic)
    def _(self, value: object) -> None:
        array = np.asarray(value)
        self._token("array", f"{array.dtype.str} {array.shape}")
        if array.dtype.hasobject:
            self.feed(array.tolist())
        else:
            self._checksum(np.ascontiguousarray(array).reshape(-1).view(np.uint8))

    def _checksum(self, data: np.ndarray[Any, Any]) -> None:
        data = data.view()
        data.flags.writeable = False  # google_crc32c takes only what cannot change under it
        self._token("crc32c", f"{google_crc32c.value(data):08x}")

    @_read.register
    def _(self, value: type) -> None:
        """The name, and the code of the class and its bases as far as they are the user's."""
        self._token("class", _name(value))
        for base in filter(_is_read, value.__mro__):
            self._token("base", _name(base))
            for name, member in sorted(vars(base).items()):
                code = isinstance(member, (types.FunctionType, staticmethod, classmethod, property))
                setting = isinstance(member, _PLAIN | tuple | frozenset) and not name.startswith("__")
                if code or setting:
                    self._items("member", (name, member))

    @_read.register
    def _(self, value: types.FunctionType) -> None:
        self._token("function", _name(value))
        if not _is_read(value):
            return
        code = value.__code__
        usage = _Usage.of(code)
        documented = value.__doc__ is not None and code.co_consts[:1] == (value.__doc__,)
        self._code(code, code.co_consts[1:] if documented else code.co_consts)
        self._items("defaults", (value.__defaults__, value.__kwdefaults__))
        for name, cell in zip(code.co_freevars, value.__closure__ or (), strict=True):
            content = _content(cell)
            if name != "__class__" and not usage.is_state(name, content):  # super() closes over __class__
                self._items("closure", (name, content))
        for name in sorted(usage.globals & value.__globals__.keys()):
            content = value.__globals__[name]
            if isinstance(content, (type, types.FunctionType)) and _package(content) != _package(value):
                self._token("global", f"{name}={_name(content)}")
            elif isinstance(content, _VALUES) or callable(content):
                if not usage.is_state(name, content):
                    self._items("global", (name, content))
            else:
                # What a script was told, where it logs, what it waits for: records and handles, not computation.
                self._token("global", f"{name}: {_name(type(content))}")

    @_read.register
    def _(self, value: types.CodeType) -> None:
        self._code(value, value.co_consts)

    def _code(self, code: types.CodeType, constants: tuple[object, ...]) -> None:
        """What the code does: neither where it was written nor how it is described."""
        names = (code.co_names, code.co_freevars, code.co_cellvars)
        self._items("code", (code.co_code, code.co_exceptiontable, code.co_argcount, code.co_flags, names, constants))

    def _attributes(self, value: object, skip: frozenset[str] = frozenset()) -> None:
        usage = _Usage.of_class(type(value))
        attributes = dict(getattr(value, "__dict__", {}))
        for base in type(value).__mro__:
            slots = base.__dict__.get("__slots__", ())
            names = (slots,) if isinstance(slots, str) else slots
            attributes.update({name: getattr(value, name) for name in names if hasattr(value, name)})
        for name, attribute in sorted(attributes.items()):
            if name not in skip and not usage.is_state(name, attribute):
                self._items("attribute", (name, attribute))

    @_read.register
    def _(self, value: nn.Module) -> None:
        """A tree of submodules: what each is, then the state of all."""
        self._token("repr", _ADDRESS.sub("", repr(value)))
        for name, submodule in value.named_modules(remove_duplicate=False):
            self._token("module", name)
            self._see(submodule)
            if isinstance(submodule, ModelFile | OnnxSession | Function):
                self.feed(submodule.described)  # ours: its own code is no part of the model
            elif isinstance(submodule, torch.jit.ScriptModule):
                self._script(submodule)
            elif isinstance(submodule, torch.fx.GraphModule):
                # Its other attributes are the compiler's notes: places in sources, symbols, empty hooks.
                self._token("graph", submodule.code)
                tensors = {key: item for key, item in vars(submodule).items() if isinstance(item, torch.Tensor)}
                self.feed(tensors)
            else:
                self.feed(type(submodule))
                self._attributes(submodule, skip=_MODULE_STATE)
                for hooks in ("_forward_pre_hooks", "_forward_hooks"):
                    self._items(hooks, getattr(submodule, hooks).values())
        state: dict[str, object] = dict(value.state_dict())
        for name, buffer in value.named_buffers(remove_duplicate=False):
            state.setdefault(name, buffer)  # state_dict leaves out what is not persistent
        self.feed(state)

    def _script(self, module: torch.jit.ScriptModule) -> None:
        """Code, constants (the weights, where frozen) and the attributes that the code reads."""
        self._token("script", str(getattr(module, "original_name", "")))
        native = module._c  # noqa: SLF001  # nothing public lists the methods
        for name in sorted(native._method_names()):  # noqa: SLF001
            text, constants = native._get_method(name).code_with_constants  # noqa: SLF001
            code = _MANGLED.sub("", text)
            self._items("code", (code, constants))
            for read in sorted(set(re.findall(r"\.([A-Za-z_]\w*)", code))):
                attribute = getattr(module, read, None)
                if attribute is not None and isinstance(attribute, _VALUES):
                    self._items("attribute", (read, attribute))

    @_read.register(torch.jit.ScriptFunction)
    def _(self, value: Any) -> None:  # its class does not say what it has
        self._token("code", _MANGLED.sub("", value.code))
        graph = value.inlined_graph  # held: its nodes do not keep it alive
        constants = graph.findAllNodes("prim::Constant")
        tensors = [node.t("value") for node in constants if node.hasAttribute("value") and node.kindOf("value") == "t"]
        self._items("constants", tensors)


@dataclasses.dataclass(frozen=True, slots=True)
class _Usage:
    """What code reads and writes, by name."""

    named: frozenset[str] = frozenset()
    """Every global and attribute."""
    globals: frozenset[str] = frozenset()
    written: frozenset[str] = frozenset()
    """Globals, closure variables and attributes that are assigned."""
    mutates: bool = False
    """Whether any container is changed in place."""

    @classmethod
    def of(cls, code: types.CodeType) -> _Usage:
        """Usage of a code object and of those nested in it."""
        read, written = set(), set()
        mutates = not _MUTATORS.isdisjoint(code.co_names)
        for instruction in dis.get_instructions(code):
            operation, name = instruction.opname, instruction.argval
            if operation in {"LOAD_GLOBAL", "LOAD_NAME"}:
                read.add(name)
            elif operation in {"STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR"}:
                written.add(name)
            elif operation in {"STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"}:
                mutates = True
        usage = cls(frozenset(code.co_names), frozenset(read), frozenset(written), mutates)
        return cls._union([usage, *(cls.of(item) for item in code.co_consts if isinstance(item, types.CodeType))])

    @classmethod
    def of_class(cls, owner: type) -> _Usage:
        """Usage of what a call of an object can run: `forward`, `__call__` and the methods they name."""
        codes: dict[str, list[types.CodeType]] = {}
        for base in filter(_is_read, owner.__mro__):
            for name, member in vars(base).items():
                if isinstance(member, types.FunctionType):
                    codes.setdefault(name, []).append(member.__code__)
        reached, waiting = list[_Usage](), ["forward", "__call__"]
        while waiting:
            for code in codes.pop(waiting.pop(), ()):
                reached.append(cls.of(code))
                waiting.extend(reached[-1].named)
        return cls._union(reached)

    @classmethod
    def _union(cls, parts: list[_Usage]) -> _Usage:
        return cls(
            frozenset().union(*(part.named for part in parts)),
            frozenset().union(*(part.globals for part in parts)),
            frozenset().union(*(part.written for part in parts)),
            any(part.mutates for part in parts),
        )

    def is_state(self, name: str, value: object) -> bool:
        """Whether this code changes the value while it runs, so that it says nothing about the model."""
        return name in self.written or (self.mutates and isinstance(value, _CONTAINERS))


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None


def _is_read(value: Any) -> bool:  # a class or a function
    """Whether the code of a class or function is the user's, and so part of the model."""
    return _package(value) not in _NOT_READ


def _package(value: Any) -> str:  # a class or a function
    return (getattr(value, "__module__", None) or "").partition(".")[0]


def _name(value: Any) -> str:  # a class or a function
    return f"{getattr(value, '__module__', None)}.{value.__qualname__}"
