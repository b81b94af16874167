"""Packages of bioimage.io: `bioimageio:PATH` of a folder, a zip file or an `rdf.yaml`, specification 0.4 and 0.5.

The description is read and validated by `bioimageio.spec`, which also brings version 0.4 to 0.5. Its parts are named by
their paths in it, such as `inputs.0.preprocessing.1`, when they cannot be honoured.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import tempfile
import warnings
import weakref
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from oocpatch.errors import error_line
from oocpatch.models.input_spec import InputSpec, ModelFile
from oocpatch.models.loading import load_model
from oocpatch.models.named_outputs import named_outputs, unnamed
from oocpatch.models.packages.package import (
    Example,
    ExpectedOutput,
    ModelPackage,
    refuse_options,
    refused_unless_given,
)
from oocpatch.system import import_extra

EXTRA = "bioimageio"
DESCRIPTIONS = ("rdf.yaml", "bioimageio.yaml", "model.yaml")
WEIGHTS = ("pytorch_state_dict", "torchscript", "onnx")
"""Formats of weights that can be run, the preferred first."""

SIDES = {1: 4096, 2: 256, 3: 96}
"""Voxels along each axis of a patch, by the number of axes, where the package allows any: the next allowed size."""


def load(path: Path, options: Mapping[str, str], *, trust_pickle: bool, device: str) -> ModelPackage:
    """Load a package.

    Args:
        path: a folder, a zip file or a description.
        options: `weights`, the format of weights to use.
        trust_pickle: run the package's source of the network, for weights that need it.
        device: where the model will run.

    Raises:
        ValueError: naming the part that cannot be honoured.
    """
    refuse_options(options, ("weights",), "bioimageio")
    spec = import_extra("bioimageio.spec", EXTRA, f"reading the package {str(path)!r}")
    folder, unpacked = _unpacked(path)
    description = _description(folder, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how version 0.4 becomes 0.5
            loaded = spec.load_model_description(description, format_version="latest", perform_io_checks=False)
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} is not a valid model of bioimage.io: {' '.join(str(error).split())}"
        ) from error
    package = _Package(loaded, description.parent)
    weights, network, files, libraries = package.network(
        options.get("weights"), trust_pickle=trust_pickle, device=device
    )
    model = package.model(network)
    if unpacked is not None:  # ONNX may read its file again
        weakref.finalize(model, unpacked.cleanup)
    return ModelPackage(
        models=(model,),
        settings=package.settings(),
        files=(path,) if unpacked is not None else (description, *files),
        classes=package.classes(),
        libraries=libraries,
        example=lambda: package.example(weights),
    )


def _unpacked(path: Path) -> tuple[Path, tempfile.TemporaryDirectory[str] | None]:
    """Return the folder, or the description, of a package; a zip file is unpacked."""
    if path.is_dir() or not zipfile.is_zipfile(path):
        return path, None
    folder = tempfile.TemporaryDirectory(prefix="oocpatch-package-")
    try:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder.name)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        folder.cleanup()
        raise ValueError(f"{str(path)!r} is damaged: {error_line(error)}; download it again") from error
    return Path(folder.name), folder


def _description(folder: Path, path: Path) -> Path:
    if folder.is_file():
        return folder
    files = [folder / name for name in DESCRIPTIONS]
    files += [file for end in ("rdf", "bioimageio", "model") for file in sorted(folder.glob(f"*.{end}.yaml"))]
    for file in files:
        if file.is_file():
            return file
    raise ValueError(f"a package of bioimage.io must have a description, {DESCRIPTIONS[0]}, and {str(path)!r} has none")


@dataclass(frozen=True, slots=True)
class _Package:
    """A validated description and its folder."""

    description: Any
    folder: Path

    @property
    def tensor(self) -> Any:
        """The description of the input."""
        for number, tensor in enumerate(self.description.inputs[1:], 1):
            if not tensor.optional:
                raise ValueError(f"inputs.{number} ({tensor.id}): models of several inputs are not run")
        return self.description.inputs[0]

    @property
    def axes(self) -> list[Any]:
        """The spatial axes of the input."""
        return [axis for axis in self.tensor.axes if axis.type == "space"]

    def file(self, part: str, source: Any) -> Path:
        """Return a file of the package."""
        file = self.folder / str(source)
        if not file.is_file():
            raise ValueError(f"{part}: {str(source)!r} is not in the package; download the complete package")
        return file

    def network(
        self, wanted: str | None, *, trust_pickle: bool, device: str
    ) -> tuple[str, nn.Module, list[Path], tuple[str, ...]]:
        """Return the weights' format, the network, its files, and the libraries that its code is from."""
        entries = {name: entry for name, entry in self.description.weights if entry is not None}
        if wanted is not None and wanted not in entries:
            raise ValueError(f"weights must be a format that the package has ({', '.join(entries)}), got {wanted!r}")
        reasons = []
        for name in WEIGHTS if wanted is None else (wanted,):
            if name not in entries:
                continue
            if name == "pytorch_state_dict" and not trust_pickle:
                reasons.append(f"{name} runs code of the package: pass --trust-pickle if you trust its author")
            elif name == "onnx" and importlib.util.find_spec("onnxruntime") is None:
                reasons.append(f"{name} needs onnxruntime: pip install 'oocpatch[onnx]'")
            elif name in WEIGHTS:
                return name, *self._loaded(name, entries[name], device)
        reasons += [f"{name} is not run here" for name in entries if name not in WEIGHTS]
        raise ValueError(f"weights: none of the package can be used; {'; '.join(reasons)}")

    def _loaded(self, name: str, entry: Any, device: str) -> tuple[nn.Module, list[Path], tuple[str, ...]]:
        part = f"weights.{name}"
        file = self.file(f"{part}.source", entry.source)
        files = [file]
        libraries: tuple[str, ...] = ()
        if name == "onnx" and entry.external_data is not None:
            files.append(self.file(f"{part}.external_data", entry.external_data.source))
        if name != "pytorch_state_dict":
            suffix = {"torchscript": ".pt", "onnx": ".onnx"}[name]
            if file.suffix.lower() != suffix:
                raise ValueError(f"{part}.source must end in {suffix}, got {file.name!r}; rename it")
            return _as_module(load_model(str(file), device=device)), files, libraries
        architecture = entry.architecture
        if hasattr(architecture, "import_from"):
            place = str(architecture.import_from)
            root = place.partition(".")[0]
            libraries = tuple(importlib.metadata.packages_distributions().get(root, ())[:1])
        else:
            source = self.file(f"{part}.architecture.source", architecture.source)
            files.append(source)
            place = str(source)
        try:
            network = load_model(
                f"{place}:{architecture.callable}",
                weights=str(file),
                model_args=dict(architecture.kwargs),
                trust_pickle=True,
                device=device,
            )
        except ValueError as error:
            raise ValueError(f"{part}: {error}") from error
        return _as_module(network), files, libraries

    def model(self, network: nn.Module) -> ModelFile:
        """Return the network as a model of patches `(B, C, *patch)`."""
        tensor = self.tensor
        for part, axis in ((f"inputs.0.axes.{axis.id}", axis) for axis in tensor.axes):
            if axis.type not in ("batch", "channel", "space"):
                raise ValueError(f"{part}: an axis of type {axis.type} is not supported")
            if getattr(axis, "pad", None) is not None:
                raise ValueError(f"{part}.pad: padding of the sample is not supported")
        types = [axis.type for axis in tensor.axes]
        if "batch" not in types or "space" not in types:
            raise ValueError("inputs.0.axes must have a batch axis and a spatial one")
        outputs = {}
        for number, output in enumerate(self.description.outputs):
            names = [axis.id for axis in output.axes if axis.type == "space"]
            if names != [axis.id for axis in self.axes] or any(a.type in ("time", "index") for a in output.axes):
                raise ValueError(
                    f"outputs.{number}.axes: must be the input's spatial axes ({', '.join(a.id for a in self.axes)}), "
                    f"batch and channel, got {', '.join(axis.id for axis in output.axes)}"
                )
            outputs[str(output.id)] = [axis.type for axis in output.axes]
        channels = [len(axis.channel_names) for axis in tensor.axes if axis.type == "channel"]
        batch = next(axis.size for axis in tensor.axes if axis.type == "batch")
        sides = tuple(axis.size if isinstance(axis.size, int) else None for axis in self.axes)
        last = getattr(tensor.preprocessing[-1].kwargs, "dtype", "float32")  # else it ends with `binarize`
        dtype = getattr(torch, str(last))
        spec = InputSpec(1, batch, channels[0] if channels else 1, sides, dtype)
        return ModelFile(_InAxes(network, types, outputs), spec)

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `predict` that the description stands for."""
        halo = self._halo()
        size = self._patch_size(halo)
        settings: dict[str, Any] = {"patch_size": size}
        if any(halo):
            settings |= {"patch_overlap": tuple(2 * h for h in halo), "overlap_mode": "crop"}
        else:
            settings["patch_overlap"] = tuple(n // 8 * 2 for n in size)
        with refused_unless_given(settings, "preprocess"):
            settings["preprocess"] = self._preprocessing() or None
        with refused_unless_given(settings, "postprocess"):
            after, dtypes = {}, {}
            for number, output in enumerate(self.description.outputs):
                after[str(output.id)], dtypes[str(output.id)] = _postprocessing(f"outputs.{number}", output)
            is_single = len(after) == 1
            settings["postprocess"] = next(iter(after.values())) if is_single else after
            settings["output_dtype"] = next(iter(dtypes.values())) if is_single else dtypes
        return {name: value for name, value in settings.items() if value not in (None, [], {})}

    def _halo(self) -> list[int]:
        """Return the voxels of the input to cut off at each side of a patch, beside what the network loses."""
        by_axis = {axis.id: axis for axis in self.axes}
        halo = dict.fromkeys(by_axis, 0)
        for output in self.description.outputs:
            for axis in output.axes:
                if axis.type != "space" or not (voxels := getattr(axis, "halo", 0)):
                    continue
                ratio = axis.scale / by_axis[axis.id].scale
                lost = -getattr(axis.size, "offset", 0) * ratio / 2
                halo[axis.id] = max(halo[axis.id], math.ceil(voxels * ratio + lost))
        return list(halo.values())

    def _patch_size(self, halo: Sequence[int]) -> tuple[int, ...]:
        """Return the smallest size that the description allows and that is no smaller than the usual one."""
        sizes: dict[Any, int] = {}
        usual = SIDES.get(len(self.axes), SIDES[3])
        for axis, lost in zip(self.axes, halo, strict=True):
            size, least = axis.size, max(usual, 8 * lost)
            if isinstance(size, int):
                sizes[axis.id] = size
            elif hasattr(size, "step"):
                sizes[axis.id] = size.min + max(0, math.ceil((least - size.min) / size.step)) * size.step
        for number, axis in enumerate(self.axes):
            size = axis.size
            if axis.id in sizes:
                continue
            if getattr(size, "tensor_id", None) != self.tensor.id or size.axis_id not in sizes:
                raise ValueError(f"inputs.0.axes.{axis.id}.size: must follow from the spatial axes of the same input")
            reference = next(other for other in self.axes if other.id == size.axis_id)
            sizes[axis.id] = int(sizes[size.axis_id] * reference.scale / self.axes[number].scale + size.offset)
        return tuple(sizes[axis.id] for axis in self.axes)

    def _preprocessing(self) -> list[dict[str, Any]]:
        """Return the steps of `preprocess`."""
        steps: list[dict[str, Any]] = []
        for number, step in enumerate(self.tensor.preprocessing):
            part = f"inputs.0.preprocessing.{number} ({step.id})"
            if step.id == "ensure_dtype":
                if steps and not str(step.kwargs.dtype).startswith("float"):
                    raise ValueError(f"{part}: values after other steps are floats, got {step.kwargs.dtype}")
                continue
            steps.append(self._preprocess_step(part, step, has_steps=bool(steps)))
        return steps

    def _preprocess_step(self, part: str, step: Any, *, has_steps: bool) -> dict[str, Any]:
        kwargs, kind = step.kwargs, step.id
        if (axis := getattr(kwargs, "axis", "channel")) != "channel":
            raise ValueError(f"{part}: numbers along axis {axis} are not supported, only along channel")
        found: dict[str, Any] | None = None
        if kind == "binarize":
            found = {"name": "binarize", "at": kwargs.threshold}
        elif kind == "sigmoid":
            found = {"name": "sigmoid"}
        elif kind == "clip" and _is_fixed(kwargs):
            limits = {"low": kwargs.min, "high": kwargs.max}
            found = {"name": "clip", **{key: value for key, value in limits.items() if value is not None}}
        elif kind == "fixed_zero_mean_unit_variance":
            found = {"name": "scale", "subtract": kwargs.mean, "divide": kwargs.std}
        elif kind == "scale_linear":
            gain, offset = np.broadcast_arrays(*np.atleast_1d(kwargs.gain, kwargs.offset))
            if (gain != 0).all():
                found = {"name": "scale", "subtract": (-offset / gain).tolist(), "divide": (1 / gain).tolist()}
        elif kind in ("zero_mean_unit_variance", "scale_range"):
            found = {"name": "zscore", "pooled": self._is_pooled(part, kwargs.axes), "epsilon": kwargs.eps}
            if kind == "scale_range":
                reference = kwargs.reference_tensor
                is_same = reference is None or (reference == self.tensor.id and not has_steps)
                low, high = kwargs.min_percentile, kwargs.max_percentile
                found |= {"name": "percentile", "low": low, "high": high, "clip": False}
                found = found if is_same else None
        if found is None:
            given = {key: value for key, value in dict(kwargs).items() if value is not None}
            raise ValueError(f"{part}: is not supported with {given}")
        return found

    def _is_pooled(self, part: str, axes: Sequence[Any] | None) -> bool:
        """Return whether channels are measured together; statistics are those of whole volumes."""
        types = {axis.id: axis.type for axis in self.tensor.axes}
        if axes is None:
            return True
        if missing := [axis.id for axis in self.axes if axis.id not in axes]:
            raise ValueError(f"{part}: is measured of whole volumes, not for each index of {', '.join(missing)}")
        return any(types[axis] == "channel" for axis in axes)

    def classes(self) -> tuple[str, ...]:
        """Return the names of the output's channels, if there is one output of several."""
        named = [axis for output in self.description.outputs for axis in output.axes if axis.type == "channel"]
        if len(self.description.outputs) > 1 or not named or len(named[0].channel_names) == 1:
            return ()
        return tuple(str(name) for name in named[0].channel_names)

    def example(self, weights: str) -> Example:
        """Return the test tensors, with the tolerances for a format of weights."""
        inputs = self.tensor
        outputs = {}
        for number, output in enumerate(self.description.outputs):
            array = self._test_tensor(f"outputs.{number}", output)
            outputs[str(output.id)] = ExpectedOutput(_in_order(array, output), *self._tolerance(output.id, weights))
        return Example(_in_order(self._test_tensor("inputs.0", inputs), inputs), outputs)

    def _test_tensor(self, part: str, tensor: Any) -> np.ndarray[Any, Any]:
        if tensor.test_tensor is None:
            raise ValueError(f"{part}.test_tensor: the package has none, so there is nothing to compare with")
        file = self.file(f"{part}.test_tensor", tensor.test_tensor.source)
        try:
            return np.asarray(np.load(file, allow_pickle=False))
        except (ValueError, EOFError) as error:
            raise ValueError(f"{part}.test_tensor: {str(file)!r} must be an array of numpy, .npy") from error

    def _tolerance(self, output: Any, weights: str) -> tuple[float, float, float]:
        config = getattr(self.description.config, "bioimageio", None)
        for tolerance in getattr(config, "reproducibility_tolerance", ()):
            outputs, formats = tolerance.output_ids, tolerance.weights_formats
            if (not outputs or output in outputs) and (not formats or weights in formats):
                share = tolerance.mismatched_elements_per_million / 1e6
                return tolerance.relative_tolerance, tolerance.absolute_tolerance, share
        return 1e-3, 1e-3, 0.0


def _postprocessing(part: str, output: Any) -> tuple[list[str], str | None]:
    """Return the steps of `postprocess` for an output, and its dtype if it has one of integers."""
    steps: list[str] = []
    dtype = None
    for number, step in enumerate(output.postprocessing):
        kwargs = step.kwargs
        if step.id == "ensure_dtype":
            dtype = None if kwargs.dtype.startswith("float") else str(kwargs.dtype)
            continue
        scalar = not hasattr(kwargs, "axis")
        if step.id == "sigmoid" or (step.id == "softmax" and kwargs.axis == "channel"):
            steps.append(step.id)
        elif step.id == "binarize" and scalar:
            steps.append(f"threshold:{kwargs.threshold!r}")
        elif step.id == "clip" and _is_fixed(kwargs):
            low, high = "-inf" if kwargs.min is None else kwargs.min, "inf" if kwargs.max is None else kwargs.max
            steps.append(f"clip:{low}:{high}")
        elif step.id == "scale_linear" and scalar:
            steps.append(f"linear:{kwargs.gain!r}:{kwargs.offset!r}")
        elif step.id == "fixed_zero_mean_unit_variance" and scalar:
            steps.append(f"linear:{1 / kwargs.std!r}:{-kwargs.mean / kwargs.std!r}")
        else:
            given = {key: value for key, value in dict(kwargs).items() if value is not None}
            raise ValueError(f"{part}.postprocessing.{number} ({step.id}): is not supported with {given}")
    return steps, dtype


def _is_fixed(kwargs: Any) -> bool:
    """Return whether a range is given in values, and not in percentiles."""
    return getattr(kwargs, "min_percentile", None) is None and getattr(kwargs, "max_percentile", None) is None


def _in_order(array: np.ndarray[Any, Any], tensor: Any) -> np.ndarray[Any, Any]:
    """Return a tensor of the package as `(B, C, *spatial)`."""
    types = [axis.type for axis in tensor.axes]
    array = np.transpose(array, _order(types))
    return array if "channel" in types else array[:, None]


def _order(types: Sequence[str]) -> list[int]:
    """Return the places of batch, channel and the spatial axes among axes of some types."""
    return sorted(range(len(types)), key=lambda place: ("batch", "channel", "space").index(types[place]))


def _as_module(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ValueError(f"weights: the network must be a torch.nn.Module, got {type(model).__name__}")
    return model


class _InAxes(nn.Module):
    """A network that takes and returns tensors with axes in any order, as one of `(B, C, *patch)`.

    Args:
        network: the network.
        types: types of the input's axes, in order.
        outputs: the same of each output, by its name.
    """

    def __init__(self, network: nn.Module, types: Sequence[str], outputs: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.network = network
        self.types, self.outputs = list(types), {name: list(of_output) for name, of_output in outputs.items()}

    def forward(self, patches: torch.Tensor) -> Any:
        """Return the outputs for patches `(B, C, *patch)`, by name if there are several."""
        order = _order(self.types)
        values = patches if "channel" in self.types else patches.squeeze(1)
        results = list(named_outputs(self.network(values.permute(_inverse(order)))).values())
        if len(results) != len(self.outputs):
            raise ValueError(
                f"outputs: the package describes {len(self.outputs)}, and its network gives {len(results)}"
            )
        returned = {}
        for (name, types), result in zip(self.outputs.items(), results, strict=True):
            ordered = result.permute(_order(types))
            returned[name] = ordered if "channel" in types else ordered.unsqueeze(1)
        return unnamed(returned) if len(returned) > 1 else next(iter(returned.values()))


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
