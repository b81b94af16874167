"""A simple reference for `predict`: one loop over patches, whole arrays in memory, float64 sums.

It shares no code with the engine, so `oocpatch check` compares two independent results. It is meant for boxes of a few
patches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from oocpatch.models.input_spec import as_input, input_dtype
from oocpatch.models.named_outputs import named_outputs
from oocpatch.models.predictor import resolve_device

Array = np.ndarray[Any, Any]
Sizes = tuple[int, ...]

STATISTICS: dict[str, Callable[[Array], Any]] = {
    "mean": lambda values: np.mean(values, dtype=np.float64),
    "median": lambda values: np.median(values.astype(np.float64)),
    "minimum": np.min,
}
"""Values of padding that depend on the whole volume."""


def reference_scores(
    volume: Array,
    model: Callable[..., Any],
    *,
    patch_size: Sizes,
    patch_overlap: Sizes,
    patch_starts: str = "regular",
    overlap_mode: str = "hann",
    padding_mode: str | None = None,
    fill: float = 0.0,
    device: str = "auto",
    autocast: bool = False,
) -> Array:
    """Return the blended scores of a model on a volume `(C, *spatial)`, before any postprocessing.

    The model maps `(1, C, *patch)` to `(1, C', *patch)`; the other arguments are those of `predict`, sizes per axis.

    Returns:
        `(C', *spatial)`: float64, or for `crop` the model's own values and dtype.

    >>> ramp = np.arange(10.0, dtype=np.float32)[None]
    >>> out = reference_scores(ramp, nn.Identity(), patch_size=(4,), patch_overlap=(2,))
    >>> np.allclose(out, ramp)
    True
    """
    spatial = volume.shape[1:]
    before = [overlap // 2 if padding_mode else 0 for overlap in patch_overlap]
    if patch_starts == "even":
        before = [max(0, size - n) // 2 for size, n in zip(patch_size, spatial, strict=True)]
    # A volume smaller than a patch is padded at its end, up to one patch.
    after = [max(low, size - n - low) for low, size, n in zip(before, patch_size, spatial, strict=True)]
    if padding_mode in STATISTICS:
        padding_mode, fill = "constant", STATISTICS[padding_mode](volume[np.isfinite(volume)]).astype(volume.dtype)
    options: dict[str, Any] = {"constant_values": fill} if padding_mode == "constant" else {}
    widths = [(0, 0), *zip(before, after, strict=True)]
    frame = np.pad(volume, widths, mode=padding_mode or "edge", **options)  # type: ignore[call-overload]

    window = np.ones(())
    for size in patch_size:
        window = window[..., None] * _window(overlap_mode, size)
    if overlap_mode == "monai":
        window = np.maximum(window, 1e-3)
    weights = np.zeros(frame.shape[1:])
    sums: Array | None = None
    sizes = list(zip(frame.shape[1:], patch_size, patch_overlap, strict=True))
    starts = [[*range(0, n - size, size - overlap), n - size] for n, size, overlap in sizes]
    if patch_starts == "even":
        starts = [np.linspace(0, of_axis[-1], len(of_axis)).round().astype(int).tolist() for of_axis in starts]
    for corner in itertools.product(*starts):
        box = tuple(slice(start, start + size) for start, size in zip(corner, patch_size, strict=True))
        scores = _run(model, frame[(slice(None), *box)], device=device, autocast=autocast)
        if sums is None:
            dtype = scores.dtype if overlap_mode == "crop" else np.float64
            sums = np.zeros((scores.shape[0], *frame.shape[1:]), dtype)
        if overlap_mode == "crop":
            inner = tuple(
                slice(a + (overlap // 2 if a > 0 else 0), a + size - (overlap // 2 if a + size < n else 0))
                for a, (n, size, overlap) in zip(corner, sizes, strict=True)
            )
            of_patch = tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(inner, box, strict=True))
            sums[(slice(None), *inner)] = scores[(slice(None), *of_patch)]
            weights[inner] = 1
        else:
            sums[(slice(None), *box)] += window * scores
            weights[box] += window
    if sums is None or not weights.all():
        raise RuntimeError("the patches of the reference must cover every voxel")
    inside = tuple(slice(low, low + n) for low, n in zip(before, spatial, strict=True))
    blended = sums if overlap_mode == "crop" else sums / weights
    return blended[(slice(None), *inside)]


def _window(mode: str, size: int) -> Array:
    if mode == "hann":
        return np.hanning(size + 2)[1:-1]
    if mode in ("gaussian", "nnunet", "monai"):
        position = np.arange(size) - (size // 2 if mode == "nnunet" else (size - 1) / 2)
        return np.asarray(np.exp(-((position / (size / 8)) ** 2) / 2))
    if mode in ("average", "crop"):
        return np.ones(size)
    raise ValueError(f"overlap_mode must be one of average, crop, gaussian, hann, nnunet, monai, got {mode!r}")


def _run(model: Callable[..., Any], patch: Array, *, device: str, autocast: bool) -> Array:
    device = resolve_device(device)
    batch = torch.from_numpy(np.ascontiguousarray(patch)[None]).to(device)
    if isinstance(model, nn.Module):
        model.to(device)
    batch = as_input(batch, input_dtype(model))
    with torch.inference_mode(), torch.autocast(torch.device(device).type, enabled=autocast):
        (output,) = named_outputs(model(batch)).values()
        output = torch.as_tensor(output)[0].cpu()
    if output.dtype == torch.bfloat16:
        output = output.float()  # numpy has no such type
    return np.asarray(output.numpy())
