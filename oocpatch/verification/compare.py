"""Check `predict` before a long run: compare it with a simple in-memory computation on random boxes of the volume.

A box has a size of a few patches and is cut into the smallest possible blocks, so that seams, borders and blending are
all tested. The reference shares no code with the engine.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from oocpatch.configuration.run_config import settings_of_package
from oocpatch.models import augmentation, preprocessing
from oocpatch.models.loading import Model, load_models
from oocpatch.models.packages.package import load_package
from oocpatch.models.postprocessing import checked_postprocess, joins_voxels, postprocess_of
from oocpatch.models.predictor import Predictor, resolve_device
from oocpatch.models.wrappers import ensemble
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.grid import PatchGrid
from oocpatch.run.predict import plan as plan_run
from oocpatch.verification.package_example import PackageReport, check_example
from oocpatch.verification.reference import reference_scores
from oocpatch.volumes.model_grid import ModelGrid, with_orientation
from oocpatch.volumes.stack import parts_of, stacked_on_grid
from oocpatch.volumes.volume import Volume, spatial_sizes

Array = np.ndarray[Any, Any]

ROUNDING = {"float64": 1e-5, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
"""Allowed difference as a share of the largest score: sums are float32, and other batch sizes round differently."""


@dataclasses.dataclass(frozen=True, slots=True)
class BoxReport:
    """Comparison of one box."""

    start: Ints
    """First voxel of the box on looped and spatial axes."""
    shape: Ints
    patches: int
    blocks: int
    largest_absolute: float
    """Largest difference: of integer outputs beyond rounding, of `argmax` in the score of the chosen class."""
    largest_relative: float
    """The same as a share of the largest score."""
    tolerance: float
    """Allowed absolute difference; 0 for `crop`, which moves values without arithmetic."""

    @property
    def passed(self) -> bool:
        return self.largest_absolute <= self.tolerance


@dataclasses.dataclass(frozen=True, slots=True)
class CheckReport:
    """Comparison of all boxes. Prints as a table."""

    boxes: tuple[BoxReport, ...]

    @property
    def passed(self) -> bool:
        """True if no box differs by more than its tolerance."""
        return all(box.passed for box in self.boxes)

    def to_json(self) -> str:
        """Return the report as a JSON object."""
        boxes = [{**dataclasses.asdict(box), "passed": box.passed} for box in self.boxes]
        return json.dumps({"passed": self.passed, "boxes": boxes}, indent=1)

    def __str__(self) -> str:
        lines = [
            f"{'start':<20} {'shape':<20} {'patches':>7} {'blocks':>6} {'absolute':>9} {'relative':>9} {'allowed':>9}"
        ]
        for box in self.boxes:
            start, shape = ",".join(map(str, box.start)), "x".join(map(str, box.shape))
            numbers = f"{box.largest_absolute:9.2e} {box.largest_relative:9.2e} {box.tolerance:9.2e}"
            verdict = "PASS" if box.passed else "FAIL"
            lines.append(f"{start:<20} {shape:<20} {box.patches:7} {box.blocks:6} {numbers} {verdict}")
        return "\n".join([*lines, "PASS" if self.passed else "FAIL"])

    __repr__ = __str__


def check(
    volume: Any, model: Any = None, *, boxes: int = 3, seed: int = 0, **predict_kwargs: Any
) -> CheckReport | PackageReport:
    """Compare `predict` with a simple in-memory computation on random boxes of a volume.

    Args:
        volume: as for `predict`; or, without a model, the spec of a model package, which is compared with its own test
            tensors.
        model: as for `predict`, with `weights`, `model_args` and `trust_pickle`.
        boxes: number of boxes to draw.
        seed: seed of the random boxes.
        **predict_kwargs: the arguments of `predict`. `block_shape` and `output_chunks` are made small unless given.
            Statistics of the whole volume that a `preprocess` needs are those of each box.

    Raises:
        ValueError: as in `predict`, for arguments that do not fit the volume or the model.

    >>> import torch
    >>> check(np.ones((40, 40), np.float32), torch.nn.Identity(), boxes=1, patch_size=8, patch_overlap=4).passed
    True
    """
    if model is None:
        given = {name: predict_kwargs[name] for name in ("trust_pickle", "device") if name in predict_kwargs}
        return check_example(volume, **given)
    if isinstance(volume, Mapping) or predict_kwargs.get("context_level") is not None:
        raise ValueError("check compares models of one input: pass no dict of volumes, and no context_level")
    loading = {name: predict_kwargs.pop(name, None) for name in ("weights", "model_args")}
    trust = bool(predict_kwargs.pop("trust_pickle", False))
    device = predict_kwargs.get("device", "auto")
    loading["eval_mode"] = predict_kwargs.get("eval_mode", True)
    package = load_package(model, trust_pickle=trust, device=device)
    models = load_models(package or model, **loading, trust_pickle=trust, device=device)
    predict_kwargs = with_orientation(
        predict_kwargs | settings_of_package(package, predict_kwargs),
        by_name=package is not None and package.names_axes,
    )
    predict_kwargs.pop("orientation", None)
    axes, level = predict_kwargs.pop("axes", None), predict_kwargs.pop("level", 0)
    if isinstance(volume, list | tuple):
        source = stacked_on_grid({name: Volume(part, axes, level) for name, part in parts_of(volume).items()})
    else:
        source = Volume(volume, axes, level)
    if (grid := ModelGrid.of(predict_kwargs.pop("spacing", None), source)) is not None:
        source = grid.over(source)  # what is compared are the scores on that grid
    predict_kwargs.pop("output_grid", None)
    generator = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory(prefix="oocpatch-check-") as folder:
        settings = _settings(source, _with_sizes(source, models, predict_kwargs, Path(folder)))
        drawn = [_draw(source, settings["patch_size"], settings["patch_overlap"], generator) for _ in range(boxes)]
        reports = [_compare(source, box, models, settings, Path(folder) / str(n)) for n, box in enumerate(drawn)]
    return CheckReport(tuple(reports))


def _with_sizes(source: Volume, models: Sequence[Model], arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the arguments with the sizes that `predict` chooses for the whole volume."""
    sizes = [arguments.get(name) for name in ("patch_size", "batch_size")]
    if not any(isinstance(size, str) and size == "auto" for size in sizes):
        return arguments
    plan = plan_run(source, list(models), folder / "sizes", **arguments)
    return {**arguments, "patch_size": plan.patch_size[-source.spatial_ndim :], "batch_size": plan.batch_size}


def _settings(source: Volume, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `predict` for a box: sizes per spatial axis, smallest blocks, no progress."""
    if arguments.get("patch_size") is None:
        raise TypeError("check needs patch_size, as predict does")
    settings = {"patch_overlap": 0, "overlap_mode": "hann", "batch_size": 1, "progress": False, **arguments}
    settings["postprocess"] = checked_postprocess(settings.get("postprocess"))
    if joins_voxels(settings["postprocess"]):
        raise ValueError("postprocess must not be 'label' for check: compare the classes, such as those of 'argmax'")
    size, overlap = (spatial_sizes(name, settings[name], source) for name in ("patch_size", "patch_overlap"))
    PatchGrid.of(source.shape[-source.spatial_ndim :], size, overlap)  # checks the sizes
    settings |= {"patch_size": size, "patch_overlap": overlap}
    settings.setdefault("output_chunks", tuple(max(1, -(-s // 2)) for s in size))
    settings.setdefault("block_shape", size)
    return settings


def _draw(source: Volume, size: Ints, overlap: Ints, generator: np.random.Generator) -> Box:
    """Draw a box of two to three patches per axis, and at least two whole patches on one axis, for two blocks."""
    loops = len(source.shape) - len(size)
    start, stop = [], []
    longest = int(generator.integers(len(size)))
    for axis, length in enumerate(source.shape, -loops):
        extent = 1
        if axis >= 0:
            patch, stride = size[axis], size[axis] - overlap[axis]
            extent = max(patch + stride, 2 * patch if axis == longest else 0) + int(generator.integers(stride))
        extent = min(extent, length)
        # Mistakes are most likely at borders: half of the boxes touch one on each axis.
        starts = [0, length - extent, *generator.integers(length - extent + 1, size=2)]
        start.append(int(starts[generator.integers(4)]))
        stop.append(start[-1] + extent)
    return Box(tuple(start), tuple(stop))


def _compare(source: Volume, box: Box, models: Sequence[Model], settings: dict[str, Any], folder: Path) -> BoxReport:
    """Compare one box."""
    ndim = source.spatial_ndim
    data = source.read(box).reshape(source.channels, *box.shape[-ndim:])
    axes, stored = source.names[-ndim:], data[0]
    if source.channel_axis is not None:
        axes, stored = (source.channel_axis, *axes), data
    # On disk and in chunks, like the volume itself.
    chunks = tuple(max(1, -(-n // 2)) for n in stored.shape)
    zarr.create_array(folder / "volume", data=stored, chunks=chunks)
    plan = plan_run(folder / "volume", list(models), folder / "output", axes=axes, **settings)
    mode = plan.heads[0].mode if plan.heads else ""
    if (
        len(plan.heads) != 1
        or plan.vectors
        or plan.heads[0].scaled
        or any(plan.context)
        or mode in {"max", "vote", "instances"}
    ):
        raise ValueError("check compares models that give one output of the patch's size, blended or cropped")
    output = np.asarray(plan.run())
    model = _whole_model(models, Volume(folder / "volume", axes), settings)
    device = resolve_device(settings.get("device", "auto"))
    eval_mode = settings.get("eval_mode", True)
    with Predictor(model, device=device, eval_mode=eval_mode).ready():  # which puts the number of threads back
        torch.set_num_threads(plan.torch_threads)  # with another one it rounds differently
        scores = reference_scores(
            data,
            model,
            patch_size=settings["patch_size"],
            patch_overlap=settings["patch_overlap"],
            patch_starts=plan.patch_starts,
            overlap_mode=mode,
            padding_mode=plan.padding_mode,
            fill=plan.fill,
            device=device,
            autocast=settings.get("autocast", False),
        )
    absolute, scale = _difference(output.reshape(-1, *data.shape[1:]), scores, settings.get("postprocess"))
    exact = mode == "crop" and plan.batch_size == 1 and output.dtype == scores.dtype
    return BoxReport(
        start=box.start,
        shape=box.shape,
        patches=plan.patches,
        blocks=plan.blocks,
        largest_absolute=absolute,
        largest_relative=absolute / scale if scale else absolute,
        tolerance=0.0 if exact and settings.get("postprocess") is None else _tolerance(model, settings, output) * scale,
    )


def _whole_model(models: Sequence[Model], volume: Volume, settings: dict[str, Any]) -> Model:
    """Return the model with its preprocessing, augmentation and ensemble."""
    axes = volume.names[-volume.spatial_ndim :]
    preprocess = preprocessing.checked_preprocess(settings.get("preprocess"), volume.dtype, volume.channels)
    statistics = preprocessing.preprocess_statistics(preprocess, volume, 1 << 28, progress=False)
    transforms = augmentation.flips_and_rotations(
        augmentation.checked_augmentation(settings.get("augment"), axes), axes, settings["patch_size"]
    )
    return ensemble(models, preprocessing.preprocess_function(preprocess, statistics), transforms)


def _difference(output: Array, scores: Array, postprocess: Any) -> tuple[float, float]:
    """Return the largest difference of the output `(C, *box)` from the reference, and the scale of the scores."""
    scores = scores.astype(np.float64)
    if postprocess == "argmax":
        # Classes with equal scores may be swapped: compare the score of the chosen class with the best score.
        chosen = np.take_along_axis(scores, output.astype(np.int64), axis=0)
        return float((scores.max(axis=0) - chosen[0]).max()), _largest(scores)
    if isinstance(postprocess, str) and postprocess.startswith("threshold"):
        threshold = float(postprocess.partition(":")[2] or 0.5)  # a score near it may round to either side
        distance = np.abs(scores - threshold).max(initial=0.0, where=(scores > threshold) != output)
        return float(distance), _largest(scores)
    expected = _postprocessed(scores, postprocess)
    if expected.shape != output.shape:
        raise ValueError(f"predict gave shape {output.shape} where the reference has {expected.shape}")
    finite = np.isfinite(expected) & np.isfinite(output)
    if not np.array_equal(expected[~finite], output[~finite].astype(np.float64), equal_nan=True):
        return float("inf"), _largest(expected)
    if np.issubdtype(output.dtype, np.integer):
        limits = np.iinfo(output.dtype)
        distance = np.abs(np.clip(expected, limits.min, limits.max) - output) - 0.5
        return float(max(distance.max(initial=0.0, where=finite), 0.0)), _largest(expected)
    return float(np.abs(expected - output).max(initial=0.0, where=finite)), _largest(expected)


def _postprocessed(scores: Array, postprocess: Any) -> Array:
    if postprocess == "softmax":
        powers = np.exp(scores - scores.max(axis=0))
        return np.asarray(powers / powers.sum(axis=0))
    if postprocess == "sigmoid":
        return np.asarray(1 / (1 + np.exp(-scores)))
    if postprocess is not None:
        postprocess = postprocess_of(postprocess, "", "hann") or postprocess
        return np.asarray(postprocess(torch.from_numpy(scores.astype(np.float32)))).astype(np.float64)
    return scores


def _largest(values: Array) -> float:
    return float(np.abs(values).max(initial=0.0, where=np.isfinite(values)))


def _tolerance(model: Model, settings: dict[str, Any], output: Array) -> float:
    """Return the tolerance as a share of the largest score, by the coarsest dtype that the values went through."""
    kinds = {str(output.dtype)}
    if isinstance(model, torch.nn.Module):
        kinds |= {str(item.dtype).removeprefix("torch.") for item in model.parameters() if item.is_floating_point()}
    if settings.get("autocast"):
        kinds.add("bfloat16")
    elif resolve_device(settings.get("device", "auto")) != "cpu":
        kinds.add("float16")  # convolutions on a GPU round as coarsely by default
    return max(ROUNDING.get(kind, ROUNDING["float32"]) for kind in kinds)
