"""Promises on the work of a patch: it is counted, the same each time; what cannot be counted is heavy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import oocpatch
from oocpatch.configuration.make_plan import _probed, workload_of
from oocpatch.configuration.run_config import RunConfig
from oocpatch.models.footprint import Footprint
from oocpatch.models.wrappers import NumpyModel
from oocpatch.planning.workload import HEAVY, Workload

VOLUME = np.zeros((40, 48), np.float32)
SIDE = 16
CONVOLUTION = 2 * 9 * SIDE * SIDE
"""Operations of a convolution of 3 x 3 from one channel to one on a patch, padded: a product and a sum per weight."""


def convolution(inputs: int = 1, outputs: int = 1) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def workload(model: Any, **options: Any) -> Workload:
    """The work that a plan assumes."""
    config = RunConfig.of(VOLUME, model, "memory-is-not-written", patch_size=SIDE, **options)
    transforms, device = len(config.pipeline.transforms), config.model.device
    probe = _probed(config, 1)
    return workload_of(config.limits.work, probe, config.models, transforms=transforms, device=device)


class Inference(nn.Module):
    """A network that asks for inference mode by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(convolution(1, 4), nn.InstanceNorm2d(4), convolution(4, 1))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.network(patches).clone()


class Halves(nn.Module):
    """A module with an operator of torch that is no work."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return patches / 2


class Opaque(nn.Module):
    """A module that works without torch."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.sort(patches.numpy(force=True)))


COUNTED: dict[str, tuple[Callable[[], Any], dict[str, Any], float]] = {
    "identity": (nn.Identity, {}, 0),
    "spec of the identity": (lambda: "identity", {}, 0),
    "pooling and norms": (lambda: nn.Sequential(nn.InstanceNorm2d(1), nn.ReLU()), {}, 0),
    "an operator without formula": (Halves, {}, 0),
    "convolution": (convolution, {}, CONVOLUTION),
    "two layers": (lambda: nn.Sequential(convolution(1, 8), convolution(8, 2)), {}, (8 + 16) * CONVOLUTION),
    "batches": (convolution, {"batch_size": 7}, CONVOLUTION),
    "autocast": (convolution, {"autocast": True}, CONVOLUTION),
    "channels last": (convolution, {"channels_last": True}, CONVOLUTION),
    "double": (lambda: convolution().double(), {}, CONVOLUTION),
    "ensemble": (lambda: [convolution(), convolution(1, 1)], {}, 2 * CONVOLUTION),
    "augmentation": (convolution, {"augment": "flips"}, 4 * CONVOLUTION),
    "both": (lambda: [convolution(), convolution()], {"augment": "rotations"}, 8 * CONVOLUTION),
    "inference mode": (Inference, {}, 8 * CONVOLUTION),
    "preprocess by a function": (convolution, {"preprocess": lambda x: x + 1}, CONVOLUTION),
    "named preprocess": (nn.Identity, {"preprocess": "zscore"}, 0),
    "transposed": (lambda: nn.ConvTranspose2d(1, 1, 3, padding=1), {}, CONVOLUTION),
    "product of matrices": (lambda: nn.Linear(SIDE, SIDE), {}, 2 * SIDE**3),
}


def test_a_batch_without_patches_counts_as_one_in_inference_mode() -> None:
    network, counted = Inference().eval(), []
    for size in (0, 1):
        with Footprint(network.parameters(), empty_batch=size == 0) as footprint:
            network(torch.zeros(size, 1, SIDE, SIDE))
        counted.append((footprint.operations, footprint.peak, footprint.batch_peak))
    assert counted[0] == counted[1]
    assert counted[0][0] == 8 * CONVOLUTION


@pytest.mark.parametrize("name", COUNTED)
def test_the_operations_of_a_patch_are_counted(name: str) -> None:
    make, options, operations = COUNTED[name]
    work = workload(make(), **options)
    assert work.operations == operations
    assert not work.is_assumed
    assert work == workload(make(), **options)


def scripted() -> torch.jit.ScriptModule:
    with pytest.warns(DeprecationWarning, match="jit"):
        return torch.jit.trace(convolution(), torch.zeros(1, 1, SIDE, SIDE))  # type: ignore[no-any-return]


ASSUMED: dict[str, tuple[Callable[[], Any], dict[str, Any], float]] = {
    "function": (lambda: lambda x: 2 * x, {}, 1),
    "function of a network": (lambda: convolution().forward, {}, 1),
    "function of numpy arrays": (lambda: NumpyModel(lambda x: 2 * x), {}, 1),
    "module that does not use torch": (Opaque, {}, 1),
    "TorchScript": (scripted, {}, 1),
    "ensemble": (lambda: [convolution(), lambda x: 2 * x, lambda x: 3 * x], {}, 2),
    "augmentation": (lambda: lambda x: 2 * x, {"augment": "flips"}, 4),
    "heavy by name": (convolution, {"work": "heavy"}, 1),
    "heavy identity": (nn.Identity, {"work": "heavy"}, 1),
}


@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", ASSUMED)
def test_work_that_cannot_be_counted_is_heavy(name: str) -> None:
    make, options, times = ASSUMED[name]
    work = workload(make(), **options)
    assert work.operations == times * HEAVY
    assert work.is_assumed
    assert workload(make(), **{**options, "work": "light"}).operations == 0
    assert workload(make(), **{**options, "work": 5e9}).operations == 5e9


def test_fused_attention_is_counted_as_its_parts_are() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    tokens = torch.zeros(2, 50, 32)
    with torch.no_grad(), Footprint([]) as fused:
        layer(tokens)
    with torch.enable_grad(), Footprint([]) as apart:  # torch fuses nothing that has gradients
        layer(tokens)
    assert fused.operations == apart.operations > 2 * 2 * 50 * (4 * 32 * 32 + 2 * 32 * 64)


@pytest.mark.parametrize("work", ["much", "", -1, float("nan"), float("inf"), True, [1]])
def test_other_values_are_refused(work: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="work must be"):
        oocpatch.plan(VOLUME, "identity", "memory-is-not-written", patch_size=SIDE, work=work)


def test_work_is_no_part_of_what_a_run_is(tmp_path: Path) -> None:
    """A resume keeps the plan that it finds."""
    volume = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    options: dict[str, Any] = {"patch_size": 8, "patch_overlap": 4, "output_chunks": 8, "progress": False}
    heavy = oocpatch.plan(volume, "identity", tmp_path / "out", work="heavy", **options)
    assert heavy.blocks > 4
    heavy.run(blocks=[0])
    again = oocpatch.plan(volume, "identity", tmp_path / "out", **options)
    assert again.block_shape == heavy.block_shape
    assert again.run_id == heavy.run_id
    assert oocpatch.plan(volume, "identity", tmp_path / "other", **options).blocks == 1
    np.testing.assert_allclose(again.run(), volume, rtol=1e-6)


@pytest.mark.parametrize("mode", ["crop", "hann", "gaussian", "average", "max"])
@pytest.mark.parametrize("overlap", [0, 6])
def test_values_do_not_depend_on_the_work(mode: str, overlap: int, tmp_path: Path) -> None:
    volume = np.random.default_rng(0).random((50, 61), dtype=np.float32)
    torch.manual_seed(0)
    model = nn.Sequential(convolution(), nn.Tanh())
    options: dict[str, Any] = {"patch_size": 10, "patch_overlap": overlap, "overlap_mode": mode, "output_chunks": 8}
    works = ("light", "heavy")
    results = [oocpatch.predict(volume, model, tmp_path / work, work=work, progress=False, **options) for work in works]
    blocks = [oocpatch.plan(volume, model, tmp_path / "plan", work=work, **options).blocks for work in works]
    assert blocks[0] < blocks[1]
    if mode in ("crop", "max"):
        np.testing.assert_array_equal(*results)
    else:
        np.testing.assert_allclose(*results, rtol=2e-5, atol=1e-6)


def test_the_plan_says_what_a_crash_costs() -> None:
    options: dict[str, Any] = {"patch_size": 8, "patch_overlap": 4, "output_chunks": 8}
    volume = np.zeros((64, 64), np.float32)
    planned = oocpatch.plan(volume, lambda x: x, "memory-is-not-written", **options)
    assert planned.patches_per_block <= 32
    assert f"a crash costs at most {planned.patches_per_block} patches per process" in str(planned)
    assert 'heavy, unless work="light" says not' in str(planned)
    short = oocpatch.plan(volume, lambda x: x, "memory-is-not-written", **{**options, "output_chunks": 64})
    assert (short.blocks, short.patches_per_block) == (1, 225)
    assert "at most 1 patches per process, as the model's outputs are stored until their block is done" in str(short)
    small = oocpatch.plan(
        volume, lambda x: x, "memory-is-not-written", max_disk="40KiB", **{**options, "output_chunks": 64}
    )
    assert "at most 225 patches per process (max_disk has no room for the model's outputs" in str(small)
    light = oocpatch.plan(volume, nn.Identity(), "memory-is-not-written", **options)
    assert "no operations counted; a crash costs at most 225 patches per process\n" in str(light)
    assert "5.0 giga-operations a patch; " in str(
        oocpatch.plan(volume, nn.Identity(), "memory-is-not-written", work=5e9, **options)
    )
