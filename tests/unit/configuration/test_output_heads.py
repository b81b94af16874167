"""Heads of other scales, modes and dtypes, against an oracle that blends whole arrays in memory."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import xarray
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from torch.nn import functional

import oocpatch
from tests.support.cases import law

RNG = np.random.default_rng(0)


def starts(length, patch, overlap, snap, *, padded=False):
    """Patch starts, one by one: multiples of `snap`, the last patch at or beyond the border."""
    stride = max(snap, (patch - overlap) // snap * snap)
    first = -(math.ceil(overlap // 2 / snap) * snap) if padded else 0
    found = [first]
    last = max(first, math.ceil((length - first - patch) / snap) * snap)
    while found[-1] < last:
        found.append(min(found[-1] + stride, last))
    return found


def window_of(mode, n):
    i = np.arange(n)
    if mode == "hann":
        return np.sin(np.pi * (i + 1) / (n + 1)) ** 2
    if mode == "gaussian":
        return np.exp(-(((i - (n - 1) / 2) / (n / 8)) ** 2) / 2)
    if mode in ("average", "max"):
        return np.ones(n)
    raise ValueError(f"no such mode: {mode!r}")


def oracle(data, model, *, patch, overlap, mode, scale, snap, context=0, skip=None, padding="edge", padded=False):
    """What a head should be: sums and weights of the whole output, patch by patch in float64.

    `data` is `(C, *spatial)`, the model numpy -> numpy; `skip` says whether the patch at a start is left out.
    """
    inner, spatial = [p - 2 * context for p in patch], data.shape[1:]
    far = [2 * p for p in patch]
    frame = np.pad(data, [(0, 0), *((f, f) for f in far)], mode=padding)
    shape = [math.ceil(n * scale) for n in spatial]
    sums = weights = best = None
    stride = [min(p - o, i) for p, o, i in zip(patch, overlap, inner, strict=True)]
    axes = [
        starts(n, i, i - s, snap) if not padded else starts(n, i, i - s, snap, padded=True)
        for n, i, s in zip(spatial, inner, stride, strict=True)
    ]
    for corner in itertools.product(*axes):
        if skip is not None and skip(corner):
            continue
        box = tuple(slice(a - context + f, a - context + f + p) for a, f, p in zip(corner, far, patch, strict=True))
        values = model(frame[(slice(None), *box)])
        if sums is None:
            sums = np.zeros((len(values), *shape))
            best = np.full((len(values), *shape), -np.inf)
            weights = np.zeros(shape)
        window = np.ones(())
        for n in values.shape[1:]:
            window = window[..., None] * window_of(mode, n)
        begin = [int(a * scale) for a in corner]
        keep = [(max(b, 0), min(b + n, m)) for b, n, m in zip(begin, values.shape[1:], shape, strict=True)]
        target = tuple(slice(a, b) for a, b in keep)
        inside = tuple(slice(a - s, b - s) for (a, b), s in zip(keep, begin, strict=True))
        sums[(slice(None), *target)] += (window * values)[(slice(None), *inside)]
        weights[target] += window[inside]
        best[(slice(None), *target)] = np.maximum(best[(slice(None), *target)], values[(slice(None), *inside)])
    covered = weights > 0
    if mode == "max":
        return np.where(covered, best, 0), covered
    return np.where(covered, sums / np.where(covered, weights, 1), 0), covered


def pooled(k):
    return lambda x: functional.avg_pool2d(x, k) if x.ndim == 4 else functional.avg_pool3d(x, k)


def enlarged(k):
    return lambda x: x.repeat_interleave(k, -1).repeat_interleave(k, -2)


def uneven(x):
    """Depends on the position within the patch, so that a patch in the wrong place shows."""
    ramp = torch.linspace(1, 2, x.shape[-1]) * torch.linspace(1, 3, x.shape[-2])[:, None]
    return x * ramp


SCALED = {
    "1/4": (lambda x: pooled(4)(uneven(x)), Fraction(1, 4), 4),
    "1/2": (lambda x: pooled(2)(uneven(x)), Fraction(1, 2), 2),
    "1": (uneven, Fraction(1), 1),
    "2": (lambda x: enlarged(2)(uneven(x)), Fraction(2), 1),
    "3/2": (lambda x: enlarged(3)(pooled(2)(uneven(x))), Fraction(3, 2), 2),
}


def as_numpy(function):
    return lambda patch: function(torch.from_numpy(np.ascontiguousarray(patch))[None])[0].numpy()


@pytest.mark.parametrize("mode", ["average", "hann", "gaussian", "max"])
@pytest.mark.parametrize("scale", SCALED)
def test_an_output_of_another_scale_is_what_blending_whole_arrays_gives(scale, mode, tmp_path):
    padding_mode = "reflect" if (mode in {"hann", "max"}) == (scale in {"1/4", "2", "3/2"}) else None
    model, factor, snap = SCALED[scale]
    data = RNG.random((53, 70)).astype("float32") + 1
    result = oocpatch.predict(
        data, model, tmp_path / "out", patch_size=(16, 24), patch_overlap=(6, 8), overlap_mode=mode,
        output_chunks=7, block_shape=16, padding_mode=padding_mode,
    )  # fmt: skip
    expected, covered = oracle(
        data[None], as_numpy(model), patch=(16, 24), overlap=(6, 8), mode=mode, scale=factor, snap=snap,
        padding=padding_mode or "edge", padded=padding_mode is not None,
    )  # fmt: skip
    assert covered.all()
    assert_allclose(result.values, expected[0], rtol=2e-6)


@law(20)
@given(
    shape=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    patch=st.tuples(st.sampled_from([4, 8, 12]), st.sampled_from([4, 8, 16])),
    data=st.data(),
    scale=st.sampled_from(list(SCALED)),
    mode=st.sampled_from(["average", "hann", "max"]),
    chunk=st.integers(1, 30),
    block=st.integers(1, 60),
)
def test_any_geometry_of_a_scaled_output_is_exact(  # noqa: PLR0917 - Hypothesis draws them by name
    shape, patch, data, scale, mode, chunk, block, tmp_path_factory
):
    model, factor, snap = SCALED[scale]
    overlap = tuple(data.draw(st.integers(0, p - 1)) for p in patch)
    volume = RNG.random(shape).astype("float32") + 1
    out = tmp_path_factory.mktemp("law") / "out"
    result = oocpatch.predict(
        volume, model, out, patch_size=patch, patch_overlap=overlap, overlap_mode=mode, output_chunks=chunk,
        block_shape=block,
    )  # fmt: skip
    expected, _ = oracle(
        volume[None], as_numpy(model), patch=patch, overlap=overlap, mode=mode, scale=factor, snap=snap
    )
    assert result.shape == tuple(math.ceil(n * factor) for n in shape)
    assert_allclose(result.values, expected[0], rtol=3e-6)


def test_crop_at_another_scale_keeps_dtype_and_the_middle_of_each_patch(tmp_path):
    data = np.arange(48 * 40, dtype=np.int32).reshape(48, 40)
    result = oocpatch.predict(
        data, lambda x: x[..., ::2, ::2], tmp_path / "out", patch_size=16, patch_overlap=8, overlap_mode="crop"
    )
    assert result.dtype == np.int32
    assert_array_equal(result.values, data[::2, ::2])


def test_several_heads_keep_their_own_values_channels_and_dtypes(tmp_path):
    data = RNG.random((40, 44)).astype("float32")

    def model(x):
        return {"copy": x, "twins": torch.cat([x, -x], dim=1), "classes": (x * 10).to(torch.uint8)}

    result = oocpatch.predict(
        data, model, tmp_path / "out", patch_size=16, patch_overlap=8, block_shape=16, output_chunks=8,
        overlap_mode={"copy": "hann", "twins": "average", "classes": "crop"},
        postprocess={"twins": "argmax"},
    )  # fmt: skip
    assert isinstance(result, xarray.Dataset)
    assert_allclose(result["copy"].values, data, rtol=1e-6)
    assert result["twins"].dtype == np.uint8
    assert_array_equal(result["twins"].values.squeeze(), np.zeros_like(data))
    assert result["classes"].dtype == np.uint8
    assert_array_equal(result["classes"].values, (data * np.float32(10)).astype("uint8"))


def test_heads_of_different_scales_are_a_tree_with_coordinates_at_the_centres(tmp_path):
    volume = xarray.DataArray(
        RNG.random((32, 48)).astype("float32"),
        dims=("y", "x"),
        coords={"y": ("y", 100 + 2.0 * np.arange(32), {"units": "micrometer"})},
    )

    def model(x):
        return {"full": x, "quarter": pooled(4)(x)}

    result = oocpatch.predict(volume, model, tmp_path / "out", patch_size=16, patch_overlap=8, overlap_mode="average")
    assert isinstance(result, xarray.DataTree)
    quarter = result["quarter/quarter"]
    # a voxel covers four: its centre is in the middle of theirs
    assert_allclose(quarter["y"].values, 100 + 2 * (1.5 + 4 * np.arange(8)))
    assert quarter["y"].attrs == {"units": "micrometer"}
    assert_allclose(quarter["x"].values, 1.5 + 4 * np.arange(12))
    assert_allclose(quarter.values, volume.values.reshape(8, 4, 12, 4).mean(axis=(1, 3)), rtol=1e-6)
    assert_allclose(result["full/full"].values, volume.values, rtol=1e-6)
    again = oocpatch.predict(volume, model, tmp_path / "out", patch_size=16, patch_overlap=8, overlap_mode="average")
    assert_array_equal(again["quarter/quarter"].values, quarter.values)


@pytest.mark.parametrize("overlap", [0, 4, 9])
@pytest.mark.parametrize("shape", [(40, 50), (10, 30)])
def test_a_network_without_padding_gives_what_it_gives_for_the_whole_volume(shape, overlap, tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 5), torch.nn.ReLU(), torch.nn.Conv2d(3, 2, 3)).double()
    data = RNG.random(shape)
    result = oocpatch.predict(data, model, tmp_path / "out", patch_size=16, patch_overlap=overlap, block_shape=12)
    whole = np.pad(data, 3, mode="edge")[None, None]
    expected = model(torch.from_numpy(whole))[0].detach().numpy()
    assert_allclose(result.values, expected, rtol=1e-5, atol=1e-6)


def test_an_encoder_without_padding_has_a_scale_and_a_border(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.AvgPool2d(2), torch.nn.Conv2d(2, 1, 3)).double()
    data = RNG.random((48, 64))
    made = oocpatch.plan(data, model, tmp_path / "out", patch_size=22, patch_overlap=8, overlap_mode="average")
    assert made.context == (3, 3)
    assert made.heads[0].scale == ((1, 2), (1, 2))
    expected = model(torch.from_numpy(np.pad(data, 3, mode="edge"))[None, None])[0, 0].detach().numpy()
    assert_allclose(made.run().values, expected, rtol=1e-5, atol=1e-6)


def test_heads_with_different_borders_share_one_grid(tmp_path):
    data = RNG.random((30, 41)).astype("float32")

    def model(x):
        return {"wide": x[..., 1:-1, 1:-1], "narrow": x[..., 4:-4, 4:-4], "half": pooled(2)(x)[..., 2:-2, 2:-2]}

    result = oocpatch.predict(data, model, tmp_path / "out", patch_size=20, patch_overlap=2)
    assert_allclose(result["wide/wide"].values, data, rtol=1e-6)
    assert_allclose(result["narrow/narrow"].values, data, rtol=1e-6)
    padded = np.pad(data, ((0, 0), (0, 1)), mode="edge")
    assert_allclose(result["half/half"].values, padded.reshape(15, 2, 21, 2).mean(axis=(1, 3)), rtol=1e-6)


def test_votes_are_counted_patch_by_patch(tmp_path):
    labels = RNG.integers(0, 4, (24, 30)).astype("uint8")

    def noisy(x):
        out = x.clone()
        out[..., 0] = 3  # every patch is wrong at its first column
        return out

    result = oocpatch.predict(
        labels, noisy, tmp_path / "out", patch_size=(8, 9), patch_overlap=(4, 6), overlap_mode="vote", num_classes=4
    )
    counts = np.zeros((4, 24, 30))
    for y in starts(24, 8, 4, 1):
        for x in starts(30, 9, 6, 1):
            patch = labels[y : y + 8, x : x + 9].copy()
            patch[:, 0] = 3
            for c in range(4):
                counts[c, y : y + 8, x : x + 9] += patch == c
    assert result.dtype == np.uint8
    assert_array_equal(result.values.squeeze(), counts.argmax(axis=0))


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"])
def test_votes_take_labels_of_every_integer_dtype(dtype, tmp_path):
    labels = RNG.integers(0, 2, (24, 30)).astype(dtype)
    result = oocpatch.predict(
        labels, torch.nn.Identity(), tmp_path / "out", patch_size=8, patch_overlap=4, overlap_mode="vote", num_classes=2
    )
    assert_array_equal(result.values, labels)


def mask_skips(mask, shape, patch):
    """Whether the patch at a corner meets no nonzero voxel of a mask of any resolution."""

    def skip(corner):
        spans = []
        for a, p, n, m in zip(corner, patch, shape, mask.shape, strict=True):
            low, high = max(a, 0), min(a + p, n)
            spans.append([j for j in range(m) if j * n < high * m and (j + 1) * n > low * m])
        return not mask[np.ix_(*spans)].any()

    return skip


@law(20)
@given(
    shape=st.tuples(st.integers(5, 50), st.integers(5, 50)),
    mode=st.sampled_from(["average", "hann", "gaussian", "max"]),
    data=st.data(),
    block=st.integers(8, 60),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    batch=st.integers(1, 3),
)
def test_patches_without_foreground_are_skipped_and_the_rim_has_true_weights(  # noqa: PLR0917 - as above
    shape, mode, data, block, density, batch, tmp_path_factory
):
    patch = (8, 6)
    overlap = tuple(data.draw(st.integers(0, p - 1)) for p in patch)
    mask = RNG.random([data.draw(st.integers(1, n)) for n in shape]) < density
    volume = RNG.random(shape).astype("float32") + 1
    result = oocpatch.predict(
        volume, uneven, tmp_path_factory.mktemp("mask") / "out", patch_size=patch, patch_overlap=overlap,
        overlap_mode=mode, block_shape=block, output_chunks=5, mask=mask, output_fill=-7, batch_size=batch,
    )  # fmt: skip
    skip = mask_skips(mask, shape, patch)
    corners = itertools.product(*(starts(n, p, o, 1) for n, p, o in zip(shape, patch, overlap, strict=True)))
    expected, covered = np.zeros((1, *shape)), np.zeros(shape, bool)
    if not all(map(skip, corners)):
        run = {"patch": patch, "overlap": overlap, "mode": mode, "scale": Fraction(1), "snap": 1, "skip": skip}
        expected, covered = oracle(volume[None], as_numpy(uneven), **run)
    assert_allclose(result.values, np.where(covered, expected[0], -7), rtol=2e-6)
    assert result.attrs.get("uncovered_voxels", 0) == (~covered).sum()


@law(20)
@given(
    shape=st.tuples(st.integers(5, 50), st.integers(5, 50)),
    mode=st.sampled_from(["crop", "average", "hann", "max"]),
    padding=st.sampled_from([None, "reflect"]),
    data=st.data(),
    block=st.integers(8, 60),
)
def test_a_box_computes_the_patches_that_meet_it_and_equals_the_whole_volume_within_it(  # noqa: PLR0917 - as above
    shape, mode, padding, data, block, tmp_path_factory
):
    patch = (8, 6)
    overlap = tuple(data.draw(st.integers(0, p // 2)) for p in patch)
    starts_stops = [sorted(data.draw(st.sampled_from([*itertools.combinations(range(n + 1), 2)]))) for n in shape]
    volume = RNG.random(shape).astype("float32") + 1
    root = tmp_path_factory.mktemp("box")
    options = {
        "patch_size": patch, "patch_overlap": overlap, "overlap_mode": mode, "block_shape": block, "output_chunks": 5,
        "padding_mode": padding if all(o // 2 < n for o, n in zip(overlap, shape, strict=True)) else None,
        "output_fill": -7,
    }  # fmt: skip
    calls = []

    def counted(x):
        calls.extend(x)
        return uneven(x)

    whole = oocpatch.predict(volume, uneven, root / "whole", **options)
    result = oocpatch.predict(volume, counted, root / "out", box=starts_stops, **options)
    inside = np.zeros(shape, bool)
    inside[tuple(slice(*span) for span in starts_stops)] = True
    assert_allclose(result.values[inside], whole.values[inside], rtol=2e-6)
    grown = tuple(slice(max(0, a - p + 1), b + p - 1) for (a, b), p in zip(starts_stops, patch, strict=True))
    reach = np.zeros(shape, bool)
    reach[grown] = True
    assert (result.values[~reach] == -7).all()
    assert result.attrs.get("uncovered_voxels", 0) == (result.values == -7).sum()
    padded = [overlap[a] // 2 if options["padding_mode"] else 0 for a in range(2)]
    per_axis = [
        sum(s - g < b and s - g + p > a for s in starts(max(n + 2 * g, p), p, o, 1))
        for (a, b), g, n, p, o in zip(starts_stops, padded, shape, patch, overlap, strict=True)
    ]
    assert len(calls) == math.prod(per_axis) + 1  # and the probe


def test_a_box_and_a_mask_leave_out_what_either_leaves_out_at_each_time(tmp_path):
    volume = RNG.random((3, 32, 32)).astype("float32") + 1
    mask = np.zeros((4, 4), bool)
    mask[:2] = True
    result = oocpatch.predict(
        volume, torch.nn.Identity(), tmp_path / "out", axes="tyx", patch_size=8, overlap_mode="crop", mask=mask,
        box=(slice(None), (8, 24)), output_chunks=8, block_shape=8,
    )  # fmt: skip
    expected = np.zeros_like(volume)
    expected[:, :16, 8:24] = volume[:, :16, 8:24]
    assert_array_equal(result.values, expected)
    assert result.attrs["uncovered_voxels"] == 3 * (32 * 32 - 16 * 16)
    with pytest.raises(oocpatch.RunMismatch, match="box"):
        oocpatch.predict(
            volume, torch.nn.Identity(), tmp_path / "out", axes="tyx", patch_size=8, overlap_mode="crop", mask=mask,
            output_chunks=8, block_shape=8,
        )  # fmt: skip


def test_cropped_labels_outside_the_mask_are_the_fill_value(tmp_path):
    labels = RNG.integers(1, 200, (40, 40)).astype("uint16")
    mask = np.zeros((4, 4), bool)
    mask[0, 0] = True
    result = oocpatch.predict(
        labels, torch.nn.Identity(), tmp_path / "out", patch_size=8, patch_overlap=4, overlap_mode="crop", mask=mask,
        output_fill=999, block_shape=16, output_chunks=8,
    )  # fmt: skip
    # starts 0, 4, 8 meet the first tenth of each axis: the last of them keeps up to 8 + 8 - 2
    assert_array_equal(result.values[:14, :14], labels[:14, :14])
    assert (result.values[14:] == 999).all()
    assert (result.values[:, 14:] == 999).all()
    assert result.attrs["uncovered_voxels"] == 40 * 40 - 14 * 14


def test_the_model_never_sees_what_was_never_written(tmp_path):
    volume = zarr.create_array(tmp_path / "v", shape=(64, 64), chunks=(16, 16), dtype="f4", fill_value=3)
    volume[16:32, 32:48] = RNG.random((16, 16)).astype("f4")
    seen = []

    def model(x):
        seen.append(x.clone())
        return x

    result = oocpatch.predict(
        volume, model, tmp_path / "out", patch_size=16, patch_overlap=0, skip_empty=True, output_fill=3
    )
    assert len(seen) == 2  # the probe, and the patch that is there
    assert_allclose(result.values, volume[...], rtol=1e-6)
    assert result.attrs["uncovered_voxels"] == 64 * 64 - 256


def test_300_overlaps_a_voxel_still_average_to_the_right_value(tmp_path):
    data = RNG.random(700).astype("float32") + 1
    result = oocpatch.predict(
        data, torch.nn.Identity(), tmp_path / "out", axes="x", patch_size=300, patch_overlap=299, overlap_mode="average"
    )
    assert_allclose(result.values, data, rtol=2e-5)


def test_the_callers_arrays_are_never_changed(tmp_path):
    data, mask = RNG.random((30, 30)).astype("float32"), np.ones((3, 3), bool)
    before, masked = data.copy(), mask.copy()

    def model(x):
        return {"a": x.add_(1), "b": x.mul_(2)}

    result = oocpatch.predict(data, model, tmp_path / "out", patch_size=8, patch_overlap=4, mask=mask)
    assert_array_equal(data, before)
    assert_array_equal(mask, masked)
    assert_allclose(result["b"].values, (before + 1) * 2, rtol=1e-6)


@pytest.mark.parametrize("mode", ["crop", "hann", "max"])
def test_a_masked_run_that_fails_and_goes_on_gives_the_same_bytes_and_count(mode, tmp_path):
    data = RNG.random((64, 48)).astype("float32") + 1
    mask = RNG.random((16, 12)) < 0.1
    options = {
        "patch_size": 8, "patch_overlap": 4, "overlap_mode": mode, "mask": mask, "block_shape": 16, "output_chunks": 8,
        "output_fill": -1,
    }  # fmt: skip
    broken = tmp_path / "broken"
    broken.touch()

    def model(x):
        if broken.exists() and float(x.flatten()[0]) > 1.8:
            raise RuntimeError("not today")
        return x

    whole = oocpatch.predict(data, torch.nn.Identity(), tmp_path / "whole", **options)
    with pytest.raises(oocpatch.BlockFailed):
        oocpatch.predict(data, model, tmp_path / "out", **options)
    broken.unlink()
    result = oocpatch.predict(data, model, tmp_path / "out", **options)
    assert_array_equal(result.values, whole.values)
    assert result.attrs["uncovered_voxels"] == whole.attrs["uncovered_voxels"] > 0


BAD = {
    "mask with another number of axes": ({"mask": np.ones((2, 2, 2, 2))}, "mask must have the volume's spatial axes"),
    "mask larger than the volume": ({"mask": np.ones((40, 10))}, "mask must not have more voxels"),
    "box with another number of axes": ({"box": [(0, 4)]}, r"box must be a pair .* per spatial axis"),
    "box that is a word": ({"box": "ab"}, r"box must be a pair .* per spatial axis"),
    "box of no numbers": ({"box": [(0, 4), ("a", "b")]}, "box must be a pair"),
    "box with steps": ({"box": [(0, 4), slice(0, 8, 2)]}, "box must be a pair"),
    "box beyond the volume": (
        {"box": [(0, 4), (0, 31)]},
        "box must be within the volume and not empty, got 0:31 for 30",
    ),
    "empty box": ({"box": [(0, 4), (5, 5)]}, "box must be within the volume and not empty"),
    "mode for a head that is not there": ({"overlap_mode": {"b": "hann"}}, r"overlap_mode names \['b'\]"),
    "vote without classes": ({"overlap_mode": "vote"}, "num_classes must be given"),
    "postprocess of votes": ({"overlap_mode": "vote", "num_classes": 2, "postprocess": "softmax"}, "must be None"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_before_the_first_block(name, tmp_path):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        oocpatch.predict(np.zeros((30, 30), "f4"), torch.nn.Identity(), tmp_path / "out", patch_size=8, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [{"a/b": 1}, {"": 1}, {"y": 1}, {3: 1}, {}])
def test_names_of_outputs_can_be_names_of_arrays(names, tmp_path):
    with pytest.raises(ValueError, match="the model"):
        oocpatch.predict(
            np.zeros((30, 30), "f4"), lambda x: dict.fromkeys(names, x), tmp_path / "out", patch_size=8, axes="yx"
        )


@pytest.mark.parametrize(("value", "said"), [(np.nan, "NaN"), (np.inf, "infinity")])
def test_labels_that_are_no_numbers_fail_their_block(value, said, tmp_path):
    labels = np.zeros((16, 16), "float32")
    labels[9, 9] = value
    with pytest.raises(oocpatch.BlockFailed, match=f"cannot convert float {said}"):
        oocpatch.predict(
            labels, torch.nn.Identity(), tmp_path / "out", patch_size=8, overlap_mode="vote", num_classes=4
        )


def test_labels_beyond_the_classes_fail_their_block(tmp_path):
    labels = np.zeros((16, 16), "uint8")
    labels[9, 9] = 5
    with pytest.raises(oocpatch.BlockFailed, match=r"labels must be in \[0, 4\)"):
        oocpatch.predict(
            labels, torch.nn.Identity(), tmp_path / "out", patch_size=8, overlap_mode="vote", num_classes=4
        )
