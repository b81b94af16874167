"""Promises on what surrounds a call: modes of torch, defaults of torch and zarr change neither values nor files."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import oocpatch

SCAN = np.random.default_rng(0).random((32, 48), dtype=np.float32)
SETTINGS: dict[str, Any] = {"patch_size": 16, "patch_overlap": 8, "progress": False}


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    """A device whose tensors have no values: whatever is made there by mistake fails."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS: dict[str, Any] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "a default device": default_device,
    "a default dtype": default_dtype,
    "Zarr 2 by default": lambda: zarr.config.set({"default_zarr_format": 2}),
    "Fortran order by default": lambda: zarr.config.set({"array.order": "F"}),
    "empty chunks written": lambda: zarr.config.set({"array.write_empty_chunks": True}),
    "numpy's errors raised": lambda: np.errstate(all="raise"),
}


@pytest.fixture(params=list(SURROUNDINGS))
def surroundings(request: pytest.FixtureRequest) -> Any:
    return SURROUNDINGS[request.param]


def chunks(path: Path) -> dict[str, str]:
    files = (file for file in path.rglob("*") if file.is_file() and file.name != "zarr.json")
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, padding=1, dtype=torch.float32), torch.nn.ReLU())


@pytest.mark.parametrize(
    "options",
    [
        {"overlap_mode": "crop", "mask": np.array([[1, 0], [0, 0]]), "output_fill": 7, "output_format": "ome-zarr"},
        {"postprocess": "argmax", "preprocess": "zscore", "block_shape": 16, "output_chunks": 16},
    ],
    ids=["crop, mask", "argmax, blocks"],
)
def test_a_run_gives_the_same_bytes(surroundings: Any, options: dict[str, Any], tmp_path: Path) -> None:
    model = network()
    expected = oocpatch.predict(SCAN, model, tmp_path / "plain.zarr", **SETTINGS, **options)
    with surroundings():
        planned = oocpatch.plan(SCAN, model, tmp_path / "out.zarr", **SETTINGS, **options)
        result = planned.run()
    np.testing.assert_array_equal(result, expected)
    assert result.dtype == expected.dtype
    stored = {name: digest for name, digest in chunks(tmp_path / "out.zarr").items() if "oocpatch" not in name}
    assert stored == {n: d for n, d in chunks(tmp_path / "plain.zarr").items() if "oocpatch" not in n}
    assert "PASS" in str(oocpatch.verify(tmp_path / "out.zarr"))


def test_heads_of_two_scales_are_the_same(surroundings: Any, tmp_path: Path) -> None:
    def model(patches: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"full": patches, "half": torch.nn.functional.avg_pool2d(patches, 2)}

    with surroundings():
        tree = oocpatch.predict(SCAN, model, tmp_path / "out.zarr", **SETTINGS, overlap_mode="crop")
    np.testing.assert_array_equal(tree["full/full"], SCAN)
    np.testing.assert_allclose(tree["half/half"], SCAN.reshape(16, 2, 24, 2).mean((1, 3)), rtol=1e-6)


def test_a_conversion_is_the_same_and_is_found_again(surroundings: Any, tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "in.zarr", data=SCAN, chunks=(8, 8), dimension_names=("y", "x"))
    with surroundings():
        for _ in range(2):
            result = oocpatch.convert(tmp_path / "in.zarr", tmp_path / "out.zarr", chunks=16)
            np.testing.assert_array_equal(result, SCAN)
            assert result.dims == ("y", "x")


def test_samplers_draw_the_same(surroundings: Any) -> None:
    subject = oocpatch.Subject(t1=SCAN, m=(SCAN > 0.9).astype(np.uint8))

    def draws() -> list[Any]:
        uniform = oocpatch.UniformSampler(subject, 8, num_patches=4, seed=1)
        labels = oocpatch.LabelSampler(subject, 8, "m", num_patches=4, seed=1)
        queue = oocpatch.Queue([subject], uniform, patches_per_volume=4, seed=2)
        return [p.patch_location.index for s in (uniform, labels, queue) for p in s]

    expected = draws()
    with surroundings():
        assert draws() == expected


@pytest.mark.parametrize(("mode", "is_stored"), [("crop", True), ("hann", False)])
def test_a_loop_of_ones_own_gives_the_same(surroundings: Any, mode: str, is_stored: bool, tmp_path: Path) -> None:
    def looped(store: Path | None) -> Any:
        grid = oocpatch.GridSampler(oocpatch.Subject(t1=SCAN), 16, 8)
        aggregator = oocpatch.PatchAggregator(SCAN.shape, mode, patch_overlap=8, store=store)
        for patch in map(grid.__getitem__, range(len(grid))):
            aggregator.add_batch(2 * patch.t1.data[None], [patch.patch_location])
        return aggregator.get_output().numpy(), aggregator.get_array()[:]

    expected, _ = looped(None)
    with surroundings():
        for result in looped(tmp_path / "out.zarr" if is_stored else None):
            assert result.dtype == np.float32
            np.testing.assert_array_equal(result, expected)
