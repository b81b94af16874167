"""Inputs that are edited after they were read: how each format is written, opened and edited, and what comes of it.

Voxels are whole numbers, so that the result of the model is known exactly. The volume is long in `x`, so that an edit
leaves most blocks alone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask.array
import h5py
import nibabel as nib
import numpy as np
import numpy.typing as npt
import tensorstore
import tifffile
import torch
import xarray as xr
import zarr
from zarr.codecs import ZstdCodec
from zarr.storage import ZipStore

import oocpatch
from oocpatch.planning.box import Box
from tests.support.children import file_digests

SHAPE, SIDE = (8, 16, 64), 8
"""Chunks and blocks are cubes of `SIDE`: 16 of them."""
PATCHES = 45
SETTINGS = {
    "patch_size": SIDE, "patch_overlap": 4, "block_shape": SIDE, "output_chunks": 4, "axes": "zyx", "progress": False,
    "workers": 1, "model_id": "twice",
}  # fmt: skip

Array = npt.NDArray[np.float32]


def new_data(seed: int) -> Array:
    """Whole numbers from 1 to 99."""
    return np.random.default_rng(seed).integers(1, 100, SHAPE).astype(np.float32)


class Twice(torch.nn.Module):
    """`2 x + 1`; counts patches, and fails on all after the first `limit`. The planner's probe of zeros is neither."""

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self.limit, self.calls = limit, 0

    def answer(self, patches: torch.Tensor) -> Any:
        return 2 * patches + 1

    def forward(self, patches: torch.Tensor) -> Any:
        if bool((patches == 0).all()):
            return self.answer(patches)
        if self.limit is not None and self.calls >= self.limit:
            raise RuntimeError("the model fails from here on")
        self.calls += len(patches)
        return self.answer(patches)


class TwoHeads(Twice):
    """Two heads."""

    def answer(self, patches: torch.Tensor) -> Any:
        return {"twice": 2 * patches + 1, "minus": -patches}


class TwoClasses(Twice):
    """Scores of two classes: is the voxel less than 50?"""

    def answer(self, patches: torch.Tensor) -> Any:
        return torch.cat([patches, 100 - patches], 1)


@dataclass(frozen=True)
class Mode:
    """Options of `predict`, with the model and the result that they give."""

    options: dict[str, Any]
    model: type[Twice] = Twice
    expected: Callable[[Array], dict[str, npt.NDArray[Any]]] = lambda data: {"prediction": 2 * data + 1}
    local: bool = True
    """Whether a small edit of the input changes a part of the result only."""


def _standardized(data: Array) -> dict[str, npt.NDArray[Any]]:
    return {"prediction": 2 * (data - data.mean(dtype=np.float64)) / data.std(dtype=np.float64) + 1}


MODES = {
    "crop": Mode({"overlap_mode": "crop"}),
    "hann": Mode({}),
    "gaussian, two workers": Mode({"overlap_mode": "gaussian", "workers": 2}),
    "one long block": Mode({"block_shape": (8, 16, 32)}),
    "reflect": Mode({"padding_mode": "reflect"}),
    "wrap": Mode({"padding_mode": "wrap", "overlap_mode": "average"}),
    "constant": Mode({"padding_mode": "constant", "fill": 3.0}),
    "zscore": Mode({"preprocess": "zscore"}, expected=_standardized, local=False),
    "heads": Mode({}, TwoHeads, lambda data: {"twice": 2 * data + 1, "minus": -data}),
    "pyramid": Mode({"output_format": "ome-zarr"}, expected=lambda data: {"scale0/image": 2 * data + 1}),
    "argmax": Mode({"postprocess": "argmax"}, TwoClasses, lambda data: {"prediction": data < 50}),
    "shards": Mode({"output_shards": 8}),
    "skip_empty": Mode({"skip_empty": True}),
}


def _zarr(path: Path, data: Array, **options: Any) -> None:
    options = {"chunks": (SIDE,) * 3, "compressors": None, **options}
    zarr.create_array(path, data=data, **options)


def _named(path: Path, data: Array, **attributes: Any) -> None:
    """Write a Zarr group with one variable, as xarray does; packed if the attributes say so."""
    packed = ((data - attributes.get("add_offset", 0)) / attributes.get("scale_factor", 1)).astype(np.float32)
    group = zarr.open_group(path, mode="w")
    array = group.create_array(
        "scan", shape=SHAPE, dtype="float32", chunks=(SIDE,) * 3, compressors=None, dimension_names=("z", "y", "x"),
        attributes=attributes,
    )  # fmt: skip
    array[:] = packed


def _levels(path: Path, data: Array) -> None:
    """Write an OME-Zarr whose level 1 is the data."""
    group = zarr.open_group(path, mode="w")
    group.create_array("s0", data=np.repeat(data, 2, axis=2), chunks=(SIDE,) * 3)
    group.create_array("s1", data=data, chunks=(SIDE,) * 3, compressors=None)
    datasets = [
        {"path": f"s{i}", "coordinateTransformations": [{"type": "scale", "scale": [1.0, 1.0, 1.0 + i]}]}
        for i in range(2)
    ]
    axes = [{"name": name, "type": "space"} for name in "zyx"]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}


def _zip(path: Path, data: Array) -> None:
    with ZipStore(path, mode="w") as store:
        zarr.create_array(store, data=data, chunks=(SIDE,) * 3, compressors=None)


def _n5(path: Path, data: Array) -> None:
    metadata = {
        "dimensions": SHAPE[::-1], "blockSize": [SIDE] * 3, "dataType": "float32", "compression": {"type": "raw"},
    }  # fmt: skip
    kvstore = {"driver": "file", "path": f"{path}/"}
    store = tensorstore.open({"driver": "n5", "kvstore": kvstore, "metadata": metadata, "create": True}).result()
    store[...].write(data.T).result()


def _nifti(path: Path, data: Array, slope: float = 1.0) -> None:
    image = nib.Nifti1Image(data.astype(np.int16), np.eye(4))
    image.header.set_slope_inter(slope, 0)
    nib.save(image, path)


def _hdf5(path: Path, data: Array, **options: Any) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("scan", data=data, **options)


def _virtual(path: Path, data: Array) -> None:
    """Write a directory with a virtual dataset over two files."""
    path.mkdir()
    half = SHAPE[2] // 2
    layout = h5py.VirtualLayout(SHAPE, np.float32)
    for i in range(2):
        _hdf5(path / f"{i}.h5", data[..., i * half : (i + 1) * half])
        layout[..., i * half : (i + 1) * half] = h5py.VirtualSource(f"{i}.h5", "scan", (*SHAPE[:2], half))
    with h5py.File(path / "all.h5", "w") as file:
        file.create_virtual_dataset("scan", layout)


def _ome_tiff(path: Path, data: Array) -> None:
    """Write a directory with an OME-TIFF over two files: each has half of the planes."""
    path.mkdir()
    half = SHAPE[0] // 2
    blocks = "".join(
        f'<TiffData FirstZ="{z}" IFD="{z % half}" PlaneCount="1"><UUID FileName="{z // half}.ome.tif">'
        f"urn:uuid:0000000{z // half}-0000-0000-0000-000000000000</UUID></TiffData>"
        for z in range(SHAPE[0])
    )
    for i in range(2):
        xml = (
            '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
            f'UUID="urn:uuid:0000000{i}-0000-0000-0000-000000000000"><Image ID="Image:0"><Pixels ID="Pixels:0" '
            f'DimensionOrder="XYZCT" Type="float" SizeX="{SHAPE[2]}" SizeY="{SHAPE[1]}" SizeZ="{SHAPE[0]}" SizeC="1" '
            f'SizeT="1"><Channel ID="Channel:0:0" SamplesPerPixel="1"/>{blocks}</Pixels></Image></OME>'
        )
        planes = data[i * half : (i + 1) * half]
        with tifffile.TiffWriter(path / f"{i}.ome.tif") as writer:
            for number, plane in enumerate(planes):
                description = xml if number == 0 else None
                writer.write(plane, description=description, metadata=None, contiguous=False, photometric="minisblack")


def _raw(path: Path, data: Array) -> None:
    data.tofile(path)


def _mapped(path: Path) -> Any:
    return np.memmap(path, np.float32, "r", shape=SHAPE)


def _variable(path: Path, chunks: dict[str, int] | None) -> xr.DataArray:
    """Open lazily, with dask or, where chunks are None, without."""
    return xr.open_zarr(path, chunks=chunks, consolidated=False)["scan"]


@dataclass(frozen=True)
class Format:
    """A format: writing a file or directory, and opening it as the argument `volume`."""

    suffix: str
    write: Callable[[Path, Array], None]
    open: Callable[[Path], Any] = str
    options: dict[str, Any] = field(default_factory=dict)
    chunk: str = ""
    """Name of the file of a chunk by `z`, `y` and `x`; empty where chunks are no files."""


FORMATS = {
    "zarr": Format("a.zarr", _zarr, chunk="c/{z}/{y}/{x}"),
    "zarr zstd": Format("a.zarr", lambda p, d: _zarr(p, d, compressors=ZstdCodec())),
    "zarr v2": Format("a.zarr", lambda p, d: _zarr(p, d, zarr_format=2), chunk="{z}.{y}.{x}"),
    "zarr sharded": Format("a.zarr", lambda p, d: _zarr(p, d, shards=(8, 16, 16)), chunk="c/{z}/0/{x}"),
    "zarr one chunk": Format("a.zarr", lambda p, d: _zarr(p, d, chunks=SHAPE)),
    "zarr variable": Format("a.zarr", _named, chunk="scan/c/{z}/{y}/{x}"),
    "zarr packed": Format("a.zarr", lambda p, d: _named(p, d, scale_factor=0.5), chunk="scan/c/{z}/{y}/{x}"),
    "zarr zip": Format("a.zip", _zip, lambda p: zarr.open_array(ZipStore(p, mode="r"), mode="r")),
    "ome-zarr level 1": Format(
        "a.zarr", _levels, options={"level": 1, "output_format": "zarr"}, chunk="s1/c/{z}/{y}/{x}"
    ),
    "n5": Format("a.n5", _n5, chunk="{x}/{y}/{z}"),
    "nifti": Format("a.nii", _nifti),
    "nifti gz": Format("a.nii.gz", _nifti),
    "tiff tiled": Format("a.tif", lambda p, d: tifffile.imwrite(p, d, tile=(16, 16), photometric="minisblack")),
    "tiff zlib": Format(
        "a.tif", lambda p, d: tifffile.imwrite(p, d, compression="zlib", rowsperstrip=8, photometric="minisblack")
    ),
    "ome-tiff files": Format("a", _ome_tiff, lambda p: str(p / "0.ome.tif")),
    "hdf5": Format("a.h5", _hdf5),
    "hdf5 chunks": Format("a.h5", lambda p, d: _hdf5(p, d, chunks=(SIDE,) * 3, compression="gzip")),
    "hdf5 virtual": Format("a", _virtual, lambda p: str(p / "all.h5")),
    "memmap": Format("a.raw", _raw, _mapped),
    "memmap flipped": Format("a.raw", lambda p, d: _raw(p, d[:, ::-1]), lambda p: _mapped(p)[:, ::-1]),
    "npy": Format("a.npy", np.save, lambda p: np.load(p, mmap_mode="r")),
    "numpy": Format("a.npy", np.save, np.load),
    "dask": Format("a.zarr", _zarr, dask.array.from_zarr, chunk="c/{z}/{y}/{x}"),
    "xarray": Format("a.zarr", _named, lambda p: _variable(p, None), chunk="scan/c/{z}/{y}/{x}"),
    "xarray dask": Format("a.zarr", _named, lambda p: _variable(p, {}), chunk="scan/c/{z}/{y}/{x}"),
}


@dataclass
class Input:
    """An input on disk, the numbers in it, and how it is opened."""

    format: Format
    path: Path
    data: Array
    opened: Any = None
    """A `Volume` that was open before the edit."""

    @classmethod
    def of(cls, name: str, folder: Path, data: Array) -> Input:
        form = FORMATS[name]
        folder.mkdir(parents=True, exist_ok=True)
        form.write(folder / form.suffix, data)
        return cls(form, folder / form.suffix, data)

    def open(self) -> Any:
        return self.opened if self.opened is not None else self.format.open(self.path)

    def put(self, data: Array) -> None:
        """Write other numbers to the same path."""
        shutil.rmtree(self.path) if self.path.is_dir() else self.path.unlink()
        self.format.write(self.path, data)
        self.data = data

    def put_by_rename(self, data: Array) -> None:
        """Write other numbers aside, and rename that into place."""
        aside = self.path.parent / "aside"
        aside.mkdir()
        self.format.write(aside / self.path.name, data)
        self.path.rename(aside / "old")
        (aside / self.path.name).rename(self.path)
        shutil.rmtree(aside)
        self.data = data

    def files(self) -> list[Path]:
        return [self.path] if self.path.is_file() else sorted(p for p in self.path.rglob("*") if p.is_file())

    def chunk(self, z: int, y: int, x: int) -> Path:
        return self.path / self.format.chunk.format(z=z, y=y, x=x)

    def extent(self, x: int) -> tuple[slice, ...]:
        """The voxels in the file of the chunk in column `x` of the first row."""
        side = SIDE if "{y}" in self.format.chunk else 2 * SIDE  # shards
        return slice(None), slice(0, side), slice(x * side, (x + 1) * side)


@contextlib.contextmanager
def restored_times(stored: Input) -> Iterator[None]:
    """Give all files that are still there the modification times that they had before."""
    times = {file: file.stat() for file in stored.files()}
    yield
    for file, status in times.items():
        if file.exists():
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def with_voxel(data: Array, rng: np.random.Generator) -> Array:
    """The data with one voxel changed."""
    data, place = data.copy(), tuple(int(rng.integers(n)) for n in SHAPE)
    data[place] = data[place] % 99 + 1
    return data


def voxel(stored: Input, rng: np.random.Generator) -> None:
    """Rewrite with one voxel changed."""
    stored.put(with_voxel(stored.data, rng))


def voxel_same_time(stored: Input, rng: np.random.Generator) -> None:
    """Change one voxel and restore modification times."""
    with restored_times(stored):
        stored.put(with_voxel(stored.data, rng))


def voxel_renamed(stored: Input, rng: np.random.Generator) -> None:
    """Replace the whole by renaming, with one voxel changed."""
    stored.put_by_rename(with_voxel(stored.data, rng))


def voxel_while_open(stored: Input, rng: np.random.Generator) -> None:
    """Replace the whole, with one voxel changed, while a `Volume` of it is open and has been read."""
    stored.opened = oocpatch.Volume(stored.open(), "zyx", stored.format.options.get("level", 0))
    stored.opened.read(Box((0, 0, 0), (1, 1, 1)))
    stored.put_by_rename(with_voxel(stored.data, rng))
    if not isinstance(stored.format.open(stored.path), str):
        stored.opened = None  # arrays that the user opened read what they were opened over


def touch(stored: Input, rng: np.random.Generator) -> None:
    """Give all files new times."""
    for file in stored.files():
        file.touch()


def rewrite(stored: Input, rng: np.random.Generator) -> None:
    """Write the same again."""
    stored.put(stored.data)


def copy(stored: Input, rng: np.random.Generator) -> None:
    """Replace the whole by a copy of it."""
    aside = stored.path.with_name("copy")
    shutil.copytree(stored.path, aside) if stored.path.is_dir() else shutil.copy(stored.path, aside)
    shutil.rmtree(stored.path) if stored.path.is_dir() else stored.path.unlink()
    aside.rename(stored.path)


def other_half(stored: Input, rng: np.random.Generator) -> None:
    """Write other numbers into half of it."""
    data = stored.data.copy()
    data[..., : SHAPE[2] // 2] = rng.integers(1, 100, (*SHAPE[:2], SHAPE[2] // 2))
    stored.put(data)


def delete_chunk(stored: Input, rng: np.random.Generator) -> None:
    """Delete the file of a chunk."""
    x = int(rng.integers(4))
    stored.chunk(0, 0, x).unlink()
    stored.data = stored.data.copy()
    stored.data[stored.extent(x)] = 0


def add_chunk(stored: Input, rng: np.random.Generator) -> None:
    """Copy the file of one chunk over another's."""
    a, b = (int(n) for n in rng.permutation(4)[:2])
    shutil.copy(stored.chunk(0, 0, a), stored.chunk(0, 0, b))
    data = stored.data.copy()
    data[stored.extent(b)] = stored.data[stored.extent(a)]
    stored.data = data


def swap_chunks(stored: Input, rng: np.random.Generator) -> None:
    """Let two chunks change places by renaming their files."""
    a, b = (int(n) for n in rng.permutation(4)[:2])
    first, second = stored.chunk(0, 0, a), stored.chunk(0, 0, b)
    with restored_times(stored):
        first.rename(first.with_name("aside"))
        second.rename(first)
        first.with_name("aside").rename(second)
    data = stored.data.copy()
    for here, there in ((a, b), (b, a)):
        data[stored.extent(here)] = stored.data[stored.extent(there)]
    stored.data = data


def swap_folders(stored: Input, rng: np.random.Generator) -> None:
    """Let two rows of chunks change places by renaming their directories: no file changes, not even its times."""
    first, second = (stored.path / stored.format.chunk.split("/{x}")[0].format(z=0, y=y) for y in (0, 1))
    first.rename(first.with_name("aside"))
    second.rename(first)
    first.with_name("aside").rename(second)
    stored.data = np.concatenate([stored.data[:, 8:], stored.data[:, :8]], axis=1)


def attributes(stored: Input, rng: np.random.Generator) -> None:
    """Add an attribute that means nothing."""
    node: Any = zarr.open(stored.path, mode="r+")
    node = next(iter(dict(node.arrays()).values())) if isinstance(node, zarr.Group) else node
    node.attrs["operator"] = "somebody"


def scale_factor(stored: Input, rng: np.random.Generator) -> None:
    """Change an attribute so that the numbers are doubled."""
    zarr.open_array(stored.path / "scan", mode="r+").attrs["scale_factor"] = 1.0
    stored.data = stored.data * 2


def fill_value(stored: Input, rng: np.random.Generator) -> None:
    """Delete a chunk, and give it another value by the fill value in the metadata."""
    delete_chunk(stored, rng)
    file = stored.path / "zarr.json"
    metadata = json.loads(file.read_text())
    metadata["fill_value"] = 7.0
    file.write_text(json.dumps(metadata))
    stored.data = np.where(stored.data == 0, 7, stored.data).astype(np.float32)


def recompress(stored: Input, rng: np.random.Generator) -> None:
    """Write the same numbers with another compressor."""
    shutil.rmtree(stored.path)
    _zarr(stored.path, stored.data, compressors=ZstdCodec(level=7))


def rechunk(stored: Input, rng: np.random.Generator) -> None:
    """Write the numbers, with one changed, in other chunks."""
    shutil.rmtree(stored.path)
    stored.data = with_voxel(stored.data, rng)
    _zarr(stored.path, stored.data, chunks=(8, 16, 16))


Edit = Callable[[Input, np.random.Generator], None]
ALWAYS: tuple[Edit, ...] = (
    voxel, voxel_same_time, voxel_renamed, voxel_while_open, touch, rewrite, copy, other_half,
)  # fmt: skip
SMALL: tuple[Edit, ...] = (
    voxel, voxel_same_time, voxel_renamed, voxel_while_open, delete_chunk, add_chunk, swap_chunks,
)  # fmt: skip
"""Edits that leave most blocks alone."""
SAME: tuple[Edit, ...] = (touch, copy, attributes)
"""Edits that leave all numbers and their bytes alone: what was computed counts."""


def edits_of(name: str) -> tuple[Edit, ...]:
    """The edits that a format allows."""
    edits = list(ALWAYS)
    if FORMATS[name].chunk:
        edits += [delete_chunk, add_chunk, swap_chunks] if "{x}/" not in FORMATS[name].chunk else [delete_chunk]
    if name in ("zarr", "dask", "xarray", "zarr variable", "xarray dask", "ome-zarr level 1"):
        edits += [swap_folders]
    if (name.startswith("zarr") and name not in ("zarr zip", "zarr v2")) or name == "ome-zarr level 1":
        edits += [attributes]
    if name == "zarr packed":
        edits = [edit for edit in edits if edit not in (delete_chunk, rewrite)] + [scale_factor]
    if name in ("zarr", "dask"):
        edits += [fill_value]
    if name in ("zarr", "zarr zstd", "zarr v2", "dask"):
        edits += [recompress, rechunk]
    return tuple(edits)


class Wrong(AssertionError):
    """A call did what it must not."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise Wrong(message)


@dataclass
class Call:
    """What one call of `predict` did."""

    computed: int
    fields: tuple[str, ...] = ()
    """Of a `RunMismatch`."""
    failed: bool = False


def call(stored: Input, mode: Mode, output: Path, *, limit: int | None = None, **options: Any) -> Call:
    """Call `predict`."""
    model = mode.model(limit)
    settings = {**SETTINGS, **stored.format.options, **mode.options, **options}
    try:
        oocpatch.predict(stored.open(), model, output, **settings)
    except oocpatch.RunMismatch as error:
        require("chunks changed" in str(error) or "statistics changed" in str(error) or error.fields, str(error))
        return Call(model.calls, tuple(error.fields))
    except oocpatch.BlockFailed:
        return Call(model.calls, failed=True)
    return Call(model.calls)


def contents(output: Path, *, metadata: bool = True) -> dict[str, str]:
    """The digests of all files of an output but the ledger, and the group's metadata, which hold times."""
    skipped = ("oocpatch.ledger",) if metadata else ("oocpatch.ledger", "zarr.json")
    return {
        name: digest
        for name, digest in file_digests(output).items()
        if Path(name).name not in skipped and name != "zarr.json"
    }


def check_values(output: Path, mode: Mode, data: Array) -> None:
    """Compare a result with what numpy says."""
    for name, values in mode.expected(data).items():
        result = np.asarray(zarr.open_array(output / name, mode="r")[:])
        require(np.allclose(result, values, rtol=1e-4, atol=1e-4), f"{output.name}/{name} is not what numpy has")


def check_edit(folder: Path, form: str, mode: str, edit: Edit, *, stop: int | None, seed: int, **others: Any) -> str:
    """Compute, wholly or up to a failure, edit, and call again without and with `update`. Returns what came of it."""
    rng = np.random.default_rng(seed)
    how = MODES[mode]
    stored = Input.of(form, folder / "input", new_data(seed))
    output = folder / "out.zarr"
    first = call(stored, how, output, limit=stop, **others)
    require(first.failed == (stop is not None), f"the first call: {first}")
    compared = functools.partial(contents, metadata=edit is not attributes)  # which outputs copy, when they are made
    before = None if first.failed else compared(output)
    if before is not None:
        check_values(output, how, stored.data)
    edit(stored, rng)
    fresh = call(stored, how, folder / "fresh.zarr", **others)
    require(not fresh.failed and not fresh.fields, f"a fresh run: {fresh}")
    expected = compared(folder / "fresh.zarr")
    check_values(folder / "fresh.zarr", how, stored.data)
    again = call(stored, how, output, **others)
    if again.fields:
        require(again.fields == ("volume",), f"it names {again.fields}")
        require(again.computed == 0, "it was refused, and computed something")
        require(edit not in SAME, "nothing changed, and it was refused")
        if before is not None:
            require(compared(output) == before, "it was refused, and the output is another")
        updated = call(stored, how, output, update=True, **others)
        if edit is scale_factor:  # another parameter of the run
            require(updated.fields == ("volume",), f"with update: {updated}")
            updated = call(stored, how, output, overwrite=True, **others)
        require(not updated.fields and not updated.failed, f"with update: {updated}")
        computed = updated.computed
        is_small = how.local and edit in SMALL and form != "zarr one chunk"
        if is_small and stop is None:
            require(0 < computed < fresh.computed, f"{computed} of {fresh.computed} patches for a small edit")
        if is_small and stop is not None:  # the edit may concern each block that was recorded
            require(computed <= fresh.computed, f"{computed} of {fresh.computed} patches for a small edit")
    else:
        computed = again.computed
        require(before is None or before == expected, "the input is another, and the old result was returned")
        require(before is None or computed == 0, f"{computed} patches computed for nothing")
        require(computed <= fresh.computed, f"{computed} patches computed")
    require(compared(output) == expected, "the bytes are not those of a fresh run")
    check_values(output, how, stored.data)
    last = call(stored, how, output, **others)
    require(last.computed == 0 and not last.fields, f"once more: {last}")
    return f"{'refused' if again.fields else 'returned' if before is not None else 'resumed'}, {computed} computed"
