"""The content of tensors, arrays and TorchScript, as parts of a fingerprint."""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from typing import Any

import google_crc32c
import numpy as np
import torch
from torch import nn

from oocpatch.models.source_code import Parts


def script_parts(model: Any, _: bool) -> Parts:
    """Return code, constants and state of TorchScript, as they would be saved."""
    with zipfile.ZipFile(io.BytesIO(model.save_to_buffer())) as archive:
        data = {name: archive.read(name) for name in archive.namelist() if _SCRIPT.match(name)}
    steps = {name: [*pickletools.genops(item)] for name, item in data.items() if name.endswith(".pkl")}
    pickled = {name: "\n".join(f"{step.name} {argument}" for step, argument, _ in steps[name]) for name in steps}
    texts = {name: item.decode("latin-1") for name, item in data.items()} | pickled
    return "", sorted((_NUMBERED.sub("", name), _NUMBERED.sub("", text)) for name, text in texts.items())


_SCRIPT = re.compile(r"[^/]+/(code/.*\.py|(data|constants)(\.pkl|/.*))$")
_NUMBERED = re.compile(r"___torch_mangle_\d+\.?|cuda:\d+")  # classes by the order of their loading, and devices


def tensor_parts(tensor: torch.Tensor, _: bool) -> Parts:
    """Return kind, shape and values of a tensor, wherever it lies."""
    if nn.parameter.is_lazy(tensor) or tensor.is_meta:
        return f"{tensor.dtype}", []
    token, tensor = f"{tensor.dtype} {tensor.layout} {tuple(tensor.shape)}", tensor.detach()
    if tensor.is_quantized:
        return f"{token} {tensor.qscheme()}", [("values", tensor.dequantize())]
    if tensor.layout is not torch.strided:
        coordinates: torch.Tensor = tensor.to_sparse_coo().coalesce()  # type: ignore[no-untyped-call]  # as torch has it
        return token, [("indices", coordinates.indices()), ("values", coordinates.values())]
    plain = tensor.resolve_conj().resolve_neg().cpu().contiguous()
    return token, [("values", plain.reshape(-1).view(torch.uint8).numpy())]


def array_parts(value: Any, _: bool) -> Parts:
    """Return dtype, shape and the checksum of the values of an array.

    >>> array_parts(np.zeros(3, np.uint8), False)[0]
    '|u1 (3,) 6064a37a'
    """
    array = np.ascontiguousarray(value)
    token = f"{array.dtype.str} {np.shape(value)}"
    if array.dtype.hasobject:
        return token, [("items", array.tolist())]
    data = array.reshape(-1).view(np.uint8)
    data.flags.writeable = False  # google_crc32c takes only what cannot change under it
    return f"{token} {google_crc32c.value(data):08x}", [("mask", getattr(value, "mask", None))]
