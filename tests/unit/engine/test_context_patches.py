"""Promises on patches of a coarser level around those of the volume: equal to numpy at the borders, seen to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import oocpatch

SIZES, PATCH, OVERLAP = (45, 62), (8, 12), (4, 6)


class Context(torch.nn.Module):
    """Gives the context of each patch back, beside the patch."""

    def forward(self, patches: torch.Tensor, context: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"patches": patches.flatten(1), "context": context.flatten(1)}


@pytest.fixture
def pyramid(tmp_path: Path) -> str:
    data = np.random.default_rng(0).random(SIZES, dtype=np.float32)
    oocpatch.predict(
        data, "identity", tmp_path / "in", patch_size=16, output_format="ome-zarr", overlap_mode="crop",
        output_chunks=8, progress=False,
    )  # fmt: skip
    return str(tmp_path / "in")


def expected(level: np.ndarray[Any, Any], start: tuple[int, ...], factor: int, mode: str | None) -> Any:
    """The patch of a level around the centre of a patch of the volume, cut out of the padded level."""
    wide = 40
    padded = np.pad(level, wide, mode=mode or "edge")  # type: ignore[call-overload]
    corner = []
    for first, size in zip(start, PATCH, strict=True):
        centre = first + size / 2  # in edges of voxels
        corner.append(int(np.floor(centre / factor - size / 2 + 0.5)) + wide)
    return padded[tuple(slice(c, c + p) for c, p in zip(corner, PATCH, strict=True))]


@pytest.mark.parametrize(("number", "padding_mode"), [(1, None), (2, "reflect")])
def test_contexts_are_those_of_numpy_at_every_border(
    number: int, padding_mode: str | None, pyramid: str, tmp_path: Path
) -> None:
    result = oocpatch.predict(
        pyramid, Context(), tmp_path / "out", patch_size=PATCH, patch_overlap=OVERLAP, context_level=number,
        padding_mode=padding_mode, batch_size=3, block_shape=16, output_format="zarr", progress=False,
    )  # fmt: skip
    level = np.asarray(zarr.open_array(f"{pyramid}/scale{number}/image", mode="r"))
    rows = zip(result.starts.values.tolist(), result.context.values, strict=True)
    for start, row in rows:
        wanted = expected(level, tuple(start), 2**number, padding_mode)
        assert np.array_equal(row.reshape(PATCH), wanted), start


def test_a_change_of_the_level_is_seen_and_what_has_no_level_is_refused(pyramid: str, tmp_path: Path) -> None:
    call: dict[str, Any] = {"volume": pyramid, "model": lambda p, context: p + context.mean((1, 2, 3), True)}
    call |= {"patch_size": 16, "output_format": "zarr", "progress": False}
    first = oocpatch.predict(output=tmp_path / "a", context_level=1, **call).load()
    level = zarr.open_array(f"{pyramid}/scale1/image")
    level[:8, :8] = 5
    with pytest.raises(oocpatch.RunMismatch, match=r"context_level: .* chunks changed"):
        oocpatch.predict(output=tmp_path / "a", context_level=1, **call)
    again = oocpatch.predict(output=tmp_path / "a", context_level=1, update=True, **call)
    assert again.equals(oocpatch.predict(output=tmp_path / "b", context_level=1, workers=2, **call))
    assert not again.equals(first)
    with pytest.raises(oocpatch.RunMismatch, match="context_level"):
        oocpatch.predict(output=tmp_path / "a", context_level=2, **call)
    with pytest.raises(ValueError, match="preprocess must not need statistics of the volume with context_level"):
        oocpatch.plan(output=tmp_path / "c", context_level=1, preprocess="zscore", **call)
    for levels in ({"level": 2, "context_level": 0}, {"context_level": 0}, {"level": -1, "context_level": -1}):
        with pytest.raises(ValueError, match="must be coarser than the level that is read"):
            oocpatch.plan(output=tmp_path / "c", **levels, **call)
    pair = [call.pop("volume")] * 2
    with pytest.raises(ValueError, match="context_level must be None with several volumes"):
        oocpatch.plan(pair, output=tmp_path / "c", context_level=1, **call)
