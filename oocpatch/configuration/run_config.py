"""A request: the checked arguments of one call. Reads metadata only; nothing is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from oocpatch.engine.buffers import lean_heap
from oocpatch.engine.patch_selection import Mask, Selection
from oocpatch.errors import RunMismatch
from oocpatch.models import augmentation, preprocessing
from oocpatch.models.compilation import (
    check_compilation,
    checked_compile_mode,
    compilation_fingerprint,
    optimized_model,
    uses_graphs,
)
from oocpatch.models.fingerprint import model_fingerprint
from oocpatch.models.input_spec import input_spec_of
from oocpatch.models.loading import Model, load_models
from oocpatch.models.postprocessing import named_postprocess
from oocpatch.models.predictor import Predictor, resolve_device
from oocpatch.models.wrappers import ensemble
from oocpatch.outputs.ome_labels import format_in_parent
from oocpatch.outputs.ome_zarr import checked_output_format
from oocpatch.outputs.record import OutputRecord
from oocpatch.planning.arguments import (
    check_fits,
    checked_overlap_mode,
    dtype_name,
    json_number,
    memory_limit,
    num_bytes,
    per_head,
    positive,
    real_number,
    switch,
)
from oocpatch.planning.blocks import BlockGrid
from oocpatch.planning.box import Ints
from oocpatch.planning.grid import PatchGrid
from oocpatch.planning.heads import patch_grid
from oocpatch.planning.plan import differences
from oocpatch.storage.locks import beside
from oocpatch.storage.paths import Address, check_writable, output_path
from oocpatch.volumes.volume import Volume, checked_padding_mode, refuse_overlap, spatial_box, spatial_sizes

AUTO = "auto"
"""A size that is to be chosen."""


@dataclass(frozen=True)
class Request:
    """The checked arguments of `predict`.

    Attributes:
        volume, models: what to read, and what to run; several are averaged.
        output, workspace: where the result is, and where what is kept until it is done.
        patch_size, patch_overlap: with one entry per looped axis (1 and 0) in front of the spatial ones; no patch
            size: it is to be chosen.
        selection: which patches to compute.
        max_memory, max_disk: in bytes.
        block_shape: as asked for, spatial.
        parameters: the fingerprint.
        options: all other arguments by name.
        given: the model and its weights as they were given.
        client: of the cluster that does the work; None: this process does.
        settings: the arguments as they were given, for people.
    """

    volume: Volume
    models: tuple[Model, ...]
    output: Address
    workspace: Address
    patch_size: Ints
    patch_overlap: Ints
    selection: Selection
    max_memory: int
    max_disk: int | None
    block_shape: Ints | None
    parameters: Mapping[str, Any]
    options: Mapping[str, Any]
    given: Mapping[str, Any]
    client: Any
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def looped(self) -> int:
        return len(self.volume.shape) - self.volume.spatial_ndim

    @property
    def skips(self) -> bool:
        """Whether patches may be skipped."""
        return bool(self.selection) or self.options["skip_value"] is not None

    @property
    def turns(self) -> tuple[augmentation.FlipRotate, ...]:
        """The ways in which the model sees a patch."""
        axes, patch_size = self.volume.names[self.looped :], self.patch_size[self.looped :]
        return augmentation.flips_and_rotations(self.options["augment"], axes, patch_size)

    def predictor(
        self, *, statistics: preprocessing.Statistics = (), compiled: bool = False, **settings: Any
    ) -> Predictor:
        """The model and what is around it, as a function of batches; compiled, if that was asked for and is to be."""
        preprocess = preprocessing.preprocess_function(self.options["preprocess"], statistics)
        axes, options = self.volume.spatial_ndim, self.options
        mode = options["compile"] if compiled else None
        models = [
            optimized_model(
                model, axes, channels_last=options["channels_last"], compile_mode=mode, device=options["device"]
            )
            for model in self.models
        ]
        return Predictor(
            ensemble(models, preprocess, self.turns),
            device=self.options["device"],
            autocast=self.options["autocast"],
            looped=self.looped,
            own_thread=uses_graphs(mode, options["device"]),
            **settings,
        )

    def statistics(self, *, hidden: bool | None = True) -> tuple[tuple[float, float], ...]:
        """What the preprocess needs to know of the whole volume; reads it all, if anything."""
        return preprocessing.preprocess_statistics(
            self.options["preprocess"], self.volume, self.max_memory, hidden=hidden
        )

    def refuse_patches(self) -> None:
        """Refuse patches that the model's file, or what is around the model, rules out.

        Raises:
            ValueError: with what would do.
        """
        accepts, preprocess = input_spec_of(ensemble(self.models, None, self.turns)), self.options["preprocess"]
        channels = accepts.channels or 0 if callable(preprocess) else self.volume.channels  # it may change them
        accepts.validate(channels, self.patch_size[self.looped :])

    def settled(self, patch_size: Sequence[int], batch_size: Any) -> Request:
        """The same request, with these sizes where it left them open; `patch_size` is spatial."""
        patch = self.patch_size or (*(1,) * self.looped, *patch_size)
        batch = batch_size if is_auto(self.options["batch_size"]) else self.options["batch_size"]
        parameters = {**self.parameters, "patch_size": patch[self.looped :], "batch_size": batch}
        return replace(self, patch_size=patch, parameters=parameters, options={**self.options, "batch_size": batch})

    def refuse_other_run(self, record: OutputRecord) -> None:
        """Refuse to go on with a run that was started with other arguments.

        Raises:
            RunMismatch: naming each parameter that differs.
        """
        if not self.patch_size or is_auto(self.options["batch_size"]):  # what is left open is what the run has
            self.settled(record.parameters["patch_size"], record.parameters["batch_size"]).refuse_other_run(record)
            return
        # what is off is not among the parameters
        found = differences({**dict.fromkeys(record.parameters), **self.parameters}, record.parameters)
        if not found and self.block_shape is not None:
            asked, there = self._blocks(record.details), record.details["block_shape"]
            if list(asked) != list(there):
                found["block_shape"] = (list(asked), list(there))
        if found:
            told = "; ".join(f"{name}: {_told(old)} before, {_told(new)} now" for name, (new, old) in found.items())
            raise RunMismatch(
                f"{self.output} belongs to a run with other parameters ({told}); "
                "repeat its call, choose another output, or start afresh with overwrite=True",
                tuple(found),
            )

    def _blocks(self, stored: Mapping[str, Any]) -> Ints:
        """The block shape asked for, as the planner rounded it."""
        assert self.block_shape is not None
        unit = tuple(stored["unit"])
        core = (*unit[: self.looped], *self.block_shape)
        geometry = (tuple(stored["context"]), tuple(stored["snap"]))
        padded = self.options["padding_mode"] is not None
        grid = patch_grid(self.volume.shape, self.patch_size, self.patch_overlap, *geometry, padded=padded)
        return BlockGrid.of(grid, core, unit, 0, crop=False).core_shape[self.looped :]


def make_request(
    volume: Any,
    model: Any,
    output: str | os.PathLike[str],
    *,
    weights: str | Sequence[str] | None,
    model_args: Mapping[str, Any] | None,
    trust_pickle: bool,
    preprocess: str | Mapping[str, Any] | Callable[..., Any] | None,
    augment: str | Sequence[str] | Mapping[str, Any] | None,
    patch_size: Any,
    patch_overlap: int | Sequence[int] | Mapping[str, int],
    overlap_mode: str | Mapping[str, str],
    num_classes: int | None,
    padding_mode: str | None,
    fill: float,
    axes: str | Sequence[str] | None,
    level: int | str,
    batch_size: Any,
    device: str,
    autocast: bool,
    channels_last: bool,
    compile: bool | str,  # noqa: A002 - as torch calls it
    postprocess: str | Callable[..., Any] | Mapping[str, Any] | None,
    output_dtype: Any,
    output_chunks: int | Sequence[int] | Mapping[str, int] | None,
    output_shards: int | Sequence[int] | Mapping[str, int] | None,
    output_fill: float,
    allow_nonfinite: bool,
    max_memory: int | float | str,
    max_disk: int | float | str | None,
    block_shape: int | Sequence[int] | Mapping[str, int] | None,
    workspace: str | os.PathLike[str] | None,
    workers: int | None,
    mask: Any,
    box: Any,
    skip_empty: bool,
    client: Any,
    output_format: str,
) -> Request:
    """Check the arguments of `predict`.

    Raises:
        ValueError, TypeError: for the first one that will not do.
    """
    lean_heap()  # before the probe of the model, whose memory would stay in the heap
    target = output_path("output", output)
    place = beside(target, "") if workspace is None else output_path("workspace", workspace)
    data = volume if isinstance(volume, Volume) and axes is None else _volume(volume, axes, level)
    named: tuple[tuple[str, Address], ...] = (("output", target), ("workspace", place))
    for name, path in named:
        refuse_overlap(name, path, data)
        check_writable(name, path)
    found_format = checked_output_format(format_in_parent(target, output_format), data)
    found_device = resolve_device(device)
    models = load_models(model, weights=weights, model_args=model_args, trust_pickle=trust_pickle, device=found_device)
    looped = len(data.shape) - data.spatial_ndim
    patch = () if is_auto(patch_size) else (1,) * looped + spatial_sizes("patch_size", patch_size, data, least=1)
    overlap = (0,) * looped + spatial_sizes("patch_overlap", patch_overlap, data)
    if patch:
        PatchGrid.of(data.shape, patch, overlap)

    def spatial(name: str, value: int | Sequence[int] | Mapping[str, int] | None) -> Ints | None:
        return None if value is None else spatial_sizes(name, value, data, least=1)

    processes = None if workers is None else positive("workers", workers)
    options = {
        "preprocess": preprocessing.checked_preprocess(preprocess, data.dtype, data.channels),
        "augment": augmentation.checked_augmentation(augment, data.names[looped:]),
        "overlap_mode": per_head(overlap_mode, checked_overlap_mode),
        "num_classes": None if num_classes is None else positive("num_classes", num_classes),
        "postprocess": per_head(postprocess, _postprocess),
        "padding_mode": checked_padding_mode(padding_mode),
        "fill": real_number("fill", fill),
        "batch_size": AUTO if is_auto(batch_size) else positive("batch_size", batch_size),
        "device": found_device,
        "autocast": switch("autocast", autocast),
        "channels_last": switch("channels_last", channels_last),
        "compile": checked_compile_mode(compile),
        "output_dtype": per_head(output_dtype, lambda value: dtype_name("output_dtype", value)),
        "output_chunks": spatial("output_chunks", output_chunks),
        "output_shards": spatial("output_shards", output_shards),
        "ome": found_format != "zarr",
        "output_fill": real_number("output_fill", output_fill),
        "allow_nonfinite": switch("allow_nonfinite", allow_nonfinite),
        "skip_value": empty_value(data) if switch("skip_empty", skip_empty) else None,
        # A process of a cluster works on one block at a time.
        "workers": 1 if client is not None else processes,
        "processes": processes,
    }
    check_compilation(
        models,
        data.spatial_ndim,
        channels_last=options["channels_last"],
        compile_mode=options["compile"],
        device=found_device,
    )
    if padding_mode == "constant":
        check_fits("fill", options["fill"], str(data.dtype))
    if found_format == "ome-zarr-0.4" and options["output_shards"] is not None:
        raise ValueError(
            "output_shards must be None for output_format 'ome-zarr-0.4', which is Zarr 2 and has no shards"
        )
    found_mask = None if mask is None else _mask(mask, data)
    found_box = None if box is None else spatial_box("box", box, data)
    parameters = {
        "volume": data.fingerprint,
        "axes": list(data.axes.names),
        "model": model_fingerprint(models[0]) if len(models) == 1 else [model_fingerprint(member) for member in models],
        "preprocess": _preprocess_identity(options["preprocess"]),
        "augment": None if options["augment"] is None else options["augment"].to_json(),
        "patch_size": patch[looped:] if patch else AUTO,
        "patch_overlap": overlap[looped:],
        "overlap_mode": options["overlap_mode"],
        "num_classes": options["num_classes"],
        "padding_mode": options["padding_mode"],
        "fill": json_number(options["fill"]),
        "mask": None if found_mask is None else found_mask.volume.fingerprint,
        "skip_empty": bool(skip_empty),
        "box": None if found_box is None else [list(found_box.start[looped:]), list(found_box.stop[looped:])],
        "batch_size": options["batch_size"],
        "device": torch.device(found_device).type,
        "autocast": options["autocast"],
        "postprocess": per_head(postprocess, _identity_of),
        "output_dtype": options["output_dtype"],
        "output_chunks": options["output_chunks"],
        "output_shards": options["output_shards"],
        "output_fill": json_number(options["output_fill"]),
        "output_format": found_format,
        "allow_nonfinite": options["allow_nonfinite"],
        "torch": torch.__version__.split("+")[0],
        **compilation_fingerprint(channels_last=options["channels_last"], compile_mode=options["compile"]),
    }
    request = Request(
        volume=data,
        models=models,
        output=target,
        workspace=place,
        patch_size=patch,
        patch_overlap=overlap,
        selection=Selection(found_mask, found_box),
        max_memory=memory_limit(max_memory),
        max_disk=None if max_disk is None else num_bytes("max_disk", max_disk),
        block_shape=spatial("block_shape", block_shape),
        parameters=parameters,
        options=options,
        given={"model": model, "weights": weights, "model_args": model_args, "trust_pickle": trust_pickle},
        client=client,
    )
    if patch:
        request.refuse_patches()
    return request


def _told(value: Any) -> str:
    """A parameter for people; of a digest, as much as two need to be told apart.

    >>> _told("hann"), _told([["03c362d21bea8ec99857", 4]])
    ("'hann'", '[[03c362d2, 4]]')
    """
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_told, value))}]"
    digest = isinstance(value, str) and len(value) >= 16 and set(value) <= set("0123456789abcdef")
    return value[:8] if digest else repr(value)


def is_auto(value: object) -> bool:
    """Whether a size is to be chosen."""
    return isinstance(value, str) and value == AUTO


def _postprocess(value: Any) -> Any:
    return value if value is None or callable(value) else named_postprocess(str(value))


def _identity_of(value: Any) -> Any:
    return model_fingerprint(value) if callable(value) else value


def _preprocess_identity(preprocess: Any) -> Any:
    if isinstance(preprocess, preprocessing.NamedPreprocess):
        return preprocessing.preprocess_json(preprocess)
    return _identity_of(preprocess)


def _volume(volume: Any, axes: str | Sequence[str] | None, level: int | str) -> Volume:
    return Volume(volume.source if isinstance(volume, Volume) else volume, axes, level)


def _mask(mask: Any, volume: Volume) -> Mask:
    """A checked mask.

    Raises:
        ValueError: when it cannot lie over the volume.
    """
    try:
        given = mask if isinstance(mask, Volume) else Volume(mask)
    except (ValueError, TypeError) as error:
        raise type(error)(f"mask: {error}") from error
    for names in (volume.names, volume.names[-volume.spatial_ndim :]):
        if len(given.source.shape) == len(names):
            found = Volume(given.source, names)
            if any(m > n for m, n in zip(found.shape[::-1], volume.shape[::-1], strict=False)):
                raise ValueError(
                    f"mask must not have more voxels than the volume on any axis, got {found.shape} for {volume.shape}"
                )
            return Mask(found, volume.shape)
    spatial = ", ".join(volume.names[-volume.spatial_ndim :])
    raise ValueError(
        f"mask must have the volume's spatial axes ({spatial}), at any resolution, got shape {given.source.shape}"
    )


def empty_value(volume: Volume) -> float:
    """What voxels hold that were never written."""
    array = volume.source.array
    value = None if array is None else array.fill_value
    return 0.0 if value is None else float(value)
