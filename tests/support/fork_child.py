"""A process that runs the package and a network with all their threads, and then forks a child for each task.

`python fork_child.py FOLDER` prints JSON: the answer of each child, or `hangs`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
import torch
import zarr
from torch.utils.data import DataLoader

import oocpatch
from oocpatch.planning.box import Box

warnings.simplefilter("ignore")
FOLDER = Path(sys.argv[-1])  # the last: pytest imports this file, too, to look for examples
CONTEXT = multiprocessing.get_context("fork")
SETTINGS: dict[str, Any] = {"patch_size": 16, "patch_overlap": 4, "overlap_mode": "crop", "progress": False}
SCAN = np.random.default_rng(0).random((32, 48, 32), dtype=np.float32)
NETWORK = torch.nn.Conv3d(1, 2, 3, padding=1, bias=False).eval()
WHOLE = Box.of_shape(SCAN.shape)


def right(values: Any, wanted: Any = SCAN, *, atol: float = 0.0) -> str:
    return "right" if np.allclose(np.asarray(values), wanted, rtol=0, atol=atol) else "wrong values"


def identity(source: Any = FOLDER / "scan.zarr", **options: Any) -> str:
    name = f"out-{os.getpid()}-{np.random.default_rng().integers(1 << 60)}.zarr"
    return right(oocpatch.predict(source, "identity", FOLDER / name, **{**SETTINGS, **options}))


def network(**options: Any) -> str:
    output = FOLDER / f"net-{os.getpid()}.zarr"
    result = oocpatch.predict(FOLDER / "scan.zarr", NETWORK, output, **{**SETTINGS, "patch_overlap": 8, **options})
    return right(result, oocpatch.predict(FOLDER / "scan.zarr", NETWORK, FOLDER / "net.zarr", **SETTINGS), atol=1e-5)


def resumed() -> str:
    kept = []

    def model(patches: torch.Tensor) -> torch.Tensor:
        kept.append(len(patches))
        return patches

    model_id = {"model_id": "copy"}
    oocpatch.predict(FOLDER / "scan.zarr", model, FOLDER / "parent.zarr", **SETTINGS, **model_id)
    return "right" if not kept else "computed again"


def inherited() -> str:
    return right(PARENTS.read(WHOLE)[0])


def loader() -> str:
    torch.set_num_threads(1)  # torch itself waits for the threads of the parent's main thread, in any code
    subject = oocpatch.Subject(scan=oocpatch.Volume(FOLDER / "scan.zarr"))
    sampler = oocpatch.GridSampler(subject, patch_size=16, patch_overlap=0)
    aggregator = oocpatch.PatchAggregator(SCAN.shape)
    for batch in DataLoader(sampler, batch_size=4):
        aggregator.add_batch(batch.scan.data, batch.patch_location)
    return right(aggregator.get_output()[0])


def grandchild() -> str:
    return in_child(identity)


def pyramid() -> str:
    result = oocpatch.predict(
        FOLDER / "scan.zarr", "identity", FOLDER / "pyramid.zarr", output_format="ome-zarr", output_chunks=8, **SETTINGS
    )
    coarse = zarr.open_group(FOLDER / "pyramid.zarr", mode="r")["scale1/image"][:].squeeze()
    mean = SCAN.reshape(16, 2, 24, 2, 16, 2).mean((1, 3, 5))
    return right(result) if right(coarse, mean, atol=1e-6) == "right" else "wrong values of level 1"


def converted() -> str:
    return right(oocpatch.convert(FOLDER / "scan.zarr", FOLDER / "copy.zarr", chunks=16, progress=False))


def normalized() -> str:
    options: dict[str, Any] = {"preprocess": "zscore"}
    result = oocpatch.predict(FOLDER / "scan.zarr", "identity", FOLDER / "z.zarr", **SETTINGS, **options)
    return right(result, (SCAN - SCAN.mean()) / SCAN.std(), atol=1e-4)


def n5() -> str:
    return right(oocpatch.Volume(FOLDER / "scan.n5").read(WHOLE)[0])


TASKS: dict[str, Callable[[], str]] = {
    "shards": identity,
    "an array in memory": lambda: identity(SCAN, axes="zyx"),
    "output with shards": lambda: identity(output_chunks=16, output_shards=32),
    "one worker": lambda: identity(workers=1),
    "two workers": lambda: identity(workers=2),
    "a network": network,
    "a network with two workers": lambda: network(workers=2),
    "a complete run of the parent": resumed,
    "a result of the parent": lambda: right(RESULT),
    "a volume of the parent": inherited,
    "patches": loader,
    "a grandchild": grandchild,
    "a pyramid": pyramid,
    "convert": converted,
    "normalization": normalized,
    "n5": n5,
}


def answer(task: Callable[[], str]) -> str:
    try:
        return task()
    except Exception as error:  # noqa: BLE001 - the caller compares it
        return f"{type(error).__name__}: {error}"


def in_child(task: Callable[[], str]) -> str:
    """Run a task in a child that `os.fork` makes."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        signal.alarm(60)
        os.write(write, answer(task).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(pid, 0)
    return text or "hangs"


if __name__ == "__main__":
    torch.set_num_threads(2)
    zarr.create_array(FOLDER / "scan.zarr", data=SCAN, chunks=(8, 16, 16), shards=(16, 48, 32), dimension_names="zyx")
    store = {"driver": "n5", "kvstore": {"driver": "file", "path": f"{FOLDER}/scan.n5/"}, "create": True}
    metadata = {"dimensions": SCAN.shape[::-1], "blockSize": [16] * 3, "dataType": "float32"}
    metadata["compression"] = {"type": "raw"}
    tensorstore.open({**store, "metadata": metadata}).result().T[...].write(SCAN).result()
    RESULT = oocpatch.predict(FOLDER / "scan.zarr", "identity", FOLDER / "parent.zarr", **SETTINGS, model_id="copy")
    oocpatch.predict(FOLDER / "scan.zarr", NETWORK, FOLDER / "net.zarr", **SETTINGS).compute()
    with torch.no_grad():
        NETWORK(torch.from_numpy(SCAN)[None, None])  # a pool of the main thread's
    PARENTS = oocpatch.Volume(FOLDER / "scan.zarr").for_run(2)
    oocpatch.Volume(FOLDER / "scan.n5").read(WHOLE)
    assert "zarrs" in sys.modules
    answers = {name: in_child(task) for name, task in TASKS.items()}
    with CONTEXT.Pool(2) as pool:
        got = pool.map_async(answer, [identity] * 3)
        answers["multiprocessing.Pool"] = " ".join({*got.get(60)})
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as executor:
        answers["ProcessPoolExecutor"] = executor.submit(answer, network).result(60)
    print(json.dumps(answers))
