"""ONNX models, run by onnxruntime, which is not a requirement of oocpatch: install `oocpatch[onnx]`."""

from __future__ import annotations

import hashlib
import json
import mmap
import pathlib
import re
import tempfile
from typing import Any

import torch
from torch import nn

from oocpatch.errors import error_line
from oocpatch.models.footprint import Footprint
from oocpatch.models.input_spec import InputSpec, ModelFile
from oocpatch.storage.paths import spec_file
from oocpatch.system import import_extra

_NAMES = ("float", "double", "float16", "bool", "uint8", "uint16", "int8", "int16", "int32", "int64")
DTYPES: dict[str, torch.dtype] = {f"tensor({name})": getattr(torch, name) for name in _NAMES}
"""Torch's dtypes by onnxruntime's names."""


def load_onnx(spec: str, device: torch.device) -> ModelFile:
    """Load the model of an `.onnx` file.

    Raises:
        ValueError: when onnxruntime is not installed, the file is no model, or it does not take one tensor.
    """
    file = spec_file(spec, spec)
    runtime = import_extra("onnxruntime", "onnx", f"running {spec!r}")
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in runtime.get_available_providers() or device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"onnxruntime must be able to use the device, got {device.type!r}, and it has "
            f"{', '.join(runtime.get_available_providers())}; pass device='cpu' or install onnxruntime-gpu"
        )
    try:
        session = OnnxSession(runtime, file, (provider, _index(device)))
    except Exception as error:
        raise ValueError(f"{spec!r} cannot be loaded as an ONNX model: {error_line(error)}") from error
    inputs = session.opened.get_inputs()
    if len(inputs) != 1 or inputs[0].type not in DTYPES or len(inputs[0].shape) < 3:
        listed = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
        raise ValueError(f"the model of {spec!r} must take one tensor (B, C, *patch), got {listed}; export it again")
    batch, channels, *sides = (n if isinstance(n, int) else None for n in inputs[0].shape)
    return ModelFile(session, InputSpec(batch or 1, batch, channels, tuple(sides), DTYPES[inputs[0].type]))


def _index(device: torch.device) -> int:
    """Return the number of a device; `"cuda"` is the current one."""
    return torch.cuda.current_device() if str(device) == "cuda" else device.index or 0


class OnnxSession(nn.Module):
    """An ONNX model as a module, without parameters that torch could see.

    Args:
        runtime: the library.
        file: the model.
        provider: name of the execution provider, and the number of the device.

    Attributes:
        digest: of the file, and of those beside it that hold its weights.
    """

    def __init__(self, runtime: Any, file: pathlib.Path, provider: tuple[str, int]) -> None:
        super().__init__()
        self.digest = _digest(file)
        self._runtime = runtime
        self._file = file.absolute()
        self._provider = provider
        self._threads = torch.get_num_threads()
        self.opened = self._open()

    def forward(self, patches: torch.Tensor) -> Any:
        """Return the outputs of a batch: a tensor, or a dict of tensors by the names of the outputs."""
        if self._threads != torch.get_num_threads():  # results may depend on it, and it is part of the plan
            self._threads = torch.get_num_threads()
            self.opened = self._open()
        names = [output.name for output in self.opened.get_outputs()]
        footprint = Footprint.active()
        if footprint is not None:
            footprint.count(self._footprint(patches))
        tensors = [_tensor(value).to(patches.device) for value in self._outputs(names, patches.contiguous())]
        return tensors[0] if len(tensors) == 1 else dict(zip(names, tensors, strict=True))

    def _outputs(self, names: list[str], patches: torch.Tensor) -> list[Any]:
        """Return the outputs of a batch where the batch is: nothing is copied from a device and back."""
        binding, device = self.opened.io_binding(), (patches.device.type, patches.device.index or 0)
        if patches.device.type == "cuda":
            torch.cuda.current_stream(patches.device).synchronize()  # onnxruntime has a stream of its own
        dtype = torch.empty(0, dtype=patches.dtype, device="cpu").numpy().dtype.type
        name, shape = self.opened.get_inputs()[0].name, tuple(patches.shape)
        binding.bind_input(name, *device, dtype, shape, patches.data_ptr())
        for output in names:
            binding.bind_output(output, *device)
        self.opened.run_with_iobinding(binding)  # returns when the outputs are there
        values: list[Any] = binding.get_outputs()
        return values

    def _footprint(self, patches: torch.Tensor) -> int:
        """Return the bytes that a run with such a batch adds, as onnxruntime's allocator counts them.

        Its tensors are not torch's, so they are counted in a session of its own that keeps a profile.
        """
        with tempfile.TemporaryDirectory(prefix="oocpatch-onnx-") as folder:
            session = self._open(profile=f"{folder}/profile")
            inputs = {session.get_inputs()[0].name: patches.contiguous().numpy(force=True)}
            session.run(None, inputs)
            events = json.loads(pathlib.Path(session.end_profiling()).read_text())
        arguments = [event.get("args", {}) for event in events]
        arena = max((int(args.get("mem_arena_held", 0)) for args in arguments), default=0)
        # without an arena, the sum of all tensors, as if none made room for another
        return arena or sum(int(args.get("output_size", 0)) for args in arguments)

    def _open(self, profile: str | None = None) -> Any:
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = False  # it holds a second copy of what the allocator keeps already
        options.log_severity_level = 4  # what is wrong is raised, and need not be printed as well
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other threads read and write
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = profile
        name, number = self._provider
        settings = {"device_id": number} if name.startswith("CUDA") else {}
        return self._runtime.InferenceSession(str(self._file), options, providers=[(name, settings)])


def _tensor(value: Any) -> torch.Tensor:
    """Return an output where it is; older versions of onnxruntime can only copy it to main memory."""
    return torch.utils.dlpack.from_dlpack(value) if hasattr(value, "__dlpack__") else torch.from_numpy(value.numpy())


def _digest(file: pathlib.Path) -> str:
    """Return the digest of a model's file and of the files beside it that hold its weights."""
    digest = hashlib.sha256()
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        digest.update(data)
        # a tensor in another file has the entry `location`: protobuf's tag, length and text, twice
        names = {data[m.end() : m.end() + m[1][0]] for m in re.finditer(rb"\n\x08location\x12([\x01-\x7f])", data)}
    for name in sorted(names):
        beside = file.parent / name.decode(errors="replace")
        if beside.is_file():
            with beside.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
