"""The law of the floors: imports only go down, and each floor owns its outside libraries.

Read from the source by AST, function-level imports and imports for types included: a direction is a direction.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "oocpatch"
MAX_LINES = 400


@dataclass(frozen=True, slots=True)
class Floor:
    """What the modules of one floor may import, the standard library apart."""

    inside: frozenset[str]
    """Parts of oocpatch: a folder or a module directly below the package."""
    outside: frozenset[str]
    """Libraries, with everything below their dotted name."""


def _floors() -> dict[str, Floor]:
    """Every part of the package with its floor; what is not listed here has no place yet."""
    errors = frozenset({"errors"})
    decide, remember = errors | {"planning"}, errors | {"planning", "storage"}
    # The public classes of floors 2 and 3 check their arguments at one door.
    door = remember | {"door"}
    compute, feed = door | {"inference"}, door | {"sampling"}
    # Floor 3 has four steps: what the model gives, what the arguments ask for, the plan, carrying it out.
    layout = compute | {"layout"}
    request = layout | feed | {"request"}
    run = request | {
        "decide",
        "progress",
        "pyramid",
        "record",
        "telling",
        "parts",
        "recipe",
        "job",
        "remote",
        "executors",
        "run",
    }
    convert = door | {"telling", "converting"}
    look = run | {"looking"}
    lint = remember | {"linting"}
    public = look | convert | lint | {"checking", "verifying"}
    above = public | {
        "__init__"
    }  # the public names come from floors 3 and 4, so only floor 4 may use them by the package
    numpy = frozenset({"numpy"})
    on_disk = numpy | {"zarr", "xarray", "dask.array", "google_crc32c", "psutil"}
    on_device = on_disk | {"torch"}
    return {
        "errors": Floor(frozenset(), frozenset()),
        "planning": Floor(decide, numpy),
        "storage": Floor(remember, on_disk),
        "inference": Floor(compute, on_device),
        "sampling": Floor(feed, on_device),
        "door": Floor(door, on_disk),
        "layout": Floor(layout, on_device),
        "request": Floor(request, on_device),
        "pyramid": Floor(compute | {"pyramid", "telling"}, on_disk),
        "decide": Floor(request | {"decide", "pyramid"}, on_device),
        "telling": Floor(frozenset(), frozenset({"tqdm"})),
        "progress": Floor(request | {"progress", "telling"}, on_device),
        "job": Floor(request | {"job"}, on_device),
        "parts": Floor(request | {"parts"}, frozenset()),
        "executors": Floor(
            request | {"progress", "telling", "pyramid", "record", "job", "remote", "executors"}, frozenset()
        ),
        "recipe": Floor(request | {"recipe"}, on_device),
        "remote": Floor(request | {"job", "recipe", "remote"}, on_device),
        "run": Floor(run, on_device | {"tqdm"}),
        "converting": Floor(convert, on_disk),
        "record": Floor(frozenset(), numpy),
        "looking": Floor(look, on_disk),
        "linting": Floor(lint, on_disk),
        "verifying": Floor(request | {"progress", "parts", "pyramid", "verifying"}, on_disk),
        "checking": Floor(above, on_device),
        "demo": Floor(above | {"demo"}, on_device | {"PIL", "tqdm"}),
        "cli_values": Floor(frozenset(), frozenset({"click"})),
        "cli_where": Floor(request, frozenset({"click"})),
        "cli_config": Floor(frozenset(), frozenset({"click"})),
        "doctor": Floor(above | {"doctor"}, on_device),
        "cli_files": Floor(above | {"cli_values", "cli_files", "doctor"}, frozenset({"click"})),
        "cli": Floor(
            above | {"demo", "cli_values", "cli_where", "cli_config", "cli_files", "cli"}, frozenset({"click"})
        ),
        "accessor": Floor(run | {"accessor"}, frozenset({"xarray"})),
        "__init__": Floor(public | {"accessor"}, frozenset()),
        "__main__": Floor(frozenset({"cli"}), frozenset()),
    }


FLOORS = _floors()
# What one file may import besides what its floor owns.
EXTRA = {
    "inference/scheduler.py": frozenset({"dask", "tenacity"}),
    "inference/cluster.py": frozenset({"dask", "distributed", "cloudpickle"}),
    "inference/connecting.py": frozenset({"distributed"}),
    "inference/slurm.py": frozenset({"dask", "dask_jobqueue", "distributed"}),
    "inference/models.py": frozenset({"safetensors"}),
    "inference/onnx_model.py": frozenset({"onnxruntime"}),
    "sampling/masses.py": frozenset({"dask", "tqdm"}),
    "storage/addresses.py": frozenset({"obstore"}),
    "storage/objects.py": frozenset({"obstore"}),
    "storage/ome_output.py": frozenset({"yaozarrs"}),
    "storage/plain.py": frozenset({"numcodecs"}),
    "storage/statistics.py": frozenset({"dask", "tqdm"}),
    "storage/formats/hdf5.py": frozenset({"h5py"}),
    "storage/formats/nifti.py": frozenset({"nibabel"}),
    "storage/formats/slide.py": frozenset({"openslide"}),
    "storage/formats/tensors.py": frozenset({"tensorstore"}),
    "storage/formats/tiff.py": frozenset({"tifffile"}),
    "looking/canvas.py": frozenset({"PIL"}),
    "door.py": frozenset({"dask.utils"}),  # reads "2GiB"
}


def offences(path: str, source: str) -> list[str]:
    """What the floor of `path` (relative to the package) does not allow its source to import, as `path:line: ...`."""
    parts = path.removesuffix(".py").split("/")
    if parts[0] not in FLOORS:
        return [f"oocpatch/{path}:1: no floor; give it one in tests/test_imports.py"]
    floor = FLOORS[parts[0]]
    outside = floor.outside | EXTRA.get(path, frozenset())
    found = []
    for line, name in imported(parts, ast.parse(source)):
        head, _, rest = name.partition(".")
        if head == "oocpatch":
            part = rest.partition(".")[0]
            allowed = (part if part in FLOORS else "__init__") in floor.inside  # oocpatch.predict is a name of the door
        else:
            allowed = head in sys.stdlib_module_names or any(f"{name}.".startswith(f"{lib}.") for lib in outside)
        if not allowed:
            found.append(f"oocpatch/{path}:{line}: {parts[0]} must not import {name}")
    return found


def imported(module: list[str], tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that a module imports, by statement or by `import_module("...")`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ["oocpatch", *module][: -node.level] if node.level else []
            stem = ".".join([*above, *filter(None, [node.module])])
            # `from dask import array` names a module, `from torch import nn` too: the longer name is the one to judge.
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


def modules() -> list[str]:
    return sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", modules())
def test_imports_only_go_down(path: str) -> None:
    found = offences(path, (PACKAGE / path).read_text())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "offence"),
    [
        ("planning/grid.py", "import numpy as np\nimport zarr", ":2: planning must not import zarr"),
        ("planning/grid.py", "from oocpatch.volumes.volume import Volume", ":1: planning must not import oocpatch.sto"),
        ("planning/grid.py", "from ..storage import volume", ":1: planning must not import oocpatch.volumes.volume"),
        ("planning/grid.py", "from oocpatch import run", ":1: planning must not import oocpatch.run.predict"),
        ("planning/grid.py", "import oocpatch", ":1: planning must not import oocpatch"),
        ("planning/grid.py", "from oocpatch import predict", ":1: planning must not import oocpatch.predict"),
        ("planning/grid.py", "def f():\n  import torch", ":2: planning must not import torch"),
        ("planning/grid.py", "if TYPE_CHECKING:\n  import torch", ":2: planning must not import torch"),
        ("planning/grid.py", "importlib.import_module('torch')", ":1: planning must not import torch"),
        ("storage/volume.py", "import dask.array\nimport dask", ":2: storage must not import dask"),
        ("storage/volume.py", "from dask import array, delayed", ":1: storage must not import dask.delayed"),
        ("inference/stages.py", "import dask", ":1: inference must not import dask"),
        ("inference/stages.py", "from oocpatch.sampling import queue", ":1: inference must not import oocpatch.sampl"),
        ("sampling/queue.py", "import oocpatch.engine.partial_sums", ":1: sampling must not import oocpatch.inference"),
        (
            "request.py",
            "from oocpatch.run.predict import predict",
            ":1: request must not import oocpatch.run.predict",
        ),
        ("run.py", "from oocpatch.cli.main import main", ":1: run must not import oocpatch.cli.main"),
        ("run.py", "import click", ":1: run must not import click"),
        ("cli.py", "import torch", ":1: cli must not import torch"),
        ("reports/html.py", "import json", "no floor"),
    ],
)
def test_an_import_that_goes_up_is_found_and_its_line_named(path: str, source: str, offence: str) -> None:
    found = offences(path, source)
    assert len(found) == 1
    assert found[0].startswith(f"oocpatch/{path}:")
    assert offence in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("planning/grid.py", "import math\nimport numpy as np\nfrom oocpatch.planning.box import Box"),
        ("storage/volume.py", "import dask.array as da\nfrom dask.array import Array\nimport zarr.storage"),
        ("inference/cluster.py", "import dask\nfrom distributed import Client\nfrom oocpatch.storage import ledger"),
        ("inference/partial.py", "from .predictor import Predictor\nfrom ..planning.box import Box"),
        ("sampling/queue.py", "import torch\nfrom oocpatch.volumes.volume import Volume"),
        ("cli.py", "import click\nfrom oocpatch.run.predict import predict\nfrom oocpatch import __version__"),
    ],
)
def test_an_import_that_goes_down_is_allowed(path: str, source: str) -> None:
    assert offences(path, source) == []


@pytest.mark.parametrize("path", modules())
def test_a_module_is_at_most_400_lines(path: str) -> None:
    assert len((PACKAGE / path).read_text().splitlines()) <= MAX_LINES


def test_no_module_is_a_drawer_for_the_rest() -> None:
    drawers = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py", "base.py"}
    assert [module for module in modules() if Path(module).name in drawers] == []


def test_every_folder_of_the_package_is_a_package_and_typed() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("module", ["oocpatch", "oocpatch.cli.main", "oocpatch.errors", "oocpatch.planning"])
def test_what_a_shell_waits_for_does_not_load_the_heavy_libraries(module: str) -> None:
    heavy = "{'torch', 'zarr', 'dask', 'xarray'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_counting_the_memory_of_a_model_does_not_import_the_compiler_of_torch():
    code = (
        "import sys, torch\n"
        "from oocpatch.models.footprint import Footprint\n"
        "with torch.inference_mode(), Footprint([]) as footprint:\n"
        "    torch.zeros(1024).add(1)\n"
        "print(footprint.peak, 'torch._dynamo' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["8192", "False"]
