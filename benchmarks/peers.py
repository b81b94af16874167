"""The environments of the libraries that oocpatch is compared with; theirs, because their pins are not ours."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENTS = {
    "zarr3": HERE / "peers.txt",
    "zarr2": HERE / "peers-zarr2.txt",
    "objects": HERE / "peers-objects.txt",
    "nnunet": HERE / "peers-nnunet.txt",
}
"""The requirements of each."""
NO_DEPS = {"objects": ("--no-deps",)}
"""Of a library that is used without its networks, the rest is not installed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    parser.add_argument(
        "--make-environment", type=Path, required=True, metavar="DIR", help="where the environments go; 4 GB"
    )


def run(arguments: argparse.Namespace) -> None:
    """Make the environments; what is there already is only completed."""
    for name, requirements in ENVIRONMENTS.items():
        python = python_of(arguments.make_environment, name)
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", *NO_DEPS.get(name, ()), "-r", str(requirements)],
            check=True,
        )
        print(python)


def python_of(directory: Path, name: str) -> Path:
    """The interpreter of one of the environments."""
    return directory / name / "bin" / "python"
