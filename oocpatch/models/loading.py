"""Loading of models by specs.

A model object often cannot travel between processes, so a run names its model by a *spec* and every process loads its
own.

```text
 package.module:name, file.py:name    Python code, which is run
 numpy:package.module:name            the same, of numpy arrays
 model.pt2                            torch.export
 model.pt .pth .ts .torchscript       TorchScript
 model.onnx                           ONNX, by onnxruntime
 KIND:PATH                            a model package
```
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import operator
import pathlib
import pickle
import sys
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from oocpatch.errors import error_line
from oocpatch.models.input_spec import ModelFile
from oocpatch.models.onnx import load_onnx
from oocpatch.models.packages.package import ModelPackage, load_package
from oocpatch.models.predictor import resolve_device
from oocpatch.models.torch_export import load_exported
from oocpatch.models.wrappers import NumpyModel
from oocpatch.storage.paths import expand_home, spec_file
from oocpatch.system import import_extra

_TORCHSCRIPT_SUFFIXES = (".pt", ".pth", ".ts", ".torchscript")
_NUMPY = "numpy:"


def load_models(
    specs: Any,
    *,
    weights: str | Sequence[str] | None = None,
    model_args: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
    device: str = "cpu",
    eval_mode: bool = True,
) -> tuple[Model, ...]:
    """Return the models of a call: one, or the members of an ensemble; specs are loaded, as `load_model` does.

    Args:
        specs: a model or a spec, or a list of them; or a loaded package.
        weights: file with the weights of each model; one spec and several files are as many models.
        model_args: as for `load_model`.
        trust_pickle: as for `load_model`.
        device: as for `load_model`.
        eval_mode: as for `load_model`.

    Raises:
        TypeError: for what is neither a model nor a spec.
        ValueError: as `load_model`, and when weights and models do not go together.

    >>> len(load_models(["identity", nn.ReLU()]))
    2
    """
    package = specs
    if not isinstance(specs, ModelPackage):
        package = load_package(specs, trust_pickle=trust_pickle, device=device)
    if package is not None:
        if weights is not None or model_args:
            raise ValueError("weights and model_args must be left out with a model package, which has its own")
        return tuple(package.models)
    members = list(specs) if isinstance(specs, (list, tuple)) else [specs]
    files = [weights] if weights is None or isinstance(weights, (str, pathlib.Path)) else list(weights)
    if not members or not files:
        raise ValueError("model and weights must not be empty lists")
    if len(members) == 1:
        members *= len(files)
    if len(files) == 1 and files[0] is None:
        files *= len(members)
    if len(files) != len(members):
        raise ValueError(f"weights must be one file for each model, got {len(files)} for {len(members)} models")
    if (weights is not None or model_args) and not all(isinstance(item, str) for item in members):
        raise ValueError("weights and model_args are for models given as specs, such as 'file.py:name'; got a model")
    options: dict[str, Any] = {
        "model_args": model_args,
        "trust_pickle": trust_pickle,
        "device": device,
        "eval_mode": eval_mode,
    }
    models = tuple(
        load_model(item, weights=None if file is None else str(file), **options) if isinstance(item, str) else item
        for item, file in zip(members, files, strict=True)
    )
    for model in models:
        if not callable(model):
            raise TypeError(f"model must be a torch.nn.Module, a callable or a model spec, got {type(model).__name__}")
    if weights is not None and len({id(model) for model in models}) < len(models):
        raise ValueError(
            f"models with weights of their own must be made anew each time, got {members[0]!r} twice; name a factory"
        )
    return models


def load_model(
    spec: str,
    *,
    weights: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
    device: str = "cpu",
    eval_mode: bool = True,
) -> Model:
    """Load the model that a spec names, ready for inference.

    Args:
        spec: `package.module:name` or `file.py:name`, where the name is a module, a callable or a factory (a class or
            function that returns one); `numpy:` and one of these, for a function of numpy arrays; `model.pt2`
            (torch.export); `model.pt`, `.pth`, `.ts` or `.torchscript` (TorchScript); `model.onnx`; `identity`. A
            package is also looked for in the current directory, and the siblings of a file are importable while it is
            loaded, in both cases after everything installed.
        weights: file with a state dict, as safetensors or written by `torch.save`, loaded strictly.
        model_args: arguments of the factory.
        trust_pickle: allow a file to run code while it is unpickled.
        device: where the model is put; as for `resolve_device`.
        eval_mode: whether the model is put in evaluation mode; else it is left as its factory gives it.

    Raises:
        ValueError: the spec, its arguments, the weights or the device cannot be used, with what to change.

    >>> load_model("identity")(torch.ones(1, 1, 4)).sum()
    tensor(4.)
    >>> load_model("torch.nn:LeakyReLU", model_args={"negative_slope": 0.5})(torch.tensor(-1.0))
    tensor(-0.5000)
    """
    target = torch.device(resolve_device(device))
    model = _load(spec, target, dict(model_args or {}), trust_pickle=trust_pickle)
    if weights is not None:
        load_weights(model, spec, weights, trust_pickle=trust_pickle)
    if isinstance(model, nn.Module):
        model = model.to(target)
        # A program in a file is fixed in the mode it was exported in, and refuses eval().
        if eval_mode and not isinstance(model, (ModelFile, torch.fx.GraphModule)):
            model.eval()
    return model


def _load(spec: str, device: torch.device, arguments: dict[str, Any], *, trust_pickle: bool) -> Model:
    path, _, name = spec.rpartition(":")
    if spec.startswith(_NUMPY) and path and path != _NUMPY.rstrip(":"):
        function = _load(spec.removeprefix(_NUMPY), device, arguments, trust_pickle=trust_pickle)
        if isinstance(function, nn.Module):
            raise ValueError(
                f"numpy: is for functions of numpy arrays, but {spec!r} is a torch module; leave numpy: out"
            )
        return NumpyModel(function)
    if path and name and name[0] not in "/\\":  # else the colon follows the letter of a drive
        module = _import_file(path, spec) if path.endswith(".py") else _import_module(path, spec)
        return _instantiate(_member(module, name, spec), spec, arguments)
    if arguments:
        raise ValueError(f"model_args are for a factory, such as file.py:name, and {spec!r} names none; leave them out")
    suffix = pathlib.PurePath(spec).suffix.lower()
    if spec == "identity":
        return nn.Identity()
    if suffix == ".pt2":
        return load_exported(spec, device, trust_pickle=trust_pickle)
    if suffix in _TORCHSCRIPT_SUFFIXES:
        return _load_torchscript(spec, device)
    if suffix == ".onnx":
        return load_onnx(spec, device)
    if suffix == ".py":
        raise ValueError(f"a Python file needs the name of what is in it, got {spec!r}; write {spec}:NAME")
    raise ValueError(f"{SPEC_RULE}, got {spec!r}")


def _load_torchscript(spec: str, device: torch.device) -> nn.Module:
    file = spec_file(spec, spec)
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
        raise ValueError(f"{spec!r} cannot be loaded as TorchScript: {error_line(error)}; export it anew") from error
    return model


def load_weights(model: Model, spec: str, weights: str, *, trust_pickle: bool) -> None:
    """Load the weights of a file into a model.

    Args:
        model: the model.
        spec: the name of the model, for messages.
        weights: as for `load_model`.
        trust_pickle: as for `load_model`.

    Raises:
        ValueError: when the file cannot be read, or does not fit the model.
    """
    if not isinstance(model, nn.Module) or not model.state_dict():
        raise ValueError(f"weights need a module that has parameters, but {spec!r} has none; leave {weights!r} out")
    file = pathlib.Path(expand_home(weights))
    if not file.is_file():
        raise ValueError(f"the weights file does not exist: {str(file.absolute())!r}; check the path")
    is_safe = file.suffix.lower() == ".safetensors"
    tensors = _state_dict(
        _read_safetensors(file) if is_safe else _read_pickle(file, trust_pickle=trust_pickle), weights
    )
    prefix = "module."  # written by DataParallel, which wrapped the network
    if all(key.startswith(prefix) for key in tensors) and not any(key.startswith(prefix) for key in model.state_dict()):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"weights must fit the model, but {weights!r} does not fit {spec!r}: {error_line(error)}"
        ) from error


def _read_safetensors(file: pathlib.Path) -> object:
    safetensors = import_extra("safetensors.torch", "safetensors", f"reading {str(file)!r}")
    try:
        return safetensors.load_file(str(file), device="cpu")
    except Exception as error:
        raise ValueError(f"{str(file)!r} is not a safetensors file: {error_line(error)}") from error


def _read_pickle(file: pathlib.Path, *, trust_pickle: bool) -> object:
    try:
        # Always explicit: an environment variable changes the default.
        return torch.load(file, map_location="cpu", weights_only=not trust_pickle)
    except pickle.UnpicklingError as error:
        if trust_pickle:
            raise ValueError(f"{str(file)!r} cannot be unpickled: {error_line(error)}") from error
        raise ValueError(
            f"weights must be a plain state dict, but {str(file)!r} needs code of its own to be unpickled, or is no "
            "pickle; save model.state_dict(), or pass --trust-pickle (trust_pickle=True) if you trust its author"
        ) from error
    except Exception as error:
        raise ValueError(f"the weights file {str(file)!r} cannot be read: {error_line(error)}") from error


def _state_dict(state: object, weights: str) -> dict[str, Any]:
    if isinstance(state, nn.Module):
        state = state.state_dict()
    if isinstance(state, Mapping):
        # Checkpoints of training frameworks keep the state dict beside the optimizer's.
        for key in ("state_dict", "model_state_dict", "network_weights", "model"):
            if isinstance(state.get(key), Mapping):
                state = state[key]
                break
    if isinstance(state, Mapping) and state and all(isinstance(key, str) for key in state):
        return dict(state)
    raise ValueError(
        f"weights must be a state dict, got {weights!r}, a {type(state).__name__}; save model.state_dict()"
    )


SPEC_RULE = (
    "a model spec is package.module:name, file.py:name, numpy:package.module:name (a function of numpy arrays), "
    "model.pt2 (torch.export), model.pt (TorchScript), model.onnx, a package (KIND:PATH) or identity"
)


Model = nn.Module | Callable[..., Any]


@contextlib.contextmanager
def _importable(folder: pathlib.Path) -> Iterator[None]:
    """Let imports find `folder`, after everything else, so that it never shadows what is installed."""
    entry = str(folder.absolute())
    is_added = entry not in sys.path
    if is_added:
        sys.path.append(entry)
    try:
        yield
    finally:
        if is_added and entry in sys.path:
            sys.path.remove(entry)


def _import_module(path: str, spec: str) -> types.ModuleType:
    if not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"{SPEC_RULE}, got {spec!r}: {path!r} is neither a module's name nor a file that ends in .py")
    try:
        with _importable(pathlib.Path.cwd()):
            return importlib.import_module(path)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{path}.".startswith(f"{missing}."):
            raise ValueError(
                f"there is no module {missing!r} for model spec {spec!r}; install it, run in the directory that "
                "holds it, or name its file (file.py:name)"
            ) from error
        raise ValueError(
            f"importing {path!r} for model spec {spec!r} failed: {error_line(error)}; "
            f"{'correct' if missing is None else 'install'} it"
        ) from error


def _import_file(path: str, spec: str) -> types.ModuleType:
    file = spec_file(path, spec)
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
        raise ValueError(f"running {path!r} for model spec {spec!r} failed: {error_line(error)}; correct it") from error
    return module


def _member(module: types.ModuleType, name: str, spec: str) -> object:
    try:
        return operator.attrgetter(name)(module)
    except AttributeError as error:
        names = sorted(key for key, item in vars(module).items() if callable(item) and not key.startswith("_"))
        raise ValueError(
            f"model spec {spec!r} names nothing that is there; choose from {', '.join(names) or 'none'}"
        ) from error


def _instantiate(value: object, spec: str, arguments: Mapping[str, Any]) -> Model:
    """Return a module or callable as it is; of a factory, its result.

    A factory is a class, or a function that requires nothing or gets all it requires from `arguments`. A function that
    still requires one argument, or that does not list its arguments, is the model itself.
    """
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
    required = _missing_arguments(value, spec, arguments)
    if not is_class and (required is None or len(required) == 1):
        return functools.partial(value, **arguments) if arguments else value
    if required:
        options = " ".join(f"--model-args {name}=..." for name in required)
        raise ValueError(
            f"a factory must get all arguments that it requires, but {spec!r} requires {', '.join(required)}; give "
            f"model_args ({options}), or write a function without arguments that returns the model, and name that"
        )
    try:
        model: object = value(**arguments)
    except Exception as error:
        raise ValueError(f"calling the factory {spec!r} failed: {error_line(error)}; correct it") from error
    if not callable(model):
        raise ValueError(  # what is wrong is the spec's value
            f"the factory {spec!r} must return a module or a callable, got a {type(model).__name__}; return the model"
        )
    return model


def _missing_arguments(function: Callable[..., Any], spec: str, arguments: Mapping[str, Any]) -> list[str] | None:
    """Return the parameters that still require an argument; None for a builtin that does not list them."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return None
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    unknown = sorted(arguments.keys() - set(names))
    if unknown and not takes_any:
        raise ValueError(
            f"model_args must be arguments of {spec!r} ({', '.join(names) or 'it has none'}), got {', '.join(unknown)}"
        )
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variable and p.name not in arguments]
