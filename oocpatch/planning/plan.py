"""The plan: all decisions of a run, frozen, as JSON, with a digest of everything that the result depends on.

`configuration.make_plan` makes it from arguments, `planner` chooses its blocks, and workers rebuild it from JSON.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.errors import RunMismatch
from oocpatch.planning.arguments import json_number
from oocpatch.planning.blocks import AllBlocks, BlockGrid, Neighbours
from oocpatch.planning.box import Ints
from oocpatch.planning.grid import PatchGrid, Scale
from oocpatch.planning.heads import Head, VectorHead, common_unit, crops, patch_grid
from oocpatch.planning.html_parts import image_of, table_of
from oocpatch.planning.labelling import Labelling
from oocpatch.planning.memory import IoStrategy, Parts, landing_bytes, layers_per_group
from oocpatch.planning.schedule import in_order
from oocpatch.planning.svg import draw_plan
from oocpatch.planning.sweep import Frame

FORMAT = 3
"""Version of the plan's JSON and of the workspace's layout."""


@dataclass(frozen=True)
class Plan:
    """All decisions of a run. `str(plan)` prints them; `PlannedRun.run` carries them out.

    Sizes are in voxels, one value per axis of `axes`: looped axes (time) first, with patches of 1, then the spatial.

    Attributes:
        parameters: the fingerprint, by the names of the parameters of `predict`: two plans with other values in it are
            different runs.
        axes: names of the looped and the spatial axes, in the output's order.
        shape, in_channels, in_dtype, in_chunks: of the volume.
        patch_size, patch_overlap: of the model's input patches.
        patch_starts: whether patches start at every stride, `"regular"`, or are spaced evenly, `"even"`.
        extent: start and stop of the box that evenly spaced patches cover; None: the volume.
        padding_mode: rule for the voxels outside the volume; None: the frame is not padded.
        fill: value outside the volume, for `constant`, and for the modes that a run computes it for: `mean` and others.
        context: input of the model beyond its output, on each side.
        snap: divisor of all patch starts.
        heads: outputs of the model that are volumes; one, or several from a dict.
        copies_input: whether the model gets copies of the input, because it writes to them.
        core: shape of a block's core.
        sweep: the axis along which blocks are computed.
        concurrency: blocks computed at a time.
        torch_threads: threads of torch for each call, set in every process, since results depend on it.
        projected_memory: most bytes that the run adds to main memory, of each process.
        projected_disk: bytes of the workspace at its fullest.
        bytes_read, bytes_written: traffic with the volume, the workspace and the output, not compressed.
        task_memory, memory_parts: shares of `projected_memory` of each concurrent block, and by name.
        projected_device_memory, task_device_memory, device_parts: the same on the model's device, if it has memory of
            its own; what its kernels and libraries take is an estimate.
        model_note: preprocessing, ensembles and compilation around the model, in words.
        statistics: two numbers per channel of the volume, for its preprocess; empty: not needed, or not yet computed.
        statistics_of: digest of the content of the volume that the statistics are of.
        box: start and stop of the box whose patches are computed; None: all are.
        skip_value: value of patches to skip that hold nothing else; None: none is skipped for its values.
        output_fill: value of voxels that no patch covers.
        allow_nonfinite: keep NaN and infinity instead of failing the block.
        work: the model's work for one patch, in words.
        crash_limit: number of patches that a crash of a process should not exceed; None: the model is light.
        selected: number of patches to compute of each block, packed by `pack_counts`; empty: of all their patches, or
            not counted.
        stores_outputs: whether the model's outputs are stored until their block is recorded, since a crash would cost
            more than it should.
        labelling: what objects are, of a run of `label`, whose patches are voxels; None: the run is one of `predict`.
        classes: names of the output's channels or labels, of a model package that has them.
        table: the columns of a run of `objects`, as JSON; its patches are voxels, and it has no heads. None: the run is
            another one.
        scores: plan of the run whose output this one resamples, as JSON; empty: there is none.
        merge_memory: bytes that the merge of objects may take, while no block is at work.
        vectors: outputs of the model that are a vector per patch.
        model_inputs: names and numbers of channels of the tensors that the model is called with; none: with one.
        calls: calls of the model at a time, in a process.
        lanes: calls that batches are cut for, on which last bits depend: `calls`, before a resume lowered these.
        patches_per_call: most patches of a call: `batch_size`, or less where several calls share a batch.
    """

    parameters: Mapping[str, Any]
    axes: tuple[str, ...]
    spatial: int
    shape: Ints
    in_channels: int
    in_dtype: str
    in_chunks: Ints
    patch_size: Ints
    patch_overlap: Ints
    padding_mode: str | None
    fill: float
    context: Ints
    snap: Ints
    heads: tuple[Head, ...]
    copies_input: bool
    may_skip: bool
    core: Ints
    sweep: int
    io_strategy: IoStrategy
    concurrency: int
    batch_size: int
    torch_threads: int
    projected_memory: int
    projected_disk: int
    bytes_read: int
    bytes_written: int
    task_memory: int
    memory_parts: Parts = ()
    projected_device_memory: int = 0
    task_device_memory: int = 0
    device_parts: Parts = ()
    model_note: str = ""
    statistics: tuple[tuple[float, float], ...] = ()
    statistics_of: str = ""
    box: tuple[Ints, Ints] | None = None
    skip_value: float | None = None
    output_fill: float = 0
    allow_nonfinite: bool = False
    work: str = ""
    crash_limit: int | None = None
    selected: str = ""
    stores_outputs: bool = False
    labelling: Labelling | None = None
    table: Mapping[str, Any] | None = None
    merge_memory: int = 0
    scores: str = ""
    patch_starts: str = "regular"
    extent: tuple[Ints, Ints] | None = None
    classes: tuple[str, ...] = ()
    vectors: tuple[VectorHead, ...] = ()
    model_inputs: tuple[tuple[str, int], ...] = ()
    calls: int = 1
    lanes: int = 1
    patches_per_call: int = 1

    @cached_property
    def grid(self) -> PatchGrid:
        """The output patches of the model, in the volume's frame."""
        sizes = (self.patch_size, self.patch_overlap, self.context, self.snap)
        is_even, is_padded = self.patch_starts == "even", self.padding_mode is not None
        return patch_grid(self.shape, *sizes, padded=is_padded, even=is_even, extent=self.extent)

    @cached_property
    def input_grid(self) -> PatchGrid:
        """The input patches of the model: larger by its context."""
        return PatchGrid(tuple(a.grown(c) for a, c in zip(self.grid.axes, self.context, strict=True)))

    @cached_property
    def unit(self) -> Ints:
        """Divisor of all cores: whole write units of every head."""
        return common_unit(self.heads, len(self.axes))

    @cached_property
    def block_grid(self) -> BlockGrid:
        """The blocks in the volume's frame."""
        return BlockGrid.of(self.grid, self.core, self.unit, self.sweep, crop=crops(self.heads))

    @cached_property
    def frames(self) -> tuple[BlockGrid, ...]:
        """The blocks in the frame of each head."""
        return tuple(self.block_grid.scaled(h.scale, h.unit, crop=h.crop) for h in self.heads)

    @cached_property
    def layers_per_group(self) -> int:
        """Layers of patches that are computed together."""
        return layers_per_group(Frame.of(self.block_grid, self.in_chunks), self.batch_size)

    @property
    def retained_memory(self) -> int:
        """Bytes of `projected_memory` that the heap may retain from call to call of the model."""
        return dict(self.memory_parts).get("heap", 0)

    @property
    def fills_batches(self) -> bool:
        """True where every call is filled up to `patches_per_call`, since the model is compiled for it."""
        return self.parameters.get("compile") is not None

    @cached_property
    def landing_bytes(self) -> tuple[int, ...]:
        """Most bytes of one slab of each head in main memory, sums or values, in any block."""
        return tuple(landing_bytes(Frame.of(f), h) for f, h in zip(self.frames, self.heads, strict=True))

    @cached_property
    def scores_may_lack(self) -> bool:
        """Return whether scores that are resampled are NaN where no patch has computed any."""
        return bool(self.scores) and json.loads(self.scores)["output_fill"] == json_number(math.nan)

    @property
    def bytes_per_patch(self) -> float:
        """Bytes of the volume per patch; overlap and padding are not counted twice."""
        volume = math.prod(self.shape) * self.in_channels * np.dtype(self.in_dtype).itemsize
        return volume / max(1, self.patches)

    @cached_property
    def block_patches(self) -> npt.NDArray[np.int32]:
        """Number of patches to compute of each block."""
        if self.selected:
            return unpack_counts(self.selected)
        return self.block_grid.block_patches()

    @cached_property
    def patches(self) -> int:
        """Number of patches to compute; of the whole grid where they were not counted."""
        return int(self.block_patches.sum(dtype=np.int64)) if self.selected else self.grid.num_patches

    @property
    def blocks(self) -> int:
        return self.block_grid.num_blocks

    @property
    def has_objects(self) -> bool:
        """Return whether an output of the model is objects, which are matched patch by patch."""
        return any(head.has_objects for head in self.heads)

    @property
    def merges(self) -> bool:
        """Return whether no block is final before the objects of all are merged."""
        return self.reads_voxels or self.has_objects

    @property
    def reads_voxels(self) -> bool:
        """Return whether patches are voxels, which no model sees: in runs of `label` and `objects`."""
        return self.labelling is not None or self.table is not None

    @property
    def num_normalized(self) -> int:
        """Number of blocks with a normalize stage: those that seams enter; after a merge all; of a table none."""
        if self.table is not None:
            return 0
        return self.blocks if self.merges else self.block_grid.num_open

    @cached_property
    def neighbours(self) -> Neighbours | AllBlocks:
        """The blocks whose normalize stages depend on each other's predict stages."""
        return AllBlocks(self.blocks) if self.merges else Neighbours(self.block_grid)

    @cached_property
    def patches_per_block(self) -> int:
        """Number of patches of the block with most of them: what a crash costs for each block that was at work."""
        return int(self.block_patches.max()) if self.selected else self.block_grid.patches_per_block

    @property
    def crash_patches(self) -> int:
        """Most patches that a crash of a process costs."""
        if self.stores_outputs:
            return min(max(self.concurrency, self.calls) * self.patches_per_call, self.patches)
        return min(self.concurrency * self.patches_per_block, self.patches)

    @property
    def normalize_slots(self) -> int:
        """Blocks that are normalized beside those that are predicted: one where these have a device of their own."""
        return 1 if self.device_parts and not self.merges else 0

    @property
    def most_concurrent(self) -> int | None:
        """Blocks at a time in a process beyond which a crash costs more than it should; None: any number."""
        if self.crash_limit is None or self.stores_outputs:
            return None
        return max(1, self.crash_limit // max(1, self.patches_per_block))

    def patches_in(self, blocks: Collection[int]) -> int:
        """Return the number of patches of some blocks."""
        return int(self.block_patches[np.fromiter(blocks, np.int64, len(blocks))].sum(dtype=np.int64))

    def in_order(self, blocks: Sequence[int]) -> Iterator[int]:
        """Yield blocks in their order of execution."""
        return in_order(self.block_patches, blocks, self.block_grid.layer)

    @property
    def block_shape(self) -> Ints:
        """Spatial shape of a block's core, in voxels."""
        return self.block_grid.core_shape[-self.spatial :]

    @cached_property
    def run_id(self) -> str:
        """Digest of everything the bytes of the result depend on."""
        names = ("parameters", "core", "sweep", "context", "snap", "torch_threads")
        values = {name: getattr(self, name) for name in names}
        values |= {"vectors": [asdict(v) for v in self.vectors]} if self.vectors else {}
        values |= {"calls": (self.patches_per_call, self.lanes)} if self.patches_per_call > 1 else {}
        return digest({"format": FORMAT, "heads": [asdict(h) for h in self.heads], **values})

    def to_json(self) -> str:
        """Return the plan as JSON, with derived numbers: patches, blocks, their shape and patches, and the run's id."""
        names = ("run_id", "patches", "patches_per_block", "crash_patches", "blocks", "block_shape")
        derived = {name: getattr(self, name) for name in names}
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        record["heads"], record["io_strategy"] = [asdict(h) for h in self.heads], asdict(self.io_strategy)
        record["vectors"] = [asdict(v) for v in self.vectors]
        record["labelling"] = None if self.labelling is None else asdict(self.labelling)
        record |= {name: json_number(record[name]) for name in ("fill", "output_fill")}
        return json.dumps({"format": FORMAT, **derived, **record}, indent=1, default=list)

    @classmethod
    def from_json(cls, text: str, *, older: bool = False) -> Plan:
        """Return the plan that `to_json` wrote; with `older` also one of format 2, whose run cannot be continued.

        Raises:
            ValueError: when the text is not the JSON of a plan.
            RunMismatch: when another version of oocpatch wrote it, in another format.
        """
        record = json.loads(text)
        if "format" not in record:
            raise ValueError("the JSON of a plan must have a 'format', as Plan.to_json() writes it")
        if record["format"] == 2 and older:
            record = _upgraded(record)
        elif record["format"] != FORMAT:
            raise RunMismatch(
                f"the plan must have format {FORMAT}, got {record['format']!r} of another version of oocpatch; "
                "finish the run with that version, or start afresh with overwrite=True",
                ("format",),
            )
        values = {f.name: _tuples(record[f.name]) for f in fields(cls) if f.name in record}
        values |= {name: float(values[name]) for name in ("fill", "output_fill") if isinstance(values.get(name), str)}
        values.setdefault("patches_per_call", record["batch_size"])
        values["parameters"] = record["parameters"]
        values["heads"] = tuple(Head(**{k: _tuples(v) for k, v in h.items()}) for h in record["heads"])
        values["vectors"] = tuple(VectorHead(**v) for v in record.get("vectors", ()))
        values["io_strategy"] = IoStrategy(**record["io_strategy"])
        values["labelling"] = None if record.get("labelling") is None else Labelling(**record["labelling"])
        return cls(**values)

    def draw(self) -> str:
        """Return sections through blocks, seams and patches, as the text of an SVG file."""
        return draw_plan(self.block_grid, self.axes, self.spatial)

    def to_html(self, rows: Mapping[str, str]) -> str:
        """Return a table of rows, and the drawing, for a notebook."""
        return table_of(rows) + image_of(self.draw(), "blocks, seams and patches of the plan")

    def _repr_html_(self) -> str:
        return self.to_html(self.rows)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return lines_of(self.rows)

    @property
    def rows(self) -> dict[str, str]:
        """Return the rows that the plan prints: a text for each name."""

        def size(values: Ints) -> str:
            return " x ".join(map(str, values))

        spatial, loops = slice(-self.spatial, None), self.axes[: -self.spatial]
        looped = f", looped over {', '.join(loops)}" if loops else ""
        volume = human(math.prod(self.shape) * self.in_channels * np.dtype(self.in_dtype).itemsize)
        names = "".join(a[0] for a in self.axes)

        def needed(most: int, parts: Parts) -> str:
            return f"{human(most)} at most ({', '.join(f'{name} {human(n)}' for name, n in parts if n)})"

        left_out = f"; {self.grid.num_patches - self.patches:,} more are left out" if self.selected else ""
        patches = f"{self.patches:,} of {size(self.patch_size[spatial])}, overlap {size(self.patch_overlap[spatial])}"
        patches += f", context {size(self.context[spatial])}" if any(self.context) else ""
        rule, at_a_time = self.labelling, f"{self.concurrency} at a time"
        swept = f"swept along {self.axes[self.sweep]}, {at_a_time}"
        side_by_side = f"{self.calls} calls at a time, {self.torch_threads} thread(s) each" if self.calls > 1 else ""
        modes = ", ".join(dict.fromkeys(h.mode for h in self.heads))
        patches += f"{f', {modes}' if modes else ''}, batches of {self.batch_size}{left_out}{self._filling()}"
        outputs = {
            "output" if i == 0 else f"output {i + 1}": f"{h.name}: {h.out_channels} channel(s), {h.out_dtype}, "
            f"chunks {size(h.chunks[spatial])}"
            + (f", shards {size(h.unit[spatial])}" if h.unit != h.chunks else "")
            + (f", scale {_scales(h.scale[spatial])}" if h.scaled else "")
            for i, h in enumerate(self.heads)
        }
        for vectors in self.vectors:
            name = f"output {len(outputs) + 1}" if outputs else "output"
            outputs[name] = f"{vectors.name}: a vector of {vectors.length} per patch, {vectors.dtype}"
        return {
            "volume": f"{size(self.shape)} {names}, {self.in_channels} channel(s), {self.in_dtype}, {volume}{looped}",
            **({"objects": str(rule)} if rule else {"patches": patches}),
            **({"model": model} if (model := ", ".join(filter(None, [self.model_note, side_by_side]))) else {}),
            "blocks": f"{self.blocks:,} of {size(self.block_shape)}, {at_a_time if rule else swept}",
            **({} if rule else {"work": f"{self.work}; {self._crash_cost()}" if self.work else self._crash_cost()}),
            **outputs,
            "memory": needed(self.projected_memory, self.memory_parts),
            **({"device": needed(self.projected_device_memory, self.device_parts)} if self.device_parts else {}),
            "disk": f"workspace {human(self.projected_disk)} at most",
            "traffic": f"reads {human(self.bytes_read)}, writes {human(self.bytes_written)}",
        }

    def _filling(self) -> str:
        """Describe how patches that are larger than the volume are filled up; nothing where none is."""
        sizes = zip(self.input_grid.patch_size, self.shape, strict=True)
        if all(patch <= length for patch, length in sizes):
            return ""
        fill = f" with {self.fill:g}" if self.padding_mode == "constant" else ""
        return f"; larger than the volume, and filled up there by padding_mode {self.padding_mode or 'edge'}{fill}"

    def _crash_cost(self) -> str:
        """Describe what a crash costs."""
        text = f"a crash costs at most {self.crash_patches:,} patches per process"
        if self.stores_outputs:
            return f"{text}, as the model's outputs are stored until their block is done"
        if self.crash_limit is None or self.crash_patches <= self.crash_limit:
            return text
        return f"{text} (max_disk has no room for the model's outputs, or smaller chunks or patches are needed)"


def lines_of(rows: Mapping[str, str]) -> str:
    """Return the rows of a plan as lines of text."""
    return "\n".join(f"{name:<8} {text}" for name, text in rows.items())


def pack_counts(counts: npt.NDArray[np.int32]) -> str:
    """Return the numbers of patches of blocks as a text, for the plan's JSON.

    >>> unpack_counts(pack_counts(np.array([8, 0, 3]))).tolist()
    [8, 0, 3]
    """
    return base64.b64encode(zlib.compress(counts.astype("<i4").tobytes())).decode()


def unpack_counts(text: str) -> npt.NDArray[np.int32]:
    """Return the numbers of patches of blocks that `pack_counts` packed."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i4").astype(np.int32, copy=False)


def _upgraded(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON of a plan of format 2 with the names of format 3."""
    aligned, ahead, threads = (record["way"][name] for name in ("aligned", "ahead", "io_threads"))
    return {
        **record,
        "io_strategy": {"aligned_reads": aligned, "prefetch": ahead, "threads": threads},
        "may_skip": record["skips"],
        "model_note": record["note"],
    }


def _scales(scale: tuple[Scale, ...]) -> str:
    """Return `1/4` where all axes have one scale, `1 x 1/4 x 1/4` otherwise."""
    texts = [str(a) if b == 1 else f"{a}/{b}" for a, b in scale]
    return texts[0] if len(set(texts)) == 1 else " x ".join(texts)


def differences(asked: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the parameters in which two fingerprints differ: name -> (asked, stored).

    >>> differences({"patch_size": [96]}, {"patch_size": [64]})
    {'patch_size': ([96], [64])}
    """
    plain = json.loads(json.dumps(asked, default=list))
    names = [n for n in plain if plain[n] != stored.get(n)]
    return {n: (plain[n], stored.get(n)) for n in names}


def digest(value: Any) -> str:
    """Return twenty hex digits of the SHA-256 of a value's canonical JSON.

    >>> digest({"b": 1, "a": (2,)}) == digest({"a": [2], "b": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def human(size: float, *, up: bool = False) -> str:
    """Return a number of bytes as text; with `up` it is rounded up, so that it suffices as a limit.

    >>> human(1536), human(3 << 30), human((3 << 30) + 1, up=True)
    ('1.5 KiB', '3.0 GiB', '3.1 GiB')
    """
    unit, *larger = "B", "KiB", "MiB", "GiB", "TiB", "PiB"
    while size >= 1024 and larger:
        size, unit = size / 1024, larger.pop(0)
    size = math.ceil(size * 10) / 10 if up else size
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
