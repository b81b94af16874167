"""The code of functions and classes: sources without comments and layout, and the names that they read and write."""

from __future__ import annotations
import __future__

import ast
import contextlib
import dis
import functools
import itertools
import linecache
import pathlib
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Parts = tuple[str, list[tuple[str, object]]]
"""A token that tells one value from another, and the values that it is made of, by name."""

# Classes and functions of these are named, not read: their versions are recorded with the run.
LIBRARIES = frozenset({"torch", "numpy", "builtins", "oocpatch"}) | sys.stdlib_module_names
_GENERATED = {"__init__", "__repr__", "__eq__", "__hash__", "__lt__", "__le__", "__gt__", "__ge__", "__replace__"}
_MUTATORS = frozenset({
    *("append", "appendleft", "extend", "insert", "add", "update", "setdefault", "sort"),
    *("pop", "popleft", "popitem", "remove", "discard", "clear"),
})  # fmt: skip
_FUTURES = functools.reduce(
    lambda flags, name: flags | getattr(__future__, name).compiler_flag, __future__.all_feature_names, 0
)


def function_parts(function: types.FunctionType, *, sources: bool) -> Parts:
    """Return what a function computes with: code, defaults, closure, and the globals that it uses.

    >>> function_parts(pathlib.PurePath.joinpath, sources=True)  # the standard library's: named only
    ('pathlib.PurePath.joinpath', [('__wrapped__', None)])
    """
    if package(function) in LIBRARIES:
        wrapped = getattr(function, "__wrapped__", None)
        cells = () if wrapped is not None else function.__closure__ or ()
        return qualified_name(function), [("__wrapped__", wrapped), *(("cell", cell.cell_contents) for cell in cells)]
    code = function.__code__
    usage = code_usage(code, sources=sources)
    parts: list[tuple[str, object]] = [
        ("code", usage.source or bytecode(code, function.__doc__)),
        ("defaults", function.__defaults__),
        ("kwdefaults", function.__kwdefaults__),
        *sorted(vars(function).items()),
    ]
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        if name != "__class__" and name not in usage.written:  # super() closes over __class__
            with contextlib.suppress(ValueError):  # a name that is not bound yet
                parts.append((name, cell.cell_contents))
    for name in sorted((usage.globals & function.__globals__.keys()) - usage.written):
        members = usage.names - usage.written_attributes
        parts += _global(name, function.__globals__[name], members, package(function))
    return "", parts


def _global(name: str, value: Any, used: frozenset[str], reader: str) -> list[tuple[str, object]]:
    """Return a global of a function; for a module of the user's, those of its members that the function names."""
    if isinstance(value, types.ModuleType):
        members = sorted(used & vars(value).keys()) if _is_own(value.__name__) else []
        parts = [_global(f"{name}.{member}", vars(value)[member], used - {member}, reader) for member in members]
        return [(name, value.__name__), *itertools.chain(*parts)]
    is_foreign = isinstance(value, type | types.FunctionType) and package(value) != reader
    return [(name, qualified_name(value) if is_foreign and not _is_own(value.__module__) else value)]


def class_parts(kind: type, *, sources: bool) -> Parts:
    """Return the members of a class and of its bases, as far as they are the user's; else its name.

    >>> class_parts(list, sources=True)
    ('builtins.list', [('bases', ['builtins.list', 'builtins.object'])])
    """
    bases = [base for base in kind.__mro__ if package(base) not in LIBRARIES]
    named: list[object] = [qualified_name(base) for base in kind.__mro__ if base not in bases]
    members = [
        (f"{base.__name__}.{name}", value)
        for base in bases
        for name, value in sorted(vars(base).items())
        if _is_member(name, value, sources=sources)
    ]
    return kind.__name__ if bases else qualified_name(kind), [("bases", named), *members]


def _is_member(name: str, value: object, *, sources: bool) -> bool:
    if isinstance(value, types.FunctionType):  # those that a dataclass generates have no source
        return name not in _GENERATED or bool(code_usage(value.__code__, sources=sources).source)
    if isinstance(value, staticmethod | classmethod | property):
        return True
    is_slot = isinstance(value, types.MemberDescriptorType | types.GetSetDescriptorType)
    return not is_slot and not name.startswith("__") and name != "_abc_impl"


def written_by_calls(kind: type, *, sources: bool) -> set[str]:
    """Return the attributes that calls of an object write: in `forward`, `__call__`, and the methods that they name."""
    methods: dict[str, list[types.FunctionType]] = {}
    for base in (base for base in kind.__mro__ if package(base) not in LIBRARIES):
        for name, member in vars(base).items():
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if isinstance(function, types.FunctionType):
                methods.setdefault(name, []).append(function)
    names, written = ["forward", "__call__"], set[str]()
    while names:
        for function in methods.pop(names.pop(), ()):
            usage = code_usage(function.__code__, sources=sources)
            written |= usage.written_attributes
            names.extend(usage.names)
    return written


def _is_own(module: str | None) -> bool:
    """Return True for modules of the user's own: no package manager installed them."""
    if module == "__main__":  # of another process, this is the script that started it
        return True
    file = pathlib.PurePath(getattr(sys.modules.get(module or ""), "__file__", None) or "")
    return (module or "").split(".")[0] not in LIBRARIES and not {"site-packages", "dist-packages"} & set(file.parts)


def package(value: Any) -> str:  # a class or a function
    """Return the package that a class or a function comes from; for a wrapper, that of the wrapper."""
    name = value.__globals__.get("__name__") if isinstance(value, types.FunctionType) else value.__module__
    return (name or "").split(".")[0]


def qualified_name(value: Any) -> str:  # a class or a function
    """Return the name of a class or function with its module."""
    return f"{value.__module__}.{value.__qualname__}"


@dataclass(frozen=True, slots=True)
class CodeUsage:
    """The source of a function, and the names that it uses.

    Attributes:
        source: without comments, documentation and annotations; empty: not at hand, or not that of the code that runs.
        names: every global and attribute.
        globals: globals that are read.
        written: globals and closure variables that are assigned, or, where there is a source, whose contents are
            changed.
        written_attributes: attributes, likewise.
    """

    source: str
    names: frozenset[str]
    globals: frozenset[str]
    written: frozenset[str]
    written_attributes: frozenset[str]


@functools.lru_cache(1024)
def code_usage(code: types.CodeType, *, sources: bool = True) -> CodeUsage:
    """Return the usage of a function's code, and of the functions in it.

    >>> usage = code_usage((lambda key, value: cache.update({key: abs(value)})).__code__)
    >>> usage.source, sorted(usage.globals), sorted(usage.written)
    ('lambda key, value: cache.update({key: abs(value)})', ['abs', 'cache'], ['cache'])
    """
    parts = list(_nested(code))
    steps = [(step.opname, step.argval) for part in parts for step in dis.get_instructions(part)]
    node, is_current = _definition(code) if sources else (None, False)
    changed = [] if node is None else list(_changed_in_place(node))
    variables = [target.id for target in changed if isinstance(target, ast.Name)]
    attributes = [target.attr for target in changed if isinstance(target, ast.Attribute)]
    return CodeUsage(
        source=ast.unparse(node) if node is not None and is_current else "",
        names=frozenset(name for part in parts for name in part.co_names),
        globals=frozenset(name for step, name in steps if step in {"LOAD_GLOBAL", "LOAD_NAME"}),
        written=frozenset([name for step, name in steps if step in {"STORE_GLOBAL", "STORE_DEREF"}] + variables),
        written_attributes=frozenset([name for step, name in steps if step == "STORE_ATTR"] + attributes),
    )


def bytecode(code: types.CodeType, documentation: str | None = None) -> tuple[object, ...]:
    """Return what code does, neither where it was written nor how it is described."""
    names = (code.co_names, code.co_freevars, code.co_cellvars)
    constants = [value for value in code.co_consts if documentation is None or value != documentation]
    return code.co_code, code.co_exceptiontable, code.co_argcount, code.co_flags, names, constants


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def _definition(code: types.CodeType) -> tuple[ast.AST | None, bool]:
    """Return the definition of a function, and whether its file still compiles to the code that runs."""
    functions, compiled = _parsed("".join(linecache.getlines(code.co_filename)), code.co_flags & _FUTURES)
    nodes = [n for n in functions if _first_line(n) == (code.co_name, code.co_firstlineno)]
    if len(nodes) > 1:  # lambdas of one line: what a lambda returns is computed by its whole body
        spans = set(code.co_positions())
        nodes = [
            n for n in nodes if (n.body.lineno, n.body.end_lineno, n.body.col_offset, n.body.end_col_offset) in spans
        ]
    return (nodes[0], code in compiled) if len(nodes) == 1 else (None, False)


def _first_line(node: Any) -> tuple[str, int]:
    lines = [part.lineno for part in (node, *getattr(node, "decorator_list", ()))]
    return getattr(node, "name", "<lambda>"), min(lines)


@functools.lru_cache(64)
def _parsed(text: str, flags: int) -> tuple[list[Any], frozenset[types.CodeType]]:
    """Return the functions of a file, without documentation and annotations, and the code of all of them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
            compiled = frozenset(_nested(compile(text, "", "exec", flags=flags, dont_inherit=True)))
    except (SyntaxError, ValueError):  # not Python: a template, a cell of a notebook with magic
        return [], frozenset()
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            node.body = node.body[ast.get_docstring(node) is not None :] or [ast.Pass()]
            if not isinstance(node, ast.ClassDef):
                node.returns = None
    return [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    ], compiled


def _changed_in_place(function: ast.AST) -> Iterator[ast.expr]:
    """Yield the variables and attributes whose contents a function changes."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _MUTATORS:
            target = node.func.value
        elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            target = node.value
        else:
            continue
        while isinstance(target, ast.Subscript):
            target = target.value
        yield target
