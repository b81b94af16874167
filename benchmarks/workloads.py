"""What `python -m benchmarks report` measures: each workload, who does it, and what was aimed at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contender:
    """One who does the job of a workload."""

    name: str
    """As the tables call it."""
    kind: str
    """`copy`, `bare` (the model alone), `ours` or `peer`."""
    task: str
    """Module and function below `benchmarks`."""
    seconds: float
    """About what one round takes at full size on two cores, with the start of the process and the comparison."""
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: str = "here"
    """`here`, or one of the peers' environments."""

    @property
    def zarr_format(self) -> int:
        """The format of the volume that it can read."""
        return 2 if self.environment == "zarr2" else 3


@dataclass(frozen=True)
class Workload:
    """A job, and who does it."""

    title: str
    source: str
    """Kind of the volume, see `benchmarks.sources.source`."""
    size: int
    """Edge of the volume."""
    patch: int
    overlap: int
    chunk: int
    model: str
    contenders: tuple[Contender, ...]
    against: str = "copy"
    """Kind of the contenders whose fastest is the yardstick; empty: there is none."""
    once: bool = False
    """Whether one round is enough, as for memory, which hardly varies."""
    targets: dict[str, float] = field(default_factory=dict)
    """Names of contenders, and how many times the yardstick was aimed at."""

    def edge(self, shrink: int) -> int:
        """Edge of the volume in a smaller run: whole chunks, and more than one patch."""
        least = max(self.size // shrink, 2 * self.patch - self.overlap)
        return min(self.size, -(-least // self.chunk) * self.chunk)


def _ours(seconds: float, limit: str = "1 GiB", **arguments: Any) -> Contender:
    more = "".join(f", {value}" for value in arguments.values())
    arguments = {"max_memory": limit.replace(" ", ""), **arguments}
    return Contender(f"oocpatch, {limit}{more}", "ours", "ours.predict", seconds, arguments)


def _peer(name: str, function: str, seconds: float, environment: str = "zarr3", **arguments: Any) -> Contender:
    return Contender(name, "peer", "peer_tasks.peer", seconds, {"name": function, **arguments}, environment)


COPIES = (
    Contender("copy, zarr-python, 4 threads", "copy", "copies.zarr_python", 4, {"threads": 4}),
    Contender("copy, zarr-python with zarrs", "copy", "copies.zarrs", 4, {"chunks": 2}),
    Contender("copy, TensorStore", "copy", "copies.tensorstore", 4),
)
ALONE = (
    Contender("the network alone, one call", "bare", "peer_tasks.bare", 16),
    Contender("the network alone, a call per core", "bare", "peer_tasks.bare", 16, {"side_by_side": True}),
)
MONAI = "MONAI SlidingWindowInferer, in memory"
MONAI_DISK = "MONAI PatchInferer, ZarrAvgMerger"
TORCHIO = "TorchIO, in memory"
PATCHLY = "patchly"
OVERLAP = "dask map_overlap"
NAIVE = "naive += on Zarr"

WORKLOADS: dict[str, Workload] = {
    "half": Workload(
        "512^3 float32, chunks 64^3, patches 96^3, overlap 48, identity",
        "random", 512, 96, 48, 64, "identity",
        (
            *COPIES, _ours(7), _ours(8, "256 MiB"),
            _peer(MONAI, "monai_in_memory", 9),
            _peer(TORCHIO, "torchio_in_memory", 9),
            _peer(PATCHLY, "patchly_on_disk", 20, "zarr2"),
            _peer(f"{OVERLAP}, overlap 48", "dask_overlap", 16, options={"cut": True}),
            _peer(f"{OVERLAP}, overlap 32", "dask_overlap", 10, options={"cut": False}),
            _peer(f"{OVERLAP}, overlap 32, zarrs", "dask_overlap", 9, options={"cut": False}, zarrs=True),
            _peer(MONAI_DISK, "monai_on_disk", 110),
            _peer(NAIVE, "naive", 150),
        ),
        targets={"oocpatch, 1 GiB": 1.3, "oocpatch, 256 MiB": 1.4},
    ),
    "plain": Workload(
        "512^3 float32, chunks 64^3, patches 96^3 without overlap, identity",
        "random", 512, 96, 0, 64, "identity",
        (
            *COPIES, _ours(7),
            _peer(MONAI, "monai_in_memory", 8),
            _peer(TORCHIO, "torchio_in_memory", 8),
            _peer(PATCHLY, "patchly_on_disk", 10, "zarr2"),
            _peer(MONAI_DISK, "monai_on_disk", 21),
        ),
        targets={"oocpatch, 1 GiB": 1.05},
    ),
    "slide": Workload(
        "16384^2 RGB uint8, chunks 512^2, patches 512^2, overlap 128, two channels",
        "slide", 16384, 512, 128, 512, "two",
        (
            *COPIES, _ours(15), _ours(12, output_dtype="uint8"),
            _peer(MONAI, "monai_in_memory", 25),
            _peer(TORCHIO, "torchio_in_memory", 25),
            _peer(PATCHLY, "patchly_on_disk", 25, "zarr2"),
            _peer(f"{OVERLAP}, overlap 128", "dask_overlap", 20, options={"cut": True}),
        ),
        targets={"oocpatch, 1 GiB, uint8": 1.3, "oocpatch, 1 GiB": 1.3},
    ),
    "network": Workload(
        "256^3 float32, patches 96^3, overlap 24, three convolutions of eight channels, three classes",
        "random", 256, 96, 24, 64, "layers",
        (
            *ALONE, _ours(18),
            _peer(MONAI, "monai_in_memory", 18),
            _peer(TORCHIO, "torchio_in_memory", 18),
            _peer(PATCHLY, "patchly_on_disk", 20, "zarr2"),
            _peer(f"{OVERLAP}, overlap 24", "dask_overlap", 20, options={"cut": True}),
        ),
        against="bare", targets={"oocpatch, 1 GiB": 1.03},
    ),
    "unet": Workload(
        "96^3 float32, patches 48^3, overlap 16, a U-Net of 2.2 million parameters, three classes",
        "random", 96, 48, 16, 48, "unet",
        (
            *ALONE, _ours(18),
            _peer(MONAI, "monai_in_memory", 18),
            _peer(f"{OVERLAP}, overlap 16", "dask_overlap", 18, options={"cut": True}),
        ),
        against="bare", targets={"oocpatch, 1 GiB": 1.03},
    ),
    "start": Workload(
        "512^3 float32, patches 96^3, overlap 48: seconds until the network gets its first patch",
        "random", 512, 96, 48, 64, "identity",
        (
            Contender("oocpatch --help", "ours", "ours.print_help", 1),
            Contender("oocpatch", "ours", "ours.first_patch", 4),
            *(
                Contender(name, "peer", "peer_tasks.first_patch", 4, {"name": function, **more}, environment)
                for name, function, environment, more in (
                    (MONAI, "monai_in_memory", "zarr3", {}),
                    (MONAI_DISK, "monai_on_disk", "zarr3", {}),
                    (TORCHIO, "torchio_in_memory", "zarr3", {}),
                    (PATCHLY, "patchly_on_disk", "zarr2", {}),
                    (OVERLAP, "dask_overlap", "zarr3", {"options": {"cut": False}}),
                )
            ),
        ),
        against="", targets={"oocpatch": 2.0, "oocpatch --help": 0.3},
    ),
    "memory-256": Workload(
        "256^3 float32, patches 96^3, overlap 48, identity",
        "random", 256, 96, 48, 64, "identity",
        (
            _ours(5), _ours(5, "256 MiB"),
            _peer(MONAI, "monai_in_memory", 6),
            _peer(TORCHIO, "torchio_in_memory", 6),
            _peer(PATCHLY, "patchly_on_disk", 6, "zarr2"),
            _peer(f"{OVERLAP}, overlap 32", "dask_overlap", 6, options={"cut": False}),
            _peer(MONAI_DISK, "monai_on_disk", 20),
        ),
        against="", once=True,
    ),
    "memory-1024": Workload(
        "1024^3 float32, no chunk stored, patches 96^3, overlap 48, identity",
        "sparse", 1024, 96, 48, 64, "identity",
        (_ours(20), _ours(25, "256 MiB")), against="", once=True,
    ),
    "memory-2048": Workload(
        "2048^3 float32, no chunk stored, patches 96^3, overlap 48, identity",
        "sparse", 2048, 96, 48, 64, "identity",
        (_ours(300), _ours(350, "256 MiB")), against="", once=True,
    ),
}  # fmt: skip
USUAL = tuple(name for name in WORKLOADS if name != "memory-2048")
"""What is measured if nothing else is said."""
EDGES = {"memory-256": 256, "half": 512, "memory-1024": 1024, "memory-2048": 2048}
"""Workloads that differ in the size of the volume only, for the memory that is added."""
