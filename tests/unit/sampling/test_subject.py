"""Promises of subjects and batches: what is a volume, what is read when, what travels to other processes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from torch.utils.data import DataLoader

import oocpatch
from oocpatch.planning.box import Box
from oocpatch.sampling.loader import SubjectsBatch
from oocpatch.sampling.subject import read_patches
from tests.support.counting_store import CountingStore

DATA = np.arange(6 * 8, dtype=np.float32).reshape(6, 8)
LOCATION = oocpatch.PatchLocation((1, 2), (3, 4))


def on_disk(root: Path) -> Path:
    zarr.create_array(root / "volume.zarr", data=DATA, chunks=(4, 4), dimension_names=("y", "x"))
    return root / "volume.zarr"


def in_group(root: Path) -> zarr.Group:
    lazily(root)
    return zarr.open_group(root / "scan.zarr", mode="r")


def lazily(root: Path) -> xr.DataArray:
    xr.DataArray(DATA, dims=("y", "x"), name="scan").to_dataset().to_zarr(root / "scan.zarr", consolidated=False)
    return xr.open_zarr(root / "scan.zarr", chunks=None, consolidated=False)["scan"]


SOURCES: dict[str, Callable[[Path], Any]] = {
    "path": on_disk,
    "zarr": lambda root: zarr.open_array(on_disk(root), mode="r"),
    "group": in_group,
    "memory-store": lambda root: zarr.create_array(zarr.storage.MemoryStore(), data=DATA, chunks=(4, 4)),
    "xarray": lambda root: xr.DataArray(DATA, dims=("y", "x")),
    "xarray-lazy": lazily,
    "xarray-dask": lambda root: xr.DataArray(da.from_array(DATA, chunks=(4, 4)), dims=("y", "x")),
    "dask": lambda root: da.from_array(DATA, chunks=(4, 4)),
    "numpy": lambda root: DATA,
    "torch": lambda root: torch.from_numpy(DATA)[None],
    "volume": lambda root: oocpatch.Volume(DATA[..., None], axes="yxc"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_array_is_a_volume_and_gives_its_voxels(kind: str, tmp_path: Path) -> None:
    subject = oocpatch.Subject(t1=SOURCES[kind](tmp_path))
    assert subject.spatial_shape == (6, 8)
    [patch] = read_patches(subject, [LOCATION])
    assert patch.t1.data.dtype == torch.float32
    assert np.array_equal(patch.t1.data.numpy(), DATA[None, 1:4, 2:6])
    assert patch.patch_location == LOCATION


@pytest.mark.parametrize("kind", SOURCES)
def test_a_subject_travels_to_another_process_and_reads_the_same(kind: str, tmp_path: Path) -> None:
    subject = oocpatch.Subject(t1=SOURCES[kind](tmp_path), age=45)
    copy = pickle.loads(pickle.dumps(subject))  # noqa: S301 - our own
    assert copy.age == 45
    [patch] = read_patches(copy, [LOCATION])
    assert np.array_equal(patch.t1.data.numpy(), DATA[None, 1:4, 2:6])


def test_a_volume_on_disk_travels_by_its_address(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "large.zarr", shape=(512, 512, 512), chunks=(64, 64, 64), dtype="uint8")
    subject = oocpatch.Subject(t1=tmp_path / "large.zarr")
    assert len(pickle.dumps(subject)) < 8192


def test_what_is_no_array_is_metadata(tmp_path: Path) -> None:
    subject = oocpatch.Subject(t1=DATA, age=45, name=str(on_disk(tmp_path)), seen=None, tags=["a"])
    assert list(subject.images) == ["t1"]
    assert subject.metadata == {"age": 45, "name": str(tmp_path / "volume.zarr"), "seen": None, "tags": ["a"]}
    assert subject.age == subject["age"] == 45
    assert "t1" in subject
    assert "t2" not in subject
    with pytest.raises(AttributeError, match="t2"):
        _ = subject.t2


def test_loading_puts_volumes_into_memory_as_tensors(tmp_path: Path) -> None:
    subject = oocpatch.Subject(t1=on_disk(tmp_path), age=45)
    assert isinstance(subject.t1, oocpatch.Volume)
    subject.load()
    assert np.array_equal(subject.t1.data.numpy(), DATA[None])
    [patch] = read_patches(subject, [LOCATION])
    assert np.array_equal(patch.t1.data.numpy(), DATA[None, 1:4, 2:6])


def test_only_metadata_are_read_until_a_patch_is() -> None:
    store = CountingStore()
    volume = zarr.create_array(store, data=np.ones((32, 32), np.uint8), chunks=(8, 8))
    store.reads.clear()
    subject = oocpatch.Subject(t1=volume)
    grid = oocpatch.GridSampler(subject, 8, 4)
    uniform = oocpatch.UniformSampler(subject, 8)
    oocpatch.WeightedSampler(subject, 8, "t1")
    oocpatch.LabelSampler(subject, 8, "t1", {1: 1})
    queue = oocpatch.Queue([subject], uniform)
    iter(queue), queue.max_memory, len(grid.locations), grid.locations[-1], iter(uniform)
    pickle.dumps([subject, grid, uniform, queue])
    assert [key for key in store.reads if "c/" in key] == []
    _ = grid[0]
    assert [key for key in store.reads if "c/" in key] == ["c/0/0"]


def test_tensors_are_channels_first_and_numpy_arrays_go_by_their_axes() -> None:
    colour = torch.arange(3 * 4 * 5).reshape(3, 4, 5)
    assert oocpatch.Subject(rgb=colour).spatial_shape == (4, 5)
    assert oocpatch.Subject(scan=colour.numpy()).spatial_shape == (3, 4, 5)
    assert oocpatch.Subject(rgb=oocpatch.Volume(colour.numpy(), "cyx")).spatial_shape == (4, 5)
    assert oocpatch.Subject(scan=np.zeros((2, 3, 4, 5))).spatial_shape == (3, 4, 5)


def test_each_patch_owns_its_memory() -> None:
    subject = oocpatch.Subject(t1=torch.zeros(1, 8))
    locations = [oocpatch.PatchLocation((i,), (4,)) for i in (0, 0, 2)]
    first, *others = read_patches(subject, locations)
    first.t1.data.fill_(1)
    assert all(not patch.t1.data.any() for patch in others)
    assert not subject.t1.data.any()
    assert all(patch.t1.data.untyped_storage().nbytes() == 16 for patch in (first, *others))


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "symmetric", "wrap"])
def test_patches_read_together_are_those_read_alone(mode: str) -> None:
    subject = oocpatch.Subject(t1=DATA, label=DATA.astype(np.int16))
    locations = [oocpatch.PatchLocation(corner, (3, 4)) for corner in ((-2, 1), (4, 6), (0, 0))]
    together = read_patches(subject, locations, {"t1": (mode, 7)})
    for location, patch in zip(locations, together, strict=True):
        [alone] = read_patches(subject, [location], {"t1": (mode, 7)})
        padding = {"constant_values": 7} if mode == "constant" else {}
        padded = np.pad(DATA, 4, mode=mode, **padding)[tuple(slice(a + 4, b + 4) for a, b in zip(
            location.index_ini, location.index_fin, strict=True))]  # fmt: skip
        assert np.array_equal(patch.t1.data[0].numpy(), padded)
        assert torch.equal(patch.t1.data, alone.t1.data)
        assert patch.label.data.dtype == torch.int16


def test_a_plain_loader_stacks_patches() -> None:
    subject = oocpatch.Subject(t1=DATA, label=(DATA > 20).astype(np.uint8), age=45)
    sampler = oocpatch.GridSampler(subject, 4, 2)
    batches = list(DataLoader(sampler, batch_size=4))
    assert [len(batch) for batch in batches] == [4, 2]
    for batch in batches:
        assert batch.t1.data.shape == (len(batch), 1, 4, 4)
        for t1, label, location, age in zip(
            batch.t1.data, batch["label"].data, batch.patch_location, batch.age, strict=True
        ):
            assert np.array_equal(t1[0].numpy(), DATA[location.to_slices()])
            assert np.array_equal(label[0].numpy(), DATA[location.to_slices()] > 20)
            assert age == 45
        assert list(batch.images) == ["t1", "label"]
        assert batch.metadata.keys() == {"age", "patch_location"}
    assert batches[0].to(torch.float64).t1.data.dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "at least one volume"),
        ({"age": 4}, r"at least one volume, got only \['age'\]"),
        ({"t1": "t1.zarr"}, r"got only \['t1'\]; strings are metadata, pass a path as pathlib.Path"),
        ({"a": DATA, "b": DATA.T}, r"one spatial shape, got a \(6, 8\), b \(8, 6\)"),
        ({"images": DATA}, "must not be one of .* got 'images'"),
        ({"a": torch.zeros(3)}, r"a: a tensor must have shape \(C, \*spatial\), got \(3,\)"),
        ({"a": np.zeros((1, 1, 4, 4, 4))}, "a: .* no looped axes, got t"),
        ({"a": Path("nowhere.zarr")}, "a: volume not found: nowhere.zarr"),
        ({"a": np.zeros(4, complex)}, "a: .*complex128"),
        ({"a": np.zeros(4, np.longdouble)}, "a: the volume must hold booleans, integers or floats of at most 64 bits"),
    ],
)
def test_a_subject_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        oocpatch.Subject(**arguments)


def test_what_cannot_be_stacked_is_refused() -> None:
    small, large = (oocpatch.Subject(t1=torch.zeros(1, n)) for n in (3, 4))
    with pytest.raises(ValueError, match=r"one shape, got \(1, 3\) and \(1, 4\) for 't1'"):
        SubjectsBatch.of([small, large])
    with pytest.raises(ValueError, match=r"same names, got \['t1'\] and \['t2'\]"):
        SubjectsBatch.of([small, oocpatch.Subject(t2=torch.zeros(1, 3))])
    with pytest.raises(ValueError, match="in memory, but 't1' is not"):
        SubjectsBatch.of([oocpatch.Subject(t1=DATA)])
    with pytest.raises(AttributeError, match="t2"):
        _ = SubjectsBatch.of([small]).t2


def test_an_array_in_memory_is_known_by_its_content() -> None:
    volume = oocpatch.Volume(DATA.copy())
    assert volume.fingerprint == oocpatch.Volume(DATA.copy()).fingerprint
    assert volume.fingerprint != oocpatch.Volume(DATA + 1).fingerprint
    assert np.array_equal(volume.read(Box((0, 0), (6, 8)))[0], DATA)


def test_volumes_of_a_subject_meet_by_the_names_of_their_axes(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    image = xr.DataArray(rng.random((4, 5, 6)), {"x": np.arange(6) * 0.5}, dims=("z", "y", "x"))
    label = (image > 0.5).astype("u1")
    zarr.create_array(tmp_path / "label.zarr", data=label.values.T, dimension_names=("x", "y", "z"))
    for other in (
        label.transpose("x", "y", "z"),
        label.transpose("y", "x", "z").expand_dims("c", axis=1),
        tmp_path / "label.zarr",
        oocpatch.Volume(label.values.transpose(1, 0, 2), axes="yzx"),
        label.values,
        torch.from_numpy(label.values[None]),
    ):
        subject = oocpatch.Subject(t1=image, label=other, age=4)
        assert subject.spatial_shape == (4, 5, 6)
        patch = next(iter(oocpatch.GridSampler(subject, (4, 5, 6))))
        assert np.array_equal(patch.label.data[0], label)
        assert np.array_equal(patch.t1.data[0], image)
        subject.load()
        assert np.array_equal(subject.label.data[0], label)


def test_volumes_of_a_subject_that_lie_elsewhere_are_refused() -> None:
    image = xr.DataArray(np.zeros((4, 4)), {"x": np.arange(4) * 0.5}, dims=("y", "x"))
    for other, message in (
        (image.rename(y="row"), r"label must have the spatial axes .*\(row: 4, x: 4\) for the volume \(y: 4, x: 4\)"),
        (image.assign_coords(x=np.arange(4) * 0.5 + 1), "label must lie over the volume, .* along x"),
        (image[:, ::-1], "label must lie over the volume"),
        (image.isel(x=slice(0, 3)), "one spatial shape"),
    ):
        with pytest.raises(ValueError, match=message):
            oocpatch.Subject(t1=image, label=other)
