"""TorchIO's transforms in a queue: each of them works on patches or is refused by name, seeded by its draw."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torchio
from torch.utils.data import DataLoader

from oocpatch import GridSampler, LabelSampler, Queue, Subject, SubjectsLoader, UniformSampler
from oocpatch.sampling.images import LoadedVolume
from oocpatch.sampling.transforms import PatchTransform, seeded, to_torchio

SHAPE, PATCH = (14, 16, 18), (6, 8, 10)
RNG = np.random.default_rng(0)
SCAN = torch.from_numpy(RNG.random((1, *SHAPE), dtype=np.float32))
LABELS = torch.from_numpy((RNG.random((1, *SHAPE)) * 3).astype(np.uint8))

WORKS: dict[str, Any] = {
    "Affine": torchio.Affine(degrees=20, scales=(0.8, 1.2), translation=2),
    "Anisotropy": torchio.Anisotropy(downsampling=(1.5, 3)),
    "BiasField": torchio.BiasField(std=1.0, scale=0.5),
    "Blur": torchio.Blur(std=(0.5, 2)),
    "Clamp": torchio.Clamp(out_min=0.2, out_max=0.5),
    "Compose": torchio.Compose([torchio.Flip(axes=(0, 1), flip_probability=0.5), torchio.Noise(std=0.1)]),
    "Contour": torchio.Contour(),
    "CopyAffine": torchio.CopyAffine("t1"),
    "Crop": torchio.Crop(cropping=1),
    "ElasticDeformation": torchio.ElasticDeformation(max_displacement=2.0, num_control_points=5),
    "Flip": torchio.Flip(axes=(0, 1, 2), flip_probability=0.5),
    "Gamma": torchio.Gamma(log_gamma=(-0.3, 0.3)),
    "Ghosting": torchio.Ghosting(intensity=(0.5, 1)),
    "LabelsToImage": torchio.LabelsToImage("seg"),
    "Lambda": torchio.Lambda(lambda data: data + torch.rand(()), types_to_apply="scalar"),
    "Mask": torchio.Mask(masking_method="seg"),
    "Motion": torchio.Motion(),
    "Noise": torchio.Noise(std=(0.1, 0.3)),
    "Normalize": torchio.Normalize(percentile_low=1, percentile_high=99),
    "OneHot": torchio.OneHot(num_classes=3),
    "OneOf": torchio.OneOf([torchio.Noise(std=0.1), torchio.Blur(std=1)]),
    "RemapLabels": torchio.RemapLabels({1: 2}),
    "RemoveLabels": torchio.RemoveLabels([2]),
    "Reorient": torchio.Reorient("LPS"),
    "RescaleIntensity": torchio.RescaleIntensity(out_min=0, out_max=1),
    "SomeOf": torchio.SomeOf([torchio.Noise(std=0.1), torchio.Gamma(log_gamma=0.3)], num_transforms=(1, 2)),
    "Spatial": torchio.Spatial(degrees=10, max_displacement=1.0),
    "Spike": torchio.Spike(intensity=(0.5, 1)),
    "Standardize": torchio.Standardize(),
    "Swap": torchio.Swap(patch_size=2, num_iterations=5),
    "To": torchio.To(torch.float64),
    "Transpose": torchio.Transpose(),
    "ZNormalization": torchio.ZNormalization(),
}
REFUSED: dict[str, Any] = {
    "CropOrPad": torchio.CropOrPad(32),
    "EnsureShapeMultiple": torchio.EnsureShapeMultiple(8),
    "HistogramStandardization": torchio.HistogramStandardization(torch.linspace(0, 100, 13)),
    "KeepLargestComponent": torchio.KeepLargestComponent(),
    "Pad": torchio.Pad(padding=2),
    "PCA": torchio.PCA(),
    "Resample": torchio.Resample(2),
    "Resize": torchio.Resize(8),
    "SequentialLabels": torchio.SequentialLabels(),
    "ToReferenceSpace": torchio.ToReferenceSpace(torchio.ScalarImage(SCAN)),
}
ADAPTERS = {"CornucopiaAdapter", "MonaiAdapter"}  # of libraries that are not in the environment
UNCHANGED = {"CopyAffine", "LabelsToImage", "To"}  # affines, one volume more, dtypes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchio")


def subjects(kind: str = "torchio") -> list[Any]:
    if kind == "torchio":
        return [Subject(t1=torchio.ScalarImage(SCAN + i), seg=torchio.LabelMap(LABELS), age=i) for i in range(2)]
    return [Subject(t1=SCAN + i, seg=LABELS, age=i) for i in range(2)]


def queue(transform: Any, **settings: Any) -> Queue:
    settings = {"subjects": subjects(), "max_length": 4, "patches_per_volume": 3, "seed": 1, **settings}
    return Queue(patch_sampler=UniformSampler(settings["subjects"][0], PATCH), transform=transform, **settings)


def test_the_table_has_every_transform_of_torchio() -> None:
    named = {
        name
        for name, value in vars(torchio).items()
        if isinstance(value, type) and issubclass(value, torchio.Transform)
    }
    assert named - {"Transform", "IntensityTransform", "SpatialTransform"} == {*WORKS, *REFUSED, *ADAPTERS}


@pytest.mark.parametrize("name", WORKS)
def test_a_transform_does_to_each_patch_what_torchio_does(name: str) -> None:
    """The patch of each draw, by TorchIO's own transform with the same generators."""
    transform = WORKS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = list(queue(None, shuffle_patches=False))
        seen: list[int] = []
        seeds = queue(lambda patch: seen.append(torch.initial_seed()) or patch, shuffle_patches=False)
        list(seeds)
        changed = False
        for before, after, seed in zip(plain, queue(transform, shuffle_patches=False), seen, strict=True):
            with seeded(seed):
                expected = transform(torchio.Subject(**before.images, **before.metadata))
            assert type(after) is Subject
            assert list(after.images) == list(expected.images)
            for image in expected.images:
                assert torch.equal(after[image].data, expected[image].data)
                assert type(after[image]) is type(expected[image])
                assert torch.equal(after[image].affine.data, expected[image].affine.data)
            assert [step.name for step in after.applied_transforms] == [s.name for s in expected.applied_transforms]
            assert (after.age, after.patch_location) == (before.age, before.patch_location)
            changed = changed or any(not torch.equal(after[n].data, before[n].data) for n in before.images)
    assert changed == (name not in UNCHANGED)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("inside", [False, True])
def test_a_transform_of_the_whole_volume_is_refused_by_name(name: str, inside: bool) -> None:
    transform = torchio.Compose([torchio.OneOf([REFUSED[name], torchio.Flip()])]) if inside else REFUSED[name]
    with pytest.raises(ValueError, match=f"applied to patches, but {name} needs the whole volume"):
        queue(transform)


@pytest.mark.parametrize(
    ("transform", "error", "message"),
    [
        (torchio.Spatial(target=2), ValueError, "Spatial needs the whole volume"),
        (torchio.OneHot(), ValueError, "OneHot must have num_classes"),
        ("flip", TypeError, "transform must be a function of a patch, or one of TorchIO, got 'flip'"),
    ],
)
def test_what_cannot_transform_patches_is_refused(transform: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        queue(transform)


def test_a_function_that_forgets_to_return_the_patch_is_told_so() -> None:
    with pytest.raises(TypeError, match="transform must return the patch, got None"):
        next(iter(queue(lambda _: None)))


AUGMENT = torchio.Compose(
    [
        torchio.Affine(degrees=20),
        torchio.OneOf([torchio.Noise(std=0.1), torchio.Blur(std=1)]),
        torchio.Gamma(log_gamma=0.3),
    ]
)


def by_hand(patch: Any) -> Any:
    """A plain function with all three generators, and TorchIO's transforms inside."""
    patch = AUGMENT(patch)
    patch.t1.set_data(patch.t1.data + torch.rand(()) + np.random.random() + random.random())  # noqa: NPY002
    return patch


def digest(patches: Any) -> list[float]:
    return sorted(float(value) for batch in patches for value in batch.t1.data.double().sum(dim=(1, 2, 3, 4)))


@pytest.mark.parametrize("transform", [AUGMENT, by_hand], ids=["torchio", "function"])
def test_the_same_seed_gives_the_same_patches_with_any_number_of_workers(transform: Any) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    patches = list(queue(transform))
    assert torch.equal(torch.get_rng_state(), state)
    alone = digest(DataLoader(patches, batch_size=2))  # type: ignore[arg-type]
    assert digest(SubjectsLoader(queue(transform, num_workers=3), batch_size=2)) == alone
    assert digest(SubjectsLoader(queue(transform), batch_size=1, num_workers=2)) == alone
    assert digest(SubjectsLoader(queue(transform, seed=2), batch_size=2)) != alone
    assert len(set(alone)) == len(alone)


def test_label_maps_are_moved_by_the_nearest_voxel_and_others_are_interpolated() -> None:
    rotate = torchio.Affine(degrees=(20, 40))
    [patch] = queue(rotate, subjects=subjects()[:1], patches_per_volume=1)
    assert set(patch.seg.data.unique().tolist()) <= {0, 1, 2}
    assert patch.t1.data.unique().numel() > 100
    ours = subjects("ours")[:1]
    sampler = LabelSampler(ours[0], PATCH, "seg")
    [drawn] = Queue(ours, sampler, patches_per_volume=1, transform=rotate, seed=0)
    assert isinstance(drawn.seg, LoadedVolume)
    assert (drawn.seg.is_label, drawn.seg.data.dtype) == (True, torch.uint8)
    assert set(drawn.seg.data.unique().tolist()) <= {0, 1, 2}
    masks = [Subject(t1=SCAN, mask=LABELS == 1)]
    [masked] = queue(torchio.Compose([rotate, torchio.Noise(std=1)]), subjects=masks, patches_per_volume=1)
    assert masked.mask.data.dtype == torch.bool


def test_integers_that_may_be_labels_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="takes the integers of seg for intensities.*LabelMap"):
        queue(AUGMENT, subjects=subjects("ours"))
    for declared in (torchio.LabelMap(LABELS), torchio.ScalarImage(LABELS), LABELS == 1, LABELS.float()):
        queue(AUGMENT, subjects=[Subject(t1=SCAN, seg=declared)])
    queue(AUGMENT, subjects=[Subject(seg=LABELS)])
    queue(lambda patch: patch, subjects=subjects("ours"))


@pytest.mark.filterwarnings("ignore:.*takes the integers of seg")
def test_volumes_of_ours_are_transformed_as_torchios_images_are() -> None:
    theirs = list(queue(AUGMENT, shuffle_patches=False))
    for a, b in zip(theirs, queue(AUGMENT, subjects=subjects("ours"), shuffle_patches=False), strict=True):
        assert torch.equal(a.t1.data, b.t1.data)
        assert isinstance(b.t1, LoadedVolume)
        assert np.allclose(a.t1.affine.numpy(), b.t1.affine)


def test_planes_are_transformed_as_volumes_of_one_voxel() -> None:
    [plane] = GridSampler(Subject(t1=np.arange(20.0).reshape(4, 5)), (4, 5))
    flipped = PatchTransform.of(torchio.Flip(axes=1))(plane, RNG)
    assert np.array_equal(flipped.t1.data[0], np.arange(20.0).reshape(4, 5)[:, ::-1])
    assert flipped.t1.affine.shape == (3, 3)
    with pytest.raises(ValueError, match="three spatial axes at most"):
        to_torchio(Subject(t1=torch.zeros(1, 2, 2, 2, 2)))


def test_the_history_of_a_patch_is_kept_through_a_batch_and_can_be_undone() -> None:
    flips = torchio.Compose([torchio.Flip(axes=(0, 1), flip_probability=0.5), torchio.Flip(axes=2)])
    plain = list(queue(None, shuffle_patches=False))
    batch = next(iter(DataLoader(queue(flips, shuffle_patches=False), batch_size=6)))
    for before, after in zip(plain, batch.unbatch(), strict=True):
        assert [step.name for step in after.applied_transforms][-1] == "Flip"
        assert torch.equal(torchio.apply_inverse_transform(after).t1.data, before.t1.data)
    [patch] = queue(torchio.Flip(axes=0), subjects=subjects()[:1], patches_per_volume=1)
    again = PatchTransform.of(torchio.Noise(std=0.1))(patch, RNG)
    assert [step.name for step in again.applied_transforms] == ["Flip", "Noise"]
