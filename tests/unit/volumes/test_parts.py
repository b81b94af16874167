"""Files that consist of several files: all parts are listed, and none may be missing."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import numpy.typing as npt
import pytest
import tensorstore
import tifffile

import oocpatch
from oocpatch.planning.box import Box

Array = npt.NDArray[Any]
DATA = np.random.default_rng(0).integers(1, 1000, (4, 24, 32)).astype(np.uint16)
SCHEMA = "http://www.openmicroscopy.org/Schemas/OME/2016-06"


def part_of_hdf5(path: Path, values: Array, name: str = "data") -> None:
    with h5py.File(path, "w") as file:
        file[name] = values


def virtual_hdf5(folder: Path, *, absolute: bool = False) -> Path:
    """Write a virtual dataset with one file per plane."""
    layout = h5py.VirtualLayout(DATA.shape, DATA.dtype)
    for number, plane in enumerate(DATA):
        part_of_hdf5(folder / f"part{number}.h5", plane)
        name = str(folder / f"part{number}.h5") if absolute else f"part{number}.h5"
        layout[number] = h5py.VirtualSource(name, "data", shape=plane.shape)
    with h5py.File(folder / "all.h5", "w") as file:
        file.create_virtual_dataset("data", layout, fillvalue=7)
    return folder / "all.h5"


def nested_virtual_hdf5(folder: Path) -> Path:
    """Write a virtual dataset of one virtual dataset."""
    virtual_hdf5(folder)
    layout = h5py.VirtualLayout(DATA.shape, DATA.dtype)
    layout[:] = h5py.VirtualSource("all.h5", "data", shape=DATA.shape)
    with h5py.File(folder / "outer.h5", "w") as file:
        file.create_virtual_dataset("data", layout)
    return folder / "outer.h5"


def linked_hdf5(folder: Path) -> str:
    """Write a dataset that an external link leads to."""
    part_of_hdf5(folder / "part2.h5", DATA)
    with h5py.File(folder / "all.h5", "w") as file:
        file["scan"] = h5py.ExternalLink("part2.h5", "/data")
    return f"{folder / 'all.h5'}::/scan"


def external_hdf5(folder: Path) -> Path:
    """Write a dataset in two raw files."""
    half = DATA.nbytes // 2
    for number, part in enumerate((DATA[:2], DATA[2:]), 1):
        part.tofile(folder / f"part{number}.raw")
    storage = [(str(folder / f"part{number}.raw"), 0, half) for number in (1, 2)]
    with h5py.File(folder / "all.h5", "w") as file:
        file.create_dataset("data", DATA.shape, DATA.dtype, external=storage)
    return folder / "all.h5"


def described(names: list[str], number: int) -> str:
    """Return the OME-XML of a set of files with one plane each."""
    identifiers = [f"urn:uuid:{uuid.UUID(int=i + 1)}" for i in range(len(names))]
    planes = "".join(
        f'<TiffData FirstZ="{i}" IFD="0" PlaneCount="1"><UUID FileName="{name}">{identifier}</UUID></TiffData>'
        for i, (name, identifier) in enumerate(zip(names, identifiers, strict=True))
    )
    sizes = f'SizeX="{DATA.shape[2]}" SizeY="{DATA.shape[1]}" SizeZ="{DATA.shape[0]}" SizeC="1" SizeT="1"'
    channel = '<Channel ID="Channel:0" SamplesPerPixel="1"/>'
    pixels = f'<Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" {sizes}>{channel}{planes}</Pixels>'
    return f'<OME xmlns="{SCHEMA}" UUID="{identifiers[number]}"><Image ID="Image:0">{pixels}</Image></OME>'


def set_of_ome_tiffs(folder: Path) -> Path:
    """Write an OME-TIFF of four files."""
    names = [f"part{number}.ome.tif" for number in range(len(DATA))]
    for number, plane in enumerate(DATA):
        tifffile.imwrite(folder / names[number], plane, description=described(names, number), metadata=None)
    return folder / names[0]


def pair_of_nifti(folder: Path) -> Path:
    nibabel.save(nibabel.Nifti1Pair(DATA.astype(np.int16), np.eye(4)), folder / "part2.hdr")
    return folder / "part2.hdr"


def precomputed(folder: Path) -> Path:
    metadata = {"type": "image", "data_type": "uint16", "num_channels": 1}
    scale = {"size": DATA.shape[::-1], "encoding": "raw", "chunk_size": [32, 24, 2], "resolution": [1, 1, 1]}
    kvstore = {"driver": "file", "path": f"{folder / 'part'}/"}
    description = {"driver": "neuroglancer_precomputed", "kvstore": kvstore}
    options = {"multiscale_metadata": metadata, "scale_metadata": {**scale, "key": "s0"}, "create": True}
    store = tensorstore.open({**description, **options}).result()
    store[..., 0].write(DATA.T).result()
    return folder / "part"


SETS: dict[str, tuple[Callable[[Path], Path | str], list[str]]] = {
    "virtual": (virtual_hdf5, ["all.h5", *(f"part{i}.h5" for i in range(4))]),
    "virtual, absolute": (lambda f: virtual_hdf5(f, absolute=True), ["all.h5", *(f"part{i}.h5" for i in range(4))]),
    "virtual of virtual": (nested_virtual_hdf5, ["all.h5", "outer.h5", *(f"part{i}.h5" for i in range(4))]),
    "external link": (linked_hdf5, ["all.h5", "part2.h5"]),
    "external storage": (external_hdf5, ["all.h5", "part1.raw", "part2.raw"]),
    "OME-TIFF": (set_of_ome_tiffs, [f"part{i}.ome.tif" for i in range(4)]),
    "NIfTI pair": (pair_of_nifti, ["part2.hdr", "part2.img"]),
    "precomputed": (precomputed, ["part/s0/0-32_0-24_0-2", "part/s0/0-32_0-24_2-4"]),
}


@pytest.mark.parametrize("kind", SETS)
def test_a_volume_lists_all_files_that_hold_it(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, names = SETS[kind]
    path = make(tmp_path)
    monkeypatch.chdir(tmp_path)
    volume = oocpatch.Volume(path)
    assert list(volume.source.units.files) == [str(tmp_path / name) for name in names]
    assert np.array_equal(volume.read(Box.of_shape(volume.shape))[0], DATA)
