"""Checks of options, and what of a checked value identifies a run; the fields of the options name them.

A check takes the parameter's name, the value as it was given, and the volume; it returns the checked value, or raises
ValueError or TypeError with the rule and the value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from oocpatch.engine.patch_selection import Mask
from oocpatch.models.augmentation import Augmentation, checked_augmentation
from oocpatch.models.compilation import checked_compile_mode
from oocpatch.models.fingerprint import model_fingerprint
from oocpatch.models.postprocessing import checked_postprocess
from oocpatch.models.predictor import resolve_device
from oocpatch.models.preprocess_steps import Step
from oocpatch.models.preprocessing import checked_preprocess, step_json
from oocpatch.planning import arguments
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.choices import OUTPUT_FORMATS, OUTPUT_GRIDS, PATCH_STARTS
from oocpatch.progress import OnProgress, display_of
from oocpatch.storage.paths import LocalPath, local_path
from oocpatch.volumes.model_grid import ModelGrid
from oocpatch.volumes.resampling import stored_volume
from oocpatch.volumes.volume import Volume, spatial_box, spatial_sizes

AUTO = "auto"
"""A size that the planner chooses."""


def is_auto(value: object) -> bool:
    """Return whether a size is to be chosen."""
    return isinstance(value, str) and value == AUTO


def _sizes(name: str, value: Any, volume: Volume) -> Ints | None:
    return None if value is None else spatial_sizes(name, value, volume, least=1)


def _shards(name: str, value: Any, volume: Volume) -> Ints | None:
    return () if isinstance(value, str) and value == "none" else _sizes(name, value, volume)


def _patch_size(name: str, value: Any, volume: Volume) -> Ints:
    if value is None:
        raise TypeError("predict and plan need patch_size (--patch-size); only a model package has one of its own")
    return () if is_auto(value) else spatial_sizes(name, value, volume, least=1)


def _batch_size(name: str, value: Any, _volume: Volume) -> int:
    return 0 if is_auto(value) else arguments.positive(name, value)


def _positive(name: str, value: Any, _volume: Volume) -> int | None:
    return None if value is None else arguments.positive(name, value)


def _num_bytes(name: str, value: Any, _volume: Volume) -> int | None:
    return None if value is None else arguments.num_bytes(name, value)


def _part(_name: str, value: Any, _volume: Volume) -> tuple[int, int] | None:
    return None if value is None else arguments.checked_part(value)


def _box(name: str, value: Any, volume: Volume) -> Box | None:
    return None if value is None else spatial_box(name, value, volume)


def _progress(_name: str, value: str | bool | OnProgress, _volume: Volume) -> str | bool | OnProgress:
    display_of(value)
    return value


def _mask(_name: str, value: Any, volume: Volume) -> Mask | None:
    """Return a mask that lies over a volume.

    Raises:
        ValueError: when it cannot.
    """
    if value is None:
        return None
    try:
        mask = value if isinstance(value, Volume) else Volume(value)
    except (ValueError, TypeError) as error:
        raise type(error)(f"mask: {error}") from error
    return Mask.over(volume, mask)


def _orientation(_name: str, value: str | None, volume: Volume) -> str | None:
    """Refuse an orientation of a volume that does not say where its axes point.

    Raises:
        ValueError: in that case.
    """
    if value is not None and "affine" not in volume.source.attrs:
        raise ValueError(
            f"orientation must be None for a volume without an affine, which a NIfTI, a DICOM and a Zarr that was "
            f"converted from them have, got {value!r}; name axes, such as axes='xyz', to pass patches in their order"
        )
    return value


def _augment(_name: str, value: Any, volume: Volume) -> Augmentation | None:
    return checked_augmentation(value, volume.names[-volume.spatial_ndim :])


def _postprocess(_name: str, value: Any, _volume: Volume) -> Any:
    return arguments.per_head(value, checked_postprocess)


def _work(_name: str, value: Any, _volume: Volume) -> float | str | None:
    return None if value is None else arguments.checked_work(value)


def _export(name: str, value: Any, _volume: Volume) -> LocalPath | None:
    return None if value is None else local_path(name, value)


CHECKS: dict[str, Callable[[str, Any, Volume], Any]] = {
    "augment": _augment,
    "batch_size": _batch_size,
    "box": _box,
    "compile_mode": lambda _, value, __: checked_compile_mode(value),
    "device": lambda _, value, __: resolve_device(value),
    "dtype": lambda name, value, _: arguments.per_head(value, lambda one: arguments.dtype_name(name, one)),
    "export": _export,
    "mask": _mask,
    "memory_limit": lambda _, value, __: arguments.memory_limit(value),
    "num_bytes": _num_bytes,
    "number": lambda name, value, _: arguments.real_number(name, value),
    "orientation": _orientation,
    "output_grid": lambda name, value, _: arguments.one_of(name, value, OUTPUT_GRIDS),
    "output_format": lambda name, value, _: arguments.one_of(name, value, OUTPUT_FORMATS),
    "overlap": spatial_sizes,
    "overlap_mode": lambda _, value, __: arguments.per_head(value, arguments.checked_overlap_mode),
    "padding_mode": lambda _, value, __: arguments.checked_padding_mode(value),
    "part": _part,
    "patch_starts": lambda name, value, _: arguments.one_of(name, value, PATCH_STARTS),
    "patch_size": _patch_size,
    "positive": _positive,
    "postprocess": _postprocess,
    "preprocess": lambda _, value, volume: checked_preprocess(value, stored_volume(volume).dtype, volume.channels),
    "progress": _progress,
    "shards": _shards,
    "share": lambda name, value, _: arguments.share(name, value),
    "sizes": _sizes,
    "spacing": lambda _, value, volume: ModelGrid.of(value, volume),
    "switch": lambda name, value, _: arguments.switch(name, value),
    "work": _work,
}
"""Checks by the names that fields give them."""


def _code(value: Any) -> Any:
    """Return the digest of a function, the JSON of a step of preprocessing, and a name as it is; of several, a list."""
    if isinstance(value, tuple):
        return [_code(one) for one in value]
    if isinstance(value, Step):
        return step_json(value)
    return model_fingerprint(value) if callable(value) else value


IDENTITIES: dict[str, Callable[[Any], Any]] = {
    "augmentation": lambda value: None if value is None else value.to_json(),
    "code": _code,
    "code_per_head": lambda value: arguments.per_head(value, _code),
    "device_type": lambda value: torch.device(value).type,
    "grid": lambda grid: None if grid is None else grid.to_json(),
    "json_number": arguments.json_number,
    "mask": lambda mask: None if mask is None else mask.signature,
    "shards": lambda value: "none" if value == () else value,
}
"""Functions of a checked value that return what identifies a run, by the names that fields give them."""
