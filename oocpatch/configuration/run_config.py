"""The configuration of a run: the checked arguments of `predict`. Reads metadata only; nothing is written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from oocpatch.configuration.checks import AUTO, CHECKS, IDENTITIES
from oocpatch.configuration.options import (
    GROUPS,
    OPTIONS,
    DataOptions,
    ExecutionOptions,
    Limits,
    OutputOptions,
    PatchOptions,
)
from oocpatch.engine.patch_selection import Selection
from oocpatch.errors import RunMismatch
from oocpatch.models.compilation import check_compilation
from oocpatch.models.loading import Model
from oocpatch.models.options import ModelOptions
from oocpatch.models.packages.package import ModelPackage, Refused, check_axes, load_package
from oocpatch.models.pipeline import Identity, Pipeline, identity_of, load
from oocpatch.models.postprocessing import joins_voxels
from oocpatch.models.preprocessed_volume import Normalization, interpolates_beyond, nonzero_box
from oocpatch.models.preprocessing import needs_statistics
from oocpatch.models.reuse import loaded
from oocpatch.outputs.ome_labels import format_in_parent
from oocpatch.outputs.ome_zarr import checked_output_format
from oocpatch.outputs.record import OutputRecord
from oocpatch.planning.arguments import check_fits
from oocpatch.planning.blocks import BlockGrid
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.grid import PatchGrid
from oocpatch.planning.heads import patch_grid
from oocpatch.planning.labelling import Labelling
from oocpatch.planning.plan import differences
from oocpatch.planning.planner import chosen_overlap
from oocpatch.provenance import is_given, run_settings
from oocpatch.storage.locks import beside
from oocpatch.storage.paths import StoragePath, check_is_zarr, output_path
from oocpatch.volumes.cf_decoding import decoded
from oocpatch.volumes.content import CONTEXT, INTENSITY, LABELS, MASK, VOLUME
from oocpatch.volumes.model_grid import ModelGrid, with_orientation
from oocpatch.volumes.resampling import cropped, stored_volume
from oocpatch.volumes.stack import grid_differences, parts_of, stacked_on_grid
from oocpatch.volumes.volume import Volume, refuse_overlap


@dataclass(frozen=True)
class RunConfig:
    """The checked arguments of `predict`.

    Attributes:
        volume: the volume to read.
        output: where the result is written.
        workspace: where unfinished work lies.
        models: the loaded models; several are averaged.
        data, model, patches, outputs, limits, execution: the groups of options.
        parameters: the fingerprint: the values that say whether two runs are the same, by name.
        settings: the arguments as they were given, as JSON.
        knows_model: whether the fingerprint covers all that the model computes with.
        target: the volume whose grid the output has, where the model takes another one; None: they are the same.
        scores: the configuration of the run whose output this one resamples, see `output_grid`; None: there is none.
        package: the model package, if the model is one.
        of_package: the arguments that the package gave.
        labelling: what objects are, of a call of `label`; None: the call is another one.
        table: the columns of a table, of a call of `objects`; None: the call is another one.
        intensity: what a table measures besides, over the labels that are its volume.
        normalization: the package's preprocess, where the volume is already preprocessed.
        model_inputs: names and numbers of channels of the tensors that the model is called with; none: with one.
        context: the level of which patches are the model's context; None: there is none.
    """

    volume: Volume
    output: StoragePath
    workspace: StoragePath
    models: tuple[Model, ...]
    data: DataOptions
    model: ModelOptions
    patches: PatchOptions
    outputs: OutputOptions
    limits: Limits
    execution: ExecutionOptions
    parameters: Mapping[str, Any]
    settings: Mapping[str, Any]
    knows_model: bool = False
    labelling: Labelling | None = None
    target: Volume | None = None
    scores: RunConfig | None = None
    package: ModelPackage | None = None
    of_package: Mapping[str, Any] = field(default_factory=dict)
    table: Mapping[str, Any] | None = None
    intensity: Volume | None = None
    normalization: Normalization | None = None
    model_inputs: tuple[tuple[str, int], ...] = ()
    context: Volume | None = None

    @classmethod
    def of(cls, volume: Any, model: Any, output: Any, **arguments: Any) -> RunConfig:
        """Check the arguments of `predict`.

        Raises:
            TypeError: for unknown or missing arguments, and values of a wrong type.
            ValueError: for the first value that breaks a rule.
        """
        arguments = {"model": model, **arguments}
        required = [name for name, f in OPTIONS.items() if f.default is dataclasses.MISSING]
        if unknown := sorted(arguments.keys() - OPTIONS.keys()):
            raise TypeError(f"predict and plan have no argument {', '.join(unknown)}")
        if missing := [name for name in required if name not in arguments]:
            raise TypeError(f"predict and plan need {', '.join(missing)}")
        trust = bool(arguments.get("trust_pickle"))
        device = arguments.get("device", "auto")
        load_it = functools.partial(load_package, model, trust_pickle=trust, device=device)
        package = loaded(("package", model, trust, device), load_it)
        of_package = settings_of_package(package, arguments)
        overriding = {n: arguments[n] for n in package.settings if is_given(arguments.get(n))} if package else {}
        settings = run_settings({"volume": volume, "output": output, **_without_defaults(arguments), **overriding})
        arguments = with_orientation(arguments | of_package, by_name=package is not None and package.names_axes)
        target = output_path("output", output)
        check_is_zarr("output", target)
        workspace = arguments.get("workspace")
        place = beside(target, "") if workspace is None else output_path("workspace", workspace)
        volumes, own, data, arguments, normalization = _read_volume(volume, arguments, package, of_package)
        for name, path in (("output", target), ("workspace", place)):
            for each in volumes.values():
                refuse_overlap(name, path, each)
            path.check_writable(name)
        context = _context(volume, data, arguments)
        named = volumes if isinstance(volume, dict) else {} if context is None else {"": data, "context": context}
        groups = {name: _checked_group(group, arguments, data) for name, group in GROUPS.items()}
        outputs = groups["outputs"]
        is_moved = own is not None and outputs.output_grid == "volume"
        output_format = checked_output_format(
            format_in_parent(target, outputs.output_format), own if own is not None and is_moved else data
        )
        groups["outputs"] = replace(outputs, output_format=output_format)
        config = cls(
            volume=data,
            output=target,
            workspace=place,
            models=load(groups["model"], package, data.names[-data.spatial_ndim :]),
            parameters={},
            settings=settings,
            target=own if is_moved else None,
            package=package,
            of_package=of_package,
            normalization=normalization,
            model_inputs=tuple((name, each.channels) for name, each in named.items()),
            context=context,
            **groups,
        )
        config._check_together()
        identity = identity_of(config.model, config.models)
        parameters = config._fingerprint(identity)
        config = replace(config, parameters=parameters, knows_model=identity.is_whole)
        if config.patches.patch_size:
            config.check_patches()
        return config

    def _check_together(self) -> None:
        """Check what depends on several arguments.

        Raises:
            ValueError: naming the arguments that do not go together.
        """
        patches = self.patches
        if patches.patch_size:
            PatchGrid.of(self.volume.shape, self.patch_size, self.patch_overlap)
        check_compilation(
            self.models,
            self.volume.spatial_ndim,
            channels_last=self.model.channels_last,
            compile_mode=self.model.compile,
            device=self.model.device,
        )
        if torch.device(self.model.device).type == "mps" and self.volume.dtype == np.float64:
            raise ValueError(
                "device must not be 'mps' for a volume of float64, which it has not; convert it, or pass 'cpu'"
            )
        if patches.padding_mode == "constant":
            check_fits("fill", patches.fill, str(self.volume.dtype))
        if self.finds_objects:
            self._check_objects()
        if self.labels_result:
            self._check_labels()
        if self.finds_objects and self.target is not None:
            raise ValueError("output_grid must be 'model' for overlap_mode 'instances': objects are not resampled")
        if self.execution.processes and self.execution.client is not None:
            raise ValueError("processes must be False with a client: its workers are the processes")
        if self.execution.processes and self.execution.workers is None:
            raise ValueError("processes=True needs their number: pass workers=N")
        if self.execution.part is not None and self.execution.is_distributed:
            kind = "processes" if self.execution.processes else "a client"
            raise ValueError(f"part must be None with {kind}: parts are for jobs without a scheduler")
        if self.execution.part is not None and self.execution.update:
            raise ValueError("update must be False with part: update the output in one call, then go on in parts")
        if self.execution.part is not None and self.execution.overwrite:
            raise ValueError(
                "overwrite must be False with part: each part would delete the others' work; delete the output"
            )

    def _check_objects(self) -> None:
        """Refuse what makes no sense around a model that returns objects.

        Raises:
            ValueError: naming the argument.
        """
        if len(self.models) > 1:
            raise ValueError("model must be one model for overlap_mode 'instances': objects have no mean, got a list")
        if self.model.augment is not None:
            raise ValueError("augment must be None for overlap_mode 'instances': objects have no mean")
        if not any(self.patches.patch_overlap):
            raise ValueError(
                "patch_overlap must not be 0 for overlap_mode 'instances': objects are matched where patches overlap; "
                "let it be as long as an object"
            )

    def _check_labels(self) -> None:
        """Refuse what does not go with a postprocess that labels.

        Raises:
            ValueError: naming the argument.
        """
        if self.target is not None:
            raise ValueError("output_grid must be 'model' for postprocess 'label': label what was resampled afterwards")
        if self.outputs.output_fill != 0:
            raise ValueError(f"output_fill must be 0 for postprocess 'label', got {self.outputs.output_fill}")
        dtype = self.outputs.output_dtype
        if dtype is not None and (isinstance(dtype, Mapping) or np.dtype(dtype).kind not in "iu"):
            raise ValueError(f"output_dtype must be of integers for postprocess 'label', which hold ids, got {dtype!r}")

    @property
    def labels_result(self) -> bool:
        """Return whether connected voxels of the result are labelled."""
        postprocess = self.model.postprocess
        return any(map(joins_voxels, postprocess.values() if isinstance(postprocess, Mapping) else [postprocess]))

    @property
    def is_made_of_scores(self) -> bool:
        """Return whether the output is made of that of another run, which is `scores` once it is known."""
        return self.scores is None and (self.target is not None or self.labels_result)

    @property
    def finds_objects(self) -> bool:
        """Return whether an output of the model is labels of objects."""
        mode = self.patches.overlap_mode
        return "instances" in (mode.values() if isinstance(mode, Mapping) else [mode])

    def _fingerprint(self, model: Identity) -> dict[str, Any]:
        """Return the values that say whether two runs are the same, by the names of the parameters."""
        box = self.data.box
        values: dict[str, Any] = {
            "volume": stored_volume(self.volume).signature,
            "axes": list(self.volume.axes.names),
            "model": model.value,
            "patch_size": self.patches.patch_size or AUTO,
            "batch_size": self.patches.batch_size or AUTO,
            "box": None if box is None else [list(box.start[self.looped :]), list(box.stop[self.looped :])],
            "output_format": self.outputs.output_format,
            "torch": torch.__version__.split("+")[0],
        }
        for group in (self.data, self.model, self.patches, self.outputs):
            for f in fields(group):
                identity = f.metadata["identity"]
                value = getattr(group, f.name)
                if identity:
                    values[f.name] = value if identity is True else IDENTITIES[identity](value)
        if not self.finds_objects:
            del values["match"]
        if self.normalization is not None:
            values["preprocess"] = self.normalization.to_json()
        if self.model_inputs:
            values["inputs"] = [list(part) for part in self.model_inputs]
        return {name: value for name, value in values.items() if name not in _OMITTED or value != _OMITTED[name]}

    @property
    def looped(self) -> int:
        """Number of looped axes."""
        return len(self.volume.shape) - self.volume.spatial_ndim

    @property
    def patch_size(self) -> Ints:
        """Size of a patch per axis, 1 for looped ones; empty where it is still to be chosen."""
        return (*(1,) * self.looped, *self.patches.patch_size) if self.patches.patch_size else ()

    @property
    def patch_overlap(self) -> Ints:
        """Overlap per axis, 0 for looped ones."""
        return (*(0,) * self.looped, *self.patches.patch_overlap)

    @property
    def inputs(self) -> dict[str, Volume]:
        """The volumes that blocks read, by the names of their parameters."""
        mask = None if self.data.mask is None else self.data.mask.volume
        volumes = {VOLUME: self.volume, MASK: mask, CONTEXT: self.context}
        volumes = volumes if self.table is None else {LABELS: self.volume, INTENSITY: self.intensity}
        return {name: volume for name, volume in volumes.items() if volume is not None}

    @property
    def selection(self) -> Selection:
        """The patches to compute."""
        return Selection(self.data.mask, self.data.box)

    @property
    def skip_value(self) -> float | None:
        """The value of voxels that were never written, where patches of nothing else are skipped."""
        if not self.data.skip_empty:
            return None
        source = stored_volume(self.volume).source
        array = source.array
        value = None if array is None else array.fill_value
        value = np.asarray(0 if value is None else value)
        return float(decoded(value, packing) if (packing := source.packing) else value)

    @property
    def skips(self) -> bool:
        """Return whether patches may be skipped."""
        return bool(self.selection) or self.data.skip_empty or self.extent is not None

    @property
    def extent(self) -> tuple[Ints, Ints] | None:
        """Start and stop of the box that evenly spaced patches cover, where the volume is zero without; else None."""
        box = None if self.normalization is None or self.crop is not None else self.normalization.box
        is_blended = self.patches.overlap_mode in ("average", "hann", "gaussian", "nnunet")
        is_used = self.scores is None and self.patches.is_even and is_blended
        return (box.start, box.stop) if box is not None and is_used else None

    @property
    def crop(self) -> Box | None:
        """The box of the volume, zero without, that alone is resampled; None: all of it, or nothing."""
        is_resampled = stored_volume(self.volume) is not self.volume
        return None if self.normalization is None or not is_resampled else self.normalization.box

    @property
    def pipeline(self) -> Pipeline:
        """The models with what is around them."""
        axes = self.volume.names[self.looped :]
        return Pipeline(self.model, self.models, axes, self.patches.patch_size, self.looped, self.model_inputs)

    def check_patches(self) -> None:
        """Refuse patches that the model's file, or what is around the model, rules out.

        Raises:
            ValueError: naming what the model takes.
        """
        spec = self.pipeline.input_spec
        channels = spec.channels or 0 if callable(self.model.preprocess) else self.volume.channels  # it may change them
        spec.validate(channels, self.patches.patch_size)

    def with_sizes(self, patch_size: Ints, batch_size: int) -> RunConfig:
        """Return the same configuration with these sizes where it left them open; `patch_size` is spatial.

        With a patch size that was left open comes an overlap, unless one was given.
        """
        if self.labelling is not None or self.table is not None:  # patches are voxels, which identify no run
            return self
        patches = replace(
            self.patches,
            patch_size=self.patches.patch_size or tuple(patch_size),
            batch_size=self.patches.batch_size or batch_size,
        )
        if self.chooses_overlap and patches.patch_size:
            shape = self.volume.shape[self.looped :]
            patches = replace(patches, patch_overlap=chosen_overlap(patches.patch_size, shape, patches.overlap_mode))
        sizes = {
            "patch_size": patches.patch_size or AUTO,
            "batch_size": patches.batch_size or AUTO,
            "patch_overlap": patches.patch_overlap,
        }
        return replace(self, patches=patches, parameters={**self.parameters, **sizes})

    @property
    def chooses_overlap(self) -> bool:
        """Return whether the overlap is chosen with the patch size."""
        return not self.patches.patch_size and not any(self.patches.patch_overlap)

    def check_same_run(self, record: OutputRecord) -> None:
        """Refuse to continue a run that was started with other arguments.

        Raises:
            RunMismatch: naming each parameter that differs.
        """
        if not (self.patches.patch_size and self.patches.batch_size):  # sizes left open are those that the run has
            sizes = (tuple(record.parameters["patch_size"]), record.parameters["batch_size"])
            self.with_sizes(*sizes).check_same_run(record)
            return
        # parameters that are off are not in the fingerprint
        differing = differences({**dict.fromkeys(record.parameters), **self.parameters}, record.parameters)
        is_of_own_blocks = self.target is None and not self.labels_result
        if not differing and self.limits.block_shape is not None and is_of_own_blocks:
            asked, stored = self._planned_block_shape(record.details), record.details["block_shape"]
            if list(asked) != list(stored):
                differing["block_shape"] = (list(asked), list(stored))
        if " " not in str(record.parameters.get("volume", " ")):  # a digest instead of a signature
            raise RunMismatch(
                f"{self.output} is of an earlier version of oocpatch, which did not record what it read of its input; "
                "it opens and verifies as before, but to compute with this version choose another output, or start "
                "afresh with overwrite=True",
                tuple(differing),
            )
        if differing:
            changes = "; ".join(f"{n}: {_shown(old)} before, {_shown(new)} now" for n, (new, old) in differing.items())
            raise RunMismatch(
                f"{self.output} belongs to a run with other parameters ({changes}); "
                "repeat its call, choose another output, or start afresh with overwrite=True",
                tuple(differing),
            )

    def _planned_block_shape(self, stored: Mapping[str, Any]) -> Ints:
        """Return the block shape asked for, as the planner rounded it."""
        unit = tuple(stored["unit"])
        core = (*unit[: self.looped], *(self.limits.block_shape or ()))
        geometry = (tuple(stored["context"]), tuple(stored["snap"]))
        frame = (self.volume.shape, self.patch_size, self.patch_overlap, *geometry)
        grid = patch_grid(*frame, padded=self.patches.is_padded, even=self.patches.is_even, extent=self.extent)
        return BlockGrid.of(grid, core, unit, 0, crop=False).core_shape[self.looped :]


_OMITTED = {
    "channels_last": False,
    "compile": None,
    "eval_mode": True,
    "patch_starts": "regular",
    "spacing": None,
    "orientation": None,
    "output_grid": "volume",
    "context_level": None,
}
"""Parameters that are left out of the fingerprint where they have these values."""


def _opened(volume: Any, axes: Any, level: int | str) -> Volume:
    if isinstance(volume, list | tuple | dict):
        return stacked_on_grid({name: _opened(part, axes, level) for name, part in parts_of(volume).items()})
    if isinstance(volume, Volume):
        return volume if axes is None else Volume(volume.source, axes, level)
    return Volume(volume, axes, level)


def _read_volume(
    volume: Any, arguments: dict[str, Any], package: ModelPackage | None, of_package: Mapping[str, Any]
) -> tuple[dict[str, Volume], Volume | None, Volume, dict[str, Any], Normalization | None]:
    """Open the volumes.

    Several are the channels of one. Those of different grids are resampled one by one, where there is a spacing.

    Returns:
        The volumes by name, the one on whose grid scores may be resampled back, the one that is read, the arguments for
        it, and how it is normalized.
    """
    axes, level, normalization = arguments.get("axes"), arguments.get("level", 0), None
    volumes = {name: _opened(part, axes, level) for name, part in parts_of(volume).items()}
    is_several = isinstance(volume, list | tuple | dict)
    normalizes = package is not None and package.normalizes_first and "preprocess" in of_package
    if is_several and arguments.get("spacing") is not None and not normalizes and grid_differences(volumes):
        parts = zip(volumes.items(), parts_of(volume).values(), strict=True)
        first, unboxed = next(iter(volumes)), {**arguments, "box": None, "mask": None}
        on_grid = {n: _on_grid(own, part, arguments if n == first else unboxed, None) for (n, own), part in parts}
        data = stacked_on_grid({name: one for name, (one, _) in on_grid.items()})
        return volumes, stacked_on_grid({first: volumes[first]}), data, on_grid[first][1], None
    own = base = stacked_on_grid(volumes) if is_several else volumes["volume"]
    check_axes(of_package.get("patch_size"), own.names[-own.spatial_ndim :])
    if package is not None and normalizes:
        package.check_channels(own.channels)
        normalization, arguments = _normalization(own, arguments), {**arguments, "preprocess": None}
        base = normalization.over(own)
    data, arguments = _on_grid(base, volume, arguments, normalization)
    return volumes, None if data is base else own, data, arguments, normalization


def _context(volume: Any, data: Volume, arguments: Mapping[str, Any]) -> Volume | None:
    """Return the level of which patches are the context of others, if there is one.

    Raises:
        ValueError: if it is no coarser level of one volume, or preprocess needs statistics, which are of one level.
    """
    asked = arguments.get("context_level")
    if asked is None:
        return None
    if isinstance(volume, list | tuple | dict) or arguments.get("spacing") is not None:
        raise ValueError("context_level must be None with several volumes, and with spacing or orientation")
    level = Volume(_opened(volume, arguments.get("axes"), asked).source, data.axes)
    is_finer = any(n > m for n, m in zip(level.shape, data.shape, strict=True))
    if level.channels != data.channels or is_finer or level.shape == data.shape:
        raise ValueError(
            f"context_level must be coarser than the level that is read, {data.shape} voxels, got {level.shape}"
        )
    if needs_statistics(CHECKS["preprocess"]("preprocess", arguments.get("preprocess"), data)):
        raise ValueError("preprocess must not need statistics of the volume with context_level: pass a function")
    return level


def _on_grid(
    data: Volume, volume: Any, arguments: dict[str, Any], normalization: Normalization | None
) -> tuple[Volume, dict[str, Any]]:
    """Return a volume on the grid that the arguments name, and the arguments with their box on that grid.

    Its levels are those of `volume`, as it was given, unless it is normalized.
    """
    axes, level = arguments.get("axes"), arguments.get("level", 0)
    grid = ModelGrid.of(arguments.get("spacing"), data)
    if grid is None:
        return data, arguments
    if grid.orientation is not None and (mask := CHECKS["mask"]("mask", arguments.get("mask"), data)) is not None:
        arguments = {**arguments, "mask": grid.turned(mask.volume, data, mask.placement.axes)}
    box = CHECKS["box"]("box", arguments.get("box"), data)
    crop = None if normalization is None or grid.over(data) is data else normalization.box
    if crop is not None:
        data = cropped(data, crop)
        if box is not None and (box & crop).empty:
            raise ValueError(f"box must meet the voxels that are not zero, {crop.start} to {crop.stop}, got {box}")
        box = None if box is None else Box(*(tuple(np.subtract(e, crop.start)) for e in astuple(box & crop)))
    has_levels = not isinstance(volume, Volume) and str(level) == "0" and normalization is None
    limits = () if normalization is None else normalization.limits
    on_grid = grid.over(data, functools.partial(_opened, volume, axes) if has_levels else None, limits)
    if box is not None:
        box, looped = grid.box(box, data), len(data.shape) - data.spatial_ndim
        arguments = {**arguments, "box": list(zip(box.start, box.stop, strict=True))[looped:]}
    return on_grid, {**arguments, "spacing": grid}


def _normalization(data: Volume, arguments: dict[str, Any]) -> Normalization:
    """Return the named preprocess of the arguments with what it needs to know of the volume, which is read for it."""
    options = {name: arguments.get(name, OPTIONS[name].default) for name in ("max_memory", "progress")}
    options["max_memory"] = CHECKS["memory_limit"]("max_memory", options["max_memory"], data)
    steps = CHECKS["preprocess"]("preprocess", arguments["preprocess"], data)
    normalization = Normalization.of(data, steps, nonzero_box(data, **options), **options)
    grid = ModelGrid.of(arguments.get("spacing"), data)
    if interpolates_beyond(grid) and grid is not None and grid.over(data) is not data:
        normalization = normalization.within_limits(data, **options)
    return normalization


def _checked_group(group: type[Any], arguments: Mapping[str, Any], volume: Volume) -> Any:
    """Return a group of options with checked values."""
    values = {}
    for f in fields(group):
        value = arguments.get(f.name, f.default)
        check = f.metadata["check"]
        values[f.name] = value if check is None else CHECKS[check](f.name, value, volume)
    return group(**values)


def settings_of_package(package: ModelPackage | None, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a model package that apply: those that the caller did not give.

    Raises:
        ValueError: for one that cannot be honoured.
    """
    settings = {} if package is None else package.settings
    settings = {name: value for name, value in settings.items() if not is_given(arguments.get(name))}
    for value in settings.values():
        if isinstance(value, Refused):
            raise ValueError(str(value))
    return settings


def _without_defaults(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that differ from their defaults."""
    return {
        name: value
        for name, value in arguments.items()
        if OPTIONS[name].default is dataclasses.MISSING or not _same(value, OPTIONS[name].default)
    }


def _same(value: Any, default: Any) -> bool:
    """Return whether a value is the default, or the default as the command line types it."""
    return value is default or (isinstance(value, str | int | float) and str(value) == str(default))


def _shown(value: Any) -> str:
    """Return a parameter as a message shows it: of a digest, as much as tells two apart.

    >>> _shown("hann"), _shown([["03c362d21bea8ec99857", 4]])
    ("'hann'", '[[03c362d2, 4]]')
    """
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_shown, value))}]"
    is_digest = isinstance(value, str) and len(value) >= 16 and set(value) <= set("0123456789abcdef")
    return value[:8] if is_digest else repr(value)
