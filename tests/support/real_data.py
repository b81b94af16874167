"""Fetches published data: downloaded on demand, checked, never kept in the repository.

- A scan, the brain in it, and two atlases: `ch2.nii.gz`, `ch2bet.nii.gz` (nonzero: brain), `aal.nii.gz` (117 labels in
  the frame of the scan) and `AICHAmc.nii.gz` (193 labels, its x axis from right to left) of Debian's `mricron-data`.
- A network: `bbox_model.pt`, a TorchScript 3-D U-Net in the wheel of `deepbet` 1.0.2 (MIT). It takes patches whose
  sides are multiples of 32 and gives two channels of probabilities, of which the second is brain.
- Nuclei in two and in three dimensions, each with a mask of labels, and stained tissue (H&E): in the wheel of
  `stardist` 0.9.2 (BSD-3-Clause).
- A network of platelets with its source and the loop that applies it: in the source distribution of
  `platelet-unet-watershed` 0.0.3 (BSD-3-Clause).
- A recording of a confocal microscope in Nikon's format: `cluster.nd2` in the source of `pims_nd2` 1.1 (BSD-3-Clause).
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

Data = TypeVar("Data")

SHA256 = {
    "ch2.nii": "707a360b809ba937f6c007231bcf7dc6e2d33657497b254414c9894b6efa5f8c",
    "ch2bet.nii": "521204362226d485c92ef5383327765b0344c99ff9ac60000a1f591ff0c3fb34",
    "aal.nii": "2926fcc98efc709f77c8cca2f9c1d797eba3e9a1b222a8e0cfa70ab131394c80",
    "AICHAmc.nii": "a46c81bf88b642841e597e2762cbe32767b37f2db66426e6a480cc1b8afc6f57",
    "bbox_model.pt": "39a7b2b5f799faa1391ea97bfcdc0b9299f20d84f2316a4ff8918dc4685e40aa",
    "img2d.tif": "f9ccc1571b92c861ff87e28463068b43f61bd47357ed0503f711e5cd1eb97750",
    "mask2d.tif": "59ad5e820b7982ca9d13e946fa6e7f64e2714899e00a2ae6c69aa79aad53d46f",
    "img3d.tif": "f5626d500c7a738cd321698f43df36e2ac149d98456579c5cbcf8af48c7253e8",
    "mask3d.tif": "a2ff51b712941a90cf3a5628b11f04f5d7fa3f29c808c065d3be6ff938b215a1",
    "plateseg/data/unet-210913-zyxmc.pt": "283aa574016dfaa064f7ae0596d352221c89f37c878e8fd2183603f01d3a334f",
    "plateseg/unet.py": "44e1b8f8a1ae81603e2c477d935a6d37e03c4709594d8e28fe6087c0f4c92ce4",
    "plateseg/predict.py": "08d0eb23ef0866b9817b601325eb98e08bca10dd5d78025b449d73a5a35e1716",
    "histo.jpg": "1b4f4cf440f22438d114ac629d102d2b403ff1d22ae8b00b1c674bfbca410a02",
    "cluster.nd2": "f8ee69c3efbaaed4f892e986c3efd06372597ec084e75437243e8dd51388de62",
}
"""Of the files as they are used; the scans uncompressed, since a repackaging may compress them anew."""

SCANS = ("ch2.nii", "ch2bet.nii", "aal.nii", "AICHAmc.nii")
NETWORK = ("bbox_model.pt",)
PLATELETS = ("plateseg/data/unet-210913-zyxmc.pt", "plateseg/unet.py", "plateseg/predict.py")
NUCLEI = ("img2d.tif", "mask2d.tif", "img3d.tif", "mask3d.tif", "histo.jpg")


class UnavailableError(Exception):
    """The data cannot be had here; the message says why."""


def had(fetched: Callable[[], Data]) -> Data:
    """What a function fetches; a skip that says why where it cannot."""
    try:
        return fetched()
    except UnavailableError as error:
        pytest.skip(f"the real data cannot be had: {error}")


@dataclass(frozen=True, slots=True)
class RealData:
    """Where the files lie.

    Attributes:
        scan: a T1-weighted head, `(181, 217, 181)` of uint8, NIfTI.
        reference: the same head with everything but the brain set to zero.
        atlas: labels of the same head's parts, uint8.
        flipped: another atlas, `(91, 109, 91)`, whose x axis runs the other way.
        network: TorchScript.
    """

    scan: Path
    reference: Path
    atlas: Path
    flipped: Path
    network: Path


@dataclass(frozen=True, slots=True)
class Nuclei:
    """Where the files lie; TIFFs are uint16, masks hold a label per nucleus, 0 for none.

    Attributes:
        flat: fluorescent nuclei, `(512, 512)`; one uncompressed strip.
        flat_mask: their labels.
        stack: nuclei in `(31, 61, 57)`; a deflated strip per plane.
        stack_mask: their labels.
        stained: tissue with haematoxylin and eosin, RGB of 300 x 500 pixels, JPEG.
    """

    flat: Path
    flat_mask: Path
    stack: Path
    stack_mask: Path
    stained: Path


@dataclass(frozen=True, slots=True)
class Platelets:
    """Where the files lie.

    Attributes:
        weights: a state dict.
        source: the file of the class `UNet`, of three axes; sides of patches in the plane are multiples of 16.
        loop: the file of the functions that cut a volume into chunks and apply the network.
    """

    weights: Path
    source: Path
    loop: Path


def fetch() -> RealData:
    """Download what is not yet in the cache, `$OOCPATCH_CACHE` or a folder below the temporary one.

    Raises:
        UnavailableError: when a download is not possible here.
        ValueError: when a file is not the one the tests were written for.
    """
    return RealData(*_cached(SCANS, _fetch_scans), *_cached(NETWORK, _fetch_network))


def fetch_nuclei() -> Nuclei:
    """The same for nuclei and tissue."""
    return Nuclei(*_cached(NUCLEI, _fetch_nuclei))


def fetch_platelets() -> Platelets:
    """The same for the network of platelets."""
    return Platelets(*_cached(PLATELETS, _fetch_platelets))


def fetch_nd2() -> Path:
    """The same for the recording."""
    return _cached(["cluster.nd2"], _fetch_nd2)[0]


def _cached(names: Sequence[str], download: Callable[[Path], None]) -> list[Path]:
    cache = Path(os.environ.get("OOCPATCH_CACHE") or Path(tempfile.gettempdir()) / "oocpatch-real-data")
    cache.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not (cache / name).exists()]
    if missing:
        # Files move into the cache when they are whole: a killed test leaves no half file.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            download(Path(folder))
            for name in missing:
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / name).replace(cache / name)
    for name in names:
        found = hashlib.sha256((cache / name).read_bytes()).hexdigest()
        if found != SHA256[name]:
            raise ValueError(
                f"{cache / name} must have SHA-256 {SHA256[name]}, got {found}; delete it to fetch it again"
            )
    return [cache / name for name in names]


def _fetch_scans(folder: Path) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise UnavailableError(f"the scan is in a Debian package, and there is no {tool} here")
    _run(folder, "apt-get", "download", "mricron-data")
    _run(folder, "dpkg-deb", "--extract", str(next(folder.glob("mricron-data_*.deb"))), str(folder))
    for name in SCANS:
        packed = folder / "usr/share/mricron/templates" / f"{name}.gz"
        (folder / name).write_bytes(gzip.decompress(packed.read_bytes()))


def _fetch_network(folder: Path) -> None:
    with _wheel(folder, "deepbet==1.0.2") as wheel:
        (folder / "bbox_model.pt").write_bytes(wheel.read("data/models/bbox_model.pt"))


def _fetch_nuclei(folder: Path) -> None:
    # Wheels of stardist are built per version of Python; the images in them are the same.
    with _wheel(folder, "stardist==0.9.2", "--python-version=3.11") as wheel:
        for name in NUCLEI:
            (folder / name).write_bytes(wheel.read(f"stardist/data/images/{name}"))


def _fetch_platelets(folder: Path) -> None:
    # Built by what is installed, since an environment for it takes longer than the download.
    package = "platelet-unet-watershed==0.0.3"
    _run(folder, sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", package)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        for name in PLATELETS:
            member = archive.getmember(f"{package.replace('==', '-')}/{name}")
            member.name = name
            archive.extract(member, folder, filter="data")


def _fetch_nd2(folder: Path) -> None:
    _run(folder, sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:", "pims_nd2==1.1")
    with tarfile.open(folder / "pims_nd2-1.1.tar.gz") as source:
        member = source.extractfile("pims_nd2-1.1/pims_nd2/cluster.nd2")
        assert member is not None
        (folder / "cluster.nd2").write_bytes(member.read())


def _wheel(folder: Path, package: str, *options: str) -> zipfile.ZipFile:
    _run(folder, sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", *options, package)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def _run(folder: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnavailableError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
