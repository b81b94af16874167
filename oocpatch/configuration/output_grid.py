"""Outputs that are made of the output of another run: resampled to the grid of the volume, or labelled.

```text
 volume --spacing--> patches --model--> scores on the model's grid        a run of its own, in the workspace
                                          |
                                          v  resampled, postprocessed, written block by block: the run of the output
                                        output on the volume's grid

 volume --> patches --model--> classes --label--> output
```

So no more than a block of scores is in memory at a time, and either run resumes where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from oocpatch.configuration.checks import IDENTITIES
from oocpatch.configuration.make_plan import make_plan
from oocpatch.configuration.options import DataOptions, PatchOptions
from oocpatch.configuration.run_config import RunConfig
from oocpatch.errors import PlanTooLarge
from oocpatch.models.loading import load_models
from oocpatch.models.options import ModelOptions
from oocpatch.models.postprocessing import around_resampling, classes_of
from oocpatch.outputs.coordinates import scaled_coords
from oocpatch.outputs.output import array_paths, channel_position
from oocpatch.planning.arguments import json_number
from oocpatch.planning.box import Ints
from oocpatch.planning.heads import Head
from oocpatch.planning.labelling import DTYPES, Labelling
from oocpatch.planning.plan import Plan, human
from oocpatch.storage.paths import StoragePath
from oocpatch.volumes.axes import Axes
from oocpatch.volumes.resampling import AxisMap, resampled
from oocpatch.volumes.sources import Source, array_source
from oocpatch.volumes.stack import stacked
from oocpatch.volumes.volume import Volume

SCORES = "scores.zarr"
"""Name of the scores on the model's grid in the workspace of the output."""

CLASSES = Labelling(None, connectivity=1, per_class=True, min_size=0)
"""The rule of postprocess `label`: connected voxels of one class, which touch by their faces."""

BLOCKS_IN_MEMORY = 64
"""Patches of scores that the limit of memory should hold at least."""

LEAST_SIDE = 8
"""Voxels of the side of a patch of scores that is not halved any more."""


@dataclass(frozen=True)
class SplitHeads:
    """Split channels into the outputs that they were stacked from; the model of the run of the output.

    Attributes:
        heads: name, number of channels and dtype of each.
    """

    heads: tuple[tuple[str, int, str], ...]

    def __call__(self, patches: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the outputs of a batch of patches."""
        sizes = [channels for _, channels, _ in self.heads]
        parts = torch.split(patches, sizes, dim=1)
        return {name: part.to(getattr(torch, dtype)) for (name, _, dtype), part in zip(self.heads, parts, strict=True)}


def on_output_grid(config: RunConfig, made: Plan | None) -> tuple[RunConfig, Plan]:
    """Return the configuration and the plan of the run of the output, with the plan of its scores.

    Args:
        config: the configuration of the call.
        made: the plan of the run of the output, if there is one; default: it is made.

    Raises:
        ValueError, PlanTooLarge: as `make_plan`, and for outputs that cannot be resampled.
    """
    plan = _plan_of_scores(config) if made is None else Plan.from_json(made.scores)
    config = config.with_sizes(plan.patch_size[config.looped :], plan.batch_size)
    config = _label_config(config, plan) if config.labels_result else _output_config(config, plan)
    if made is not None:
        return config, made
    output_plan = make_plan(config)
    limit, disk = config.limits.max_disk, output_plan.projected_disk + scores_bytes(plan) + plan.projected_disk
    if limit is not None and disk > limit:
        raise PlanTooLarge(
            f"the workspace needs {human(disk, up=True)} (scores of the model {human(scores_bytes(plan))}) but "
            f"max_disk is {human(limit)}; raise max_disk, or pass output_grid='model', and no postprocess 'label'"
        )
    return config, replace(output_plan, scores=plan.to_json(), projected_disk=disk)


def _plan_of_scores(config: RunConfig) -> Plan:
    plan = make_plan(_scores_config(config))
    if config.labels_result or (not config.skips and config.crop is None):
        return plan
    # NaN, where there is one, so that the voxels without scores are known after they are resampled
    has_nan = all(np.dtype(head.out_dtype).kind == "f" for head in plan.heads)
    fill = math.nan if has_nan else config.outputs.output_fill
    return replace(plan, output_fill=fill, parameters={**plan.parameters, "output_fill": json_number(fill)})


def scores_bytes(plan: Plan) -> int:
    """Return the bytes of the scores of a plan, not compressed."""
    frames = zip(plan.heads, plan.frames, strict=True)
    return sum(math.prod(frame.grid.shape) * head.out_voxel_bytes for head, frame in frames)


def _scores_config(config: RunConfig, plan: Plan | None = None) -> RunConfig:
    """Return the configuration of the run that computes the scores, whose place is still to be set.

    Args:
        config: the configuration of the call.
        plan: the plan of that run, if there is one.
    """
    plain: dict[str, Any] = {"output_dtype": None, "output_chunks": None, "output_shards": None}
    plain |= {"output_format": "zarr", "output_fill": 0.0}
    outputs = replace(config.outputs, **plain, export=None)
    postprocess: Any = classes_of(config.model.postprocess)
    if not config.labels_result:
        postprocess, _ = around_resampling(config.model.postprocess)
        plain["postprocess"] = IDENTITIES["code_per_head"](postprocess)
    parameters = {**config.parameters, **plain}
    return replace(
        config,
        target=None,
        parameters=parameters if plan is None else plan.parameters,
        model=replace(config.model, postprocess=postprocess),
        outputs=outputs if plan is None else replace(outputs, output_fill=plan.output_fill),
        execution=replace(config.execution, overwrite=False, resume=True),
    )


def with_scores(config: RunConfig, scores: RunConfig, plan: Plan) -> RunConfig:
    """Return the configuration of the run of an output with the scores that it reads.

    Args:
        config: that configuration, before the scores were there.
        scores: the configuration of the run that computed them.
        plan: its plan.
    """
    if config.target is None:
        volume = _stored_head(scores, plan, scores.output)
    else:
        volume = _scores_volume(scores, config.target, plan, scores.output)
    return replace(config, scores=scores, volume=volume)


def _label_config(config: RunConfig, plan: Plan) -> RunConfig:
    """Return the configuration of the run of an output that is labelled: its volume is the classes.

    Args:
        config: the configuration of the call.
        plan: the plan of the run that computes the classes.

    Raises:
        ValueError: for a model of several outputs.
    """
    names = [*(head.name for head in plan.heads), *(vectors.name for vectors in plan.vectors)]
    if len(names) > 1 or plan.vectors:
        raise ValueError(
            f"postprocess 'label' needs a model of one output per voxel, got {', '.join(names)}; label one of them "
            "afterwards, with oocpatch.label"
        )
    volume = _stored_head(config, plan, None)
    model = _plain_model(config, "identity")
    return replace(
        config,
        scores=_scores_config(config, plan),
        volume=volume,
        labelling=CLASSES,
        context=None,
        models=load_models("identity"),
        model_inputs=(),
        data=DataOptions(),
        model=model,
        patches=PatchOptions(patch_size=(1,) * volume.spatial_ndim, patch_overlap=(0,) * volume.spatial_ndim),
        outputs=replace(config.outputs, output_dtype=config.outputs.output_dtype or DTYPES[0]),
        limits=replace(config.limits, block_shape=None),
    )


def _plain_model(config: RunConfig, model: Any) -> ModelOptions:
    """Return the options of a model with nothing around it but the postprocess."""
    return replace(
        config.model,
        model=model,
        weights=None,
        model_args=None,
        model_id=SCORES,
        preprocess=None,
        augment=None,
        postprocess=None if config.labels_result else around_resampling(config.model.postprocess)[1],
        device="cpu",
        autocast=False,
        channels_last=False,
        compile=None,
    )


def _stored_head(config: RunConfig, plan: Plan, scores: StoragePath | None) -> Volume:
    """Return the output of a run of one head as a volume, with the coordinates that it has.

    Args:
        config: a configuration with the volume that it was computed from.
        plan: the plan of that run.
        scores: its output; None: it is not there yet.
    """
    volume, (head,) = config.volume, plan.heads
    stored = _head_volume(volume, plan, 0, scores, volume.names)
    image = None if head.scaled else volume.source.image
    coords = scaled_coords(volume, plan, head)
    source = replace(stored.source, coords=coords, attrs=volume.source.attrs, image=image)
    return Volume(source, stored.axes)


def _head_volume(volume: Volume, plan: Plan, number: int, scores: StoragePath | None, order: Sequence[str]) -> Volume:
    """Return one output of a run as a volume without coordinates.

    Args:
        volume: the volume that it was computed from.
        plan: the plan of that run.
        number: position of the output among the heads.
        scores: the output of the run; None: it is not there yet.
        order: names of the axes in the order of boxes.
    """
    head, frame, position = plan.heads[number], plan.frames[number], channel_position(plan)
    names = _with_channel(head, position, plan.axes, head.channel_axis)
    if scores is None:
        source = Source(
            shape=_with_channel(head, position, frame.grid.shape, head.out_channels),
            dtype=np.dtype(head.out_dtype),
            chunks=_with_channel(head, position, head.chunks, 1),
            load=_not_there,
        )
    else:
        source = array_source(scores, array_paths(plan)[number])
    roles = dict(zip(volume.axes.names, volume.axes.roles, strict=True))
    axes_roles = tuple("c" if name == head.channel_axis else roles[name] for name in names)
    axes = Axes(names, axes_roles, tuple(names.index(name) for name in order))
    return Volume(replace(source, names=names, coords={}, attrs={}), axes)


def _output_config(config: RunConfig, plan: Plan) -> RunConfig:
    """Return the configuration of the run of the output: its volume is the scores, and its model splits them.

    Args:
        config: the configuration of the call.
        plan: the plan of the run that computes the scores.
    """
    if config.target is None or plan.vectors:
        raise ValueError("output_grid must be 'model' for a model that returns vectors of patches")
    volume = _scores_volume(config, config.target, plan, None)
    heads = SplitHeads(tuple((head.name, head.out_channels, head.out_dtype) for head in plan.heads))
    patch = _patch(volume, config.limits.max_memory)
    model = _plain_model(config, heads)
    chunks = config.outputs.output_chunks
    if patch != volume.chunks[-volume.spatial_ndim :]:
        chunks = chunks or patch
    return replace(
        config,
        scores=_scores_config(config, plan),
        volume=volume,
        models=(heads,),
        model_inputs=(),
        data=DataOptions(),
        model=model,
        patches=PatchOptions(patch_size=patch, patch_overlap=(0,) * volume.spatial_ndim, overlap_mode="crop"),
        outputs=replace(config.outputs, output_chunks=chunks, allow_nonfinite=True),
        limits=replace(config.limits, block_shape=None, work="light"),
    )


def _patch(volume: Volume, max_memory: int) -> Ints:
    """Return the spatial size of patches of scores: their chunks, or smaller ones for many channels."""
    patch = list(volume.chunks[-volume.spatial_ndim :])
    voxel = volume.channels * volume.dtype.itemsize
    while math.prod(patch) * voxel > max_memory // BLOCKS_IN_MEMORY and max(patch) > LEAST_SIDE:
        axis = patch.index(max(patch))
        patch[axis] = -(-patch[axis] // 2)
    return tuple(patch)


def _scores_volume(config: RunConfig, target: Volume, plan: Plan, scores: StoragePath | None) -> Volume:
    """Return the scores of all heads, resampled to the grid of the output, as the channels of one volume.

    Args:
        config: a configuration with the model's grid.
        target: a volume on the grid of the output.
        plan: the plan of the run that computes the scores.
        scores: the output of that run; None: it is not there yet.
    """
    if config.data.spacing is None:
        raise ValueError("only scores of a model with a spacing are resampled")
    back = config.data.spacing.back(target, config.crop)
    parts = []
    for number, head in enumerate(plan.heads):
        part, maps = _head_volume(config.volume, plan, number, scores, target.names), []
        for name, n in zip(target.names, target.shape, strict=True):
            times, per = head.scale[plan.axes.index(name)]
            axis_map = back.get(name, AxisMap(n)).after(times / per, (times / per - 1) / 2)
            maps.append(replace(axis_map, order=0) if head.labels else axis_map)
        parts.append(resampled(part, maps))
    return stacked(parts, target)


def _with_channel(head: Head, position: int, values: Sequence[Any], channel: Any) -> tuple[Any, ...]:
    """Return values per axis of a head's array: with one for its channels, if it has an axis of them."""
    return tuple(values) if head.channel_axis is None else (*values[:position], channel, *values[position:])


def _not_there(_selection: tuple[slice, ...]) -> Any:
    raise RuntimeError("the scores are read before they are computed: a fault of oocpatch, please report it")
