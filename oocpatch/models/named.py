"""Models of Python code, by name: a module, a callable, or a factory of one, which may take arguments.

Naming code runs it: importing a module or a file, and calling a factory, does whatever its author wrote.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import pathlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from oocpatch.models.wording import existing, say

SPEC_RULE = (
    "a model spec is package.module:name, file.py:name, numpy:package.module:name (a function of numpy arrays), "
    "model.pt2 (torch.export), model.pt (TorchScript), model.onnx or identity"
)

Model = nn.Module | Callable[..., Any]


def load_named(path: str, name: str, spec: str, arguments: Mapping[str, Any]) -> Model:
    """What `name` is in a module or file, ready to be called with patches.

    A factory is a class, or a function that requires nothing or gets all it requires from `arguments`. A function that
    still requires one argument, or that does not say, is the model itself.

    Args:
        path: `package.module`, or a file that ends in `.py`.
        name: where it is in there; dots are attributes.
        spec: what the user wrote, for messages.
        arguments: for the factory, or for the function besides the patches.

    Raises:
        ValueError: when there is no such thing, or it fails.

    >>> load_named("torch.nn", "LeakyReLU", "torch.nn:LeakyReLU", {"negative_slope": 0.5})
    LeakyReLU(negative_slope=0.5)
    """
    module = _import_file(path, spec) if path.endswith(".py") else _import_module(path, spec)
    return _instantiate(_member(module, name, spec), spec, arguments)


@contextlib.contextmanager
def _importable(folder: pathlib.Path) -> Iterator[None]:
    """Let imports find `folder`, after everything else, so that it never shadows what is installed."""
    entry = str(folder.absolute())
    sys.path.append(entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)


def _import_module(path: str, spec: str) -> types.ModuleType:
    if not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"{SPEC_RULE}, got {spec!r}: {path!r} is neither a module's name nor a file that ends in .py")
    try:
        with _importable(pathlib.Path.cwd()):
            return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is not None and (path == error.name or path.startswith(error.name + ".")):
            raise ValueError(
                f"there is no module {error.name!r} for model spec {spec!r}; install it, run in the directory that "
                "holds it, or name its file (file.py:name)"
            ) from error
        raise ValueError(f"importing {path!r} for model spec {spec!r} failed: {say(error)}; install it") from error
    except Exception as error:
        raise ValueError(f"importing {path!r} for model spec {spec!r} failed: {say(error)}; correct it") from error


def _import_file(path: str, spec: str) -> types.ModuleType:
    file = existing(path, spec)
    # The name holds no directory: the same file elsewhere is the same model.
    name = f"oocpatch_model_{file.stem}"
    description = importlib.util.spec_from_file_location(name, file)
    if description is None or description.loader is None:
        raise ValueError(f"{SPEC_RULE}, got {spec!r}: {path!r} cannot be imported")
    module = importlib.util.module_from_spec(description)
    sys.modules[name] = module
    try:
        with _importable(file.absolute().parent):
            description.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"running {path!r} for model spec {spec!r} failed: {say(error)}; correct it") from error
    return module


def _member(module: types.ModuleType, name: str, spec: str) -> object:
    value: object = module
    for part in name.split("."):
        if not hasattr(value, part):
            names = sorted(key for key, item in vars(module).items() if callable(item) and not key.startswith("_"))
            raise ValueError(
                f"model spec {spec!r} names nothing that is there; choose from {', '.join(names) or 'none'}"
            )
        value = getattr(value, part)
    return value


def _instantiate(value: object, spec: str, arguments: Mapping[str, Any]) -> Model:
    """A module or callable as it is; a factory called."""
    if not callable(value):
        raise ValueError(  # what is wrong is the spec's value
            f"a model spec must name a module, a callable or a factory of one, got {spec!r}, a {type(value).__name__}"
        )
    is_class = isinstance(value, type)
    wrapped = isinstance(value, functools.partial) or hasattr(value, "__wrapped__")
    if isinstance(value, nn.Module) or not (is_class or wrapped or inspect.isroutine(value)):
        if arguments:  # an object with __call__, or a TorchScript function
            raise ValueError(f"model_args are for a factory, but {spec!r} is a {type(value).__name__}; leave them out")
        return value
    parameters = _parameters(value)
    if arguments and parameters is not None:
        _refuse_unknown(parameters, spec, arguments)
    required = None if parameters is None else [p.name for p in parameters if _required(p) and p.name not in arguments]
    if not is_class and (required is None or len(required) == 1):
        return functools.partial(value, **arguments) if arguments else value
    if required:
        given = " ".join(f"--model-args {name}=..." for name in required)
        raise ValueError(
            f"a factory must get all arguments that it requires, but {spec!r} requires {', '.join(required)}; give "
            f"model_args ({given}), or write a function without arguments that returns the model, and name that"
        )
    try:
        made: object = value(**arguments)
    except Exception as error:
        raise ValueError(f"calling the factory {spec!r} failed: {say(error)}; correct it") from error
    if not callable(made):
        raise ValueError(  # what is wrong is the spec's value
            f"the factory {spec!r} must return a module or a callable, got a {type(made).__name__}; return the model"
        )
    return made


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """What a call takes; None for a builtin that does not say."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):
        return None


def _required(parameter: inspect.Parameter) -> bool:
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and parameter.kind not in variable


def _refuse_unknown(parameters: list[inspect.Parameter], spec: str, arguments: Mapping[str, Any]) -> None:
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = sorted(arguments.keys() - set(names))
    if unknown:
        raise ValueError(
            f"model_args must be arguments of {spec!r} ({', '.join(names) or 'it has none'}), got {', '.join(unknown)}"
        )
