"""Subjects of TorchIO's images beside TorchIO's own: voxels, affines, what may be set, and who takes them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import torchio
import zarr
from torch.utils.data import DataLoader

import oocpatch
from oocpatch import GridSampler, Subject, Volume
from oocpatch.sampling.images import readable

AFFINE = np.array([[0, 2.0, 0, 5], [1.5, 0, 0, 6], [0, 0, -3.0, 7], [0, 0, 0, 1]])
SHAPE = (7, 10, 12)
VALUES = np.arange(2 * np.prod(SHAPE)).reshape(2, *SHAPE)


def nifti(folder: Path, name: str, values: Any, slope: tuple[float, float] | None = None) -> Path:
    image = nibabel.Nifti1Image(values, AFFINE)
    if slope is not None:
        image.header.set_slope_inter(*slope)
    nibabel.save(image, folder / name)
    return folder / name


def images(folder: Path, kind: str) -> dict[str, Any]:
    """Two images of TorchIO, from tensors or from files."""
    if kind == "tensor":
        scan, labels = torch.from_numpy(VALUES.astype("float32")), torch.from_numpy(VALUES[:1] % 3)
        return {"t1": torchio.ScalarImage(scan, affine=AFFINE), "seg": torchio.LabelMap(labels, affine=AFFINE)}
    scan_file = nifti(folder, "scan" + kind, np.moveaxis(VALUES, 0, -1).astype("int16"), slope=(0.5, 3))
    label_file = nifti(folder, "labels" + kind, (VALUES[0] % 3).astype("uint16"))
    return {"t1": torchio.ScalarImage(scan_file), "seg": torchio.LabelMap(label_file)}


@pytest.mark.parametrize("kind", ["tensor", ".nii", ".nii.gz"])
@pytest.mark.parametrize("as_theirs", [True, False])
def test_patches_are_those_of_torchio_with_its_affines_and_kinds(tmp_path: Path, kind: str, as_theirs: bool) -> None:
    given = images(tmp_path, kind)
    subject: Any = (torchio.Subject if as_theirs else Subject)(**given, age=45)
    ours = GridSampler(subject, (4, 6, 8), (2, 4, 2))
    theirs = torchio.GridSampler(torchio.Subject(**images(tmp_path, kind), age=45), (4, 6, 8), (2, 4, 2))
    assert len(ours) == len(theirs)
    assert given["t1"].is_loaded == (kind == "tensor")
    for a, b in zip(ours, theirs, strict=True):
        for name in ("t1", "seg"):
            assert torch.equal(a[name].data.double(), b[name].data.double())
            assert type(a[name]) is type(b[name])
            assert torch.equal(a[name].affine.data, b[name].affine.data)
            assert (a[name].spacing, a[name].orientation, a[name].shape) == (
                (b[name].spacing, b[name].orientation, b[name].shape)
            )
        assert a.seg.data.dtype == b.seg.data.dtype
        assert (a.age, a.patch_location.index, a.spacing) == (45, b.patch_location.index, b.spacing)


def test_files_of_torchios_images_are_read_in_parts(tmp_path: Path) -> None:
    subject = Subject(**images(tmp_path, ".nii"))
    assert all(isinstance(readable(image), Volume) for image in subject.images.values())
    subject.t1.set_data(torch.zeros(2, *SHAPE))  # in place of the file
    assert not next(iter(oocpatch.UniformSampler(subject, 4, 1))).t1.data.any()


def test_a_file_that_torchio_cannot_read_is_a_volume_with_the_kind_of_its_image(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a.zarr", data=VALUES[0], dimension_names=("z", "y", "x"))
    subject = Subject(t1=torchio.ScalarImage(tmp_path / "a.zarr"), seg=torchio.LabelMap(tmp_path / "a.zarr"))
    patch = GridSampler(subject, 4)[-1]
    assert np.array_equal(patch.t1.data[0], VALUES[0, 3:, 6:, 8:])
    assert (patch.t1.is_label, patch.seg.is_label) == (False, True)


def test_named_axes_beside_an_image_of_torchio_are_turned_to_its_order(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a.zarr", data=VALUES[0].transpose(), dimension_names=("z", "y", "x"))
    for first in (True, False):
        both = {"a": torchio.ScalarImage(torch.from_numpy(VALUES)), "b": tmp_path / "a.zarr"}
        subject = Subject(**(both if first else dict(reversed(both.items()))))
        for patch in GridSampler(subject, (4, 6, 8)):
            assert torch.equal(patch.a.data[:1], patch.b.data)


def test_what_looks_like_an_image_is_one() -> None:
    subject = Subject(t1=SimpleNamespace(path=None, data=torch.zeros(1, 4, 5, 6), affine=AFFINE))
    assert np.array_equal(GridSampler(subject, (2, 5, 6))[1].t1.affine[:3, 3], [5, 9, 7])


def test_points_and_boxes_are_metadata_and_a_reader_of_ones_own_is_used(tmp_path: Path) -> None:
    path = nifti(tmp_path, "a.nii", VALUES[0].astype("float32"))
    image = torchio.ScalarImage(path, reader=lambda _: (torch.ones(1, *SHAPE), AFFINE))
    points = torchio.Points(torch.zeros(3, 3))
    boxes = torchio.BoundingBoxes(torch.zeros(1, 6), format=torchio.BoundingBoxFormat.IJKIJK)
    patch = GridSampler(Subject(t1=image, points=points, boxes=boxes), 4)[3]
    assert patch.t1.data.unique().tolist() == [1]
    assert (patch.points, patch.boxes) == (points, boxes)


USES: dict[str, Any] = {
    "transform": torchio.Flip(axes=0),
    "compose": torchio.Compose([torchio.Noise(std=0.1), torchio.OneOf([torchio.Flip(axes=1)])]),
    "grid": lambda s: torchio.GridSampler(s, 4, 2, padding_mode="mean")[0],
    "uniform": lambda s: next(iter(torchio.UniformSampler(s, 4, num_patches=1))),
    "label": lambda s: next(iter(torchio.LabelSampler(s, 4, "seg", num_patches=1))),
    "weighted": lambda s: next(iter(torchio.WeightedSampler(s, 4, "seg", num_patches=1))),
    "queue": lambda s: next(iter(torchio.Queue([s, s], torchio.UniformSampler(s, 4), max_length=4))),
    "collate": lambda s: torchio.collate_subjects([s, s]).unbatch()[0],
    "loader": lambda s: torchio.Noise(std=1)(next(iter(torchio.SubjectsLoader(GridSampler(s, 4))))).unbatch()[0],
}


@pytest.mark.filterwarnings("ignore:.*data type of the input image is not float:RuntimeWarning")
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_torchio_takes_a_subject_of_its_images(tmp_path: Path, use: Any) -> None:
    result = use(Subject(**images(tmp_path, "tensor"), age=45))
    assert isinstance(result, torchio.Subject)
    assert (type(result.t1), type(result.seg), result.age) == (torchio.ScalarImage, torchio.LabelMap, 45)


def test_a_subject_is_of_its_own_class_when_it_is_copied_or_sent(tmp_path: Path) -> None:
    subject = Subject(**images(tmp_path, "tensor"), age=45)
    for other in (pickle.loads(pickle.dumps(subject)), copy.copy(subject), copy.deepcopy(subject)):  # noqa: S301 - our own
        assert type(other) is Subject
        other.t1 = torch.zeros(1, *SHAPE)
        assert subject.t1.data.any()
    assert not isinstance(Subject(t1=VALUES[0]), torchio.Subject)


def patches_of(kind: str) -> Subject:
    """A subject in memory, of our volumes or of TorchIO's images."""
    if kind == "torchio":
        given: dict[str, Any] = images(Path(), "tensor")
    else:
        given = {"t1": torch.from_numpy(VALUES), "seg": torch.from_numpy(VALUES[:1] % 3)}
    return GridSampler(Subject(**given, age=45), (7, 5, 6))[1]


NEW = torch.full((1, 7, 5, 6), 8.0)

SETTERS: dict[str, Any] = {
    "attribute": lambda patch: setattr(patch, "t1", NEW),
    "item": lambda patch: patch.__setitem__("t1", NEW),
    "images": lambda patch: patch.images.__setitem__("t1", NEW),
    "update": lambda patch: patch.images.update(t1=NEW),
    "array": lambda patch: setattr(patch, "t1", NEW.numpy()),
    "flat": lambda patch: setattr(patch, "t1", NEW[0].numpy()),
    "image": lambda patch: setattr(patch, "t1", torchio.ScalarImage(NEW)),
}


@pytest.mark.parametrize("kind", ["ours", "torchio"])
@pytest.mark.parametrize("how", SETTERS)
def test_what_is_set_in_a_patch_is_in_the_batch(kind: str, how: str) -> None:
    patch = patches_of(kind)
    before = patch.t1
    SETTERS[how](patch)
    batch = next(iter(DataLoader([patch, patch], batch_size=2)))  # type: ignore[arg-type]
    assert torch.equal(batch.t1.data, torch.stack([NEW, NEW]).to(batch.t1.data.dtype))
    if how != "image":
        assert type(patch.t1) is type(before)
        assert np.array_equal(np.asarray(patch.t1.affine.data), np.asarray(before.affine.data))


@pytest.mark.parametrize("kind", ["ours", "torchio"])
def test_volumes_and_metadata_can_be_added_and_deleted(kind: str) -> None:
    patch = patches_of(kind)
    patch.new, patch.sex = NEW, "f"
    del patch.seg, patch.age
    batch = next(iter(DataLoader([patch], batch_size=1)))  # type: ignore[arg-type]
    assert (list(batch.images), sorted(batch.metadata)) == (["t1", "new"], ["patch_location", "sex"])
    del patch.images["new"]
    with pytest.raises(ValueError, match="at least one volume, and 't1' is its last"):
        del patch.t1
    with pytest.raises(AttributeError, match="no 'seg'"):
        del patch.seg


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("t1", 5, TypeError, "'t1' is a volume and must be a tensor"),
        ("t1", NEW[0], ValueError, r"'t1' must have shape \(C, \*spatial\) with 3 spatial axes, got \(7, 5, 6\)"),
        ("images", {}, AttributeError, "'images' of a subject cannot be set"),
        ("spatial_shape", (1, 2, 3), AttributeError, "cannot be set"),
    ],
)
def test_what_cannot_be_set_is_refused(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        setattr(patches_of("ours"), name, value)
    if name == "t1":
        with pytest.raises(error, match=message):
            patches_of("torchio").images["t1"] = value


@pytest.mark.parametrize("kind", ["ours", "torchio"])
def test_what_is_set_in_a_batch_is_in_its_patches(kind: str) -> None:
    batch = next(iter(DataLoader([patches_of(kind)] * 3, batch_size=3)))  # type: ignore[arg-type]
    affine = np.asarray(batch.t1.affines[0].data)
    assert (batch.batch_size, len(batch), batch.metadata["age"], batch.device.type) == (3, 3, [45] * 3, "cpu")
    batch.t1.data = torch.ones(3, 1, 7, 5, 6)
    batch.seg = torch.full((3, 1, 7, 5, 6), 2)
    batch.images["more"] = torch.full((3, 4, 7, 5, 6), 3)
    batch.sex = ["f", "m", "f"]
    del batch.age
    batch.to(torch.float64)
    patches = batch.unbatch()
    assert [(p.t1.data.unique().item(), p.seg.data.unique().item(), p.more.data.unique().item()) for p in patches] == (
        [(1, 2, 3)] * 3
    )
    assert [patch.sex for patch in patches] == ["f", "m", "f"]
    assert patches[2].t1.data.dtype == torch.float64
    assert np.array_equal(np.asarray(patches[1].t1.affine.data), affine)
    assert type(patches[0].seg) is (torchio.LabelMap if kind == "torchio" else oocpatch.sampling.images.LoadedVolume)
    del batch.images["more"]
    assert list(batch.images) == ["t1", "seg"]


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("t1", torch.zeros(2, 1, 7, 5, 6), ValueError, "'t1' must have 3 patches, as the batch has, got 2"),
        ("t1", [1, 2, 3], TypeError, "'t1' is a volume and must be a tensor"),
        ("age", [1, 2], ValueError, "'age' must be a tensor, or a list of one value per patch"),
        ("images", {}, AttributeError, "'images' of a batch cannot be set"),
    ],
)
def test_what_cannot_be_set_in_a_batch_is_refused(name: str, value: Any, error: type[Exception], message: str) -> None:
    batch = next(iter(DataLoader([patches_of("ours")] * 3, batch_size=3)))  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        setattr(batch, name, value)
    with pytest.raises(ValueError, match="data of a batch must be a tensor"):
        batch.t1.data = torch.zeros(3, 4)


def test_affines_of_our_volumes_follow_the_corner_of_the_patch(tmp_path: Path) -> None:
    path = nifti(tmp_path, "a.nii", VALUES[0].astype("float32"))
    theirs = torchio.GridSampler(torchio.Subject(a=torchio.ScalarImage(path)), (4, 5, 6))
    for ours, other in zip(GridSampler(Subject(a=path), (4, 5, 6)), theirs, strict=True):
        assert np.allclose(ours.a.affine, other.a.affine.numpy())
        assert (ours.a.spacing, ours.a.orientation) == (other.a.spacing, other.a.orientation)
        assert np.allclose(ours.a.origin, other.a.origin)
    plain = GridSampler(Subject(a=np.zeros((8, 9))), 4)[-1]
    assert plain.a.affine.tolist() == [[1, 0, 4], [0, 1, 5], [0, 0, 1]]
