"""Promises on what a call of a model takes: an empty batch shows the same as a patch, and kernels are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import oocpatch
from benchmarks.architectures import (
    AttentionUNet,
    DenseResNet,
    LightSheetRCAN,
    PlainUNet,
    SegResNet,
    StarHeads,
    SwinUNet,
    VisionTransformer,
)
from oocpatch.models.footprint import Footprint
from oocpatch.models.kernels import Convolution, Operand

SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "nnU-Net": (lambda: PlainUNet(1, 2, (4, 8, 16)), (1, 16, 16, 16)),
    "SegResNet": (lambda: SegResNet(2, 3, 8), (2, 16, 16, 16)),
    "ResNet": (lambda: DenseResNet(3, 5), (3, 64, 64)),
    "light-sheet": (lambda: LightSheetRCAN(2, 2, 8, 1), (2, 8, 8, 8)),
    "Swin": (lambda: SwinUNet(3, 4, 24, 7), (3, 112, 112)),
    "attention U-Net": (lambda: AttentionUNet(1, 4, 4), (1, 16, 16, 16)),
    "heads": (lambda: StarHeads(2, 4, 8, 5), (2, 32, 32)),
    "pooling": (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(4), nn.Flatten()), (1, 16, 16)),
}


def counted(model: nn.Module, shape: tuple[int, ...], *, empty: bool) -> tuple[int, float]:
    footprint = Footprint([*model.parameters(), *model.buffers()], empty_batch=empty)
    patch = torch.zeros(0 if empty else 1, *shape)
    with torch.no_grad(), footprint:
        model(patch)
    return footprint.peak, footprint.operations


@pytest.mark.parametrize("name", SMALL)
def test_an_empty_batch_takes_what_a_patch_takes(name: str) -> None:
    make, shape = SMALL[name]
    model = make().eval()
    assert counted(model, shape, empty=True) == counted(model, shape, empty=False)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_an_empty_batch_is_that_of_a_patch(masked: bool) -> None:
    model = VisionTransformer(1, 2, size=16, step=4, width=32, depth=2).eval()
    (peak, operations), (expected, same) = (counted(model, (1, 16, 16, 16), empty=empty) for empty in (True, False))
    assert operations == same
    assert expected <= peak <= 1.05 * expected

    class Attention(nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros(tokens.shape[2], tokens.shape[2]) if masked else None
            return functional.scaled_dot_product_attention(tokens, tokens, tokens, mask)

    assert counted(Attention(), (4, 50, 8), empty=True) == counted(Attention(), (4, 50, 8), empty=False)


def test_layers_of_torch_that_attend_count_their_weights() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    (empty, operations), (patch, same) = (counted(layer, (300, 32), empty=empty) for empty in (True, False))
    assert operations == same
    assert min(empty, patch) > 4 * 300 * 300 * 4
    assert empty < 1.6 * patch


class Recorder(nn.Module):
    """A network that records the sizes of its batches."""

    def __init__(self, *, by_patch: bool = False) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 2, 3, padding=1)
        self.batches: list[int] = []
        self.by_patch = by_patch

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(patches))
        if self.by_patch:
            return torch.stack([self.convolution(patch[None])[0] for patch in patches])
        return self.convolution(patches).reshape(patches.shape[0], 2, -1).view(len(patches), 2, *patches.shape[2:])


@pytest.mark.parametrize("by_patch", [False, True])
def test_a_plan_runs_no_network_that_takes_an_empty_batch(by_patch: bool, tmp_path: Path) -> None:
    model = Recorder(by_patch=by_patch)
    plan = oocpatch.plan(np.zeros((40, 40), np.float32), model, tmp_path / "out", patch_size=16, axes="yx")
    assert model.batches == ([0, 1] if by_patch else [0])
    assert plan.heads[0].channels == 2
    work = 2 * 9 * 2 * 16 * 16
    assert f"{work} operations a patch" in str(plan)
    assert plan.run().shape == (2, 40, 40)


@pytest.mark.parametrize("kind", ["network", "function"])
def test_what_takes_more_than_the_limit_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    steps: list[int] = []

    def function(patches: torch.Tensor) -> torch.Tensor:
        for step in range(100):
            steps.append(step)
            patches = torch.cat([patches, patches], dim=1)
        return patches

    model: Any = function if kind == "function" else nn.Sequential(*(nn.Conv2d(1, 1024, 3), nn.ReLU()) * 1)
    with pytest.raises(oocpatch.PlanTooLarge, match=r"max_memory is 16.0 MiB; raise max_memory"):
        oocpatch.plan(np.zeros((256, 256), np.float32), model, tmp_path / "o", patch_size=256, max_memory="16MiB")
    assert len(steps) < 10


def operand(*shape: int, dtype: torch.dtype = torch.float32) -> Operand:
    return Operand(shape, dtype)


MEASURED = {
    "few values, laid out": ((1, 1, 64, 64, 64), (32, 1, 3, 3, 3), (1, 32, 64, 64, 64), {}, 27.0),
    "filled up with zeros": ((1, 1, 160, 160, 160), (8, 1, 3, 3, 3), (1, 8, 160, 160, 160), {}, 249.9),
    "source and result": ((1, 16, 96, 96, 96), (4, 16, 3, 3, 3), (1, 4, 96, 96, 96), {}, 94.4),
    "two axes": ((1, 24, 768, 768), (40, 24, 3, 3), (1, 40, 768, 768), {}, 107.9),
    "transposed": ((1, 64, 32, 32, 32), (64, 32, 2, 2, 2), (1, 32, 64, 64, 64), {"transposed": True}, 63.9),
    "transposed, large source": (
        (1, 256, 32, 32, 32),
        (256, 32, 3, 3, 3),
        (1, 32, 34, 34, 34),
        {"transposed": True},
        31.8,
    ),
    "per channel": ((1, 32, 64, 64, 64), (32, 1, 3, 3, 3), (1, 32, 64, 64, 64), {"groups": 32}, 63.9),
    "large kernels": ((1, 16, 80, 80, 80), (16, 16, 5, 5, 5), (1, 16, 80, 80, 80), {}, 31.1),
    "strided": ((1, 64, 256, 256), (64, 64, 1, 1), (1, 64, 128, 128), {"stride": 2}, 21.9),
}


@pytest.mark.parametrize("name", MEASURED)
def test_the_scratch_of_convolutions_is_what_was_measured(name: str) -> None:
    source, weight, result, options, mib = MEASURED[name]
    scratch = Convolution(operand(*source), operand(*weight), operand(*result), **options).scratch() / 2**20
    assert mib - 0.5 <= scratch <= 1.15 * mib + 1


def test_double_precision_lays_out_the_neighbourhoods() -> None:
    patch, weight = operand(1, 16, 64, 64, 64, dtype=torch.float64), operand(16, 16, 3, 3, 3, dtype=torch.float64)
    assert Convolution(patch, weight, patch).scratch() / 2**20 == 864
