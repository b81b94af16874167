"""The options of a run in typed groups: every parameter of `predict` is one field of these, or of `ModelOptions`.

The metadata of a field name the function of `configuration.checks` that checks its value, whether runs that differ in
it are different runs (`identity`), and how it is typed on the command line. The fingerprint, the command line's
options, the command that repeats a run and the table in the docs are made of the fields. This module imports no heavy
library: `oocpatch predict --help` reads it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from oocpatch.models.options import ModelOptions
from oocpatch.planning.choices import OUTPUT_FORMATS, OUTPUT_GRIDS, OVERLAP_MODES, PADDING_MODES, PATCH_STARTS
from oocpatch.progress import DISPLAYS, OnProgress
from oocpatch.provenance import option

if TYPE_CHECKING:
    from oocpatch.engine.patch_selection import Mask
    from oocpatch.planning.box import Box, Ints
    from oocpatch.volumes.model_grid import ModelGrid


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """The part of the volume that is read."""

    axes: Any = option(
        None,
        kind="names",
        metavar="NAMES",
        help="Name the axes of the volume, such as zyx or tczyx; default: its dimension names.",
    )
    level: int | str = option(
        0, metavar="LEVEL", help="Read this level of an OME-Zarr's pyramid, by its number or path."
    )
    context_level: int | str | None = option(
        None,
        identity=True,
        metavar="LEVEL",
        help="Pass the patch of this coarser level around the same centre to the model, too, as its argument context.",
    )
    spacing: ModelGrid | None = option(
        None,
        check="spacing",
        identity="grid",
        kind="spacing",
        metavar="SIZES",
        help="Read the volume at this distance of voxels: 0.5um, or z=1,y=0.5,x=0.5 in the units of the axes.",
    )
    orientation: str | None = option(
        None,
        check="orientation",
        identity=True,
        metavar="CODE",
        help="Turn patches so that their axes point to these ends, such as RAS; the output lies as the volume does.",
    )
    mask: Mask | None = option(
        None,
        check="mask",
        identity="mask",
        metavar="IN",
        help="Skip patches without a nonzero voxel in this mask, of any resolution.",
    )
    box: Box | None = option(
        None,
        check="box",
        kind="box",
        metavar="START:STOP,...",
        help="Compute only the patches that meet this box, in voxels per spatial axis: 16:64,:,0:128.",
    )
    skip_empty: bool = option(
        False, check="switch", identity=True, kind="flag", help="Skip patches that contain only the fill value."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchOptions:
    """Patches and how they are blended. Sizes are spatial, in voxels; an empty patch size and a batch of 0 are open."""

    patch_size: Ints = option(
        None, check="patch_size", kind="size_or_auto", metavar="SIZE", help="Voxels of a patch: 96, 32,96,96, or auto."
    )
    patch_overlap: Ints = option(
        0, check="overlap", identity=True, kind="size", metavar="SIZE", help="Voxels that adjacent patches share."
    )
    patch_starts: str = option(
        "regular",
        check="patch_starts",
        identity=True,
        kind="choice",
        choices=PATCH_STARTS,
        help="Begin a patch at every stride, or space the same number evenly, as nnU-Net does.",
    )
    overlap_mode: Any = option(
        "hann",
        check="overlap_mode",
        identity=True,
        kind="per_head",
        choices=OVERLAP_MODES,
        help="Blend patches in this way; HEAD=MODE,... for several outputs.",
    )
    num_classes: int | None = option(
        None, check="positive", identity=True, kind="int", metavar="N", help="Number of labels that are voted on."
    )
    match: float = option(
        0.5,
        check="share",
        identity=True,
        kind="float",
        metavar="SHARE",
        help="Least intersection over union of objects of two patches that are one, for instances.",
    )
    padding_mode: str | None = option(
        None,
        check="padding_mode",
        identity=True,
        kind="choice",
        choices=PADDING_MODES,
        help="Pad the volume by half an overlap on each side.",
    )
    fill: float = option(
        0.0,
        check="number",
        identity="json_number",
        kind="float",
        metavar="NUMBER",
        help="Value of constant padding.",
    )
    batch_size: int = option(
        1, check="batch_size", kind="size_or_auto", metavar="N", help="Most patches of a call of the model, or auto."
    )

    @property
    def is_padded(self) -> bool:
        """Return whether patches begin before the volume."""
        return self.padding_mode is not None

    @property
    def is_even(self) -> bool:
        """Return whether patches are spaced evenly."""
        return self.patch_starts == "even"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """The arrays that are written. Sizes are spatial, in voxels of the output."""

    output_dtype: Any = option(
        None,
        check="dtype",
        identity=True,
        kind="per_head",
        metavar="DTYPE",
        help="Dtype of the output; default: float32, the model's for crop, the smallest for argmax.",
    )
    output_chunks: Ints | None = option(
        None, check="sizes", identity=True, kind="size", metavar="SIZE", help="Chunk shape; default: as the input has."
    )
    output_shards: Ints | None = option(
        None,
        check="shards",
        identity="shards",
        kind="size_or_none",
        metavar="SIZE",
        help="Shard shape, or none; default: as the input has, and for more than 100,000 chunks.",
    )
    output_fill: float = option(
        0, check="number", identity="json_number", kind="number", metavar="NUMBER", help="Value of uncovered voxels."
    )
    output_format: str = option(
        "auto",
        check="output_format",
        kind="choice",
        choices=OUTPUT_FORMATS,
        help="Write plain Zarr, or OME-Zarr with a pyramid; auto: as the input is.",
    )
    output_grid: str = option(
        "volume",
        check="output_grid",
        identity=True,
        kind="choice",
        choices=OUTPUT_GRIDS,
        help="Write scores of a model with a spacing on the grid of the volume, or as they are, on that of the model.",
    )
    allow_nonfinite: bool = option(
        False,
        check="switch",
        identity=True,
        kind="flag",
        help="Keep NaN and infinity that the model gives instead of failing the block.",
    )
    export: Any = option(
        None,
        check="export",
        metavar="FILE",
        help="Write the complete output as this file, too: .nii, .nii.gz, .ome.tif, .tif; vectors as .h5, .h5ad.",
    )

    @property
    def ome(self) -> bool:
        """Return whether the output is an OME-Zarr; a `RunConfig` has resolved `"auto"`."""
        return self.output_format == "ome-zarr"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on memory and disk, in bytes, and the unit of work, which follows from the work of a patch."""

    max_memory: int = option("auto", check="memory_limit", metavar="SIZE", help="Bound on the added memory: 2GiB.")
    max_disk: int | None = option(None, check="num_bytes", metavar="SIZE", help="Bound on the workspace.")
    block_shape: Ints | None = option(
        None, check="sizes", kind="size", metavar="SIZE", help="Voxels of one unit of work; default: planned."
    )
    work: float | str | None = option(
        None,
        check="work",
        kind="work",
        metavar="light|heavy|N",
        help="Operations of the model for one patch, or whether they are few or many; default: counted.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionOptions:
    """Place and manner of the execution; the result does not depend on them."""

    workspace: Any = option(None, metavar="PLACE", help="Path or URL of unfinished work; default: beside the output.")
    workers: int | None = option(
        None,
        check="positive",
        kind="int",
        metavar="N",
        help="Blocks, or worker processes, at a time.",
    )
    processes: bool = option(
        False, check="switch", kind="flag", help="Compute in --workers processes of this machine instead of threads."
    )
    client: Any = option(None, kind="none", help="Dask client whose workers run the tasks.")
    part: tuple[int, int] | None = option(
        None,
        check="part",
        kind="part",
        metavar="I/N",
        help="Compute only part I of N; the last part to end completes the output.",
    )
    resume: bool = option(True, check="switch", kind="switch", help="Continue an unfinished run.")
    overwrite: bool = option(False, check="switch", kind="flag", help="Replace what oocpatch wrote here before.")
    update: bool = option(
        False, check="switch", kind="flag", help="Where the input has changed, compute again what depends on it."
    )
    check_input: bool = option(
        True, check="switch", kind="switch", help="Compare the input with what a complete output was computed from."
    )
    progress: str | bool | OnProgress = option(
        "auto", check="progress", kind="choice", choices=DISPLAYS, help="Show progress on stderr in this form."
    )

    @property
    def threads(self) -> int | None:
        """Blocks that one process works on at a time, where that was asked for; a worker of a cluster takes one."""
        return 1 if self.is_distributed else self.workers

    @property
    def is_distributed(self) -> bool:
        """Return whether other processes compute: those of a client, or some of this machine."""
        return self.client is not None or self.processes


GROUPS: dict[str, type[Any]] = {
    "model": ModelOptions,
    "patches": PatchOptions,
    "data": DataOptions,
    "outputs": OutputOptions,
    "limits": Limits,
    "execution": ExecutionOptions,
}
"""The groups of options, by their names in `RunConfig`."""

DERIVED_IDENTITY = ("axes", "model", "patch_size", "batch_size", "box", "output_format")
"""Options that identify a run by what they come to: the volume's axes, the model's fingerprint, the chosen sizes."""

OPTIONS: dict[str, dataclasses.Field[Any]] = {f.name: f for group in GROUPS.values() for f in fields(group)}
"""Every option of a run by its name, but for volume and output."""


def options_table() -> str:
    """Return the options of a run as Markdown: one table per group, for the docs."""
    lines = []
    for name, group in GROUPS.items():
        lines += [f"## {name}", "", "| parameter | default | identifies a run | |", "|---|---|---|---|"]
        for field in fields(group):
            default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
            identity = "yes" if field.metadata["identity"] or field.name in DERIVED_IDENTITY else ""
            lines.append(
                f"| `{field.name}` | {default} | {identity} | {field.metadata['help'].replace('|', chr(92) + '|')} |"
            )
        lines.append("")
    return "\n".join(lines)
