"""Models by name, and what makes two models the same.

A model object often cannot travel between processes, so a run names its model by a *spec* and every process loads its
own. `load_model` turns a spec into a model. `model_identity` turns a model into a digest that is the same in every
process, so that a resumed run never mixes the outputs of two models.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import pathlib
import pickle
import sys
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.export.passes import move_to_device_pass

from oocpatch.inference.identity import model_identity

__all__ = ["Model", "load_model", "model_identity"]

Model = nn.Module | Callable[..., Any]

_TORCHSCRIPT_SUFFIXES = (".pt", ".pth", ".ts", ".torchscript")
_LONGEST = 300  # characters of another library's message; a state dict that does not fit fills a screen
_SPEC_RULE = (
    "a model spec is package.module:name, file.py:name, model.pt2 (torch.export), model.pt (TorchScript) or identity"
)


def load_model(spec: str, *, weights: str | None = None, trust_pickle: bool = False, device: str = "cpu") -> Model:
    """Load the model that a spec names, ready for inference.

    Args:
        spec: `package.module:name` or `file.py:name`, where the name is a module, a callable or a factory (a class or
            function without required arguments that returns one); `model.pt2` (torch.export); `model.pt`, `.pth`,
            `.ts` or `.torchscript` (TorchScript); `identity`. A package is also looked for in the current directory,
            and the siblings of a file are importable while it is loaded, in both cases after everything installed.
        weights: file with a state dict, as safetensors or written by `torch.save`, loaded strictly.
        trust_pickle: allow a weights file to run code while it is unpickled.
        device: where the model is put; `auto` is the first CUDA device if there is one, else the CPU.

    Raises:
        ValueError: the spec, the weights or the device cannot be used; the message says what would do.

    >>> load_model("identity")(torch.ones(1, 1, 4)).sum()
    tensor(4.)
    """
    target = _device(device)
    model = _load(spec, target)
    if weights is not None:
        _load_weights(model, spec, weights, trust_pickle=trust_pickle)
    if isinstance(model, nn.Module):
        model = model.to(target)
        # An exported program is fixed in the mode it was exported in, and refuses eval().
        if not isinstance(model, torch.fx.GraphModule):
            model.eval()
    return model


def _load(spec: str, device: torch.device) -> Model:
    path, colon, name = spec.rpartition(":")
    suffix = pathlib.PurePath(spec).suffix.lower()
    if spec == "identity":
        return nn.Identity()
    if suffix == ".pt2":
        return _load_exported(spec, device)
    if suffix in _TORCHSCRIPT_SUFFIXES:
        return _load_torchscript(spec, device)
    if suffix == ".onnx":
        raise ValueError(
            f"ONNX models are not supported yet, got {spec!r}; export the torch model with torch.export.save instead"
        )
    if colon and path and name:
        module = _import_file(path, spec) if path.endswith(".py") else _import_module(path, spec)
        return _instantiate(_member(module, name, spec), spec)
    if suffix == ".py":
        raise ValueError(f"a Python file needs the name of what is in it, got {spec!r}; write {spec}:NAME")
    raise ValueError(f"{_SPEC_RULE}, got {spec!r}")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device must be one torch can use here, such as cpu or cuda:0, got {name!r}: {error}"
        ) from error
    return device


def _existing(path: str, spec: str) -> pathlib.Path:
    file = pathlib.Path(path)
    if not file.is_file():
        raise ValueError(f"the file of model spec {spec!r} does not exist: {str(file.absolute())!r}; check the path")
    return file


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
        raise ValueError(f"{_SPEC_RULE}, got {spec!r}: {path!r} is neither a module's name nor a file that ends in .py")
    try:
        with _importable(pathlib.Path.cwd()):
            return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is not None and (path == error.name or path.startswith(error.name + ".")):
            raise ValueError(
                f"there is no module {error.name!r} for model spec {spec!r}; install it, run in the directory that "
                "holds it, or name its file (file.py:name)"
            ) from error
        raise ValueError(f"importing {path!r} for model spec {spec!r} failed: {_say(error)}; install it") from error
    except Exception as error:
        raise ValueError(f"importing {path!r} for model spec {spec!r} failed: {_say(error)}; correct it") from error


def _import_file(path: str, spec: str) -> types.ModuleType:
    file = _existing(path, spec)
    # The name holds no directory: the same file elsewhere is the same model.
    name = f"oocpatch_model_{file.stem}"
    description = importlib.util.spec_from_file_location(name, file)
    if description is None or description.loader is None:
        raise ValueError(f"{_SPEC_RULE}, got {spec!r}: {path!r} cannot be imported")
    module = importlib.util.module_from_spec(description)
    sys.modules[name] = module
    try:
        with _importable(file.absolute().parent):
            description.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"running {path!r} for model spec {spec!r} failed: {_say(error)}; correct it") from error
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


def _instantiate(value: object, spec: str) -> Model:
    """A module or callable as it is; a factory called."""
    if isinstance(value, nn.Module):
        return value
    if not callable(value):
        raise ValueError(  # what is wrong is the spec's value
            f"a model spec must name a module, a callable or a factory of one, got {spec!r}, a {type(value).__name__}"
        )
    is_class = isinstance(value, type)
    wrapped = isinstance(value, functools.partial) or hasattr(value, "__wrapped__")
    if not (is_class or wrapped or inspect.isroutine(value)):
        return value  # an object with __call__, or a TorchScript function
    required = _required_arguments(value)
    if not is_class and (required is None or len(required) == 1):
        return value
    if required:
        raise ValueError(
            f"a factory takes no required arguments, but {spec!r} requires {', '.join(required)}; write a function "
            "without arguments that returns the model, and name that"
        )
    try:
        made: object = value()
    except Exception as error:
        raise ValueError(f"calling the factory {spec!r} failed: {_say(error)}; correct it") from error
    if not callable(made):
        raise ValueError(  # what is wrong is the spec's value
            f"the factory {spec!r} must return a module or a callable, got a {type(made).__name__}; return the model"
        )
    return made


def _required_arguments(function: Callable[..., Any]) -> list[str] | None:
    """Names of the arguments a call must give; None for a builtin that does not say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return None
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [item.name for item in parameters if item.default is item.empty and item.kind not in variable]


def _load_exported(spec: str, device: torch.device) -> nn.Module:
    file = _existing(spec, spec)
    try:
        program = torch.export.load(file)
        if device.type != "cpu":
            # Devices are written into the graph, where Module.to does not reach.
            program = move_to_device_pass(program, device)
        return program.module()
    except Exception as error:
        raise ValueError(
            f"a .pt2 file must hold a program written by torch.export.save, got {spec!r}: {_say(error)}"
        ) from error


def _load_torchscript(spec: str, device: torch.device) -> nn.Module:
    file = _existing(spec, spec)
    members: list[str] = []
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            members = archive.namelist()
    if not any(member.endswith("/constants.pkl") for member in members):
        raise ValueError(
            f"a {file.suffix} model must be TorchScript, got {spec!r}, which torch.jit.save did not write; if it holds "
            f"weights, name the network and give them apart (--model file.py:Network --weights {file.name}); if it "
            "holds a whole pickled model, export that with torch.export.save and name the .pt2 file"
        )
    try:
        with warnings.catch_warnings():
            # Deprecated for writing new models; the files people have are still to be read.
            warnings.filterwarnings("ignore", message=r".*torch\.jit", category=DeprecationWarning)
            model: nn.Module = torch.jit.load(file, map_location=device)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise ValueError(f"{spec!r} cannot be loaded as TorchScript: {_say(error)}; export it anew") from error
    return model


def _load_weights(model: Model, spec: str, weights: str, *, trust_pickle: bool) -> None:
    if not isinstance(model, nn.Module) or not model.state_dict():
        raise ValueError(f"weights need a module that has parameters, but {spec!r} has none; leave {weights!r} out")
    file = pathlib.Path(weights)
    if not file.is_file():
        raise ValueError(f"the weights file does not exist: {str(file.absolute())!r}; check the path")
    if file.suffix.lower() == ".safetensors":
        state: object = _read_safetensors(file)
    else:
        state = _read_pickle(file, trust_pickle=trust_pickle)
    tensors = _state_dict(state, weights)
    prefix = "module."  # written by DataParallel, which wrapped the network
    if all(key.startswith(prefix) for key in tensors) and not any(key.startswith(prefix) for key in model.state_dict()):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"weights must fit the model, but {weights!r} does not fit {spec!r}: {_say(error)}") from error


def _read_safetensors(file: pathlib.Path) -> object:
    try:
        safetensors = importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ValueError(f"reading {str(file)!r} needs safetensors: pip install safetensors") from error
    try:
        return safetensors.load_file(str(file), device="cpu")
    except Exception as error:
        raise ValueError(f"{str(file)!r} is not a safetensors file: {_say(error)}") from error


def _read_pickle(file: pathlib.Path, *, trust_pickle: bool) -> object:
    try:
        # Always explicit: an environment variable changes the default.
        return torch.load(file, map_location="cpu", weights_only=not trust_pickle)
    except pickle.UnpicklingError as error:
        if trust_pickle:
            raise ValueError(f"{str(file)!r} cannot be unpickled: {_say(error)}") from error
        raise ValueError(
            f"weights must be a plain state dict, but {str(file)!r} needs code of its own to be unpickled, or is no "
            "pickle; save model.state_dict(), or pass --trust-pickle (trust_pickle=True) if you trust its author"
        ) from error
    except Exception as error:
        raise ValueError(f"the weights file {str(file)!r} cannot be read: {_say(error)}") from error


def _state_dict(state: object, weights: str) -> dict[str, Any]:
    if isinstance(state, nn.Module):
        state = state.state_dict()
    if isinstance(state, Mapping):
        # Checkpoints of training frameworks keep the state dict beside the optimizer's.
        for key in ("state_dict", "model_state_dict", "model"):
            if isinstance(state.get(key), Mapping):
                state = state[key]
                break
    if isinstance(state, Mapping) and state and all(isinstance(key, str) for key in state):
        return dict(state)
    raise ValueError(
        f"weights must be a state dict, got {weights!r}, a {type(state).__name__}; save model.state_dict()"
    )


def _say(error: BaseException) -> str:
    """The error's kind and message on one line, without torch's stack of C++ frames."""
    text = " ".join(str(error).split("\nException raised from")[0].split())
    return f"{type(error).__name__}: {text if len(text) <= _LONGEST else text[:_LONGEST] + '...'}"
