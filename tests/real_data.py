"""Fetches a published scan and a published network: downloaded on demand, checked, never kept in the repository.

- The scan and its reference: `ch2.nii.gz` and `ch2bet.nii.gz` (nonzero: brain) of Debian's package `mricron-data`.
- The network: `bbox_model.pt`, a TorchScript 3-D U-Net in the wheel of `deepbet` 1.0.2 (MIT). It takes patches whose
  sides are multiples of 32 and gives two channels of probabilities, of which the second is brain.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

SHA256 = {
    "ch2.nii": "707a360b809ba937f6c007231bcf7dc6e2d33657497b254414c9894b6efa5f8c",
    "ch2bet.nii": "521204362226d485c92ef5383327765b0344c99ff9ac60000a1f591ff0c3fb34",
    "bbox_model.pt": "39a7b2b5f799faa1391ea97bfcdc0b9299f20d84f2316a4ff8918dc4685e40aa",
}
"""Of the files as they are used; the scans uncompressed, since a repackaging may compress them anew."""


class UnavailableError(Exception):
    """The data cannot be had here; the message says why."""


@dataclass(frozen=True, slots=True)
class RealData:
    """Where the files lie.

    Attributes:
        scan: a T1-weighted head, `(181, 217, 181)` of uint8, NIfTI.
        reference: the same head with everything but the brain set to zero.
        network: TorchScript.
    """

    scan: Path
    reference: Path
    network: Path


def fetch() -> RealData:
    """Download what is not yet in the cache, `$OOCPATCH_CACHE` or a folder below the temporary one.

    Raises:
        UnavailableError: when a download is not possible here.
        ValueError: when a file is not the one the tests were written for.
    """
    cache = Path(os.environ.get("OOCPATCH_CACHE") or Path(tempfile.gettempdir()) / "oocpatch-real-data")
    cache.mkdir(parents=True, exist_ok=True)
    missing = [name for name in SHA256 if not (cache / name).exists()]
    # Files move into the cache when they are whole: a killed test leaves no half file.
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        if {"ch2.nii", "ch2bet.nii"} & set(missing):
            _fetch_scans(Path(folder))
        if "bbox_model.pt" in missing:
            _fetch_network(Path(folder))
        for name in missing:
            (Path(folder) / name).replace(cache / name)
    for name, expected in SHA256.items():
        found = hashlib.sha256((cache / name).read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(f"{cache / name} must have SHA-256 {expected}, got {found}; delete it to fetch it again")
    return RealData(cache / "ch2.nii", cache / "ch2bet.nii", cache / "bbox_model.pt")


def _fetch_scans(folder: Path) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise UnavailableError(f"the scan is in a Debian package, and there is no {tool} here")
    _run(folder, "apt-get", "download", "mricron-data")
    _run(folder, "dpkg-deb", "--extract", str(next(folder.glob("mricron-data_*.deb"))), str(folder))
    for name in ("ch2.nii", "ch2bet.nii"):
        packed = folder / "usr/share/mricron/templates" / f"{name}.gz"
        (folder / name).write_bytes(gzip.decompress(packed.read_bytes()))


def _fetch_network(folder: Path) -> None:
    _run(folder, sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "deepbet==1.0.2")
    with zipfile.ZipFile(next(folder.glob("deepbet-*.whl"))) as wheel:
        (folder / "bbox_model.pt").write_bytes(wheel.read("data/models/bbox_model.pt"))


def _run(folder: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnavailableError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
