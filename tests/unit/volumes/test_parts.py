"""Files that consist of several files: all parts are listed, and none may be missing."""

from __future__ import annotations

import os
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


def cut(path: Path, share: float = 0.6) -> Path:
    os.truncate(path, int(path.stat().st_size * share))
    return path


def without_part2(make: Callable[[Path], Path | str], content: bytes | None = None) -> Callable[[Path], Path | str]:
    """Return a function that writes a set of files and deletes or overwrites one of them."""

    def broken(folder: Path) -> Path | str:
        path = make(folder)
        part = next(file for file in folder.glob("part2*") if file.suffix != ".hdr")
        part.unlink() if content is None else part.write_bytes(content)
        return path

    return broken


def with_short_part(make: Callable[[Path], Path | str]) -> Callable[[Path], Path | str]:
    def broken(folder: Path) -> Path | str:
        path = make(folder)
        cut(next(file for file in folder.glob("part2*") if file.suffix != ".hdr"))
        return path

    return broken


def other_dataset(folder: Path) -> Path:
    path = virtual_hdf5(folder)
    part_of_hdf5(folder / "part2.h5", DATA[2], name="renamed")
    return path


def other_shape(folder: Path) -> Path:
    path = virtual_hdf5(folder)
    part_of_hdf5(folder / "part2.h5", DATA[2, :12])
    return path


def numbered(folder: Path) -> Path:
    """Write a virtual dataset of numbered files that grows; one in the middle is missing."""
    for number, plane in enumerate(DATA):
        part_of_hdf5(folder / f"part{number}.h5", plane[None])
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    endless = (h5py.h5s.UNLIMITED, *DATA.shape[1:])
    space = h5py.h5s.create_simple(DATA.shape, endless)
    space.select_hyperslab((0, 0, 0), (h5py.h5s.UNLIMITED, 1, 1), (1, 1, 1), (1, *DATA.shape[1:]))
    properties.set_virtual(space, b"part%b.h5", b"data", h5py.h5s.create_simple((1, *DATA.shape[1:])))
    with h5py.File(folder / "all.h5", "w") as file:
        h5py.h5d.create(
            file.id, b"data", h5py.h5t.NATIVE_UINT16, h5py.h5s.create_simple(DATA.shape, endless), properties
        )
    return folder / "all.h5"


def soft_link(folder: Path) -> str:
    with h5py.File(folder / "all.h5", "w") as file:
        file["scan"] = h5py.SoftLink("/entry/part2")
    return f"{folder / 'all.h5'}::/scan"


def tiff(folder: Path, share: float = 0.6, **options: Any) -> Path:
    tifffile.imwrite(folder / "part2.tif", DATA, photometric="minisblack", **options)
    return cut(folder / "part2.tif", share)


def pages_of_tiff(folder: Path) -> Path:
    for number, plane in enumerate(DATA):
        tifffile.imwrite(folder / "part2.tif", plane, append=number > 0, metadata=None)
    return cut(folder / "part2.tif")


def few_planes(folder: Path) -> Path:
    """Write an OME-TIFF whose metadata name more planes than it has."""
    xml = described(["part2.ome.tif"] * 4, 0).partition("<TiffData")[0]
    xml += '<TiffData IFD="0" PlaneCount="3"/></Pixels></Image></OME>'
    tifffile.imwrite(folder / "part2.ome.tif", DATA[:3], description=xml, metadata=None, photometric="minisblack")
    return folder / "part2.ome.tif"


def companion(folder: Path) -> Path:
    """Write a file of an OME-TIFF whose metadata are in a companion file."""
    xml = f'<OME xmlns="{SCHEMA}" UUID="urn:uuid:{uuid.UUID(int=1)}"><BinaryOnly MetadataFile="part2.companion.ome" '
    xml += f'UUID="urn:uuid:{uuid.UUID(int=2)}"/></OME>'
    tifffile.imwrite(folder / "a.ome.tif", DATA[0], description=xml, metadata=None)
    return folder / "a.ome.tif"


def nifti(folder: Path) -> Path:
    nibabel.save(nibabel.Nifti1Image(DATA.astype(np.int16), np.eye(4)), folder / "part2.nii")
    return cut(folder / "part2.nii")


BROKEN: dict[str, Callable[[Path], Path | str]] = {
    "virtual, part missing": without_part2(virtual_hdf5),
    "virtual, absolute, part missing": without_part2(lambda folder: virtual_hdf5(folder, absolute=True)),
    "virtual, part empty": without_part2(virtual_hdf5, b""),
    "virtual, part is no HDF5": without_part2(virtual_hdf5, b"x" * 5000),
    "virtual, part cut short": with_short_part(virtual_hdf5),
    "virtual, dataset of part missing": other_dataset,
    "virtual, part too small": other_shape,
    "virtual of virtual, part missing": without_part2(nested_virtual_hdf5),
    "virtual, numbered, one missing": without_part2(numbered),
    "external link, file missing": without_part2(linked_hdf5),
    "soft link, target missing": soft_link,
    "external storage, file missing": without_part2(external_hdf5),
    "external storage, file cut short": with_short_part(external_hdf5),
    "OME-TIFF, file missing": without_part2(set_of_ome_tiffs),
    "OME-TIFF, file is no TIFF": without_part2(set_of_ome_tiffs, b"x" * 100),
    "OME-TIFF, file cut short": with_short_part(set_of_ome_tiffs),
    "OME-TIFF, fewer planes": few_planes,
    "OME-TIFF, companion": companion,
    "ImageJ, cut short": lambda folder: tiff(folder, imagej=True),
    "ImageJ, one page, cut short": lambda folder: tiff(folder, imagej=True, truncate=True),
    "ImageJ, compressed, cut short": lambda folder: tiff(folder, imagej=True, compression="zlib"),
    "TIFF, cut short": tiff,
    "TIFF, one page, cut short": lambda folder: tiff(folder, truncate=True),
    "TIFF, last tile cut short": lambda folder: tiff(folder, 0.97, tile=(16, 16)),
    "BigTIFF, cut short": lambda folder: tiff(folder, bigtiff=True, compression="zlib"),
    "TIFF, pages missing": pages_of_tiff,
    "NIfTI, cut short": nifti,
    "NIfTI, image missing": without_part2(pair_of_nifti),
    "NIfTI, image cut short": with_short_part(pair_of_nifti),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_missing_part_is_refused_by_its_name(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    del caplog  # tifffile logs that it would read zeros
    path = BROKEN[kind](tmp_path)
    with pytest.raises(ValueError, match="volume cannot be read: ") as refused:
        oocpatch.Volume(path)
    assert "part2" in str(refused.value)


@pytest.mark.parametrize("make", [virtual_hdf5, nested_virtual_hdf5, set_of_ome_tiffs])
def test_a_part_that_goes_missing_during_the_run_fails_its_block(make: Callable[[Path], Path], tmp_path: Path) -> None:
    volume = oocpatch.Volume(make(tmp_path))
    next(tmp_path.glob("part2*")).unlink()
    with pytest.raises((OSError, ValueError), match="part2"):
        volume.read(Box.of_shape(DATA.shape))


def test_a_part_that_a_box_does_not_need_may_go_missing(tmp_path: Path) -> None:
    volume = oocpatch.Volume(virtual_hdf5(tmp_path))
    assert np.array_equal(volume.read(Box((0, 0, 0), (1, 24, 32)))[0], DATA[:1])
    (tmp_path / "part2.h5").unlink()
    assert np.array_equal(volume.read(Box((0, 0, 0), (2, 24, 32)))[0], DATA[:2])


def test_a_cut_compressed_nifti_fails_when_it_is_read(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(DATA.astype(np.int16), np.eye(4)), tmp_path / "part2.nii.gz")
    volume = oocpatch.Volume(cut(tmp_path / "part2.nii.gz"))
    with pytest.raises((EOFError, OSError)):
        volume.read(Box.of_shape(DATA.shape))


def test_what_a_format_leaves_out_is_read_as_its_fill_value(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "chunks.h5", "w") as file:
        file.create_dataset("data", DATA.shape, DATA.dtype, chunks=(1, 24, 32), fillvalue=9)[0] = DATA[0]
    expected = np.full(DATA.shape, 9, DATA.dtype)
    expected[0] = DATA[0]
    assert np.array_equal(oocpatch.Volume(tmp_path / "chunks.h5").read(Box.of_shape(DATA.shape))[0], expected)
    layout = h5py.VirtualLayout(DATA.shape, DATA.dtype)  # the other planes have no source
    part_of_hdf5(tmp_path / "part0.h5", DATA[0])
    layout[0] = h5py.VirtualSource("part0.h5", "data", shape=DATA.shape[1:])
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file.create_virtual_dataset("data", layout, fillvalue=9)
    assert np.array_equal(oocpatch.Volume(tmp_path / "all.h5").read(Box.of_shape(DATA.shape))[0], expected)
    path = precomputed(tmp_path)
    (path / "s0/0-32_0-24_2-4").unlink()
    assert np.array_equal(oocpatch.Volume(path).read(Box.of_shape(DATA.shape))[0, 2:], np.zeros((2, 24, 32)))
