"""Promises on vectors of patches: one row per patch that was computed, in the order of the grid, to the last bit."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import oocpatch
from tests.support.oracle import frame, starts

SHAPE, SETTINGS = (
    (30, 26),
    {"patch_size": 8, "patch_overlap": 4, "block_shape": 8, "output_chunks": 4, "progress": False},
)
VOLUME = np.random.default_rng(0).random(SHAPE, dtype=np.float32)


def vectors(patches: torch.Tensor) -> torch.Tensor:
    """Three voxels of each patch."""
    return patches.flatten(1)[:, [0, 5, -1]]


def image_and_vectors(patches: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"scores": patches * 2, "features": vectors(patches)}


@st.composite
def grids(draw: st.DrawFn) -> dict[str, Any]:
    ndim = draw(st.integers(1, 3))
    patch = draw(st.tuples(*[st.integers(2, 6)] * ndim))
    longest = {1: 40, 2: 20, 3: 12}[ndim]
    return {
        "shape": draw(st.tuples(*[st.integers(p, longest) for p in patch])),
        "patch": patch,
        "overlap": tuple(draw(st.integers(0, p - 1)) for p in patch),
        "block": draw(st.tuples(*[st.integers(4, 12)] * ndim)),
        "padding_mode": draw(st.sampled_from([None, None, "reflect"])),
        "batch_size": draw(st.integers(1, 4)),
        "masked": draw(st.booleans()),
        "with_image": draw(st.booleans()),
    }


@settings(max_examples=8, deadline=None)
@given(grids())
def test_rows_are_those_of_a_plain_loop_over_the_grid_to_the_last_bit(grid: dict[str, Any]) -> None:
    shape, patch, overlap = grid["shape"], grid["patch"], grid["overlap"]
    data = np.random.default_rng(1).random(shape, dtype=np.float32)
    mask = np.random.default_rng(2).random(shape) > 0.9 if grid["masked"] else None
    padded, (*inside,) = frame(data[None], patch, overlap, grid["padding_mode"], 0.0)
    offsets = [part.start for part in inside]
    expected, firsts = [], []
    for corner in itertools.product(*map(starts, padded.shape[1:], patch, overlap)):
        first = tuple(c - o for c, o in zip(corner, offsets, strict=True))
        seen = tuple(slice(max(0, f), max(0, f + p)) for f, p in zip(first, patch, strict=True))
        if mask is None or mask[seen].any():
            part = padded[(slice(None), *(slice(c, c + p) for c, p in zip(corner, patch, strict=True)))]
            expected.append(part.reshape(-1)[[0, 1, -1]])
            firsts.append(first)

    def model(patches: torch.Tensor) -> Any:
        rows = patches.flatten(1)[:, [0, 1, -1]]
        return {"scores": patches, "rows": rows} if grid["with_image"] else {"rows": rows}

    with tempfile.TemporaryDirectory() as folder:
        result = oocpatch.predict(
            data, model, f"{folder}/out", patch_size=patch, patch_overlap=overlap, block_shape=grid["block"],
            padding_mode=grid["padding_mode"], batch_size=grid["batch_size"], mask=mask, workers=2, progress=False,
        )  # fmt: skip
        assert np.array_equal(result.rows, np.reshape(np.array(expected, np.float32), (-1, 3)))
        assert np.array_equal(result.starts, np.reshape(firsts, (-1, len(shape))))
        assert oocpatch.verify(f"{folder}/out").passed


def test_an_image_and_vectors_are_one_dataset_and_a_run_by_blocks_or_parts_has_the_same_bytes(tmp_path: Path) -> None:
    whole = oocpatch.predict(VOLUME, image_and_vectors, tmp_path / "whole", **SETTINGS)
    assert whole.sizes == {"y": 30, "x": 26, "patch": 42, "feature": 3, "axis": 2}
    assert np.allclose(whole.scores, VOLUME * 2)
    plan = oocpatch.plan(VOLUME, image_and_vectors, tmp_path / "blocks", **SETTINGS)
    assert "features: a vector of 3 per patch" in str(plan)
    assert plan.run(blocks=[2]).sizes["patch"] == 0
    files = sorted((tmp_path / "blocks.oocpatch").rglob("rows-*"))
    assert files
    files[0].write_bytes(files[0].read_bytes()[::-1])  # damage that is found when the rows are put in order
    by_blocks = plan.run()
    for number in (1, 2):
        in_parts = oocpatch.predict(VOLUME, image_and_vectors, tmp_path / "parts", part=(number, 2), **SETTINGS)
    for result in (by_blocks, in_parts):
        assert result.equals(whole)
    assert not list(tmp_path.glob("*.oocpatch*"))


def test_a_change_of_the_input_and_a_repair_give_the_rows_of_a_fresh_run(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "in", data=VOLUME, chunks=(8, 8))
    call: dict[str, Any] = {
        "volume": tmp_path / "in",
        "model": image_and_vectors,
        "output": tmp_path / "out",
    } | SETTINGS
    oocpatch.predict(**call, skip_empty=True)
    zarr.open_array(tmp_path / "in")[8:16] = 0
    updated = oocpatch.predict(**call, skip_empty=True, update=True)
    fresh = oocpatch.predict(**{**call, "output": tmp_path / "fresh"}, skip_empty=True)
    assert updated.equals(fresh)
    assert oocpatch.verify(tmp_path / "fresh").units == 8 * 7 + 2  # chunks of scores, and one of each array of rows
    next((tmp_path / "out" / "scores").rglob("c/0/*")).write_bytes(b"")
    assert not oocpatch.verify(tmp_path / "out", repair=True).passed
    assert oocpatch.predict(**call, skip_empty=True).equals(updated)
    next((tmp_path / "out" / "features").rglob("c/*/*")).write_bytes(b"")
    assert "features/c/0/0 is not what was written" in str(oocpatch.verify(tmp_path / "out"))
    replaced = oocpatch.predict(VOLUME, vectors, tmp_path / "out", overwrite=True, **SETTINGS)
    assert set(replaced.data_vars) == {"prediction", "starts"}
    assert not (tmp_path / "out" / "features").exists()


def test_looped_axes_have_their_places_beside_the_starts(tmp_path: Path) -> None:
    data = np.random.default_rng(0).random((3, 12, 9), dtype=np.float32)
    result = oocpatch.predict(data, vectors, tmp_path / "out", axes="tyx", patch_size=8, progress=False)
    assert result.loops.values[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    rows = zip(result.loops.values, result.starts.values, result.prediction.values, strict=True)
    assert all(data[t, y, x] == row[0] for (t,), (y, x), row in rows)


def test_vectors_beside_images_of_several_scales_and_in_an_ome_zarr_are_at_the_root(tmp_path: Path) -> None:
    def model(patches: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"fine": patches, "coarse": patches[..., ::2, ::2], "rows": vectors(patches)}

    data = np.random.default_rng(0).random((32, 32), dtype=np.float32)
    for number, output_format in enumerate(("zarr", "ome-zarr")):
        path = tmp_path / str(number)
        tree = oocpatch.predict(data, model, path, patch_size=16, output_format=output_format, progress=False)
        assert np.array_equal(tree.starts, [[0, 0], [0, 16], [16, 0], [16, 16]])
        assert np.array_equal(tree.rows[:, 0], data[::16, ::16].reshape(-1))
        assert np.allclose(tree["fine/fine"], data)
        assert oocpatch.verify(path).passed


def test_vectors_keep_their_dtype_and_floats_take_another(tmp_path: Path) -> None:
    for number, (dtype, asked, expected) in enumerate([("int32", None, "int32"), ("float32", "float16", "float16")]):
        kind = getattr(torch, dtype)
        result = oocpatch.predict(
            VOLUME, lambda p, kind=kind: vectors(p * 9).to(kind), tmp_path / str(number), output_dtype=asked, **SETTINGS
        )
        assert result.prediction.dtype == expected


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda p: {"starts": vectors(p)}, {}, "'starts' must have another name"),
        (image_and_vectors, {"postprocess": {"features": "softmax"}}, "postprocess must not name 'features'"),
        (image_and_vectors, {"output_dtype": {"features": "uint8"}}, "output_dtype must be of floats for the vectors"),
        (
            vectors,
            {"postprocess": "softmax"},
            "postprocess must be None for a model that returns vectors .* got 'softmax'",
        ),
        (image_and_vectors, {"overlap_mode": "instances"}, "must not be 'instances' where an output is a vector"),
    ],
)
def test_what_vectors_cannot_have_is_refused(model: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        oocpatch.plan(VOLUME, model, tmp_path / "out", **SETTINGS, **options)


def test_an_h5_that_patches_do_not_fit_is_refused_before_the_run(tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    for axes, told in (("zyx", "patches of 8 x 8 x 8; write an .h5ad"), ("tyx", "8 x 8 along looped axes; write")):
        with pytest.raises(ValueError, match=told):
            oocpatch.predict(
                np.zeros((8, 16, 16), np.float32),
                vectors,
                tmp_path / "out",
                axes=axes,
                patch_size=8,
                export=tmp_path / "vectors.h5",
            )
    assert not list(tmp_path.iterdir())


def test_a_vector_that_is_not_finite_is_refused_with_its_patch_or_kept(tmp_path: Path) -> None:
    def model(patches: torch.Tensor) -> torch.Tensor:
        return torch.where(patches.flatten(1)[:, :1] == VOLUME[4, 8], torch.inf, vectors(patches))

    with pytest.raises(
        oocpatch.BlockFailed, match=r"NaN or infinity in 'prediction' for the patch that starts at \(4, 8\)"
    ):
        oocpatch.predict(VOLUME, model, tmp_path / "out", **SETTINGS)
    result = oocpatch.predict(VOLUME, model, tmp_path / "out", overwrite=True, allow_nonfinite=True, **SETTINGS)
    assert result.attrs["nonfinite_voxels"] == 1
