"""The code of functions: sources without comments and layout, and what they read and write."""

from __future__ import annotations

import ast
import dis
import functools
import linecache
import types
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

Chain = tuple[str, ...]
"""A name, and the attributes and constant indices that lead from it to a value: `("self", "stats", "['calls']")`."""

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_NOT_RUN = frozenset({"annotation", "returns", "type_comment", "type_params", "kind", "ctx"})
_MUTATORS = frozenset({
    *("append", "appendleft", "extend", "insert", "add", "update", "setdefault", "sort", "move_to_end"),
    *("pop", "popleft", "popitem", "remove", "discard", "clear", "__setitem__"),
})  # fmt: skip
_OVERWRITERS = frozenset({"copy_", "zero_", "fill_", "normal_", "uniform_", "copyto"})
_FILE_WRITERS = frozenset({
    *("save", "savez", "savez_compressed", "savetxt", "imwrite", "imsave", "tofile"),
    *("write_text", "write_bytes", "touch", "unlink", "mkdir", "to_csv", "FileHandler"),
})  # fmt: skip
# The source of a function that is still in memory, also when its file has changed since.
_DEFINITIONS: dict[types.CodeType, ast.AST] = {}


class CodeUsage(NamedTuple):
    """The source of a function and of those in it, and what they use."""

    source: str  # without comments, documentation and annotations; empty: not at hand, or not that of the code
    names: frozenset[str]  # globals, attributes, and texts that may be the name of one
    globals: frozenset[str]  # globals that are read
    variables: frozenset[str]  # names of their own
    imports: frozenset[str]  # modules, with a point before relative ones
    texts: frozenset[str]
    calls: frozenset[Chain]  # attributes that are read, and so may be called
    writes: frozenset[Chain]  # what is assigned
    fills: frozenset[Chain]  # what changes in place if it is a container
    outputs: frozenset[Chain]  # names of files that are written, or texts with quotes around


def code_usage(code: types.CodeType, *, sources: bool = True) -> CodeUsage:
    """Return the usage of a function's code, and of the functions in it.

    >>> sorted(code_usage((lambda key, value: cache.update({key: abs(value)})).__code__).globals)
    ['abs', 'cache']
    """
    if not sources:
        return _usage(code, None)
    if code not in _DEFINITIONS:
        linecache.checkcache(code.co_filename)
        node = _definition(code, "".join(linecache.getlines(code.co_filename)))
        if node is None:
            return _usage(code, None)
        _DEFINITIONS[code] = node
    return _usage(code, _DEFINITIONS[code])


@functools.lru_cache(1024)
def _usage(code: types.CodeType, node: ast.AST | None) -> CodeUsage:
    parts = list(_nested(code))
    steps = [(step.opname, step.argval) for part in parts for step in dis.get_instructions(part)]
    texts = frozenset(text for part in parts for text in _texts(part.co_consts))
    names = frozenset(name for part in parts for name in part.co_names)
    closed_over = {("STORE_DEREF", name) for name in code.co_freevars}
    variables = frozenset(name for part in parts for name in (*part.co_varnames, *part.co_cellvars))
    assigned = {name for step, name in steps if step == "STORE_GLOBAL" or (step, name) in closed_over}
    writes: set[Chain] = {(name,) for name in assigned}
    calls, fills, outputs = set[Chain](), set[Chain](), set[Chain]()
    if node is None:  # which object has the attribute is not known: it may be the first argument
        writes |= {(*code.co_varnames[:1], name) for step, name in steps if step == "STORE_ATTR"}
        calls |= {(*code.co_varnames[:1], name) for name in names}
    nodes = [] if node is None else list(_run_nodes(node))
    for part in nodes:
        if isinstance(part, ast.Attribute | ast.Subscript) and not isinstance(part.ctx, ast.Load):
            writes |= _chains(part)
        elif isinstance(part, ast.Attribute):
            calls |= _chains(part)
        elif isinstance(part, ast.Call):
            _add_call(part, writes, fills, outputs)
    aliases = dict(alias for part in nodes for alias in _aliases(part))
    calls, writes, fills = ({_unaliased(c, aliases) for c in chains} for chains in (calls, writes, fills))
    return CodeUsage(
        source="" if node is None else canonical(node),
        names=names | {text for text in texts if text.isidentifier()},
        globals=frozenset(name for step, name in steps if step in {"LOAD_GLOBAL", "LOAD_NAME"}),
        variables=variables - {name for step, name in steps if step == "STORE_GLOBAL"},
        imports=frozenset(name for part in parts for name in _imports(part))
        | {text for text in texts if "import_module" in names and text.replace(".", "").isidentifier()},
        texts=texts,
        calls=frozenset(calls),
        writes=frozenset(writes),
        fills=frozenset(fills),
        outputs=frozenset(outputs),
    )


def _aliases(node: ast.AST) -> Iterator[tuple[str, Chain]]:
    """Yield the name of a variable and the chain that it stands for."""
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and (chain := _chain(node.value)):
        yield node.targets[0].id, chain
    elif isinstance(node, ast.For) and isinstance(node.target, ast.Name) and (chain := _chain(node.iter)):
        yield node.target.id, (*chain, "[*]")


def _unaliased(chain: Chain, aliases: dict[str, Chain]) -> Chain:
    for _ in aliases:
        if len(chain) < 2 or chain[0] not in aliases:
            break
        chain = (*aliases[chain[0]], *chain[1:])
    return chain


def _add_call(call: ast.Call, writes: set[Chain], fills: set[Chain], outputs: set[Chain]) -> None:
    """Add what a call changes: an attribute, a container, a file."""
    function, files = call.func, list[ast.expr]()
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    texts = [part.value for part in arguments if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    for keyword in call.keywords:
        writes |= _chains(keyword.value) if keyword.arg == "out" else set()
    if isinstance(function, ast.Attribute) and name in _MUTATORS:
        fills |= {(*chain, "[*]") for chain in _chains(function.value)}
    elif name == "next" or name in _OVERWRITERS:
        writes |= _chains(function.value if isinstance(function, ast.Attribute) and name[-1] == "_" else call.args[0])
    elif name == "setattr" and texts:
        writes |= {(*chain, texts[0]) for chain in _chains(call.args[0])}
    elif name in _FILE_WRITERS or (name == "open" and any(len(text) <= 3 and {*text} & {*"wax+"} for text in texts)):
        files = [*arguments, *([function.value] if isinstance(function, ast.Attribute) else [])]
    for file in files:
        outputs |= _chains(file) | {
            (repr(text),) for part in ast.walk(file) for text in _texts([getattr(part, "value", 0)])
        }


def _chains(node: ast.expr) -> set[Chain]:
    """Return the chain that leads to an expression, or to an unknown item of a container; empty: none does."""
    items: Chain = ()
    while not (chain := _chain(node)) and isinstance(node, ast.Subscript):
        node, items = node.value, ("[*]",)
    return {(*chain, *items)} if chain else set()


def _chain(node: ast.expr) -> Chain:
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == "type" and len(node.args) == 1:
            return (*chain, "__class__") if (chain := _chain(node.args[0])) else ()
        return ("super()",) if node.func.id == "super" else ()
    if isinstance(node, ast.Attribute):
        return (*chain, node.attr) if (chain := _chain(node.value)) else ()
    if isinstance(node, ast.Subscript) and (isinstance(node.slice, ast.Constant) or ast.unparse(node.slice) == ":"):
        return (*chain, f"[{getattr(node.slice, 'value', ...)!r}]") if (chain := _chain(node.value)) else ()
    return ()


def _run_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node and those in it, without what runs in training mode only."""
    yield node
    for child in ast.iter_child_nodes(node):
        is_training = isinstance(node, ast.If) and isinstance(node.test, ast.Attribute) and node.test.attr == "training"
        if not is_training or child not in node.body:  # type: ignore[attr-defined]
            yield from _run_nodes(child)


def canonical(node: Any) -> str:
    """Return a text that is the same for the same code, in whatever version of Python it was parsed.

    >>> canonical(ast.parse("a = 1")) == canonical(ast.parse("a  =  1  # one"))
    True
    """
    if isinstance(node, list):
        return f"[{','.join(map(canonical, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
        fields["body"] = node.body[1:]
    texts = [f"{name}={canonical(v)}" for name, v in fields.items() if name not in _NOT_RUN and v not in (None, [])]
    return f"{type(node).__name__}({','.join(texts)})"


def bytecode(code: types.CodeType, documentation: str | None = None) -> tuple[object, ...]:
    """Return what code does, neither where it was written nor how it is described."""
    names = (code.co_names, code.co_freevars, code.co_cellvars)
    constants = [value for value in code.co_consts if documentation is None or value != documentation]
    return code.co_code, code.co_exceptiontable, code.co_argcount, code.co_flags, names, constants


def _identity(code: types.CodeType) -> tuple[object, ...]:
    """Return what tells code from other code of the same file, wherever it stands there."""
    *rest, constants = bytecode(code)
    values = [_identity(c) if isinstance(c, types.CodeType) else (type(c), repr(c)) for c in constants]  # type: ignore[attr-defined]
    return code.co_name, code.co_varnames, *rest, *values


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def _texts(constants: Any) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple | frozenset):
            yield from _texts(constant)


def _imports(code: types.CodeType) -> Iterator[str]:
    """Yield the names of the modules that code imports, with a point for each level of a relative one."""
    steps = list(dis.get_instructions(code))
    for number, step in enumerate(steps):
        if step.opname == "IMPORT_NAME":  # after its level and what is taken from it, which may be modules, too
            module = "." * int(steps[number - 2].argval or 0) + step.argval
            yield module
            yield from (f"{module}{'.' * (module[-1] != '.')}{name}" for name in steps[number - 1].argval or ())


def _definition(code: types.CodeType, text: str) -> ast.AST | None:
    """Return the definition of a function; None: the text does not compile to the code that runs."""
    functions, compiled = _parsed(text)
    twin = compiled.get(_identity(code))
    nodes = [] if twin is None else functions.get((twin.co_name, twin.co_firstlineno), [])
    if twin is not None and len(nodes) > 1:  # lambdas of one line: what one returns is computed by its whole body
        bodies = [(n.body.lineno, n.body.end_lineno, n.body.col_offset, n.body.end_col_offset) for n in nodes]
        nodes = [node for node, body in zip(nodes, bodies, strict=True) if body in set(twin.co_positions())]
    return nodes[0] if len(nodes) == 1 else None


@functools.lru_cache(64)
def _parsed(text: str) -> tuple[dict[tuple[str, int], list[Any]], dict[tuple[object, ...], types.CodeType]]:
    """Return the functions of a file by name and first line, and their code by its identity."""
    functions: dict[tuple[str, int], list[Any]] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree, code = ast.parse(text), compile(text, "", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):  # not Python: a template, a cell of a notebook with magic
        return functions, {}
    for node in ast.walk(tree):
        if isinstance(node, _FUNCTIONS):
            line = min(part.lineno for part in (node, *getattr(node, "decorator_list", ())))
            functions.setdefault((getattr(node, "name", "<lambda>"), line), []).append(node)
    return functions, {_identity(part): part for part in reversed(list(_nested(code)))}
