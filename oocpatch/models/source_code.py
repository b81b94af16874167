"""The code of functions: sources without comments and layout, and the names that they read and write."""

from __future__ import annotations

import ast
import dis
import functools
import linecache
import types
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_MUTATORS = frozenset({
    *("append", "appendleft", "extend", "insert", "add", "update", "setdefault", "sort"),
    *("pop", "popleft", "popitem", "remove", "discard", "clear"),
})  # fmt: skip


class CodeUsage(NamedTuple):
    """The source of a function, and the names that it uses."""

    source: str  # without comments, documentation and annotations; empty: not at hand, or not that of the code
    names: frozenset[str]  # every global and attribute
    globals: frozenset[str]  # globals that are read
    written: frozenset[str]  # globals and variables that are assigned or, where there is a source, changed in place
    written_attributes: frozenset[str]  # attributes, likewise


@functools.lru_cache(1024)
def code_usage(code: types.CodeType, *, sources: bool = True) -> CodeUsage:
    """Return the usage of a function's code, and of the functions in it.

    >>> sorted(code_usage((lambda key, value: cache.update({key: abs(value)})).__code__).globals)
    ['abs', 'cache']
    """
    steps = [(step.opname, step.argval) for part in _nested(code) for step in dis.get_instructions(part)]
    node = _definition(code) if sources else None
    changed = [] if node is None else list(_changed_in_place(node))
    variables = [target.id for target in changed if isinstance(target, ast.Name)]
    attributes = [target.attr for target in changed if isinstance(target, ast.Attribute)]
    return CodeUsage(
        source="" if node is None else ast.unparse(node),
        names=frozenset(name for part in _nested(code) for name in part.co_names),
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


def _definition(code: types.CodeType) -> ast.AST | None:
    """Return the definition of a function; None: its file no longer compiles to the code that runs."""
    functions, compiled = _parsed("".join(linecache.getlines(code.co_filename)))
    nodes = functions.get((code.co_name, code.co_firstlineno), []) if code in compiled else []
    if len(nodes) > 1:  # lambdas of one line: what a lambda returns is computed by its whole body
        bodies = [(n.body.lineno, n.body.end_lineno, n.body.col_offset, n.body.end_col_offset) for n in nodes]
        nodes = [node for node, body in zip(nodes, bodies, strict=True) if body in set(code.co_positions())]
    return nodes[0] if len(nodes) == 1 else None


@functools.lru_cache(64)
def _parsed(text: str) -> tuple[dict[tuple[str, int], list[Any]], frozenset[types.CodeType]]:
    """Return the functions of a file by name and first line, without documentation and annotations, and their code."""
    functions: dict[tuple[str, int], list[Any]] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree, code = ast.parse(text), compile(text, "", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):  # not Python: a template, a cell of a notebook with magic
        return functions, frozenset()
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            node.body = node.body[ast.get_docstring(node) is not None :] or [ast.Pass()]
        if isinstance(node, _FUNCTIONS):
            if not isinstance(node, ast.Lambda):
                node.returns = None
            line = min(part.lineno for part in (node, *getattr(node, "decorator_list", ())))
            functions.setdefault((getattr(node, "name", "<lambda>"), line), []).append(node)
    return functions, frozenset(_nested(code))


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
