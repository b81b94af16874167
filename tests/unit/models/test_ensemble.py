"""What is around a model computes what numpy computes: preprocessing, the mean of turns, the mean of models."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from oocpatch.models.augmentation import checked_augmentation, flips_and_rotations
from oocpatch.models.input_spec import InputSpec, ModelFile, as_input, input_spec_of
from oocpatch.models.predictor import Halving
from oocpatch.models.preprocess_steps import Measured, Percentile, Scale, Step, ZScore
from oocpatch.models.preprocessing import (
    Preprocess,
    checked_preprocess,
    preprocess_function,
    preprocess_statistics,
    step_json,
)
from oocpatch.models.wrappers import EnsembleModel, NumpyModel
from oocpatch.volumes.volume import Volume

Array = np.ndarray[Any, Any]


def ramp(patches: torch.Tensor) -> torch.Tensor:
    """Depends on the place in the patch, and is no symmetric function of it."""
    place = torch.arange(float(patches[0, 0].numel())).reshape(patches.shape[2:])
    return torch.cat([patches * place, patches.cumsum(-1)], dim=1)


def numpy_ramp(patches: Array) -> Array:
    place = np.arange(float(patches[0, 0].size)).reshape(patches.shape[2:])
    return np.concatenate([patches * place, patches.cumsum(-1)], axis=1)


def test_the_mean_over_rotations_is_numpys() -> None:
    patches = torch.randn(3, 2, 4, 4)
    model = EnsembleModel([ramp], transforms=flips_and_rotations(checked_augmentation("rotations", "yx"), "yx", (4, 4)))
    data = patches.numpy().astype(np.float64)
    expected = np.mean([np.rot90(numpy_ramp(np.rot90(data, k, (2, 3))), -k, (2, 3)) for k in range(4)], axis=0)
    np.testing.assert_allclose(model(patches), expected, rtol=1e-5, atol=1e-5)


def test_the_mean_over_all_rotations_of_a_cube_is_numpys() -> None:
    patches = torch.randn(1, 1, 3, 3, 3)
    model = EnsembleModel([ramp], transforms=flips_and_rotations(checked_augmentation("all", "zyx"), "zyx", (3, 3, 3)))
    data = patches.numpy().astype(np.float64)
    total, count = np.zeros((1, 2, 3, 3, 3)), 0
    for z in range(4):  # every orientation: which face is up, how it is turned, mirrored or not
        for plane in [(2, 3), (2, 4)]:
            for k in range(4) if plane == (2, 3) else (1, 3):
                for flip in (False, True):
                    turned = np.rot90(np.rot90(data, k, plane), z, (3, 4))
                    turned = np.flip(turned, 2) if flip else turned
                    back = numpy_ramp(turned)
                    back = np.flip(back, 2) if flip else back
                    total += np.rot90(np.rot90(back, -z, (3, 4)), -k, plane)
                    count += 1
    assert count == 48
    np.testing.assert_allclose(model(patches), total / count, rtol=1e-4, atol=1e-4)


def test_turns_of_dicts_and_scaled_outputs_come_back() -> None:
    def heads(patches: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "half": nn.functional.avg_pool2d(patches, 2),
            "double": patches.repeat_interleave(2, 2).repeat_interleave(2, 3),
        }

    patches = torch.randn(2, 1, 4, 4)
    found = EnsembleModel([heads], transforms=flips_and_rotations(checked_augmentation("all", "yx"), "yx", (4, 4)))(
        patches
    )
    for name, values in heads(patches).items():  # they turn as patches do, so the mean is the output itself
        np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-6)


def test_an_ensemble_is_the_mean_of_its_models_per_output() -> None:
    def heads(factor: float) -> Any:
        return lambda patches: {"a": patches * factor, "b": patches[:, :1] + factor}

    patches = torch.randn(2, 2, 5)
    found = EnsembleModel([heads(1.0), heads(2.0), heads(6.0)])(patches)
    torch.testing.assert_close(found["a"], patches * 3)
    torch.testing.assert_close(found["b"], patches[:, :1] + 3)


def test_half_precision_is_averaged_in_float32() -> None:
    models = [lambda x: (x * 0 + 1.0).half(), lambda x: (x * 0 + 1.0009765625).half()]
    found = EnsembleModel(models)(torch.zeros(1, 1, 2))
    assert found.dtype == torch.float32
    assert found[0, 0, 0].item() == 1.00048828125


def test_each_model_gets_its_own_dtype_and_the_preprocess_that_of_the_volume() -> None:
    seen: list[torch.dtype] = []
    single, double = nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1).double()
    for module in (single, double):
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))

    def preprocess(patches: torch.Tensor) -> torch.Tensor:
        seen.append(patches.dtype)
        return patches.float()

    with torch.no_grad():
        EnsembleModel([single, double], preprocess)(torch.ones(1, 1, 3, dtype=torch.uint8))
    assert seen == [torch.uint8, torch.float32, torch.float64]


def test_one_model_with_a_preprocess_gives_its_own_output() -> None:
    labels = EnsembleModel([lambda x: x.argmax(1, keepdim=True)], lambda x: -x)(
        torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])
    )
    assert labels.dtype == torch.int64
    assert labels.tolist() == [[[0, 1]]]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([lambda x: x > 0, lambda x: x > 0], "must return floats to be averaged.*torch.bool"),
        ([lambda x: x, lambda x: {"a": x}], "the same outputs each time"),
        ([lambda x: x, lambda x: x[..., :-1]], "one shape for all"),
        ([lambda x: [x, "text"], lambda x: [x, "text"]], "a tensor or a dict of tensors, got str"),
        ([lambda x: x, lambda _: None], "got NoneType"),
        ([lambda x: x[0, 0], lambda x: x[0, 0]], "3 axes"),
    ],
)
def test_outputs_that_cannot_be_averaged_are_refused(models: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnsembleModel(models)(torch.ones(2, 1, 3))


def test_axes_of_another_scale_cannot_be_exchanged() -> None:
    model = EnsembleModel(
        [lambda x: x.repeat_interleave(2, 2)],
        transforms=flips_and_rotations(checked_augmentation("all", "yx"), "yx", (4, 4)),
    )
    with pytest.raises(ValueError, match="axes that augment exchanges must have one scale"):
        model(torch.ones(1, 1, 4, 4))


# Preprocessing.

VALUES = {
    "uint8": np.array([[[0, 7, 255]], [[3, 3, 9]]], np.uint8),
    "int16": np.array([[[-32768, 7, 32767]], [[3, -3, 9]]], np.int16),
    "int32": np.array([[[2**31 - 1, 2**31 - 2, 0]], [[3, -3, 9]]], np.int32),
    "float32": np.array([[[-1.5, 7, 255]], [[3, 3, 9e9]]], np.float32),
    "float64": np.array([[[1e9 + 0.25, 1e9 + 0.5, 1e9]], [[3, -3, 9]]], np.float64),
}


@pytest.mark.parametrize("dtype", VALUES)
@pytest.mark.parametrize("clip", [False, True])
def test_a_formula_is_numpys(dtype: str, clip: bool) -> None:
    values = VALUES[dtype]
    subtract, divide = (float(values[0].min()), 3.0), (float(np.ptp(values[0].astype(np.float64))), 0.5)
    found = Preprocess(Scale(subtract, divide, clip=clip))(torch.from_numpy(values)[None])[0].numpy()
    expected = (values - np.reshape(subtract, (2, 1, 1))) / np.reshape(divide, (2, 1, 1))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.clip(0, 1) if clip else expected, rtol=3e-7, atol=3e-7)


def test_the_input_of_a_formula_is_left_as_it_was() -> None:
    patches = torch.ones(1, 1, 3)
    Preprocess(Scale((1.0,), (2.0,), clip=True))(patches)
    assert patches.tolist() == [[[1.0, 1.0, 1.0]]]


def test_scale_divides_integers_by_the_largest_of_their_dtype() -> None:
    for dtype, largest in (("uint8", 255), ("int16", 32767), ("uint16", 65535), ("bool", 1)):
        scale = checked_preprocess("scale", np.dtype(dtype), 1)
        assert scale == Scale((0.0,), (float(largest),), clip=False)


def test_a_channel_without_spread_is_only_shifted() -> None:
    assert ZScore().scale(((5.0, 0.0),)).divide == (1.0,)
    assert Percentile().scale(((5.0, 5.0),)).divide == (1.0,)


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        ("whiten", "one of zscore, percentile, scale, clip, binarize, sigmoid, or a function of patches, got 'whiten'"),
        ({"name": "zscore", "mean": 3}, "preprocess zscore takes channels, epsilon, pooled, nonzero, got mean"),
        ({"name": "percentile", "low": 9, "high": 3}, "0 <= low < high <= 100, got 9.0 and 3.0"),
        ({"name": "percentile", "high": 101}, "0 <= low < high <= 100"),
        ({"name": "percentile", "low": "1"}, "percentile's low must be a finite number, got '1'"),
        ({"name": "percentile", "clip": 1}, "percentile's clip must be true or false, got 1"),
        ({"name": "scale", "divide": [1, 2]}, "one number, or one per channel .3."),
        ({"name": "scale", "divide": 0}, "numbers other than 0"),
        ({"name": "scale", "divide": float("nan")}, "must be a finite number"),
        (3, "a name, a dict or a function, got int"),
        ({"name": "zscore", "channels": [0, 3]}, "different numbers from 0 below 3"),
        ({"name": "clip", "low": [1, 2], "channels": [0]}, "one number, or one per channel .1."),
        (["clip", "scale"], "what to divide floats by"),
        ([lambda x: x, "zscore"], "zscore must come before functions"),
    ],
)
def test_a_preprocess_that_is_none_is_refused(preprocess: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        checked_preprocess(preprocess, np.dtype("uint8"), 3)


def test_scaling_floats_needs_to_know_by_what() -> None:
    with pytest.raises(ValueError, match="what to divide floats by"):
        checked_preprocess("scale", np.dtype("float32"), 1)


# Batches.


class Counting(nn.Module):
    """Notes the sizes of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, patches: torch.Tensor) -> Any:
        self.sizes.append(len(patches))
        return {"sum": patches.sum(dim=-1, keepdim=True), "same": patches}


@pytest.mark.parametrize(
    ("least", "most", "given", "sizes"),
    [
        (4, 4, 6, [4, 4]),
        (4, 4, 1, [4]),
        (1, 3, 7, [3, 3, 1]),
        (2, None, 1, [2]),
        (2, 5, 11, [5, 5, 2]),
        (1, None, 9, [9]),
    ],
)
def test_batches_are_fitted_to_what_a_file_takes(least: int, most: int | None, given: int, sizes: list[int]) -> None:
    program = Counting()
    patches = torch.randn(given, 1, 3)
    found = ModelFile(program, InputSpec(least, most))(patches)
    assert program.sizes == sizes
    assert torch.equal(found["same"], patches)
    assert torch.equal(found["sum"], patches.sum(dim=-1, keepdim=True))


class Tight:
    """A model for at most so many patches at a time, as on a device with little memory."""

    def __init__(self, most: int, error: Exception) -> None:
        self.most = most
        self.error = error
        self.sizes: list[int] = []

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(patches))
        if len(patches) > self.most:
            raise self.error
        return patches * 2


MEMORY = [
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"
    ),
    MemoryError(),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
]


@pytest.mark.parametrize("error", MEMORY, ids=["cuda", "cpu", "python", "cublas", "cudnn", "engine"])
def test_a_batch_is_halved_until_it_fits(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    tight = Tight(2, error)
    halving = Halving(tight)
    patches = torch.randn(7, 1, 3)
    with caplog.at_level(logging.WARNING, "oocpatch"):
        assert torch.equal(halving(patches), patches * 2)
    assert tight.sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert halving.count == 1
    assert "memory ran out with 7 patches in a batch; going on with 3" in caplog.text
    tight.sizes.clear()
    assert torch.equal(halving(patches[:2]), patches[:2] * 2)
    assert tight.sizes == [1, 1]
    assert halving.count == 2


def test_a_single_patch_is_never_halved() -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        Halving(Tight(0, MEMORY[0]))(torch.ones(2, 1, 3))


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    tight = Tight(1, RuntimeError("sizes do not match"))
    with pytest.raises(RuntimeError, match="sizes do not match"):
        Halving(tight)(torch.ones(2, 1, 3))
    assert tight.sizes == [2]


# What models take.


def test_a_function_of_arrays_gets_arrays_and_gives_tensors() -> None:
    seen: list[type] = []

    def function(patches: Array) -> dict[str, Array]:
        seen.append(type(patches))
        return {"big": patches.astype(">f4") + 1, "view": patches[..., ::-1]}

    found = NumpyModel(function)(torch.arange(4.0).reshape(1, 1, 4))
    assert seen == [np.ndarray]
    assert found["big"].tolist() == [[[1.0, 2.0, 3.0, 4.0]]]
    assert found["view"].tolist() == [[[3.0, 2.0, 1.0, 0.0]]]


def test_an_ensemble_takes_what_all_its_models_take() -> None:
    one = ModelFile(nn.Identity(), InputSpec(1, 4, 3, (64, None)))
    other = ModelFile(nn.Identity(), InputSpec(2, None, None, (None, 32)))
    assert input_spec_of(EnsembleModel([one, other])) == InputSpec(2, 4, 3, (64, 32))
    with pytest.raises(ValueError, match="the same sides, got 64 and 32"):
        input_spec_of(EnsembleModel([one, ModelFile(nn.Identity(), InputSpec(sides=(32, None)))]))


def test_integers_are_not_cut_to_fit_a_model() -> None:
    assert as_input(torch.tensor([3], dtype=torch.uint8), torch.int16).dtype == torch.int16
    with pytest.raises(ValueError, match="takes patches of uint8, which do not hold float32"):
        as_input(torch.tensor([3.5]), torch.uint8)
    with pytest.raises(ValueError, match="takes patches of uint8, which do not hold int16"):
        as_input(torch.tensor([300], dtype=torch.int16), torch.uint8)


SEVERAL: list[Any] = [
    {"name": "clip", "low": -1.5, "high": [2, 1, 3]},
    {"name": "zscore", "channels": [0, 2], "epsilon": 0.25},
    {"name": "percentile", "pooled": True, "low": 10, "high": 80, "clip": False},
    {"name": "sigmoid", "channels": [1]},
    lambda patches: patches * 1,
    {"name": "binarize", "at": 0.5, "channels": [2]},
]


@pytest.mark.parametrize("dtype", ["int16", "float32", "float64"])
def test_steps_follow_each_other_and_measure_what_the_ones_before_leave(dtype: str) -> None:
    values = np.random.default_rng(0).normal(0, 3, (3, 20, 30)).astype(dtype)
    checked = checked_preprocess(SEVERAL, values.dtype, 3)
    volume = Volume(values, "cyx")
    statistics = preprocess_statistics(checked, volume, 1 << 26, progress=False)
    found = preprocess_function(checked, statistics)(torch.from_numpy(values)[None])[0].numpy()  # type: ignore[misc]

    wide = values.astype(np.float64).clip(-1.5, np.reshape([2, 1, 3], (3, 1, 1)))
    for channel in (0, 2):
        wide[channel] = (wide[channel] - wide[channel].mean()) / (wide[channel].std() + 0.25)
    low, high = np.percentile(wide, (10, 80))
    wide = (wide - low) / (high - low)
    wide[1] = 1 / (1 + np.exp(-wide[1]))
    sure = np.abs(wide[2] - 0.5) > 1e-5
    wide[2] = wide[2] > 0.5
    np.testing.assert_allclose(found[:2], wide[:2], rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(found[2][sure], wide[2][sure])


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_zeros_neither_count_nor_change_where_they_are_left_out(dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 5, (2, 20, 30)).astype(dtype)
    checked = checked_preprocess({"name": "zscore", "nonzero": True}, values.dtype, 2)
    statistics = preprocess_statistics(checked, Volume(values, "cyx"), 1 << 26, progress=False)
    found = preprocess_function(checked, statistics)(torch.from_numpy(values)[None])[0].numpy()  # type: ignore[misc]
    for channel in (0, 1):
        inside = values[channel] != 0
        kept = values[channel][inside].astype(np.float64)
        np.testing.assert_allclose(found[channel][inside], (kept - kept.mean()) / kept.std(), rtol=1e-5, atol=1e-6)
        assert not found[channel][~inside].any()


def test_steps_are_the_json_that_asks_for_them() -> None:
    checked = checked_preprocess([s for s in SEVERAL if isinstance(s, dict)], np.dtype("int16"), 3)
    steps = [step for step in checked if isinstance(step, Step)]  # type: ignore[union-attr]
    again = checked_preprocess([step_json(step) for step in steps], np.dtype("int16"), 3)
    assert again == checked
    assert isinstance(checked_preprocess("zscore", np.dtype("int16"), 3), Measured)
    assert checked_preprocess("none", np.dtype("int16"), 3) is None
