"""The machine as oocpatch sees it: versions, cores, memory, disk, devices, extras. For people and bug reports."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import zarr

from oocpatch.planning.arguments import memory_limit
from oocpatch.planning.plan import human
from oocpatch.provenance import versions
from oocpatch.storage.zarrs_codec import ZarrsArray
from oocpatch.system import usable_cores

EXTRAS = {
    "fast": ("zarrs",),
    "onnx": ("onnxruntime",),
    "safetensors": ("safetensors",),
    "bioimageio": ("bioimageio",),
    "monai": ("monai",),
    "tiff": ("tifffile", "imagecodecs"),
    "slide": ("openslide",),
    "nifti": ("nibabel",),
    "nnunet": ("dynamic_network_architectures",),
    "hdf5": ("h5py",),
    "dicom": ("pydicom",),
    "microscopy": ("h5py", "liffile", "nd2", "pylibCZIrw"),
    "tensorstore": ("tensorstore",),
    "s3": ("obstore",),
    "view": ("PIL",),
    "objects": ("scipy", "cc3d", "h5py", "pyarrow"),
    "slurm": ("dask_jobqueue",),
    "serve": ("neuroglancer",),
}
"""Modules of each extra."""


def examine(directory: Path) -> dict[str, Any]:
    """Return facts about the machine, and about the disk of a directory.

    >>> sorted(examine(Path()))
    ['cores', 'devices', 'disk', 'extras', 'memory', 'platform', 'versions', 'zarrs']
    """
    memory = psutil.virtual_memory()
    folders = {"here": directory, "temporary": Path(tempfile.gettempdir())}
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cores": {
            "machine": os.cpu_count(),
            "allowed": usable_cores(),
            "torch_threads": torch.get_num_threads(),
        },
        "memory": {"total": memory.total, "available": memory.available, "auto": memory_limit("auto")},
        "disk": {name: {"path": str(p.resolve()), "free": shutil.disk_usage(p).free} for name, p in folders.items()},
        "devices": _devices(),
        "extras": {name: [m for m in wanted if importlib.util.find_spec(m) is None] for name, wanted in EXTRAS.items()},
        "zarrs": _codes_with_zarrs(),
    }


def _devices() -> list[str]:
    devices = ["cpu"]
    devices += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return [*devices, "mps"] if torch.backends.mps.is_available() else devices


def _codes_with_zarrs() -> bool:
    """Return whether zarrs reads an array here, and is not only installed."""
    with tempfile.TemporaryDirectory() as folder:
        array = zarr.create_array(f"{folder}/a", data=np.arange(8, dtype=np.uint8), chunks=(4,))
        coder = ZarrsArray.open(array, 1)
        if coder is None:
            return False
        out = np.zeros(8, np.uint8)
        coder.read_into(out, (slice(0, 8),))
        return bool((out == np.arange(8)).all())


def as_text(facts: dict[str, Any]) -> str:
    """Return the facts of `examine` as lines of text."""
    cores, memory = facts["cores"], facts["memory"]
    rows = {
        "versions": ", ".join(f"{n} {v}" for n, v in facts["versions"].items()),
        "platform": facts["platform"],
        "cores": f"{cores['machine']}, {cores['allowed']} for this process, {cores['torch_threads']} threads of torch",
        "memory": f"{human(memory['total'])}, {human(memory['available'])} available; "
        f"max_memory='auto' is {human(memory['auto'])}",
        **{f"disk, {n}": f"{human(d['free'])} free at {d['path']}" for n, d in facts["disk"].items()},
        "devices": ", ".join(facts["devices"]),
        "chunks": "decoded by zarrs"
        if facts["zarrs"]
        else "decoded by oocpatch and zarr-python; zarrs is faster: pip install zarrs",
    }
    for name, missing in facts["extras"].items():
        rows[f"extra {name}"] = f"needs {', '.join(missing)}: pip install 'oocpatch[{name}]'" if missing else "there"
    return "\n".join(f"{name:<18} {text}" for name, text in rows.items())
