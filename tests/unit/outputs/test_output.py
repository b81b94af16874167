"""Promises on the output: its classes, dtypes, names, coordinates and chunks."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zarr

import oocpatch
from tests.support import oracle
from tests.support.cases import INTEGERS, MODES, Array, positional, small_integers
from tests.support.children import file_digests


def run(data: Array, model: Any, root: Path, **options: Any) -> xr.DataArray:
    """`predict` in small blocks on a volume without channels."""
    arguments = {"axes": "zyx"[-data.ndim :], "patch_size": 6, "patch_overlap": 3, "block_shape": 8, "output_chunks": 4}
    return oocpatch.predict(data, model, root / "out", **{**arguments, **options})


def three_classes(patches: torch.Tensor) -> torch.Tensor:
    return torch.cat([patches / 9, 1 - patches / 7, patches.abs() / 8], dim=1)


def scores_of_three_classes(data: Array) -> Array:
    return np.stack([data / 9, 1 - data / 7, np.abs(data) / 8])


@pytest.mark.parametrize("mode", MODES)
def test_argmax_is_the_class_of_the_blended_scores_without_channel_axis(mode: str, tmp_path: Path) -> None:
    data = small_integers((15, 20))
    result = run(data, three_classes, tmp_path, overlap_mode=mode, postprocess="argmax")
    assert result.dims == ("y", "x")
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result.values, scores_of_three_classes(data).argmax(0))


@pytest.mark.parametrize("form", ["zarr", "ome-zarr"])
def test_the_arrays_of_heads_are_compressed_quickly_and_hardly_less(form: str, tmp_path: Path) -> None:
    """Level 3, Zarr's default, takes ten times as long on such values."""
    noise = np.random.default_rng(0).integers(100, 116, (96, 96)).astype(np.uint8)
    run(
        noise, torch.nn.Identity(), tmp_path, output_format=form, output_dtype="uint8", block_shape=96, output_chunks=96
    )
    group = zarr.open_group(tmp_path / "out", mode="r")
    members = [member for _, member in group.members(max_depth=None)]
    heads = [member for member in members if isinstance(member, zarr.Array) and member.shape[-2:] == noise.shape]
    assert [array.compressors for array in heads] == [(zarr.codecs.ZstdCodec(level=1),)]
    default = zarr.create_array(tmp_path / "default", data=noise)
    assert heads[0].nbytes_stored() < 1.1 * default.nbytes_stored() < noise.nbytes


def test_argmax_blends_scores_before_it_takes_the_class(tmp_path: Path) -> None:
    """Classes blended after argmax would give 1 where patches disagree between 0 and 2; scores never do."""

    def undecided(patches: torch.Tensor) -> torch.Tensor:
        ramp = torch.arange(patches.shape[-1], dtype=torch.float32).expand_as(patches) - 2.4
        return torch.cat([ramp, ramp * 0 - 99, -ramp], dim=1)

    def undecided_patch(patch: Array) -> Array:
        ramp = np.broadcast_to(np.arange(patch.shape[-1]) - 2.4, patch.shape)
        return np.concatenate([ramp, ramp * 0 - 99, -ramp])

    data = np.zeros((1, 40), np.float32)
    scores = oracle.predict(data, undecided_patch, patch=(6,), overlap=(3,), mode="hann")
    result = run(data[0], undecided, tmp_path, postprocess="argmax")
    np.testing.assert_array_equal(result.values, scores.argmax(0))
    assert set(np.unique(result.values)) == {0, 2}


@pytest.mark.parametrize("mode", MODES)
def test_softmax_is_taken_of_the_blended_scores(mode: str, tmp_path: Path) -> None:
    data = small_integers((15, 20))
    result = run(data, three_classes, tmp_path, overlap_mode=mode, postprocess="softmax")
    powers = np.exp(scores_of_three_classes(data))
    assert result.dims == ("channel", "y", "x")
    assert result.dtype == np.float32
    np.testing.assert_allclose(result.values, powers / powers.sum(0), rtol=2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_sigmoid_is_taken_of_the_blended_scores(mode: str, tmp_path: Path) -> None:
    data = small_integers((15, 20)) / 10
    result = run(data, torch.nn.Identity(), tmp_path, overlap_mode=mode, postprocess="sigmoid")
    assert result.dims == ("y", "x")
    np.testing.assert_allclose(result.values, 1 / (1 + np.exp(-data)), rtol=2e-5)


@pytest.mark.parametrize(("name", "at"), [("threshold", 0.5), ("threshold:0.3", 0.3), ("threshold:-2", -2)])
def test_a_threshold_of_the_blended_scores_is_one_above_it(name: str, at: float, tmp_path: Path) -> None:
    data = small_integers((15, 20)) / 8
    result = run(data, torch.nn.Identity(), tmp_path, overlap_mode="crop", postprocess=name)
    assert result.dims == ("y", "x")
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result.values, data > at)
    assert set(np.unique(result.values)) == {0, 1}


@pytest.mark.parametrize("mode", MODES)
def test_a_callable_postprocess_gets_channels_first_and_may_change_their_number(mode: str, tmp_path: Path) -> None:
    data = small_integers((15, 20))
    result = run(data, three_classes, tmp_path, overlap_mode=mode, postprocess=difference_of_first_two)
    np.testing.assert_allclose(np.squeeze(result.values), data / 9 - 1 + data / 7, rtol=2e-5, atol=2e-5)


def difference_of_first_two(scores: Any) -> Any:
    assert len(scores) == 3
    return scores[:1] - scores[1:2]


HALVES = np.array([0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 0.49, 0.51, 254.5, 255.5, 1e3, -1e3, 4e9, -4e9, 1e20, -1e20])


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integer_outputs_round_half_to_even_and_saturate(dtype: str, tmp_path: Path) -> None:
    data, info = HALVES.astype(np.float32), np.iinfo(dtype)
    result = run(data, torch.nn.Identity(), tmp_path, patch_size=5, patch_overlap=0, output_dtype=dtype)
    # Python's integers know neither float32 nor overflow.
    expected = [min(max(round(float(value)), info.min), info.max) for value in data]
    assert result.dtype == dtype
    assert result.values.tolist() == expected


def mean_over_patch(patch: Array) -> Array:
    return np.broadcast_to(patch.mean(axis=(1, 2), keepdims=True), patch.shape).astype(np.float32)


def averaging(patches: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.stack([mean_over_patch(patch) for patch in patches.numpy()]))


ORDERS = {"tczyx": "tczyx", "ctzyx": "ctzyx", "tzcyx": "tczyx", "tzyxc": "tczyx", "yxct": "ctyx", "yxtc": "tcyx"}
ORDERS |= {"zcyx": "czyx", "yxc": "cyx", "yxt": "tyx", "tzyx": "tzyx", "xyz": "xyz", "cyx": "cyx"}


@pytest.mark.parametrize("output_format", ["zarr", "ome-zarr"])
@pytest.mark.parametrize(("axes", "expected"), ORDERS.items(), ids=ORDERS)
def test_axes_before_the_spatial_ones_keep_their_order(
    axes: str, expected: str, output_format: str, tmp_path: Path
) -> None:
    """Channels and time come before space; OME-Zarr wants time before channels."""
    lengths = {"t": 3, "c": 2, "z": 5, "y": 8, "x": 9}
    volume = xr.DataArray(small_integers(tuple(lengths[axis] for axis in axes)), dims=tuple(axes))
    settings: dict[str, Any] = {"patch_size": 4, "patch_overlap": 2, "overlap_mode": "average", "output_chunks": 4}
    settings |= {"output_format": output_format, "block_shape": 8}
    expected = expected.replace("ct", "tc") if output_format == "ome-zarr" else expected
    result = oocpatch.predict(volume, torch.nn.Identity(), tmp_path / "out", **settings)
    assert result.dims == tuple(expected)
    assert np.array_equal(result, volume.transpose(*expected))
    assert not oocpatch.verify(tmp_path / "out").damaged
    if "c" not in axes:
        more = oocpatch.predict(volume, lambda p: torch.cat([p, -p], 1), tmp_path / "more", **settings)
        loops = tuple(axis for axis in expected if axis == "t")
        assert more.dims == (*loops, "channel", *expected[len(loops) :])
        assert np.array_equal(more.isel(channel=1), -result)


@pytest.mark.parametrize(("axes", "expected"), ORDERS.items(), ids=ORDERS)
def test_conversions_have_the_same_order(axes: str, expected: str, tmp_path: Path) -> None:
    lengths = {"t": 3, "c": 6, "z": 5, "y": 8, "x": 9}
    volume = xr.DataArray(small_integers(tuple(lengths[axis] for axis in axes)), dims=tuple(axes))
    array = oocpatch.convert(volume, tmp_path / "out", chunks=4, levels=1, progress=False)
    assert array.dims == tuple(expected)
    assert np.array_equal(array, volume.transpose(*expected))


@pytest.mark.parametrize("axes", ["tyx", "tcyx", "ctyx", "yxt"])
def test_each_time_point_is_a_volume_of_its_own(axes: str, tmp_path: Path) -> None:
    lengths = {"t": 3, "c": 2, "y": 13, "x": 10}
    data = small_integers(tuple(lengths[axis] for axis in axes))
    result = oocpatch.predict(
        data, averaging, tmp_path / "out", axes=axes, patch_size=6, patch_overlap=3, overlap_mode="average"
    )
    assert set(result.dims) == set(axes)
    if "c" in axes:
        assert result.dims[:2] == tuple(axes[:2])
    volumes = xr.DataArray(data, dims=tuple(axes))
    for index in range(lengths["t"]):
        alone = volumes.isel(t=index).transpose(..., "y", "x").values.reshape(-1, 13, 10)
        expected = oracle.predict(alone, mean_over_patch, patch=(6, 6), overlap=(3, 3), mode="average")
        got = result.isel(t=index).transpose(..., "y", "x").values.reshape(expected.shape)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def labelled(shape: tuple[int, ...] = (2, 12, 9)) -> xr.DataArray:
    """A volume with everything that a user would miss."""
    return xr.DataArray(
        small_integers(shape),
        dims=("stain", "height", "width"),
        coords={"height": np.arange(shape[1]) * 0.5 + 3, "width": np.arange(shape[2]) * 0.25, "stain": ["dapi", "gfp"]},
        attrs={"microscope": "M1", "scale": [0.5, 0.25]},
        name="scan",
    )


def test_dimension_names_coordinates_and_attributes_are_kept(tmp_path: Path) -> None:
    volume = labelled()
    result = oocpatch.predict(
        volume, torch.nn.Identity(), tmp_path / "out", axes="cyx", patch_size=6, patch_overlap=2, block_shape=8
    )
    assert result.dims == volume.dims
    for name in ("height", "width"):
        np.testing.assert_array_equal(result.coords[name].values, volume.coords[name].values)
    assert result.attrs["microscope"] == "M1"
    assert result.attrs["scale"] == [0.5, 0.25]
    reopened = xr.open_zarr(tmp_path / "out")["prediction"]
    assert reopened.dims == volume.dims
    np.testing.assert_array_equal(reopened.coords["height"].values, volume.coords["height"].values)
    np.testing.assert_allclose(reopened.values, volume.values, rtol=1e-6)


def test_a_new_channel_axis_is_first_and_named_channel(tmp_path: Path) -> None:
    result = run(small_integers((15, 20)), three_classes, tmp_path)
    assert result.dims == ("channel", "y", "x")
    assert result.shape == (3, 15, 20)


def test_a_channel_axis_at_the_end_comes_first_in_the_output_and_keeps_its_name(tmp_path: Path) -> None:
    data = small_integers((15, 20, 3))
    volume = xr.DataArray(data, dims=("y", "x", "c"))
    result = oocpatch.predict(volume, torch.nn.Identity(), tmp_path / "out", patch_size=6, patch_overlap=2)
    assert result.dims == ("c", "y", "x")
    np.testing.assert_allclose(result.values, np.moveaxis(data, -1, 0), rtol=1e-6)


@pytest.mark.parametrize("shards", [None, (10, 8)])
def test_the_output_is_stored_in_the_chunks_and_shards_asked_for(
    shards: tuple[int, int] | None, tmp_path: Path
) -> None:
    run(small_integers((23, 20)), three_classes, tmp_path, output_chunks=(5, 4), output_shards=shards)
    stored = zarr.open_array(tmp_path / "out" / "prediction", mode="r")
    assert stored.chunks[-2:] == (5, 4)
    assert (stored.shards[-2:] if stored.shards else None) == shards


@pytest.mark.parametrize("mode", MODES)
def test_the_output_does_not_depend_on_the_fill_value_of_the_store(mode: str, tmp_path: Path) -> None:
    """A voxel of 0 or NaN that the model wrote is a value, not an absence."""
    data = small_integers((15, 20)) * (np.arange(20) > 9)
    result = run(data, torch.nn.Identity(), tmp_path, overlap_mode=mode, output_fill=7, output_chunks=(3, 3))
    np.testing.assert_allclose(result.values, data, rtol=1e-6)


def test_patches_reach_the_model_in_the_dtype_of_its_parameters_or_of_the_volume(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []

    def note(patches: torch.Tensor) -> torch.Tensor:
        seen.append(patches.dtype)
        return patches

    run(np.arange(300, dtype=np.int16).reshape(15, 20), note, tmp_path, overlap_mode="crop")
    assert set(seen) == {torch.int16}
    module = torch.nn.Conv2d(1, 1, 1, bias=False)
    torch.nn.init.ones_(module.weight)
    data = np.arange(300, dtype=np.int16).reshape(15, 20)
    result = oocpatch.predict(data, module, tmp_path / "conv", axes="yx", patch_size=6, patch_overlap=3)
    np.testing.assert_allclose(result.values, data, rtol=1e-6)


def test_batches_are_full_and_hold_whole_patches(tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []

    def note(patches: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(patches.shape))
        return patches

    data = small_integers((9, 21))
    plan = oocpatch.plan(data, note, tmp_path / "out", axes="yx", patch_size=(9, 6), patch_overlap=(0, 3), batch_size=4)
    seen.clear()
    plan.run()
    assert {shape[1:] for shape in seen} == {(1, 9, 6)}
    assert max(shape[0] for shape in seen) <= 4
    assert sum(shape[0] for shape in seen) == plan.patches == 6


@pytest.mark.parametrize("mode", MODES)
def test_identity_in_float64_is_exact_for_crop_and_float32_otherwise(mode: str, tmp_path: Path) -> None:
    data = np.linspace(0, 1, 23 * 20).reshape(23, 20) * np.pi
    result = run(data, torch.nn.Identity(), tmp_path, overlap_mode=mode)
    assert result.dtype == (np.float64 if mode == "crop" else np.float32)
    np.testing.assert_allclose(result.values, data, rtol=0 if mode == "crop" else 2e-6)


def test_hann_of_a_constant_volume_is_that_constant(tmp_path: Path) -> None:
    data = np.ones((20, 20, 20), np.float32)
    result = run(data, torch.nn.Identity(), tmp_path, patch_size=10, patch_overlap=5)
    assert float(result.mean()) == pytest.approx(1, abs=1e-6)
    assert float(np.abs(result - 1).max()) < 1e-6


def test_running_a_plan_is_predict(tmp_path: Path) -> None:
    data = small_integers((15, 20))
    arguments = {"axes": "yx", "patch_size": 6, "patch_overlap": 3, "block_shape": 8, "output_chunks": 4}
    plan = oocpatch.plan(data, positional, tmp_path / "plan", **arguments)
    assert not list(tmp_path.iterdir()), "a plan writes nothing"
    assert plan.patches == 4 * 6
    assert plan.blocks == 2 * 2
    plan.run()
    run(data, positional, tmp_path)
    assert file_digests(tmp_path / "plan" / "prediction") == file_digests(tmp_path / "out" / "prediction")


@pytest.mark.parametrize("output_format", ["zarr", "ome-zarr"])
@pytest.mark.parametrize("fill", [np.nan, np.inf, -np.inf])
def test_metadata_are_json_that_any_language_reads(output_format: str, fill: float, tmp_path: Path) -> None:
    """Python's own parser takes NaN and Infinity, which JSON does not have."""
    attributes = {"valid": np.nan, "range": [np.inf, 1.0], "deep": {"a": np.float32("nan")}}
    volume = xr.DataArray(
        np.ones((16, 24), np.float32),
        dims=("y", "x"),
        attrs=attributes,
        coords={"y": ("y", np.arange(16.0), {"missing": np.nan})},
    )
    settings: dict[str, Any] = {"patch_size": 8, "mask": np.eye(2), "padding_mode": "constant", "fill": fill}
    for _ in range(2):  # also as a run that is found again
        result = oocpatch.predict(
            volume,
            "identity",
            tmp_path / "out.zarr",
            output_fill=fill,
            output_format=output_format,
            allow_nonfinite=True,
            progress=False,
            **settings,
        )
    np.testing.assert_array_equal(np.unique(result), np.unique([1, fill]))
    files = list((tmp_path / "out.zarr").rglob("zarr.json"))
    assert len(files) >= 3
    for file in files:
        json.loads(file.read_text(), parse_constant=lambda name, file=file: pytest.fail(f"{file} has {name}"))
    assert result.attrs["valid"] == "NaN"
    with pytest.raises(oocpatch.RunMismatch, match="output_fill"):
        oocpatch.plan(volume, "identity", tmp_path / "out.zarr", allow_nonfinite=True, output_fill=0, **settings)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.datetime64("2024-10-02T07:39:39.000000005"), "2024-10-02T07:39:39.000000005"),
        (np.datetime64("2024-10-02T07:39:39", "s"), "2024-10-02T07:39:39"),
        (np.datetime64("2024-10-02"), "2024-10-02"),
        (dt.datetime(2024, 10, 2, 7, 39, tzinfo=dt.UTC), "2024-10-02T07:39:00+00:00"),
        (dt.date(2024, 10, 2), "2024-10-02"),
        (np.timedelta64(5, "ms"), "5 milliseconds"),
        (np.array(["2024-10-02", "NaT"], "M8[D]"), ["2024-10-02", "NaT"]),
        (np.arange(3), [0, 1, 2]),
        (np.float32(0.5), 0.5),
    ],
)
def test_an_attribute_that_is_a_time_is_kept_as_text(value: Any, text: Any, tmp_path: Path) -> None:
    volume = xr.DataArray(np.ones((16, 24), np.float32), dims=("y", "x"), attrs={"acquired": value})
    result = oocpatch.predict(volume, "identity", tmp_path / "out.zarr", patch_size=8, progress=False)
    assert result.attrs["acquired"] == text
