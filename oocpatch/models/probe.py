"""The probe: one call of the model, before anything is planned.

It shows the outputs, how their sizes follow from the patch's, and the memory and the operations that a call takes. A
network is called with an empty batch, for which it takes neither. What is no network, and what does not take an empty
batch, is called with a patch of zeros; that call ends where it takes more memory than it may.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain

import torch
from torch import nn

from oocpatch.errors import PlanTooLarge
from oocpatch.models.footprint import Footprint
from oocpatch.models.input_spec import input_spec_of
from oocpatch.models.named_outputs import in_same_memory
from oocpatch.models.onnx import OnnxSession
from oocpatch.models.predictor import Predictor, is_vectors, out_of_memory, version
from oocpatch.models.reach import callables_of
from oocpatch.models.wrappers import writes_unseen
from oocpatch.planning.box import Ints
from oocpatch.planning.grid import Scale
from oocpatch.planning.plan import human

TRIED_MULTIPLES = (2, 4, 8, 16, 32, 64)
MORE = (32, 64)
"""Voxels by which the second patch is larger; else it is twice as large: what most networks accept."""
SIMPLE = 32
"""Largest denominator of a scale that is believed when a model takes no other size of patch."""


@dataclass(frozen=True, slots=True)
class Probe:
    """The result of one call of the model.

    Attributes:
        outputs: zeros of the shapes and dtypes of the model's outputs for one patch, by name, `(1, C, *spatial)`,
            looped axes included, or a vector `(1, D)`; all values of one are one in memory.
        geometry: how the spatial size of each follows from the patch's; vectors have none.
        copies_input: whether the model must get copies of patches, because it writes to its input.
        aliased: names of the outputs that are the input's memory.
        bytes: memory that the call added at its peak, outputs included, input not.
        batch_bytes: the same per call of so few patches, if several were made at once.
        kept_bytes: memory that stays with libraries and the heap.
        operations: operations of one patch that torch can count, of all models and transforms.
        ran_operators: whether the call ran any of torch's operators.
        least_batch: fewest patches that the model is called with: smaller batches are filled up.
        is_stateless: whether calls leave everything as it was, as far as is known: here, parameters and buffers.
    """

    outputs: Mapping[str, torch.Tensor]
    geometry: Mapping[str, Geometry]
    copies_input: bool
    aliased: frozenset[str]
    bytes: int
    batch_bytes: int = 0
    kept_bytes: int = 0
    operations: float = 0.0
    ran_operators: bool = True
    least_batch: int = 1
    is_stateless: bool = True

    def model_bytes(self, batch: int) -> int:
        """Return the memory that a call with so many patches adds."""
        calls = -(-batch // self.least_batch)
        return self.kept_bytes + (self.bytes if calls == 1 else calls * self.batch_bytes)


def probe_model(
    predictor: Predictor, channels: int, patch_size: Ints, dtype: torch.dtype, max_memory: int | None = None
) -> Probe:
    """Call a model once, with one patch or none; again with other sizes, where the sizes of its outputs differ.

    Args:
        predictor: the model.
        channels: channels of the volume.
        patch_size: with one voxel per looped axis in front of the spatial ones.
        dtype: dtype of the volume.
        max_memory: bytes that a call with a patch may take where the model is; None: any number.

    Raises:
        ValueError: when the model fails, with the sizes it takes, or returns something else than it should.
        PlanTooLarge: when a call takes more memory than it may.
    """
    looped, spatial = patch_size[: predictor.looped], patch_size[predictor.looped :]
    networks = [called for called in callables_of(predictor.model) if isinstance(called, nn.Module)]
    weights = list(chain.from_iterable(chain(m.parameters(False), m.buffers(False)) for m in networks))
    least_batch = input_spec_of(predictor.model).least_batch
    takes_empty = bool(weights) and least_batch == 1 and not any(map(_is_specialized, networks))

    def call(size: Ints, *, empty: bool) -> Probe:
        patch = torch.zeros((0 if empty else 1, channels, *looped, *size), dtype=dtype, device=predictor.device)
        footprint = Footprint([patch, *weights], empty_batch=empty, limit=None if empty else max_memory)
        before = version(patch)
        versions = [version(w) for w in weights if not w.is_inference()]
        with footprint:
            outputs = predictor(patch)
        itemsize = 0 if predictor.dtype is None or predictor.dtype == dtype else predictor.dtype.itemsize
        cast = itemsize * channels * math.prod(patch_size)
        return Probe(
            {name: _stand_in(output) for name, output in outputs.items()},
            geometry={},
            copies_input=version(patch) != before or writes_unseen(predictor.model),
            aliased=frozenset(name for name, output in outputs.items() if in_same_memory(output, patch)),
            bytes=max(footprint.peak, cast),
            batch_bytes=max(footprint.batch_peak, cast),
            kept_bytes=footprint.kept_bytes,
            operations=footprint.operations / least_batch,
            ran_operators=footprint.ran_operators,
            least_batch=least_batch,
            is_stateless=versions == [version(w) for w in weights if not w.is_inference()],
        )

    def called(size: Ints) -> Probe:
        if takes_empty:
            with warnings.catch_warnings(), contextlib.suppress(Exception):
                warnings.simplefilter("ignore")  # of means over nothing, and the like
                return call(size, empty=True)
        return call(size, empty=False)

    def output_sizes(size: Ints) -> dict[str, Ints] | None:
        try:
            return _sizes(called(size), predictor.looped)
        except Exception:  # noqa: BLE001 - whatever the model raises, it does not take this size
            return None

    try:
        probe = called(spatial)
    except PlanTooLarge as error:
        is_main = torch.device(predictor.device).type == "cpu"
        limit, advice = ("max_memory is", "raise max_memory, or ") if is_main else (f"{predictor.device} has", "")
        raise PlanTooLarge(
            f"the model needs {error} for one patch of {_sides(spatial)} but {limit} {human(max_memory or 0)}; "
            f"{advice}lower patch_size"
        ) from error
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("the model must return"):
            raise
        if not isinstance(error, ValueError) and out_of_memory(error):
            raise ValueError(
                f"one patch of {_sides(spatial)} is too much for the model: {error}; lower patch_size"
            ) from error
        if not dtype.is_floating_point and _takes(predictor, (1, channels, *looped, *spatial), torch.float32):
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"the model does not take patches of {kind}, the volume's dtype, but those of float32 "
                f"({_reason(error)}); pass preprocess='scale', or a function such as preprocess=torch.Tensor.float"
            ) from error
        raise ValueError(_rejection(channels, spatial, error, output_sizes)) from error
    return replace(probe, geometry=measure(spatial, _sizes(probe, predictor.looped), output_sizes))


def _is_specialized(module: nn.Module) -> bool:
    """Return whether a module is compiled for the batches that it has seen, or runs where torch does not see it."""
    return isinstance(module, (OnnxSession, torch.jit.ScriptModule)) or hasattr(module, "_orig_mod")


def _stand_in(output: torch.Tensor) -> torch.Tensor:
    """Return zeros like one sample of an output, which take no memory."""
    return torch.zeros((), dtype=output.dtype, device=output.device).expand(1, *output.shape[1:])


def _sizes(probe: Probe, looped: int) -> dict[str, Ints]:
    """Return the spatial sizes of the outputs that have some."""
    outputs = probe.outputs.items()
    return {name: tuple(output.shape[2 + looped :]) for name, output in outputs if not is_vectors(output)}


def _rejection(
    channels: int, spatial: Ints, error: Exception, output_sizes: Callable[[Ints], Mapping[str, Ints] | None]
) -> str:
    """Return a message with the nearest sizes that the model takes, or with its own error."""
    for multiple in TRIED_MULTIPLES:
        if all(n % multiple == 0 for n in spatial):
            continue
        below = tuple(max(multiple, n // multiple * multiple) for n in spatial)
        above = tuple(-(-n // multiple) * multiple for n in spatial)
        # an odd multiple: an even one would also pass a model that needs twice as much
        tried = tuple(n if n // multiple % 2 else m for n, m in zip(below, above, strict=True))
        tried = tuple(n if n // multiple % 2 else n + multiple for n in tried)
        if output_sizes(tried) is not None:
            return (
                f"the model rejects patches of {_sides(spatial)}: sides must be multiples of {multiple}; "
                f"nearest: {_sides(below)}, {_sides(above)}"
            )
    needs_array = isinstance(error, AttributeError) and "'Tensor' object" in str(error)
    hint = "; wrap a function of NumPy arrays in oocpatch.NumpyModel, or name it numpy:FILE:NAME" if needs_array else ""
    return f"the model rejects patches of shape {(1, channels, *spatial)}: {_reason(error)}{hint}"


def _takes(predictor: Predictor, shape: Ints, dtype: torch.dtype) -> bool:
    """Return whether a model takes a batch of zeros."""
    try:
        predictor(torch.zeros(shape, dtype=dtype, device=predictor.device))
    except Exception:  # noqa: BLE001 - whatever the model raises, it does not take this batch
        return False
    return True


def _reason(error: Exception) -> str:
    """Return the kind of an error and the last line of its message."""
    line = next((line for line in reversed(str(error).strip().splitlines()) if line.strip()), "")
    return f"{type(error).__name__}: {line.strip()[:300]}"


def _sides(shape: Ints) -> str:
    """Return `96` for a cube, else `32 x 96 x 96`."""
    return str(shape[0]) if len(set(shape)) == 1 else " x ".join(map(str, shape))


@dataclass(frozen=True, slots=True)
class Geometry:
    """Scale and border of one output, per axis; the border in voxels of the volume."""

    scale: tuple[Scale, ...]
    border: Ints


def measure(
    patch: Ints, shapes: Mapping[str, Ints], other: Callable[[Ints], Mapping[str, Ints] | None]
) -> dict[str, Geometry]:
    """Return scale and border of each output.

    Args:
        patch: size of the patch that the model was called with.
        shapes: sizes of the outputs, by name.
        other: returns the sizes of the outputs for another size of patch; None if the model rejects it.

    Raises:
        ValueError: when the sizes follow from no scale and border.

    >>> measure((20,), {"a": (16,), "b": (10,)}, lambda n: {"a": (n[0] - 4,), "b": (n[0] // 2,)})
    {'a': Geometry(scale=((1, 1),), border=(2,)), 'b': Geometry(scale=((1, 2),), border=(0,))}
    """
    ones = tuple((1, 1) for _ in patch)
    if all(shape == patch for shape in shapes.values()):
        return {name: Geometry(ones, (0,) * len(patch)) for name in shapes}
    sizes = (*(tuple(n + m for n in patch) for m in MORE), tuple(2 * n for n in patch))
    second = next(((size, larger) for size in sizes if (larger := other(size)) is not None), None)
    geometries = {}
    for name, shape in shapes.items():
        pairs = list(zip(patch, shape, strict=True))
        axes: list[tuple[Scale, int] | None]
        if all(m == 1 for m in shape) and (second is None or all(m == 1 for m in second[1][name])):
            axes = [((1, n), 0) for n in patch]  # one answer per patch, whatever its size
        elif second is None:
            axes = [_simple(n, m) for n, m in pairs]
        else:
            axes = [
                _exact(*pair, *more)
                for pair, more in zip(pairs, zip(second[0], second[1][name], strict=True), strict=True)
            ]
        known = [axis for axis in axes if axis is not None]
        if len(known) < len(axes):
            larger_text = "" if second is None else f", and {second[1][name]} for {second[0]}"
            raise ValueError(
                f"the model's output {name!r} must be a multiple or a fraction of its input, or smaller by a border, "
                f"got {shape} for patches of {patch}{larger_text}; try patches whose sides are multiples of 32, or "
                "expand an answer that does not grow with the patch to the patch's size"
            )
        geometries[name] = Geometry(tuple(s for s, _ in known), tuple(b for _, b in known))
    return geometries


def _exact(n: int, m: int, larger: int, more: int) -> tuple[Scale, int] | None:
    """Return scale and border of an axis with `m` voxels for `n`, and `more` for `larger`."""
    scale = Fraction(more - m, larger - n)
    if scale <= 0:
        return None
    border = (n - m / scale) / 2
    return None if border < 0 or border.denominator != 1 else (scale.as_integer_ratio(), int(border))


def _simple(n: int, m: int) -> tuple[Scale, int] | None:
    """Return scale and border of an axis of which only one size is known: a simple scale, else a border."""
    scale = Fraction(m, n)
    if scale.denominator <= SIMPLE and scale.numerator <= SIMPLE:
        return scale.as_integer_ratio(), 0
    return ((1, 1), (n - m) // 2) if m < n and (n - m) % 2 == 0 else None
