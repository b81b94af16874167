"""Small folders of results of nnU-Net and volumes for them: the suite compares with what nnU-Net made of them.

`tests/interop/campaign_nnunet.py` runs nnU-Net itself, and stores its labels for the suite.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

Array = np.ndarray[Any, Any]

NETWORK = f"{__name__}.TinyNet"
IMPORTED = ("conv_op", "norm_op")
RESAMPLING = "resample_data_or_seg_to_shape"
REFERENCE = Path(__file__).parent.parent / "interop" / "nnunet_labels.npz"
"""Labels of all cases, as nnU-Net 2.8.1 gives them with sums in float32 instead of float16."""


class TinyNet(nn.Module):
    """Two convolutions with instance norms: a voxel's scores depend on all of its patch, so a patch elsewhere shows."""

    def __init__(
        self,
        *,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool,
        conv_op: Any,
        norm_op: Any,
        features: int,
    ) -> None:
        super().__init__()
        assert not deep_supervision
        self.layers = nn.Sequential(
            conv_op(input_channels, features, 3, padding=1),
            norm_op(features, affine=True),
            nn.LeakyReLU(inplace=True),
            conv_op(features, features, 3, padding=2, dilation=2),
            norm_op(features, affine=True),
            nn.LeakyReLU(inplace=True),
            conv_op(features, num_classes, 1),
        )

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.layers(patches)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Case:
    """A folder and a volume, whose axes are z, y and x.

    Attributes:
        shape, spacing: of the volume.
        patch, model_spacing: of the plans, in their order of axes; two of each for slices.
        schemes: of normalization, one per channel.
        holes: whether a part of each slice is zero.
        border: voxels of zeros at some sides, which nnU-Net crops.
        border: voxels at each side of the volume that are zero in all channels.
    """

    shape: tuple[int, int, int] = (22, 27, 25)
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    patch: tuple[int, ...] = (12, 14, 12)
    model_spacing: tuple[float, ...] = (1.0, 1.0, 1.0)
    schemes: tuple[str, ...] = ("CTNormalization",)
    masked: bool = False
    transpose: tuple[int, int, int] = (0, 1, 2)
    mirrored: tuple[int, ...] | None = (0, 1, 2)
    folds: int = 1
    labels: dict[str, Any] = field(default_factory=lambda: {"background": 0, "one": 1, "two": 2, "ignore": 3})
    order: tuple[int, ...] = ()
    holes: bool = False
    border: int = 0

    @property
    def volume(self) -> Array:
        """Smooth noise, `(C, z, y, x)` of float32, between -1000 and 1000."""
        rng = np.random.default_rng(sum(self.shape))
        frequency = np.sqrt(sum(np.meshgrid(*(np.fft.fftfreq(n) ** 2 for n in self.shape), indexing="ij")))
        damped = np.exp(-((frequency / 0.12) ** 2))
        values = rng.standard_normal((len(self.schemes), *self.shape))
        values = np.fft.ifftn(np.fft.fftn(values, axes=(1, 2, 3)) * damped, axes=(1, 2, 3)).real
        values *= 1000 / np.abs(values).max()
        if self.holes:  # a part of each slice has no signal, but no whole face of the volume
            values[:, :, :9, 8:] = 0
        if self.border:
            inside = np.zeros(self.shape, bool)
            inside[self.border :, self.border : -1, : -self.border] = True
            values[:, ~inside] = 0
        return values.astype(np.float32)

    def write(self, folder: Path) -> None:
        """Write plans, data set and checkpoints."""
        dims, heads = len(self.patch), len(self.order) or len(self.labels) - ("ignore" in self.labels)
        order = {"is_seg": False, "order_z": 0, "force_separate_z": None}
        configuration = {
            "preprocessor_name": "DefaultPreprocessor",
            "patch_size": list(self.patch),
            "spacing": list(self.model_spacing),
            "normalization_schemes": list(self.schemes),
            "use_mask_for_norm": [self.masked] * len(self.schemes),
            "resampling_fn_data": RESAMPLING,
            "resampling_fn_data_kwargs": {**order, "order": 3},
            "resampling_fn_seg": RESAMPLING,
            "resampling_fn_seg_kwargs": {**order, "is_seg": True, "order": 1},
            "resampling_fn_probabilities": RESAMPLING,
            "resampling_fn_probabilities_kwargs": {**order, "order": 1},
            "architecture": {
                "network_class_name": NETWORK,
                "arch_kwargs": {
                    "conv_op": f"torch.nn.Conv{dims}d",
                    "norm_op": f"torch.nn.InstanceNorm{dims}d",
                    "features": 6,
                },
                "_kw_requires_import": list(IMPORTED),
            },
        }
        numbers = {"mean": 20.0, "std": 310.0, "percentile_00_5": -400.0, "percentile_99_5": 500.0}
        plans = {
            "image_reader_writer": "NibabelIO",
            "transpose_forward": list(self.transpose),
            "transpose_backward": np.argsort(self.transpose).tolist(),
            "configurations": {
                "base": {k: v for k, v in configuration.items() if k != "patch_size"},
                "3d_fullres": {"inherits_from": "base", "patch_size": configuration["patch_size"]},
            },
            "foreground_intensity_properties_per_channel": {str(c): numbers for c in range(len(self.schemes))},
        }
        dataset = {"channel_names": {str(c): "noise" for c in range(len(self.schemes))}, "labels": self.labels}
        dataset |= {"regions_class_order": list(self.order), "file_ending": ".nii"}
        folder.mkdir(parents=True)
        (folder / "plans.json").write_text(json.dumps(plans))
        (folder / "dataset.json").write_text(json.dumps(dataset))
        arguments = configuration["architecture"]["arch_kwargs"]
        operations = {name: getattr(nn, arguments[name].removeprefix("torch.nn.")) for name in IMPORTED}
        for fold in range(self.folds):
            with torch.random.fork_rng():
                torch.manual_seed(fold)
                network = TinyNet(
                    input_channels=len(self.schemes),
                    num_classes=heads,
                    deep_supervision=False,
                    **operations,
                    features=6,
                )
            checkpoint = {
                "network_weights": network.state_dict(),
                "init_args": {"configuration": "3d_fullres", "fold": fold, "device": torch.device("cpu")},
                "trainer_name": "nnUNetTrainer",
                "inference_allowed_mirroring_axes": self.mirrored,
                "logging": {"ema_fg_dice": [np.float64(0.5)], "epoch": np.int64(1)},
                "_best_ema": np.float32(0.5),
            }
            (folder / f"fold_{fold}").mkdir()
            torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")


REGIONS = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}

CASES = {
    "ct": Case(mirrored=None),
    "mirrored, two folds": Case(folds=2, mirrored=(0, 2)),
    "two channels, regions": Case(
        schemes=("ZScoreNormalization", "RescaleTo01Normalization"), labels=REGIONS, order=(1, 2), mirrored=(0,)
    ),
    "masked": Case(schemes=("ZScoreNormalization",), masked=True, holes=True, mirrored=None),
    "cropped": Case(shape=(28, 30, 27), border=4, schemes=("ZScoreNormalization",), mirrored=None),
    "cropped, finer": Case(
        shape=(20, 21, 22), border=4, schemes=("ZScoreNormalization",), mirrored=None, model_spacing=(0.8, 0.8, 0.8)
    ),
    "transposed, larger patch": Case(transpose=(1, 0, 2), patch=(14, 32, 12), mirrored=(1,)),
    "slices": Case(patch=(14, 12), model_spacing=(1.0, 1.0), mirrored=(0, 1), schemes=("ZScoreNormalization",)),
    "finer": Case(shape=(14, 17, 18), model_spacing=(0.8, 0.7, 0.9), mirrored=None),
    "thick slices": Case(shape=(9, 30, 28), spacing=(5.0, 1.0, 1.0), model_spacing=(3.0, 1.3, 1.3), mirrored=None),
}
