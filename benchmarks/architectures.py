"""Networks as they are published, written in plain torch: what their convolutions, norms and attention take in memory.

Weights are random, since memory and time do not depend on them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class PlainUNet(nn.Module):
    """The U-Net of nnU-Net and HD-BET: strided convolutions, instance norms, transposed convolutions."""

    def __init__(self, channels: int, classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        strides = [1] + [2] * (len(widths) - 1)
        pairs = itertools.pairwise([channels, *widths])
        self.down = nn.ModuleList(self._stage(a, b, s) for (a, b), s in zip(pairs, strides, strict=True))
        upwards = list(itertools.pairwise(widths))[::-1]
        self.up = nn.ModuleList(nn.ConvTranspose3d(b, a, 2, stride=2) for a, b in upwards)
        self.merge = nn.ModuleList(self._stage(2 * a, a, 1) for a, _ in upwards)
        self.head = nn.Conv3d(widths[0], classes, 1)

    @staticmethod
    def _stage(channels: int, width: int, stride: int) -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, step in ((channels, stride), (width, 1)):
            layers += [nn.Conv3d(inputs, width, 3, step, 1), nn.InstanceNorm3d(width, affine=True)]
            layers.append(nn.LeakyReLU(0.01, inplace=True))
        return nn.Sequential(*layers)

    def forward(self, values: torch.Tensor) -> Any:
        """Return scores `(B, classes, *patch)`."""
        skips = []
        for stage in self.down:
            values = stage(values)
            skips.append(values)
        values = skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            values = merge(torch.cat([up(values), skips.pop()], dim=1))
        return self.head(values)


class Residual(nn.Module):
    """Norm, activation and convolution, twice, beside the identity: the block of SegResNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [(nn.GroupNorm(8, width), nn.ReLU(inplace=True), nn.Conv3d(width, width, 3, 1, 1, bias=False))] * 2
        self.layers = nn.Sequential(*itertools.chain(*layers))

    def forward(self, values: torch.Tensor) -> Any:
        """Return values of the same shape."""
        return values + self.layers(values)


class SegResNet(nn.Module):
    """A residual U-Net with group norms, whose decoder interpolates and adds."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        widths = [width << level for level in range(4)]
        self.first = nn.Conv3d(channels, width, 3, 1, 1, bias=False)
        self.down = nn.ModuleList()
        for level, (inputs, outputs, blocks) in enumerate(zip([width, *widths], widths, (1, 2, 2, 4), strict=False)):
            before = nn.Conv3d(inputs, outputs, 3, 2, 1, bias=False) if level else nn.Identity()
            self.down.append(nn.Sequential(before, *(Residual(outputs) for _ in range(blocks))))
        upwards = list(itertools.pairwise(widths))[::-1]
        self.narrow = nn.ModuleList(nn.Conv3d(b, a, 1, bias=False) for a, b in upwards)
        self.up = nn.ModuleList(Residual(a) for a, _ in upwards)
        self.head = nn.Sequential(nn.GroupNorm(8, width), nn.ReLU(inplace=True), nn.Conv3d(width, classes, 1))

    def forward(self, values: torch.Tensor) -> Any:
        """Return scores `(B, classes, *patch)`."""
        values = self.first(values)
        skips = []
        for stage in self.down:
            values = stage(values)
            skips.append(values)
        skips.pop()
        for narrow, up in zip(self.narrow, self.up, strict=True):
            larger = functional.interpolate(narrow(values), scale_factor=2, mode="trilinear", align_corners=False)
            values = up(larger + skips.pop())
        return self.head(values)


class Bottleneck(nn.Module):
    """The block of ResNet-50."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        sizes = ((channels, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1))
        layers: list[nn.Module] = []
        for inputs, outputs, kernel, step in sizes:
            layers += [nn.Conv2d(inputs, outputs, kernel, step, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]
            layers.append(nn.ReLU(inplace=True))
        self.layers = nn.Sequential(*layers[:-1])
        change = nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
        self.beside = nn.Sequential(*change) if stride > 1 or channels != 4 * width else nn.Identity()

    def forward(self, values: torch.Tensor) -> Any:
        """Return values at `1 / stride` of the resolution."""
        return functional.relu(self.layers(values) + self.beside(values), inplace=True)


def encoder() -> nn.Module:
    """Return ResNet-50 without its last stage, a vector of 1024 numbers per patch, as slides are encoded for CLAM."""
    return nn.Sequential(_stem(3), *_stages(3, 4, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def _stem(channels: int) -> nn.Sequential:
    """Return the first layers of a ResNet."""
    first = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(64), nn.ReLU(True), nn.MaxPool2d(3, 2, 1))


def _stages(*blocks: int) -> list[nn.Sequential]:
    """Return the stages after it, of so many blocks, each of twice the channels and half the resolution."""
    stages, inputs = [], 64
    for level, count in enumerate(blocks):
        width = 64 << level
        steps = (2 if level else 1, *[1] * (count - 1))
        channels_of = (inputs, *[4 * width] * (count - 1))
        stages.append(nn.Sequential(*(Bottleneck(c, width, s) for c, s in zip(channels_of, steps, strict=True))))
        inputs = 4 * width
    return stages


class DenseResNet(nn.Module):
    """The encoder of ResNet-50 with a head that fuses its stages and interpolates scores to the patch."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = _stem(channels)
        self.stages = nn.ModuleList(_stages(3, 4, 6, 3))
        self.lateral = nn.ModuleList(nn.Conv2d(256 << level, 128, 1) for level in range(4))
        self.head = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(True), nn.Conv2d(128, classes, 1))

    def forward(self, patches: torch.Tensor) -> Any:
        """Return scores `(B, classes, *patch)`."""
        values, fused = self.stem(patches), []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            values = stage(values)
            fused.append(lateral(values))
        merged = fused.pop()
        while fused:
            merged = fused.pop() + functional.interpolate(merged, scale_factor=2, mode="nearest")
        size = patches.shape[2:]
        return functional.interpolate(self.head(merged), size=size, mode="bilinear", align_corners=False)


class ChannelAttention(nn.Module):
    """The residual block of RCAN: two convolutions, whose channels are weighed by their means."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(width, width, 3, padding=1), nn.ReLU(True), nn.Conv3d(width, width, 3, padding=1)
        )
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool3d(1), nn.Conv3d(width, width // 8, 1), nn.ReLU(True), nn.Conv3d(width // 8, width, 1)
        )

    def forward(self, values: torch.Tensor) -> Any:
        """Return values of the same shape."""
        result = self.layers(values)
        return values + result * torch.sigmoid(self.weigh(result))


class LightSheetRCAN(nn.Module):
    """A residual channel attention network at full resolution, as it restores light-sheet volumes."""

    def __init__(self, channels: int, outputs: int, width: int, blocks: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ChannelAttention(width) for _ in range(blocks)))
        self.last = nn.Conv3d(width, outputs, 3, padding=1)

    def forward(self, patches: torch.Tensor) -> Any:
        """Return `(B, outputs, *patch)`."""
        features = self.first(patches)
        return self.last(features + self.blocks(features))


class Layer(nn.Module):
    """A layer of a transformer that attends to all tokens, by torch's fused attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: torch.Tensor) -> Any:
        """Return tokens `(B, N, width)`."""
        batch, count, width = tokens.shape
        qkv = self.qkv(self.norms[0](tokens)).reshape(batch, count, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.project(attended.transpose(1, 2).reshape(batch, count, width))
        return tokens + self.mlp(self.norms[1](tokens))


class VisionTransformer(nn.Module):
    """A ViT over patches of a volume with a decoder of transposed convolutions, as in UNETR and SAM."""

    def __init__(self, channels: int, classes: int, *, size: int, step: int, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Conv3d(channels, width, step, step)
        self.positions = nn.Parameter(torch.zeros(1, (size // step) ** 3, width))
        self.layers = nn.Sequential(*(Layer(width, width // 32) for _ in range(depth)))
        decoder: list[nn.Module] = []
        while step > 1:
            decoder += [nn.ConvTranspose3d(width, width // 2, 2, 2), nn.InstanceNorm3d(width // 2), nn.GELU()]
            width, step = width // 2, step // 2
        self.decoder = nn.Sequential(*decoder, nn.Conv3d(width, classes, 3, padding=1))

    def forward(self, patches: torch.Tensor) -> Any:
        """Return scores `(B, classes, *patch)`."""
        values = self.embed(patches)
        tokens = self.layers(values.flatten(2).transpose(1, 2) + self.positions)
        return self.decoder(tokens.transpose(1, 2).reshape(values.shape))


class WindowLayer(nn.Module):
    """A layer of a Swin transformer: attention within windows, which every second layer shifts."""

    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(heads, window * window, window * window))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, values: torch.Tensor) -> Any:
        """Return values `(B, H, W, width)`."""
        batch, height, width, channels = values.shape
        side = self.window
        shifted = torch.roll(self.norms[0](values), (-self.shift, -self.shift), (1, 2))
        windows = shifted.view(batch, height // side, side, width // side, side, channels)
        windows = windows.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, side * side, channels)
        qkv = self.qkv(windows).reshape(windows.shape[0], side * side, 3, self.heads, channels // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        weights = (query * (channels // self.heads) ** -0.5 @ key.transpose(-2, -1) + self.bias).softmax(-1)
        attended = self.project((weights @ value).transpose(1, 2).reshape(windows.shape))
        attended = attended.view(batch, height // side, width // side, side, side, channels)
        attended = attended.permute(0, 1, 3, 2, 4, 5).contiguous().view(batch, height, width, channels)
        values = values + torch.roll(attended, (self.shift, self.shift), (1, 2))
        return values + self.mlp(self.norms[1](values))


class SwinUNet(nn.Module):
    """A Swin transformer of three stages with a decoder that interpolates."""

    def __init__(self, channels: int, classes: int, width: int, window: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, width, 4, 4)
        self.stages, self.merges = nn.ModuleList(), nn.ModuleList()
        for level in range(3):
            size, shifts = width << level, (0, window // 2)
            self.stages.append(nn.Sequential(*(WindowLayer(size, size // 24, window, s) for s in shifts)))
            self.merges.append(nn.Sequential(nn.LayerNorm(4 * size), nn.Linear(4 * size, 2 * size, bias=False)))
        self.head = nn.Conv2d(width * 7, classes, 3, padding=1)

    def forward(self, patches: torch.Tensor) -> Any:
        """Return scores `(B, classes, *patch)`."""
        values = self.embed(patches).permute(0, 2, 3, 1)
        size, scales = values.shape[1:3], []
        for level, (stage, merge) in enumerate(zip(self.stages, self.merges, strict=True)):
            values = stage(values)
            scales.append(functional.interpolate(values.permute(0, 3, 1, 2), size=size, mode="bilinear"))
            if level < 2:
                quarters = [values[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
                values = merge(torch.cat(quarters, dim=-1))
        return functional.interpolate(self.head(torch.cat(scales, dim=1)), size=patches.shape[2:], mode="bilinear")


def _double(channels: int, width: int, *, axes: int) -> nn.Module:
    convolution, norm = ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[axes - 2]
    layers: list[nn.Module] = []
    for inputs in (channels, width):
        layers += [convolution(inputs, width, 3, padding=1), norm(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class AttentionUNet(nn.Module):
    """A U-Net whose skips pass gates that attend to what the decoder knows."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        widths = [width << level for level in range(4)]
        self.down = nn.ModuleList(_double(a, b, axes=3) for a, b in itertools.pairwise([channels, *widths]))
        self.up, self.gates, self.merge = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for a, b in list(itertools.pairwise(widths))[::-1]:
            self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv3d(b, a, 3, padding=1), nn.BatchNorm3d(a)))
            gate = nn.Conv3d(a, a // 2, 1), nn.Conv3d(a, a // 2, 1), nn.Conv3d(a // 2, 1, 1)
            self.gates.append(nn.ModuleList(gate))
            self.merge.append(_double(2 * a, a, axes=3))
        self.head = nn.Conv3d(width, classes, 1)

    def forward(self, values: torch.Tensor) -> Any:
        """Return scores `(B, classes, *patch)`."""
        skips = []
        for level, stage in enumerate(self.down):
            values = stage(functional.max_pool3d(values, 2) if level else values)
            skips.append(values)
        skips.pop()
        for up, (known, skipped, joined), merge in zip(self.up, self.gates, self.merge, strict=True):
            values, skip = up(values), skips.pop()
            gate = torch.sigmoid(joined(functional.relu(known(values) + skipped(skip))))
            values = merge(torch.cat([skip * gate, values], dim=1))
        return self.head(values)


class StarHeads(nn.Module):
    """A two-dimensional U-Net with heads for probability, distances and classes, as in StarDist."""

    def __init__(self, channels: int, width: int, rays: int, classes: int) -> None:
        super().__init__()
        widths = [width << level for level in range(4)]
        self.down = nn.ModuleList(_double(a, b, axes=2) for a, b in itertools.pairwise([channels, *widths]))
        upwards = list(itertools.pairwise(widths))[::-1]
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in upwards)
        self.merge = nn.ModuleList(_double(2 * a, a, axes=2) for a, _ in upwards)
        self.features = nn.Sequential(nn.Conv2d(width, 128, 3, padding=1), nn.ReLU(inplace=True))
        outputs = {"probability": 1, "distances": rays, "classes": classes}
        self.heads = nn.ModuleDict({name: nn.Conv2d(128, count, 1) for name, count in outputs.items()})

    def forward(self, values: torch.Tensor) -> Any:
        """Return a dict of heads, each `(B, C, *patch)`."""
        skips = []
        for level, stage in enumerate(self.down):
            values = stage(functional.max_pool2d(values, 2) if level else values)
            skips.append(values)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            values = merge(torch.cat([skips.pop(), up(values)], dim=1))
        features = self.features(values)
        return {name: head(features) for name, head in self.heads.items()}


@dataclass(frozen=True, slots=True)
class Architecture:
    """A network with the patches that it is used with.

    Attributes:
        make: returns the network.
        channels: channels of the volume; 1: no axis of its own.
        patch: sides of a patch.
        limits: values of `max_memory` for a run with one patch at a time.
    """

    make: Callable[[], nn.Module]
    channels: int
    patch: tuple[int, ...]
    limits: tuple[str, ...]


ARCHITECTURES = {
    "nnU-Net, 64^3": Architecture(
        lambda: PlainUNet(1, 2, (32, 64, 128, 256, 320, 320)), 1, (64, 64, 64), ("300MiB", "1GiB")
    ),
    "SegResNet, 4 channels, 96^3": Architecture(lambda: SegResNet(4, 3, 16), 4, (96, 96, 96), ("700MiB", "1GiB")),
    "ResNet-50 encoder, 512^2": Architecture(lambda: DenseResNet(3, 5), 3, (512, 512), ("128MiB", "300MiB")),
    "light-sheet RCAN, 64 channels, 48^3": Architecture(
        lambda: LightSheetRCAN(2, 2, 64, 4), 2, (48, 48, 48), ("300MiB",)
    ),
    "light-sheet RCAN, 32 channels, 48^3": Architecture(
        lambda: LightSheetRCAN(1, 1, 32, 4), 1, (48, 48, 48), ("128MiB", "300MiB")
    ),
    "ViT, 12 layers, 96^3": Architecture(
        lambda: VisionTransformer(1, 4, size=96, step=8, width=384, depth=12), 1, (96, 96, 96), ("300MiB", "1GiB")
    ),
    "Swin, 448^2": Architecture(lambda: SwinUNet(3, 4, 96, 7), 3, (448, 448), ("300MiB",)),
    "attention U-Net, 64^3": Architecture(lambda: AttentionUNet(1, 4, 32), 1, (64, 64, 64), ("300MiB", "1GiB")),
    "StarDist, 3 heads, 256^2": Architecture(lambda: StarHeads(2, 32, 32, 5), 2, (256, 256), ("160MiB", "300MiB")),
}
