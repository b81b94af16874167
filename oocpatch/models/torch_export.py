"""Models of torch.export: `.pt2` files, which are inspected before they are loaded.

torch loads such a file with whatever is in it: pickles, compiled libraries, formulas that are evaluated. Here a file
that could run code of its own is refused unless it is trusted. This closes the known ways; it is no sandbox.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import pickle
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import torch
from torch.export.passes import move_to_device_pass

from oocpatch.errors import error_line
from oocpatch.models.input_spec import InputSpec, ModelFile
from oocpatch.storage.paths import spec_file

# Members of the archive that torch hands to pickle or to the dynamic linker, whatever its arguments.
_RUNNABLE = re.compile(r"(^|/)data/(aotinductor/|constants/(?!tensor_|[^/]*\.(?:json|pt)$))")
# Formulas over sizes are evaluated as Python. What they need is numbers, names, arithmetic, and functions of sympy and
# torch, which begin with a capital; a builtin does not. Texts are the names of symbols.
_NAME = re.compile(r"'[\w.\-]*'")
_UNSAFE = re.compile(r"__|[^\w\s+\-*/%(),<>=!&|~.]|\.(?!\d)|\b[a-z_]\w*\s*\(")
_TRUST = "pass --trust-pickle (trust_pickle=True) if you trust its author"
_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def load_exported(spec: str, device: torch.device, *, trust_pickle: bool) -> ModelFile:
    """Load the program of a `.pt2` file on a device.

    Raises:
        ValueError: when the file holds something else, or could run code and is not trusted.
    """
    file = spec_file(spec, spec)
    if not trust_pickle:
        _refuse_code(file, spec)
    try:
        with contextlib.nullcontext() if trust_pickle else _no_code():
            program = torch.export.load(file)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{spec!r} needs code of its own to be unpickled, which is not run; {_TRUST}") from error
    except Exception as error:
        raise _not_a_program(spec, error) from error
    input_spec = _input_spec(program, spec)
    if device.type != "cpu":
        # Devices are written into the graph, where Module.to does not reach.
        program = move_to_device_pass(program, device)
    return ModelFile(program.module(), input_spec)


def _not_a_program(spec: str, error: Exception) -> ValueError:
    return ValueError(
        f"a .pt2 file must hold a program written by torch.export.save, got {spec!r}: {error_line(error)}"
    )


def _refuse_code(file: pathlib.Path, spec: str) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            runnable = [name for name in archive.namelist() if _RUNNABLE.search(name)]
            if runnable:
                raise ValueError(f"{spec!r} holds compiled or pickled code ({runnable[0]}), which is not run; {_TRUST}")
            for name in archive.namelist():
                if name.endswith(".json") and not _RUNNABLE.search(name):
                    for formula in _formulas(json.loads(archive.read(name))):
                        if _UNSAFE.search(_NAME.sub("name", formula)):
                            raise ValueError(f"{spec!r} holds code in place of a size ({formula[:60]!r}); {_TRUST}")
    except (zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _not_a_program(spec, error) from error


def _formulas(value: Any) -> Iterator[str]:
    """Yield all texts of a program that torch evaluates."""
    if isinstance(value, dict):
        if isinstance(value.get("expr_str"), str):
            yield value["expr_str"]
        if isinstance(value.get("range_constraints"), dict):
            yield from value["range_constraints"]
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _formulas(item)


@contextlib.contextmanager
def _no_code() -> Iterator[None]:
    """Let every `torch.load` within load weights only: torch itself would fall back to unpickling anything."""
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    torch_log = logging.getLogger("torch.export")
    level = torch_log.level
    torch_log.setLevel(logging.ERROR)  # it prints a whole traceback before it raises
    try:
        yield
    finally:
        torch_log.setLevel(level)
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _input_spec(program: torch.export.ExportedProgram, spec: str) -> InputSpec:
    """Return the batches that a program takes, from the one input that it was exported with.

    Raises:
        ValueError: when it has other inputs.
    """
    inputs = program.graph_signature.user_inputs
    values = [
        node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in set(inputs)
    ]
    if len(inputs) != 1 or not isinstance(values[0], torch.Tensor) or values[0].ndim < 3:
        listed = ", ".join(str(getattr(v, "shape", v)) for v in values) or "none"
        raise ValueError(f"the program of {spec!r} must take one tensor (B, C, *patch), got {listed}; export it again")
    sizes: tuple[Any, ...] = tuple(values[0].shape)
    fixed, channels, *sides = (size if isinstance(size, int) else None for size in sizes)  # None: free
    ranges = {str(symbol): bounds for symbol, bounds in program.range_constraints.items()}
    bounds = ranges.get(str(sizes[0]))
    return InputSpec(
        least_batch=fixed or (_bound(bounds.lower) if bounds is not None else None) or 1,
        most_batch=fixed or (_bound(bounds.upper) if bounds is not None else None),
        channels=channels,
        sides=tuple(sides),
        dtype=values[0].dtype,
    )


def _bound(limit: Any) -> int | None:
    """Return a limit of a size; None for no limit, which torch calls infinity."""
    text = str(limit)
    return int(text) if text.isdigit() else None
