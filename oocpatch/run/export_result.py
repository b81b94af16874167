"""The file that `predict(export=...)` writes when its output is complete."""

from __future__ import annotations

import contextlib

from oocpatch.configuration.run_config import RunConfig
from oocpatch.conversion.export import check_exportable, export, format_of, mark_of
from oocpatch.conversion.vector_file import check_slide_patches, slide_levels, vector_heads
from oocpatch.errors import OutputBusy, OutputExists, RunMismatch
from oocpatch.outputs.record import OutputRecord, inspect_output
from oocpatch.planning.plan import Plan


def check_export(config: RunConfig, record: OutputRecord | None, plan: Plan | None = None) -> None:
    """Refuse a file that could not be written once the output is complete, before anything is computed.

    Args:
        config: the checked arguments.
        record: the record of the output that is there, if there is one.
        plan: the plan of the run; None: the output is complete.

    Raises:
        ValueError: if the run has several heads, or its axes do not fit the file.
        OutputExists: if the file is there, and this run may not replace it.
    """
    path = config.outputs.export
    if path is None:
        return
    heads, vectors = [], []
    if plan is not None:
        heads, vectors = [head.name for head in plan.heads], [head.name for head in plan.vectors]
    elif record is not None:
        heads, vectors = record.details["heads"], vector_heads(record)
    fitting, kind, other = heads, "a volume", "a vector per patch: take .h5 or .h5ad"
    if format_of("export", path) == "hdf5":
        fitting, kind, other = vectors, "a vector per patch", "a volume: take .ome.tif or .nii"
    if not fitting and (heads or vectors):
        others = ", ".join([*heads, *vectors])
        raise ValueError(
            f"export must be a file for the model's outputs, but {path.name} is for {kind}, got {others}, {other}"
        )
    if len(fitting) > 1:
        raise ValueError(
            f"export must be None for a model of several outputs ({', '.join(fitting)}): export one of them "
            f"afterwards, oocpatch.export({str(config.output / fitting[0])!r}, {path.name!r})"
        )
    if fitting and plan is not None and path.suffix == ".h5":
        check_slide_patches(plan.patch_size[config.looped :], is_looped=config.looped > 0)
        slide_levels(config.settings, config.volume.shape)
    check_exportable("export", path, config.volume)
    if not path.exists():
        return
    is_complete = record is not None and record.complete and not config.execution.overwrite
    if mark_of(path) is None or not (is_complete or _may_replace(config)):
        raise OutputExists(
            f"export must be a new file, but {path} is there and was not exported from {config.output}; choose another "
            "one, or move it away; overwrite=True replaces a file that was exported"
        )


def export_result(config: RunConfig) -> None:
    """Export the output of a run to the file that its caller named, if it is complete; the file may be there already.

    Raises:
        As `export`.
    """
    path = config.outputs.export
    record = None if path is None else inspect_output(config.output)
    if path is None or record is None or not record.complete:
        return
    limit, progress = config.limits.max_memory, config.execution.progress
    is_hdf5 = format_of("export", path) == "hdf5"
    head = (vector_heads(record) if is_hdf5 else record.details["heads"])[0]
    volume = str(config.output / head if is_hdf5 or vector_heads(record) else config.output)
    # another part of the run may be exporting already
    with contextlib.suppress(*([OutputBusy] if config.execution.part is not None else [])):
        try:
            export(volume, path, max_memory=limit, progress=progress)
        except RunMismatch:
            if not _may_replace(config):
                raise
            export(volume, path, max_memory=limit, progress=progress, overwrite=True)


def _may_replace(config: RunConfig) -> bool:
    """Return whether a file of an earlier run may be replaced, as its output is."""
    return config.execution.overwrite or config.execution.update
