"""Promises on shards that nobody asked for: the input's or whole fractions of them, and the values that zarr reads."""

from __future__ import annotations

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
from oocpatch.planning import shards as shards_module


def sharded(
    folder: Path, shape: tuple[int, ...], chunks: tuple[int, ...], shards: tuple[int, ...] | None
) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 1000, shape).astype(np.float32)
    zarr.create_array(folder / "in.zarr", shape=shape, chunks=chunks, shards=shards, dtype="float32")[:] = values
    return values


def predicted(folder: Path, model: Any = None, **options: Any) -> tuple[oocpatch.Plan, zarr.Array[Any]]:
    settings = {"patch_size": 8, "patch_overlap": 4, "progress": False, **options}
    plan = oocpatch.plan(folder / "in.zarr", model or torch.nn.Identity(), folder / "out.zarr", **settings)
    plan.run()
    return plan, zarr.open_array(folder / "out.zarr" / "prediction", mode="r")


@st.composite
def inputs(draw: st.DrawFn) -> dict[str, Any]:
    axes = draw(st.sampled_from(["yx", "zyx"]))
    chunks = tuple(draw(st.sampled_from([4, 8])) for _ in axes)
    shards = tuple(c * draw(st.integers(1, 6)) for c in chunks)
    shape = tuple(draw(st.integers(8, 60 if axes == "yx" else 30)) for _ in axes)
    options = draw(st.sampled_from([{}, {"work": "heavy"}, {"block_shape": 16}, {"max_memory": "1MiB"}]))
    return {"shape": shape, "chunks": chunks, "shards": shards, "options": {"axes": axes, **options}}


@settings(max_examples=10, deadline=None)
@given(inputs())
def test_an_output_has_whole_fractions_of_the_shards_of_its_input(case: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        values = sharded(Path(folder), case["shape"], case["chunks"], case["shards"])
        plan, output = predicted(Path(folder), **case["options"])
        np.testing.assert_allclose(output[:], values, rtol=1e-5)
        unit = output.shards or output.chunks
        for n, chunk, shard, side, made, core in zip(
            case["shape"], case["chunks"], case["shards"], unit, output.chunks, plan.block_shape, strict=True
        ):
            assert made == min(chunk, n)
            whole = min(shard, -(-n // chunk) * chunk) if chunk < n else n
            assert whole % side == 0, "no whole fraction of the shard"
            assert side % made == 0
            assert core % side == 0 or core >= n
        if "block_shape" in case["options"]:
            plain = oocpatch.plan(
                Path(folder) / "in.zarr",
                torch.nn.Identity(),
                Path(folder) / "other.zarr",
                patch_size=8,
                patch_overlap=4,
                output_shards="none",
                output_chunks=output.chunks,
                **case["options"],
            )
            assert plan.block_shape == plain.block_shape


EXPECTED: dict[str, tuple[dict[str, Any], tuple[int, ...] | None]] = {
    "the same": ({}, (32, 16)),
    "those that are asked for": ({"output_chunks": 8, "output_shards": 16}, (16, 16)),
    "none": ({"output_shards": "none", "output_chunks": 8}, None),
    "what a block of that shape holds": ({"block_shape": 16}, (16, 16)),
    "other chunks": ({"output_chunks": 16}, (32, 16)),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_shards_of_an_output(name: str, tmp_path: Path) -> None:
    options, shards = EXPECTED[name]
    values = sharded(tmp_path, (64, 64), (8, 8), (32, 16))
    plan, output = predicted(tmp_path, axes="yx", **options)
    assert output.shards == shards
    np.testing.assert_allclose(output[:], values, rtol=1e-5)
    assert (f"shards {' x '.join(map(str, shards))}" in str(plan)) if shards else ("shards" not in str(plan))
    sizes: dict[str, Any] = {"patch_size": 8, "patch_overlap": 4, "axes": "yx", **options}
    again = oocpatch.plan(tmp_path / "in.zarr", torch.nn.Identity(), tmp_path / "out.zarr", **sizes)
    assert again.run_id == plan.run_id


def test_a_heavy_model_keeps_its_small_blocks(tmp_path: Path) -> None:
    sharded(tmp_path, (256, 256), (8, 8), (256, 256))
    plan, output = predicted(tmp_path, axes="yx", work="heavy")
    assert plan.crash_patches <= plan.crash_limit
    assert output.shards is not None
    assert all(256 % side == 0 for side in output.shards)


def test_an_output_of_very_many_chunks_has_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "MOST_CHUNKS", 100)
    values = sharded(tmp_path, (88, 96), (8, 8), None)
    plan, output = predicted(tmp_path, axes="yx", output_chunks=8)
    assert output.chunks == (8, 8)
    assert output.shards is not None
    assert all(side % 8 == 0 for side in output.shards)
    assert "shards" in str(plan)
    np.testing.assert_allclose(output[:], values, rtol=1e-5)
    huge = oocpatch.plan(
        zarr.create_array(tmp_path / "huge.zarr", shape=(1 << 16,) * 3, chunks=(64,) * 3, dtype="float32"),
        torch.nn.Identity(),
        tmp_path / "o.zarr",
        patch_size=96,
        patch_overlap=48,
        axes="zyx",
        max_memory="64GiB",
    )
    (head,) = huge.heads
    assert 64**3 * 4 < np.prod(head.unit) * 4 <= 256 << 20
