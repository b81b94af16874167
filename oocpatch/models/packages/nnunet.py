"""Folders of results of nnU-Net, version 2, as model packages.

A folder has `plans.json`, `dataset.json`, and a checkpoint per fold, which names the configuration of the plans that it
was trained with. The spec takes `folds=0+1` (default: all that are there) and `checkpoint=checkpoint_best.pth`.

```text
 volume (z, y, x) --normalize--> --resample to the spacing--> patches --transpose--> network
                                                                                        |
 labels <--argmax, or regions-- scores on the volume's grid <--resample-- blended scores
```
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from oocpatch.errors import error_line
from oocpatch.models.packages.package import Entries, ModelPackage, NamedAxes, refuse_options
from oocpatch.system import import_extra
from oocpatch.volumes.model_grid import ModelGrid

AXES = ("z", "y", "x")
"""Axes of the arrays that nnU-Net's readers give, in their order."""

NETWORKS = "dynamic_network_architectures"

READERS = ("SimpleITKIO", "NibabelIO", "NaturalImage2DIO", "Tiff3DIO")
"""Readers whose arrays have the axes of the file, in the order of `AXES`."""

MEDICAL = ("SimpleITKIO", "NibabelIO")
"""Readers of files whose voxel sizes are in millimetres."""

SEPARATE = 3.0
"""Ratio of voxel sizes from which nnU-Net resamples the coarsest axis for itself, without interpolation."""


@dataclass(frozen=True, slots=True)
class RegionLabels:
    """Turns scores of regions, `(C, *box)`, into labels: of each voxel that of the last region that it is in.

    Attributes:
        order: the label of each region.

    >>> RegionLabels((1, 2))(torch.tensor([[1.0, 1.0, -1.0], [-1.0, 1.0, -1.0]])).tolist()
    [[1, 2, 0]]
    """

    order: tuple[int, ...]

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """Return labels `(1, *box)`."""
        labels = scores.new_zeros(scores.shape[1:], dtype=torch.uint8 if max(self.order) < 256 else torch.int32)
        for region, label in zip(scores, self.order, strict=True):
            labels[region > 0] = label  # where the sigmoid is above one half
        return labels[None]


def load(path: Path, options: Mapping[str, str], *, trust_pickle: bool, device: str) -> ModelPackage:
    """Load a folder of results.

    Raises:
        ValueError: for a folder that is none, and for what its plans say that cannot be honoured.
    """
    refuse_options(options, ("folds", "checkpoint"), "nnunet")
    plans, dataset = (_read_json(path / name) for name in ("plans.json", "dataset.json"))
    files = _checkpoint_files(path, options)
    checkpoints = [_read_checkpoint(file, trust_pickle=trust_pickle) for file in files]
    plan = NnunetPlan.of(plans, dataset, checkpoints[0])
    networks = []
    for file, checkpoint in zip(files, checkpoints, strict=True):
        network = plan.network(trust_pickle=trust_pickle)
        weights = {name.removeprefix("module."): value for name, value in checkpoint["network_weights"].items()}
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"the weights in {str(file)!r} do not fit the architecture in plans.json, as it may be with a trainer "
                f"that builds another network ({checkpoint.get('trainer_name')}): {error_line(error)}"
            ) from error
        networks.append(NamedAxes(network, plan.axes, plan.channels).to(device).eval())
    return ModelPackage(
        models=tuple(networks),
        settings=plan.settings,
        files=(path / "plans.json", path / "dataset.json", *files),
        classes=plan.classes,
        libraries=(NETWORKS,) if plan.architecture["network_class_name"].startswith(f"{NETWORKS}.") else (),
        normalizes_first=True,
    )


@dataclass(frozen=True)
class NnunetPlan:
    """The parts of plans and of a data set that prediction depends on.

    Attributes:
        configuration: the configuration of the plans, inherited values included.
        names: names of the spatial axes in the order of the plans: `AXES`, transposed.
        intensities: intensities of the foreground of each channel, as the plans have them.
        channels: number of channels of the volume.
        labels: the data set's labels by name: numbers, or lists of numbers where they are regions.
        region_order: labels of the regions, in the order in which they are drawn; None: labels are not regions.
        mirrored: axes of the network along which predictions are mirrored.
        unit: unit of voxel sizes; None: that of the images, whatever it is.
    """

    configuration: Mapping[str, Any]
    names: tuple[str, ...]
    intensities: Mapping[str, Any]
    channels: int
    labels: Mapping[str, Any]
    region_order: tuple[int, ...] | None
    mirrored: tuple[int, ...]
    unit: str | None

    @classmethod
    def of(cls, plans: Mapping[str, Any], dataset: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> NnunetPlan:
        """Read plans, and refuse what is not done here.

        Raises:
            ValueError: naming the entry.
        """
        configuration = _configuration(
            plans, Entries(checkpoint["init_args"], "init_args of the checkpoint")["configuration"]
        )
        if configuration.get("previous_stage"):
            raise ValueError(
                f"an nnU-Net cascade takes the labels of its previous stage as input, which is not done here: "
                f"previous_stage is {configuration['previous_stage']!r}; use a folder of 3d_fullres, 3d_lowres or 2d"
            )
        expected = {
            "preprocessor_name": (configuration.get("preprocessor_name"), ("DefaultPreprocessor",)),
            "label_manager": (plans.get("label_manager", "LabelManager"), ("LabelManager",)),
            "image_reader_writer": (plans.get("image_reader_writer"), READERS),
            "resampling_fn_data": (configuration.get("resampling_fn_data"), RESAMPLINGS),
            "resampling_fn_probabilities": (configuration.get("resampling_fn_probabilities"), RESAMPLINGS),
        }
        for name, (value, known) in expected.items():
            if value not in known:
                raise ValueError(f"plans.json must have {name} {' or '.join(known)} to be honoured, got {value!r}")
        labels = {name: value for name, value in dataset["labels"].items() if name != "ignore"}
        regions = any(isinstance(value, list) and len(value) > 1 for value in labels.values())
        mirrored = checkpoint.get("inference_allowed_mirroring_axes") or ()
        names = tuple(AXES[axis] for axis in plans["transpose_forward"])
        is_flat = plans["image_reader_writer"] == "NaturalImage2DIO"
        return cls(
            configuration,
            names[1:] if is_flat else names,
            plans.get("foreground_intensity_properties_per_channel")
            or plans.get("foreground_intensity_properties_by_modality")
            or {},
            len(dataset.get("channel_names") or dataset["modality"]),
            labels,
            tuple(int(label) for label in dataset["regions_class_order"]) if regions else None,
            tuple(int(axis) for axis in mirrored),
            "millimeter" if plans["image_reader_writer"] in MEDICAL else None,
        )

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes that the network takes."""
        return self.names[-len(self.configuration["patch_size"]) :]

    @property
    def architecture(self) -> Mapping[str, Any]:
        """The class of the network and its arguments."""
        return self.configuration.get("architecture") or _older_architecture(self.configuration)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels from 0; of regions, none."""
        return () if self.region_order is not None else tuple(sorted(self.labels, key=lambda name: self.labels[name]))

    @property
    def heads(self) -> int:
        """Number of the network's output channels."""
        if self.region_order is None:
            return len({int(label) for value in self.labels.values() for label in np.atleast_1d(value)})
        return len(self.region_order)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of `predict`."""
        patch = dict(zip(self.axes, self.configuration["patch_size"], strict=True))
        sliced = [name for name in self.names if name not in self.axes]
        mirrored = [self.axes[axis] for axis in self.mirrored]
        return {
            "patch_size": {**dict.fromkeys(sliced, 1), **patch},
            # at most half a patch apart
            "patch_overlap": {**dict.fromkeys(sliced, 0), **{name: n - max(1, n // 2) for name, n in patch.items()}},
            "patch_starts": "even",
            "overlap_mode": "nnunet",
            "padding_mode": "constant",
            "preprocess": self.normalization,
            "spacing": self.grid,
            "augment": {"name": "flips", "axes": mirrored} if mirrored else None,
            "postprocess": "argmax" if self.region_order is None else RegionLabels(self.region_order),
        }

    @property
    def normalization(self) -> list[dict[str, Any]]:
        """The steps of preprocessing of each channel."""
        steps: list[dict[str, Any]] = []
        schemes = self.configuration["normalization_schemes"]
        masked = self.configuration.get("use_mask_for_norm") or [False] * len(schemes)
        for channel, (scheme, is_masked) in enumerate(zip(schemes, masked, strict=True)):
            steps += [
                {**step, "channels": [channel]} for step in self._steps(channel, scheme, is_masked=bool(is_masked))
            ]
        return steps

    def _steps(self, channel: int, scheme: str, *, is_masked: bool) -> list[dict[str, Any]]:
        """Return the steps of one channel."""
        if scheme == "CTNormalization":
            numbers = self.intensities[str(channel)]
            low, high = (float(numbers[f"percentile_{rank}"]) for rank in ("00_5", "99_5"))
            divide = max(float(numbers["std"]), 1e-8)
            return [
                {"name": "clip", "low": low, "high": high},
                {"name": "scale", "subtract": float(numbers["mean"]), "divide": divide},
            ]
        if scheme == "ZScoreNormalization":
            return [{"name": "zscore", "nonzero": is_masked}]
        if scheme == "RescaleTo01Normalization":
            return [{"name": "percentile", "low": 0.0, "high": 100.0, "clip": False}]
        if scheme == "RGBTo01Normalization":
            return [{"name": "scale", "subtract": 0.0, "divide": 255.0}]
        if scheme == "NoNormalization":
            return []
        raise ValueError(f"the plan's normalization scheme of channel {channel} is not known here, got {scheme!r}")

    @property
    def grid(self) -> ModelGrid | None:
        """The voxel sizes that the network takes, and how is resampled to them and back."""
        if self.configuration["resampling_fn_data"] == NO_RESAMPLING or "z" not in self.names:
            return None  # pictures have no voxel size
        spacing = dict(zip(self.axes, map(float, self.configuration["spacing"]), strict=True))
        data, scores = (self.configuration[f"resampling_fn_{name}_kwargs"] for name in ("data", "probabilities"))
        for name, value in (("data", data), ("probabilities", scores)):
            if value.get("order_z", 0) != 0 or value.get("force_separate_z") is True:
                raise ValueError(
                    f"plans.json must have order_z 0 and force_separate_z null or false in resampling_fn_{name}_kwargs "
                    f"to be honoured, got {value}"
                )
        separate = SEPARATE if data.get("force_separate_z", False) is None else math.inf
        return ModelGrid(spacing, data.get("order", 3), scores.get("order", 3), separate=separate, unit=self.unit)

    def network(self, *, trust_pickle: bool) -> nn.Module:
        """Build the network, with random weights.

        Raises:
            ValueError: if its library is not installed, or it is a class of another one.
        """
        arguments = Entries(self.architecture["arch_kwargs"], "arch_kwargs of plans.json")
        for name in self.architecture["_kw_requires_import"]:
            if arguments[name] is not None:
                arguments[name] = _located(arguments[name], trust_pickle=trust_pickle)
        network = _located(self.architecture["network_class_name"], trust_pickle=trust_pickle)
        arguments |= {"input_channels": self.channels, "num_classes": self.heads, "deep_supervision": False}
        try:
            built: nn.Module = network(**arguments)
        except Exception as error:
            raise ValueError(f"the architecture in plans.json cannot be built: {error_line(error)}") from error
        return built


NO_RESAMPLING = "no_resampling_hack"
RESAMPLINGS = ("resample_data_or_seg_to_shape", NO_RESAMPLING)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(), object_hook=functools.partial(Entries, place=file.name))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"a folder of nnU-Net's results has plans.json, dataset.json and fold_*/checkpoint_final.pth, but {file} "
            "is missing; pass the folder named TRAINER__PLANS__CONFIGURATION"
        ) from error
    except ValueError as error:
        raise ValueError(f"{file} must hold JSON: {error_line(error)}") from error
    if not isinstance(content, Entries):
        raise ValueError(f"{file} must hold a JSON object, got a {type(content).__name__}")
    return content


def _configuration(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a configuration with what it inherits.

    Raises:
        ValueError: if it is not there.
    """
    parts: list[dict[str, Any]] = []
    following: str | None = name
    while following is not None:
        if following not in plans["configurations"] or len(parts) > len(plans["configurations"]):
            raise ValueError(
                f"plans.json must have the configuration {following!r} that the checkpoint was trained with, got "
                f"{', '.join(plans['configurations'])}"
            )
        parts.append(plans["configurations"][following])
        following = parts[-1].get("inherits_from")
    merged = {key: value for part in reversed(parts) for key, value in part.items()}
    return Entries(merged, f"configuration {name} of plans.json")


def _checkpoint_files(path: Path, options: Mapping[str, str]) -> list[Path]:
    """Return the checkpoints of the folds.

    Raises:
        ValueError: if one is missing, or there is none.
    """
    name = options.get("checkpoint", "checkpoint_final.pth")
    if folds := options.get("folds"):
        files = [path / f"fold_{fold}" / name for fold in folds.split("+")]
        if missing := [str(file) for file in files if not file.is_file()]:
            raise ValueError(f"the checkpoint of a fold does not exist: {', '.join(missing)}")
        return files
    files = sorted(file for file in path.glob(f"fold_*/{name}") if file.parent.name != "fold_all")
    if not files and (path / "fold_all" / name).is_file():
        files = [path / "fold_all" / name]
    if not files:
        there = sorted({str(file.relative_to(path)) for file in path.glob("fold_*/*.pth")})
        raise ValueError(f"no fold in {path} has a {name}, got {', '.join(there) or 'no checkpoint'}; pass checkpoint=")
    return files


def _read_checkpoint(file: Path, *, trust_pickle: bool) -> Mapping[str, Any]:
    """Read a checkpoint; its numbers and dtypes of numpy are allowed, since they run no code."""
    try:
        with _numpy_scalars():
            checkpoint: Mapping[str, Any] = torch.load(
                file, map_location="cpu", weights_only=not trust_pickle, mmap=True
            )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(file)!r} needs code of its own to be unpickled: {error_line(error)}; pass --trust-pickle "
            "(trust_pickle=True) if you trust its author"
        ) from error
    except Exception as error:
        raise ValueError(f"the checkpoint {str(file)!r} cannot be read: {error_line(error)}") from error
    if not isinstance(checkpoint, dict) or not {"network_weights", "init_args"} <= set(checkpoint):
        raise ValueError(f"{str(file)!r} must be a checkpoint of nnU-Net, version 2: network_weights and init_args")
    return checkpoint


@contextlib.contextmanager
def _numpy_scalars() -> Iterator[None]:
    """Allow the scalars of numpy that nnU-Net's logs hold, by the names that numpy 1 and 2 have for them."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "bool")]
    names: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    with torch.serialization.safe_globals([*names, np.dtype, *dtypes]):
        yield


def _located(name: str, *, trust_pickle: bool) -> Any:
    """Import a class by its full name: one of torch or of nnU-Net's networks, unless other code may run.

    Raises:
        ValueError: if it is another one, or is not there.
    """
    module, _, attribute = name.rpartition(".")
    library = name.partition(".")[0]
    if library not in ("torch", NETWORKS) and not trust_pickle:
        raise ValueError(
            f"plans.json must name classes of torch or {NETWORKS}, got {name!r}; pass --trust-pickle "
            "(trust_pickle=True) if you trust its author"
        )
    import_extra(library, "nnunet", "an nnU-Net")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"plans.json names {name!r}, which is not installed: {error_line(error)}") from error


def _older_architecture(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Return the architecture of plans that describe it by numbers, as those of the first versions do."""
    name, stages = configuration["UNet_class_name"], len(configuration["n_conv_per_stage_encoder"])
    dims = len(configuration["patch_size"])
    if name not in ("PlainConvUNet", "ResidualEncoderUNet"):
        raise ValueError(f"plans.json must have UNet_class_name PlainConvUNet or ResidualEncoderUNet, got {name!r}")
    widest, base = configuration["unet_max_num_features"], configuration["UNet_base_num_features"]
    encoder = "n_conv_per_stage" if name == "PlainConvUNet" else "n_blocks_per_stage"
    return {
        "network_class_name": f"{NETWORKS}.architectures.unet.{name}",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": [min(base << stage, widest) for stage in range(stages)],
            "conv_op": f"torch.nn.Conv{dims}d",
            "kernel_sizes": configuration["conv_kernel_sizes"],
            "strides": configuration["pool_op_kernel_sizes"],
            encoder: configuration["n_conv_per_stage_encoder"],
            "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
            "conv_bias": True,
            "norm_op": f"torch.nn.InstanceNorm{dims}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
