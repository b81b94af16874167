"""Whole runs with something around the model: the values are those of numpy, a resume uses the same numbers."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import nn

import oocpatch
from oocpatch.outputs.record import inspect_output
from oocpatch.storage.paths import LocalPath
from oocpatch.verification import compare as checking
from oocpatch.volumes import statistics
from tests.support import oracle

Array = np.ndarray[Any, Any]
SHAPE, PATCH, OVERLAP = (20, 26), 8, 4
SETTINGS: dict[str, Any] = {"patch_size": PATCH, "patch_overlap": OVERLAP, "progress": False}


@pytest.fixture
def data() -> Array:
    """Two channels of uint16 that differ in mean and spread."""
    generator = np.random.default_rng(0)
    found = np.stack([generator.integers(0, 1000, SHAPE), generator.integers(30_000, 65_536, SHAPE)]).astype(np.uint16)
    found[1, 3, 5] = 65_535
    return found


@pytest.fixture
def volume(data: Array, tmp_path: Path) -> Path:
    zarr.create_array(tmp_path / "volume", data=data, chunks=(1, 7, 9), dimension_names=("c", "y", "x"))
    return tmp_path / "volume"


def blended(data: Array, model: Any) -> Array:
    return oracle.predict(data, model, patch=(PATCH, PATCH), overlap=(OVERLAP, OVERLAP), mode="hann")


def numpy_zscore(data: Array) -> Array:
    wide = data.astype(np.float64)
    return (wide - wide.mean(axis=(1, 2), keepdims=True)) / wide.std(axis=(1, 2), keepdims=True)


def numpy_percentile(data: Array) -> Array:
    low, high = np.percentile(data, (2, 90), axis=(1, 2), keepdims=True)
    return np.clip((data - low) / (high - low), 0, 1)


PREPROCESSES = {
    "zscore": ("zscore", numpy_zscore),
    "percentile": ({"name": "percentile", "low": 2, "high": 90}, numpy_percentile),
    "scale": ("scale", lambda data: data / 65535),
    "numbers": (
        {"name": "scale", "subtract": [500, 48_000], "divide": [250, 9_000.5]},
        lambda data: (data - np.reshape([500, 48_000], (2, 1, 1))) / np.reshape([250, 9_000.5], (2, 1, 1)),
    ),
    "function": (lambda patches: patches.float() / 2, lambda data: data / 2),
}


@pytest.mark.parametrize(("preprocess", "expected"), PREPROCESSES.values(), ids=PREPROCESSES)
def test_a_preprocessed_volume_reaches_the_model(
    preprocess: Any, expected: Any, data: Array, volume: Path, tmp_path: Path
) -> None:
    result = oocpatch.predict(volume, nn.Identity(), tmp_path / "out", preprocess=preprocess, **SETTINGS)
    np.testing.assert_allclose(result, expected(data), rtol=1e-5, atol=1e-5)


def test_the_model_gets_float32_of_what_half_precision_cannot_hold(data: Array, volume: Path, tmp_path: Path) -> None:
    # 65535 as float16 is infinite: the preprocess must come before the cast.
    half = nn.Conv2d(2, 2, 1, bias=False).half()
    with torch.no_grad():
        half.weight[:] = torch.eye(2).reshape(2, 2, 1, 1)
    result = oocpatch.predict(volume, half, tmp_path / "out", preprocess="zscore", **SETTINGS)
    np.testing.assert_allclose(result, numpy_zscore(data), atol=3e-3)


def test_statistics_are_recorded_and_taken_once(
    data: Array, volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    faults = [7]

    def fragile(patches: torch.Tensor) -> torch.Tensor:
        calls.append(len(patches))
        if len(calls) in faults:
            raise RuntimeError("the device fell off the bus")
        return patches

    arguments = {**SETTINGS, "preprocess": "zscore", "block_shape": 8, "output_chunks": 4, "workers": 1}
    with pytest.raises(oocpatch.BlockFailed, match="fell off the bus"):
        oocpatch.predict(volume, fragile, tmp_path / "out", **arguments)
    # What was found is in the plan that lies on disk: nobody goes through the volume again.
    monkeypatch.setattr(statistics.VolumeStatistics, "_pass", None)
    result = oocpatch.predict(volume, fragile, tmp_path / "out", **arguments)
    np.testing.assert_allclose(result, numpy_zscore(data), rtol=1e-5, atol=1e-5)
    found = inspect_output(LocalPath(tmp_path / "out"))
    assert found is not None
    wide = data.reshape(2, -1).astype(np.float64)
    np.testing.assert_allclose(found.details["statistics"], np.stack([wide.mean(1), wide.std(1)], 1), rtol=1e-12)


def test_a_plan_reads_no_voxel_though_statistics_are_asked_for(
    volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics.VolumeStatistics, "_pass", None)
    plan = oocpatch.plan(volume, nn.Identity(), tmp_path / "out", preprocess="percentile", augment="flips", **SETTINGS)
    assert "mean of 4 flips and rotations, preprocess percentile" in str(plan)
    assert plan.statistics == ()


def uneven(patches: torch.Tensor) -> torch.Tensor:
    """Looks at the place in the patch, along y more than along x."""
    y, x = (torch.arange(float(n)) for n in patches.shape[2:])
    return patches.float() * (y[:, None] * 3 + x + 1) + patches.float().cumsum(-1)


def numpy_uneven(patch: Array) -> Array:
    y, x = (np.arange(float(n)) for n in patch.shape[1:])
    return patch * (y[:, None] * 3 + x + 1) + patch.astype(np.float64).cumsum(-1)


def mean_over(turns: list[Any]) -> Any:
    return lambda patch: np.mean([back(numpy_uneven(turn(patch))) for turn, back in turns], axis=0)


ROTATIONS = [(lambda p, k=k: np.rot90(p, k, (1, 2)), lambda p, k=k: np.rot90(p, -k, (1, 2))) for k in range(4)]
FLIPS = [(lambda p, a=a: np.flip(p, a), lambda p, a=a: np.flip(p, a)) for a in [(), (1,), (2,), (1, 2)]]
ALL = [
    (lambda p, k=k, f=f: np.rot90(np.flip(p, 1) if f else p, k, (1, 2)),
     lambda p, k=k, f=f: np.flip(np.rot90(p, -k, (1, 2)), 1) if f else np.rot90(p, -k, (1, 2)))
    for k, f in itertools.product(range(4), (False, True))
]  # fmt: skip


@pytest.mark.parametrize(
    ("augment", "turns"),
    [("flips", FLIPS), ("rotations", ROTATIONS), ("all", ALL), (["x"], FLIPS[::2])],
    ids=["flips", "rotations", "all", "axis"],
)
def test_outputs_of_turned_patches_are_averaged(
    augment: Any, turns: list[Any], data: Array, volume: Path, tmp_path: Path
) -> None:
    result = oocpatch.predict(volume, uneven, tmp_path / "out", augment=augment, batch_size=3, **SETTINGS)
    expected = blended(data, mean_over(turns))
    np.testing.assert_allclose(result, expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())


def test_an_ensemble_is_the_mean_of_its_runs(volume: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = [nn.Conv2d(2, 3, 3, padding=1) for _ in range(3)]
    alone = [oocpatch.predict(volume, m, tmp_path / f"{i}", **SETTINGS).values for i, m in enumerate(models)]
    result = oocpatch.predict(volume, models, tmp_path / "all", **SETTINGS)
    np.testing.assert_allclose(result, np.mean(alone, axis=0), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("preprocess", "zscore", "scale"),
        ("preprocess", None, {"name": "percentile", "low": 1}),
        ("preprocess", lambda x: x.float() + 1, lambda x: x.float() + 2),
        ("augment", None, "flips"),
        ("augment", "all", {"name": "all", "axes": ["y"]}),
    ],
)
def test_another_setting_is_another_run(name: str, before: Any, after: Any, volume: Path, tmp_path: Path) -> None:
    arguments = {**SETTINGS, "preprocess": "scale"}
    oocpatch.predict(volume, nn.Identity(), tmp_path / "out", **{**arguments, name: before})
    with pytest.raises(oocpatch.RunMismatch, match=f"{name}: .* before, .* now") as error:
        oocpatch.predict(volume, nn.Identity(), tmp_path / "out", **{**arguments, name: after})
    assert error.value.fields == (name,)


def test_another_member_of_an_ensemble_is_another_run(volume: Path, tmp_path: Path) -> None:
    first, second = (lambda x: x.float()), (lambda x: x.float() + 1)
    oocpatch.predict(volume, [first, second], tmp_path / "out", **SETTINGS)
    oocpatch.predict(volume, [first, second], tmp_path / "out", **SETTINGS)
    with pytest.raises(oocpatch.RunMismatch, match="model: "):
        oocpatch.predict(volume, [first, first], tmp_path / "out", **SETTINGS)


def test_a_run_whose_memory_runs_out_halves_its_batches_and_says_so(data: Array, volume: Path, tmp_path: Path) -> None:
    sizes = []

    def hungry(patches: torch.Tensor) -> torch.Tensor:
        sizes.append(len(patches))
        if len(patches) > 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return patches.float()

    result = oocpatch.predict(volume, hungry, tmp_path / "out", batch_size=7, **SETTINGS)
    np.testing.assert_allclose(result, data, rtol=1e-6)
    assert max(sizes[sizes.index(3) :]) == 3
    found = inspect_output(LocalPath(tmp_path / "out"))
    assert found is not None
    assert found.details["halved_batches"] >= 1


def test_a_patch_that_does_not_fit_into_memory_is_said_before_the_first_block(volume: Path, tmp_path: Path) -> None:
    def hungry(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not enough memory: you tried to allocate 99 bytes")

    with pytest.raises(
        ValueError, match=r"one patch of 8 is too much for the model: not enough memory.*lower patch_size"
    ):
        oocpatch.predict(volume, hungry, tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()


# Sizes that are chosen.


class Halved(nn.Module):
    """Takes sides that are multiples of 32 only, and needs memory for four times its input."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        if any(n % 32 for n in patches.shape[2:]):
            raise RuntimeError("sizes do not match")
        return torch.cat([patches.float()] * 4, dim=1)[:, :1].clone()


def large(tmp_path: Path, shape: tuple[int, ...] = (700, 900), chunks: tuple[int, ...] = (128, 128)) -> Path:
    zarr.create_array(
        tmp_path / "large", shape=shape, chunks=chunks, dtype="uint8", dimension_names=("z", "y", "x")[-len(shape) :]
    )
    return tmp_path / "large"


def chosen(volume: Path, model: Any, output: Path, **options: Any) -> tuple[tuple[int, ...], int]:
    plan = oocpatch.plan(volume, model, output, **{"patch_size": "auto", "batch_size": "auto", **options})
    assert plan.parameters["patch_size"] == plan.patch_size
    assert plan.parameters["batch_size"] == plan.batch_size
    return plan.patch_size, plan.batch_size


def test_sizes_follow_model_volume_and_memory(tmp_path: Path) -> None:
    volume, output = large(tmp_path), tmp_path / "out"
    assert chosen(volume, Halved(), output, max_memory="1GiB") == ((512, 512), 4)
    small, batch = chosen(volume, Halved(), output, max_memory="12MiB")
    assert max(small) < 512
    assert all(n % 32 == 0 for n in small)
    sizes = {"patch_size": small, "batch_size": batch}
    assert oocpatch.plan(volume, Halved(), output, **sizes, max_memory="12MiB").projected_memory <= 12 << 20
    assert chosen(volume, nn.Identity(), output, max_memory="1GiB", patch_size=64)[1] == 64
    assert chosen(volume, Halved(), output, max_memory="1GiB", patch_overlap=(256, 300))[0] == (512, 512)


def test_an_open_patch_size_comes_with_an_overlap_and_the_plan_says_so(tmp_path: Path) -> None:
    volume, arguments = large(tmp_path), {"patch_size": "auto", "max_memory": "1GiB"}
    for mode, overlap in {"hann": 256, "gaussian": 256, "average": 128, "crop": 128}.items():
        plan = oocpatch.plan(volume, Halved(), tmp_path / "out", overlap_mode=mode, **arguments)
        assert (plan.patch_size, plan.patch_overlap) == ((512, 512), (overlap, overlap))
        assert plan.parameters["patch_overlap"] == plan.patch_overlap
        assert "chosen   patch_size and patch_overlap, by patch_size='auto'" in str(plan)
    given = oocpatch.plan(volume, Halved(), tmp_path / "out", patch_overlap=64, **arguments)
    assert given.patch_overlap == (64, 64)
    assert "chosen" not in str(given)


def test_a_plan_says_how_a_patch_that_is_larger_than_the_volume_is_filled(tmp_path: Path) -> None:
    small = np.zeros((20, 100), np.uint8)
    words = "larger than the volume, and filled up there by padding_mode"
    plan = oocpatch.plan(small, nn.Identity(), tmp_path / "out", patch_size=32)
    assert f"{words} edge" in str(plan)
    plan = oocpatch.plan(small, nn.Identity(), tmp_path / "out", patch_size=32, padding_mode="constant", fill=7)
    assert f"{words} constant with 7" in str(plan)
    assert words not in str(oocpatch.plan(small, nn.Identity(), tmp_path / "out", patch_size=20))


def test_sizes_that_would_take_too_much_are_not_even_tried(tmp_path: Path) -> None:
    seen: list[int] = []
    model = Halved()
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    sizes, _ = chosen(large(tmp_path), model, tmp_path / "out", max_memory="12MiB")
    assert max(seen) == np.prod(sizes) < 512 * 512


def test_sizes_of_a_thin_volume_are_no_longer_than_it(tmp_path: Path) -> None:
    volume = large(tmp_path, (20, 500, 500), (20, 48, 48))
    assert chosen(volume, Halved(), tmp_path / "out", max_memory="1GiB")[0] == (32, 96, 96)


def test_a_model_that_takes_no_size_is_refused_in_its_own_words(tmp_path: Path) -> None:
    def broken(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    volume = large(tmp_path)
    with pytest.raises(ValueError, match="mat1 and mat2 shapes cannot be multiplied"):
        chosen(volume, broken, tmp_path / "out")
    with pytest.raises(ValueError, match="patch_overlap must be smaller than the patches"):
        chosen(volume, Halved(), tmp_path / "out", patch_overlap=600)
    with pytest.raises(oocpatch.PlanTooLarge, match="max_memory is"):
        chosen(volume, Halved(), tmp_path / "out", max_memory=100_000)


def test_the_same_call_with_open_sizes_resumes_its_run_whatever_the_memory(
    volume: Path, data: Array, tmp_path: Path
) -> None:
    failing = threading.Event()  # a handle, which is no part of the model
    failing.set()
    calls: list[int] = []

    def model(patches: torch.Tensor) -> torch.Tensor:
        calls.append(len(patches))
        if failing.is_set() and patches.float().any():
            raise RuntimeError("the device fell off the bus")
        return patches.float()

    arguments: dict[str, Any] = {"patch_size": "auto", "batch_size": "auto", "progress": False}
    with pytest.raises(oocpatch.BlockFailed):
        oocpatch.predict(volume, model, tmp_path / "out", **arguments, max_memory="1GiB")
    failing.clear()
    plan = oocpatch.plan(volume, model, tmp_path / "out", **arguments, max_memory="900MiB")
    sizes = {"patch_size": plan.patch_size, "batch_size": plan.batch_size}
    result = oocpatch.predict(volume, model, tmp_path / "out", **arguments, max_memory="800MiB")
    np.testing.assert_allclose(result, data, rtol=1e-6)
    calls.clear()
    oocpatch.predict(volume, model, tmp_path / "out", **arguments)
    oocpatch.predict(volume, model, tmp_path / "out", **sizes)  # what was chosen, given: the same run
    assert calls == []
    with pytest.raises(oocpatch.RunMismatch, match="patch_size"):
        oocpatch.predict(volume, model, tmp_path / "out", patch_size=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preprocess": "whiten"}, "preprocess must be one of zscore, percentile, scale"),
        ({"augment": "mirrors"}, "augment must be one of flips, rotations, all"),
        (
            {"augment": "rotations", "patch_size": (8, 12)},
            "rotations exchange axes along which patches are equally long",
        ),
        ({"augment": ["t"]}, "augment must name spatial axes of the volume .y, x."),
        ({"patch_size": "large"}, "patch_size must be an int or one int per spatial axis, got 'large'"),
        ({"batch_size": "all"}, "batch_size must be an int, got 'all'"),
        ({"weights": "weights.pth"}, "weights and model_args are for models given as specs"),
        ({"model_args": {"depth": 3}}, "weights and model_args are for models given as specs"),
    ],
)
def test_what_cannot_be_around_a_model_is_refused(options: Any, message: str, volume: Path, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        oocpatch.predict(volume, nn.Identity(), tmp_path / "out", **{**SETTINGS, **options})
    assert not (tmp_path / "out").exists()


def test_check_compares_what_is_around_the_model_too(volume: Path) -> None:
    torch.manual_seed(0)
    models = [nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)]
    settings = {"preprocess": "zscore", "augment": "rotations", "patch_size": 8, "patch_overlap": 4}
    assert oocpatch.check(volume, models, boxes=2, **settings).passed
    assert oocpatch.check(volume, nn.Identity(), boxes=1, patch_size="auto", batch_size="auto").passed


def test_check_fails_where_what_is_around_the_model_differs(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "_whole_model", lambda models, *_: models[0])
    assert not oocpatch.check(volume, nn.Identity(), boxes=1, preprocess="zscore", patch_size=8).passed
