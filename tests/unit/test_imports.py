"""The law of imports, read from the source by AST: one list, and every module imports only what stands left of it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "oocpatch"
MAX_LINES = 600

LAW = """
errors < progress < system < provenance < planning < storage < {volumes, workspace} < {outputs, models, sampling}
< engine < {aggregation, conversion, configuration, execution, objects} < run < {verification, visualization, xarray}
< __init__ < cli < __main__
"""
"""A name imports only what stands left of it; those in braces do not know each other."""

ON_DISK = "numpy zarr xarray dask.array google_crc32c psutil"
LIBRARIES = {
    "progress": "tqdm",
    "system": "psutil dask.system",
    "planning": "numpy",
    "planning/arguments": "psutil dask.utils",  # how much memory there is; reads "2GiB"
    "storage": ON_DISK,
    "storage/object_store": "obstore",
    "storage/object_path": "obstore",
    "storage/retries": "tenacity",
    "storage/chunk_reader": "numcodecs",
    "storage/packed_arrays": "numcodecs",
    "volumes": ON_DISK,
    "volumes/passes": "dask",
    "volumes/formats/czi": "pylibCZIrw",
    "volumes/formats/dicom": "pydicom",
    "volumes/formats/hdf5": "h5py",
    "volumes/formats/imaris": "h5py",
    "volumes/formats/lif": "liffile",
    "volumes/formats/nd2": "fsspec nd2",
    "volumes/formats/nifti": "nibabel",
    "volumes/formats/slide": "openslide",
    "volumes/formats/tensors": "tensorstore",
    "volumes/formats/tiff": "tifffile",
    "workspace": ON_DISK,
    "outputs": ON_DISK,
    "outputs/ome_zarr": "yaozarrs",
    "models": "numpy torch google_crc32c",
    "models/loading": "safetensors",
    "models/onnx": "onnxruntime",
    "models/packages/bioimageio": "bioimageio.spec",
    "models/packages/monai": "monai yaml",
    "sampling": ON_DISK + " torch",
    "engine": "numpy torch",
    "aggregation": ON_DISK + " torch",
    "objects": ON_DISK + " torch scipy cc3d numcodecs",
    "objects/table_files": "h5py pandas pyarrow",
    "conversion": ON_DISK,
    "conversion/nifti_file": "nibabel",
    "conversion/tiff_file": "tifffile",
    "conversion/vector_file": "h5py",
    "configuration": "numpy torch",
    "execution": ON_DISK + " torch dask distributed cloudpickle",
    "execution/dask_clients": "dask_jobqueue",
    "run": ON_DISK + " torch",
    "verification": ON_DISK + " torch",
    "visualization": ON_DISK,
    "visualization/canvas": "PIL",
    "visualization/neuroglancer": "neuroglancer tornado",
    "visualization/object_table": "pandas pyarrow",
    "visualization/virtual_zarr": "numcodecs",
    "xarray": "xarray",
    "__init__": "lazy_loader torchio",
    "cli": "click numpy",
    "cli/demo": "torch zarr",
    "cli/doctor": "torch zarr psutil",
}
"""The outside libraries of a package, and what one module of it may import besides."""

DYNAMIC_IMPORTS = {"import_module", "__import__", "import_extra", "import_reader"}
"""Functions whose first argument is the name of a module."""


def ranks() -> dict[str, int]:
    """The place of each name in the law."""
    groups = LAW.replace("\n", " ").split("<")
    return {name: place for place, group in enumerate(groups) for name in group.strip(" {}").split(", ")}


RANKS = ranks()


def offences(path: str, source: str) -> list[str]:
    """What the law does not allow `path` (relative to the package) to import, as `path:line: ...`."""
    parts = path.removesuffix(".py").split("/")
    package = parts[0]
    if package not in RANKS:
        return [f"oocpatch/{path}:1: {package} has no place in the law; give it one in tests/unit/test_imports.py"]
    libraries = f"{LIBRARIES.get(package, '')} {LIBRARIES.get('/'.join(parts), '')}".split()
    wrong = []
    for line, name in imported(parts, ast.parse(source)):
        head, _, rest = name.partition(".")
        if head == "oocpatch":
            part = rest.partition(".")[0]
            part = part if part in RANKS else "__init__"  # oocpatch.predict is one of the public names
            allowed = part == package or RANKS[part] < RANKS[package]
        else:
            allowed = head in sys.stdlib_module_names or any(f"{name}.".startswith(f"{lib}.") for lib in libraries)
        if not allowed:
            wrong.append(f"oocpatch/{path}:{line}: {package} must not import {name}")
    return wrong


def imported(module: list[str], tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that a module imports, by statement or by a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ["oocpatch", *module][: -node.level] if node.level else []
            stem = ".".join([*above, *filter(None, [node.module])])
            # `from dask import array` names a module, `from torch import nn` too: the longer name is the one to judge.
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in DYNAMIC_IMPORTS:
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
        ("planning/grid.py", "from oocpatch.volumes.volume import Volume", ":1: planning must not import oocpatch.vol"),
        ("planning/grid.py", "from ..volumes import volume", ":1: planning must not import oocpatch.volumes.volume"),
        ("planning/grid.py", "from oocpatch import run", ":1: planning must not import oocpatch.run"),
        ("planning/grid.py", "import oocpatch", ":1: planning must not import oocpatch"),
        ("planning/grid.py", "from oocpatch import predict", ":1: planning must not import oocpatch.predict"),
        ("planning/grid.py", "def f():\n  import torch", ":2: planning must not import torch"),
        ("planning/grid.py", "if TYPE_CHECKING:\n  import torch", ":2: planning must not import torch"),
        ("planning/grid.py", "importlib.import_module('torch')", ":1: planning must not import torch"),
        ("volumes/volume.py", "import dask.array\nimport dask", ":2: volumes must not import dask"),
        ("volumes/volume.py", "from dask import array, delayed", ":1: volumes must not import dask.delayed"),
        (
            "volumes/volume.py",
            "from oocpatch.workspace import ledger",
            ":1: volumes must not import oocpatch.workspace",
        ),
        ("engine/stages.py", "import dask", ":1: engine must not import dask"),
        ("sampling/queue.py", "import oocpatch.engine.partial_sums", ":1: sampling must not import oocpatch.engine"),
        (
            "engine/stages.py",
            "from oocpatch.configuration import x",
            ":1: engine must not import oocpatch.configuration",
        ),
        ("run/predict.py", "from oocpatch.cli.main import main", ":1: run must not import oocpatch.cli.main"),
        ("run/predict.py", "import click", ":1: run must not import click"),
        ("cli/main.py", "import torch", ":1: cli must not import torch"),
        ("reports/html.py", "import json", "no place in the law"),
    ],
)
def test_an_import_that_goes_up_is_reported_with_its_line(path: str, source: str, offence: str) -> None:
    found = offences(path, source)
    assert len(found) == 1
    assert found[0].startswith(f"oocpatch/{path}:")
    assert offence in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("planning/grid.py", "import math\nimport numpy as np\nfrom oocpatch.planning.box import Box"),
        ("volumes/volume.py", "import dask.array as da\nfrom dask.array import Array\nimport zarr.storage"),
        (
            "execution/dask_cluster.py",
            "import dask\nfrom distributed import Client\nfrom oocpatch.workspace import ledger",
        ),
        ("engine/partial_sums.py", "from .buffers import buffer\nfrom ..planning.box import Box"),
        ("sampling/queue.py", "import torch\nfrom oocpatch.volumes.volume import Volume"),
        ("cli/main.py", "import click\nfrom oocpatch.run.predict import predict\nfrom oocpatch import __version__"),
    ],
)
def test_an_import_that_goes_down_is_allowed(path: str, source: str) -> None:
    assert offences(path, source) == []


@pytest.mark.parametrize("path", modules())
def test_a_module_is_at_most_600_lines(path: str) -> None:
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
