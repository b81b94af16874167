"""Compilation: a model in another memory format, compiled by torch, or both.

```text
 patches --> cast --> channels last --> compiled model --> outputs
```

A compiled model is compiled once per process: all its calls have one shape, since the last batch is filled up, and one
layout, since patches are copied into the batch. CUDA graphs, of all modes but `default`, are recorded per thread,
and leave their outputs in memory that the next call uses again. So one thread makes the calls, and outputs are copied.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from oocpatch.models.input_spec import InputSpec
from oocpatch.models.named_outputs import map_outputs
from oocpatch.models.onnx import OnnxSession
from oocpatch.models.wrappers import NumpyModel, as_module
from oocpatch.planning.choices import COMPILE_MODES

FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}
"""Memory formats with the channels last, by number of spatial axes."""

COMPILER_BYTES = 256 << 20
"""Bytes that torch's compiler may add to a process: on a CPU 140 MiB for three layers, 180 for 18 convolutions."""


def checked_compile_mode(value: Any) -> str | None:
    """Return the mode to compile in for the argument `compile` of `predict`; None: not to compile.

    Raises:
        ValueError: for what is neither a mode nor True, False or None.

    >>> checked_compile_mode(True), checked_compile_mode("reduce-overhead"), checked_compile_mode(False)
    ('default', 'reduce-overhead', None)
    """
    if value is None or value is False:
        return None
    if value is True:
        return COMPILE_MODES[0]
    if value not in COMPILE_MODES:
        raise ValueError(f"compile must be True, False or one of {', '.join(COMPILE_MODES)}, got {value!r}")
    return str(value)


def check_compilation(
    models: Sequence[Any], axes: int, *, channels_last: bool, compile_mode: str | None, device: str
) -> None:
    """Refuse models that cannot be compiled, or put into another memory format.

    Args:
        models: the loaded models.
        axes: number of spatial axes.
        channels_last: whether to put the channels last in memory.
        compile_mode: mode of the compiler; None: not compiled.
        device: the device to compile for.

    Raises:
        ValueError: with what to do.
    """
    if channels_last and axes not in FORMATS:
        raise ValueError(f"channels_last must be False for patches of {axes} spatial axes: torch has it for 2 and 3")
    if compile_mode is None:
        return
    modules = [module for model in models for module in as_module(model).modules()]
    for kinds, kind in _NOT_COMPILED:
        if any(isinstance(module, kinds) for module in modules):
            raise ValueError(f"compile must be False for {kind}, which torch does not compile")
    _refuse_without_compiler(torch.device(device).type)


_NOT_COMPILED: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (OnnxSession, "an ONNX model"),
    (NumpyModel, "a function of numpy arrays"),
    ((torch.jit.ScriptModule, torch.jit.ScriptFunction), "a TorchScript model"),
)


def _refuse_without_compiler(kind: str) -> None:
    if kind == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError("compile needs triton on a CUDA device, and it is not installed: pip install triton")
    variable, names = ("CXX", ["g++"]) if kind == "cpu" else ("CC", ["gcc", "clang", "g++"])
    if compiler := os.environ.get(variable):
        names = [compiler]
    if not any(map(shutil.which, names)):
        raise ValueError(
            f"compile needs a C++ compiler ({' or '.join(names)}), and none is installed: install one, name one in "
            f"the environment variable {variable}, or leave compile out"
        )


def compiled_bytes(compile_mode: str | None, device: str, batch_bytes: int) -> int:
    """Return the bytes that compiling adds to what a model takes; CUDA graphs have a batch of their own."""
    return (COMPILER_BYTES if compile_mode else 0) + (batch_bytes if uses_graphs(compile_mode, device) else 0)


def uses_graphs(compile_mode: str | None, device: str) -> bool:
    """Return True if calls are recorded as CUDA graphs."""
    return compile_mode not in (None, "default") and torch.device(device).type == "cuda"


def optimized_model(model: Any, axes: int, *, channels_last: bool, compile_mode: str | None, device: str) -> Any:
    """Return a model as `OptimizedModel`, for patches of so many spatial axes; as it is if nothing is to be done."""
    form = FORMATS[axes] if channels_last else None
    return model if form is None and compile_mode is None else OptimizedModel(model, form, compile_mode, device)


class OptimizedModel(nn.Module):
    """A model in a memory format, compiled, or both.

    Args:
        model: the model.
        memory_format: of patches and weights; None: as they come.
        mode: of the compiler; None: not compiled.
        device: where it runs.

    >>> OptimizedModel(nn.Conv2d(2, 1, 1), torch.channels_last, None, "cpu")(torch.ones(1, 2, 4, 4)).shape
    torch.Size([1, 1, 4, 4])
    """

    def __init__(self, model: Any, memory_format: torch.memory_format | None, mode: str | None, device: str) -> None:
        super().__init__()
        self.model = as_module(model)
        self._format = memory_format
        self._graphs = uses_graphs(mode, device)
        # A module of our own is compiled: torch leaves a mark on it, which would make the user's another model.
        call = self.model if mode is None else _compiled(nn.Sequential(self.model), mode)
        self._calls = (call,)  # in a tuple: not a second submodule
        if isinstance(spec := getattr(model, "input_spec", None), InputSpec):
            self.input_spec = spec

    def forward(self, patches: torch.Tensor) -> Any:
        """Return the model's outputs for a batch."""
        if self._format is not None:
            patches = patches.contiguous(memory_format=self._format)
        if not self._graphs:
            return self._calls[0](patches)
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch does not annotate it
        return map_outputs(torch.clone, self._calls[0](patches))

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Put the model's weights into the memory format, and back afterwards."""
        form = self._format or torch.contiguous_format
        axes = {form: spatial + 2 for spatial, form in FORMATS.items()}.get(form)
        weights = (*self.model.parameters(), *self.model.buffers())
        tensors = [t for t in weights if t.ndim == axes and not t.is_contiguous(memory_format=form)]
        for tensor in tensors:
            tensor.data = tensor.data.contiguous(memory_format=form)
        try:
            yield
        finally:
            for tensor in tensors:
                tensor.data = tensor.data.contiguous()


def _compiled(model: nn.Module, mode: str) -> Callable[..., Any]:
    """Return a model that is compiled when it is first called.

    Where torch lets it, kernels are not chosen by timing them, which would choose others, and round otherwise, in the
    process that goes on with a run. `max-autotune` is nothing but that.
    """
    # Private, but the one that torch's documentation names: torch.compile takes either a mode or options.
    from torch import _inductor  # noqa: PLC0415 - a second of imports, for models that are compiled only

    options: dict[str, Any] = dict(_inductor.list_mode_options(mode))
    if mode != "max-autotune" and "deterministic" in _inductor.list_options():
        options["deterministic"] = True
    return torch.compile(model, dynamic=False, options=options)
