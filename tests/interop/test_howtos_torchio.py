"""Patch-based inference, training and the queue as TorchIO's documentation has them, with another import.

Each loop is a function of the module that `import ... as tio` names. It runs with TorchIO and with oocpatch, on the
same volumes. Values are compared where TorchIO is right.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import torchio
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import oocpatch

Ints = tuple[int, ...]
Array = np.ndarray[Any, Any]
SHAPES = [(24, 20, 22), (20, 20, 20), (26, 18, 16)]
AFFINE = np.diag([2.0, 1.5, 3.0, 1.0])


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Path]]:
    """Scans and segmentations as NIfTI, of three subjects."""
    folder, random = tmp_path_factory.mktemp("scans"), np.random.default_rng(0)
    written = []
    for i, shape in enumerate(SHAPES):
        scan = random.standard_normal(shape).astype(np.float32)
        files = {"t1": scan, "seg": (scan > 0.5).astype(np.uint8), "weights": np.maximum(scan, 0)}
        written.append({name: folder / f"{name}{i}.nii" for name in files})
        for name, data in files.items():
            nibabel.save(nibabel.Nifti1Image(data, AFFINE), written[-1][name])  # type: ignore[attr-defined]
    return written


def subject_of(tio: ModuleType, files: dict[str, Path]) -> Any:
    return tio.Subject(
        t1=tio.ScalarImage(files["t1"]),
        seg=tio.LabelMap(files["seg"]),
        weights=tio.ScalarImage(files["weights"]),
        age=40,
    )


def scan_of(files: dict[str, Path], name: str = "t1") -> Array:
    return np.asarray(nibabel.load(files[name]).dataobj)  # type: ignore[attr-defined]


MODULES = pytest.mark.parametrize("tio", [torchio, oocpatch], ids=["torchio", "oocpatch"])


def test_every_name_of_the_how_tos_is_one_of_ours() -> None:
    names = (
        "Compose Flip GridSampler LabelMap LabelSampler Noise PatchAggregator Queue ScalarImage Subject SubjectsLoader"
    )
    for name in [*names.split(), "UniformSampler", "WeightedSampler"]:
        assert hasattr(torchio, name)
        assert hasattr(oocpatch, name), name


# Inference


def infer(tio: ModuleType, subject: Any, mode: str, loader: Callable[..., Any]) -> torch.Tensor:
    """The dense inference of the how-to."""

    def model(patches: torch.Tensor) -> torch.Tensor:
        return torch.cat([patches, patches.flip(-1) * torch.arange(patches.shape[-1])], dim=1)

    sampler = tio.GridSampler(subject, patch_size=10, patch_overlap=4)
    aggregator = tio.PatchAggregator(spatial_shape=subject.spatial_shape, overlap_mode=mode, patch_overlap=4)
    for batch in loader(sampler, batch_size=4):
        output = model(batch.t1.data)
        locations = [batch.metadata["patch_location"][i] for i in range(batch.batch_size)]
        aggregator.add_batch(output, locations)
    result: torch.Tensor = aggregator.get_output()
    return result


@pytest.mark.parametrize("mode", ["crop", "average", "hann"])
@pytest.mark.parametrize("plain", [False, True])
def test_dense_inference_gives_the_same_volume(mode: str, plain: bool, paths: list[dict[str, Path]]) -> None:
    results = []
    for tio in (torchio, oocpatch):
        subject = subject_of(tio, paths[0])
        # a plain loader cannot stack the subjects of TorchIO
        results.append(infer(tio, subject, mode, DataLoader if plain and tio is oocpatch else tio.SubjectsLoader))
    theirs, ours = results
    assert ours.shape == theirs.shape == (2, *SHAPES[0])
    assert ours.dtype == theirs.dtype
    if mode == "crop":
        assert torch.equal(ours, theirs)
    elif mode == "average":
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    else:  # TorchIO divides by weights of at least 1
        weights = hann_weights(SHAPES[0])
        torch.testing.assert_close(ours * weights / weights.clamp(min=1), theirs, rtol=1e-4, atol=1e-4)
        assert (weights < 1).double().mean().item() > 0.5


def hann_weights(shape: Ints) -> torch.Tensor:
    """Sum of the windows of patches of 10 with an overlap of 4."""
    axes = []
    for n in shape:
        axis = torch.zeros(n)
        for start in sorted({min(a, n - 10) for a in range(0, n, 6)}):
            axis[start : start + 10] += torch.hann_window(12, periodic=False)[1:-1]
        axes.append(axis)
    return torch.einsum("i,j,k->ijk", *axes)


@MODULES
@pytest.mark.parametrize("overlap", [4, 2])
def test_downsampled_outputs_and_several_keys(tio: ModuleType, overlap: int, paths: list[dict[str, Path]]) -> None:
    """Half of the scale: two voxels of overlap in the output, or one, of which none is cropped."""
    subject = subject_of(tio, paths[1])
    sampler = tio.GridSampler(subject, patch_size=8, patch_overlap=overlap)
    aggregator = tio.PatchAggregator((20, 20, 20), "crop", overlap, output_shape=(10, 10, 10))
    for batch in tio.SubjectsLoader(sampler, batch_size=3):
        small = torch.nn.functional.avg_pool3d(batch.t1.data, 2)
        aggregator.add_batch({"segmentation": small > 0, "embedding": small}, batch.metadata["patch_location"])
    whole = torch.nn.functional.avg_pool3d(torch.from_numpy(scan_of(paths[1]))[None], 2)
    torch.testing.assert_close(aggregator.get_output("embedding"), whole)
    assert torch.equal(aggregator.get_output("segmentation"), whole > 0)


def test_crops_of_scaled_outputs_are_those_of_torchio() -> None:
    """Values say which voxel of which patch they are of, so that each seam shows; all overlaps, odd ones too."""
    for (up, down), overlap in itertools.product([(1, 2), (2, 1), (3, 1)], [0, 1, 2, 3, 5, 6]):
        if overlap * up % down:
            continue
        stride, out = 8 - overlap, (8 + 4 * (8 - overlap)) * up // down
        results = []
        for tio, location in ((torchio, torchio.data.patch.PatchLocation), (oocpatch, oocpatch.PatchLocation)):
            shape = (8 + 4 * stride, 1, 1)
            aggregator = tio.PatchAggregator(shape, "crop", (overlap, 0, 0), output_shape=(out, 1, 1))
            for i in range(5):
                values = 100.0 * i + torch.arange(8 * up // down)
                aggregator.add_batch(values.reshape(1, 1, -1, 1, 1), [location((i * stride, 0, 0), (8, 1, 1))])
            results.append(aggregator.get_output())
        assert torch.equal(*results), (up, down, overlap)


# Training


def sampler_of(tio: ModuleType, kind: str, subject: Any, num_patches: int) -> Any:
    if kind == "uniform":
        return tio.UniformSampler(subject, patch_size=7, num_patches=num_patches)
    if kind == "weighted":
        return tio.WeightedSampler(subject, patch_size=7, probability_map="weights", num_patches=num_patches)
    return tio.LabelSampler(
        subject, patch_size=7, label_name="seg", label_probabilities={0: 0.5, 1: 0.5}, num_patches=num_patches
    )


@MODULES
@pytest.mark.parametrize("kind", ["uniform", "weighted", "label"])
def test_a_loop_of_training_has_the_voxels_at_each_location(
    tio: ModuleType, kind: str, paths: list[dict[str, Path]]
) -> None:
    subject = subject_of(tio, paths[0])
    scan, seg, weights = (scan_of(paths[0], name) for name in ("t1", "seg", "weights"))
    count = 0
    net = torch.nn.Conv3d(1, 2, 3, padding=1)
    for batch in tio.SubjectsLoader(sampler_of(tio, kind, subject, 10), batch_size=4):
        loss = torch.nn.functional.cross_entropy(net(batch.t1.data), batch.seg.data[:, 0].long())
        loss.backward()  # type: ignore[no-untyped-call]
        assert batch.t1.data.shape == batch.seg.data.shape == (batch.batch_size, 1, 7, 7, 7)
        assert batch.t1.data.dtype == torch.float32
        assert batch.metadata["age"] == [40] * batch.batch_size
        for patch, labels, place in zip(batch.t1.data, batch.seg.data, batch.metadata["patch_location"], strict=True):
            np.testing.assert_array_equal(patch[0], scan[place.to_slices()])
            np.testing.assert_array_equal(labels[0], seg[place.to_slices()])
            assert kind != "weighted" or weights[tuple(i + 3 for i in place.index)] > 0
            count += 1
    assert count == 10


# The queue


def queue_of(tio: ModuleType, paths: list[dict[str, Path]], **options: Any) -> Any:
    subjects = [subject_of(tio, files) for files in paths]
    sampler = tio.UniformSampler(subjects[0], patch_size=7)
    return tio.Queue(subjects, patch_sampler=sampler, max_length=12, patches_per_volume=4, **options)


@MODULES
@pytest.mark.parametrize("threads", [0, 4])
def test_the_queue_of_the_how_to_gives_its_patches_of_each_subject(
    tio: ModuleType, threads: int, paths: list[dict[str, Path]]
) -> None:
    queue = queue_of(tio, paths, num_workers=threads)
    scans = [scan_of(files) for files in paths]
    assert queue.num_subjects == 3
    assert queue.patches_per_epoch == 12
    assert queue.max_memory_pretty.endswith("iB")
    for _ in range(2):
        found = Counter[int]()
        for batch in tio.SubjectsLoader(queue, batch_size=5):
            assert batch.t1.data.shape[1:] == (1, 7, 7, 7)
            for patch, place in zip(batch.t1.data, batch.metadata["patch_location"], strict=True):
                box = place.to_slices()
                (which,) = (i for i, scan in enumerate(scans) if np.array_equal(scan[box], patch[0]))
                found[which] += 1
        assert found == {0: 4, 1: 4, 2: 4}


@MODULES
def test_transforms_of_the_how_to_are_applied(tio: ModuleType, paths: list[dict[str, Path]]) -> None:
    """TorchIO transforms a whole subject, and so its patches; ours are transformed one by one."""
    transform = tio.Compose([tio.Flip(axes=(0,)), tio.Noise(std=0.1)])
    queue = queue_of(tio, paths, transform=transform, num_workers=2)
    scans = [scan_of(files) for files in paths]
    for batch in tio.SubjectsLoader(queue, batch_size=5):
        for patch, place in zip(batch.t1.data, batch.metadata["patch_location"], strict=True):
            box = place.to_slices()
            flipped = [
                (scan[::-1][box] if tio is torchio else scan[box][::-1])
                for scan in scans
                if scan[box].shape == (7, 7, 7)
            ]
            deviations = [np.std(patch[0].numpy() - known) for known in flipped if known.shape == (7, 7, 7)]
            assert 0.07 < min(deviations) < 0.13
            assert sum(deviation < 0.5 for deviation in deviations) == 1


@MODULES
def test_ranks_take_their_own_subjects(tio: ModuleType, paths: list[dict[str, Path]]) -> None:
    """Two of three subjects for each of two ranks, one of them twice, another order in each epoch."""
    for epoch in (0, 1):
        count = 0
        for rank in (0, 1):
            sampler = DistributedSampler(range(3), num_replicas=2, rank=rank, shuffle=True)
            queue = queue_of(tio, paths, subject_sampler=sampler, shuffle_subjects=False)
            sampler.set_epoch(epoch)
            patches = list(itertools.chain.from_iterable(b.t1.data for b in tio.SubjectsLoader(queue, batch_size=3)))
            assert len(patches) == queue.patches_per_epoch == 8
            count += len(patches)
        assert count == 16
