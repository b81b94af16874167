"""Bundles of MONAI: `monai:FOLDER`, with `configs/inference.json` (or `.yaml`) and `models/model.pt`.

The configuration is read as data: its references (`@preprocessing#transforms`) are followed, and nothing is run. An
expression (`$...`), or a network that is not MONAI's own, is code of the bundle, which is run by MONAI's parser only if
the bundle is trusted. Parts are named by their paths in the configuration when they cannot be honoured.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from oocpatch.models.loading import load_model, load_weights
from oocpatch.models.packages.package import Entries, ModelPackage, refuse_options, refused_unless_given
from oocpatch.models.postprocessing import RESAMPLE
from oocpatch.system import import_extra
from oocpatch.volumes.model_grid import ModelGrid

EXTRA = "monai"
CONFIGS = ("inference.json", "inference.yaml", "inference.yml")
BLENDING = {"constant": "average", "gaussian": "monai"}
"""Modes of a sliding window and the `overlap_mode` of each."""

PASSED = frozenset({"LoadImage", "EnsureChannelFirst", "EnsureType", "ToTensor", "ToDevice", "CastToType", "Identity"})
"""Transforms before the network that `predict` does anyway, or that change no value."""

RETURNED = frozenset({"EnsureType", "ToDevice", "Identity", "Invert", "SaveImage", "ToTensor"})
"""The same after the network: scores come back on the volume's grid, and are written."""

INFERER = {"roi_size", "sw_batch_size", "overlap", "mode", "sigma_scale", "padding_mode", "cval"}
WITHOUT_EFFECT = frozenset(
    {
        *("sw_device", "device", "progress", "cache_roi_weight_map", "cpu_thresh", "buffer_steps", "buffer_dim"),
        *("keys", "allow_missing_keys", "meta_keys", "meta_key_postfix", "lazy"),
    }
)
"""Arguments of inferers and transforms that are not read, since values do not depend on them."""

SPACING: dict[str, tuple[Any, ...]] = {
    "mode": ("bilinear", 1),
    "padding_mode": ("border",),
    "diagonal": (False,),
    "scale_extent": (False,),
    "recompute_affine": (False,),
    "min_pixdim": (None,),
    "max_pixdim": (None,),
}
"""Values of the arguments of a change of voxel sizes that are honoured, the defaults first."""


def load(path: Path, options: Mapping[str, str], *, trust_pickle: bool, device: str) -> ModelPackage:
    """Load a bundle.

    Args:
        path: its folder.
        options: `checkpoint`, the name of a file in `models/`.
        trust_pickle: run expressions and code of the bundle.
        device: where the model will run.

    Raises:
        ValueError: naming the part that cannot be honoured.
    """
    refuse_options(options, ("checkpoint",), "monai")
    file = next((path / "configs" / name for name in CONFIGS if (path / "configs" / name).is_file()), None)
    if file is None:
        raise ValueError(f"a MONAI bundle must have configs/{CONFIGS[0]}, and {str(path)!r} has none")
    bundle = _Bundle(path, _read(file), trust_pickle=trust_pickle)
    try:
        settings = bundle.settings()
        model, checkpoint = bundle.network(options.get("checkpoint", "model.pt"), device)
    except RecursionError as error:
        raise ValueError(f"{str(file)!r} has references that lead back to themselves") from error
    return ModelPackage(
        models=(model,),
        settings=settings,
        files=(file, checkpoint),
        classes=bundle.classes(),
        libraries=() if checkpoint.suffix == ".ts" else ("monai",),
    )


def _read(file: Path) -> Mapping[str, Any]:
    text = file.read_text()
    try:
        content = json.loads(text) if file.suffix == ".json" else import_extra("yaml", EXTRA, str(file)).safe_load(text)
    except ValueError as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{str(file)!r} must hold an object, got a {type(content).__name__}")
    return content


@dataclass(frozen=True)
class _Bundle:
    """A bundle and its configuration."""

    path: Path
    content: Mapping[str, Any]
    trust_pickle: bool

    def value(self, place: str) -> Any:
        """Return the value at a place of the configuration, `a#b#0`, with references in it followed."""
        return self._resolved(*self._at(place))

    def _at(self, place: str) -> tuple[Any, str]:
        """Return the value at a place and where it stands: references on the way are followed, those in it are not."""
        value: Any = self.content
        at = ""
        for part in place.replace("::", "#").split("#"):
            try:
                value = value[int(part)] if isinstance(value, list) else value[part]
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise ValueError(f"{_named(place)}: is not in the configuration of the bundle") from error
            at = f"{at}#{part}".strip("#")
            if isinstance(value, str) and value.startswith("@"):
                value, at = self._at(value[1:])
        return value, at

    def _arguments(self, place: str, ignored: frozenset[str] = frozenset()) -> dict[str, Any]:
        """Return the arguments of an object at a place, but for those that are not read."""
        value, at = self._at(place)
        names = [name for name in value if name not in ignored and not name.startswith("_")]
        return Entries({name: self.value(f"{at}#{name}") for name in names}, _named(at))

    def _resolved(self, value: Any, place: str) -> Any:
        """Return a value with the references in it followed, and its expressions run where they may be."""
        if isinstance(value, Mapping):
            return {key: self._resolved(item, f"{place}#{key}") for key, item in value.items()}
        if isinstance(value, list):
            return [self._resolved(item, f"{place}#{number}") for number, item in enumerate(value)]
        if not isinstance(value, str) or value[:1] not in ("@", "$", "%"):
            return value
        if value.startswith("@"):
            return self.value(value[1:])
        if value.startswith("$") and self.trust_pickle:
            return self._parsed(place)
        raise ValueError(
            f"{_named(place)}: {value!r} is code of the bundle; pass --trust-pickle if you trust its author, or write "
            "its value"
        )

    def _parsed(self, place: str) -> Any:
        """Return what MONAI's parser makes of a place of the configuration; runs code of the bundle."""
        parser = import_extra("monai.bundle", EXTRA, f"running {_named(place)}").ConfigParser(dict(self.content))
        parser["bundle_root"] = str(self.path.absolute())
        with _importable(self.path):
            try:
                return parser.get_parsed_content(place)
            except Exception as error:
                cause = error.__cause__ or error
                raise ValueError(f"{_named(place)}: running it failed: {type(cause).__name__}: {cause}") from error

    def network(self, checkpoint: str, device: str) -> tuple[nn.Module, Path]:
        """Return the network with its weights, and the file of these."""
        file = self.path / "models" / checkpoint
        scripted = file.with_suffix(".ts")
        if not file.is_file() and scripted.is_file():
            model = load_model(str(scripted), device=device)
            assert isinstance(model, nn.Module)
            return model, scripted
        if not file.is_file():
            raise ValueError(f"models/{checkpoint}: is not in the bundle; download the complete bundle")
        model = self._built()
        load_weights(model, f"monai:{self.path}", str(file), trust_pickle=self.trust_pickle)
        return model, file

    def _built(self) -> nn.Module:
        definition = self.content.get("network_def")
        if not isinstance(definition, Mapping) or "_target_" not in definition:
            raise ValueError("network_def: the bundle must define a network with _target_")
        if self.trust_pickle:
            model = self._parsed("network_def")
        else:
            arguments = self._arguments("network_def")
            if nested := next((k for k, v in arguments.items() if isinstance(v, Mapping) and "_target_" in v), None):
                raise ValueError(f"network_def.{nested}: is an object to be made; pass --trust-pickle for that")
            model = self._class(str(definition["_target_"]))(**arguments)
        if not isinstance(model, nn.Module):
            raise ValueError(f"network_def: must be a torch.nn.Module, got {type(model).__name__}")
        return model

    @staticmethod
    def _class(target: str) -> Any:
        """Return a network of MONAI by its name."""
        place, _, name = target.rpartition(".")
        networks = import_extra("monai.networks.nets", EXTRA, "building the network of a bundle")
        found = getattr(networks, name, None)
        if found is None or (place and not place.startswith("monai.networks.nets")):
            raise ValueError(
                f"network_def._target_: {target!r} is not one of MONAI's own networks; pass --trust-pickle if you "
                "trust the author of the bundle"
            )
        return found

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `predict` that the configuration stands for."""
        settings: dict[str, Any] = {}
        with refused_unless_given(settings, "patch_size"):
            settings |= self._inferer()
        with refused_unless_given(settings, "preprocess"):
            settings |= self._before()
        with refused_unless_given(settings, "postprocess"):
            settings["postprocess"] = self._after()
        return {name: value for name, value in settings.items() if value not in (None, [])}

    def _inferer(self) -> dict[str, Any]:
        kind = _kind(self._at("inferer")[0])
        if kind not in ("SlidingWindowInferer", "SlidingWindowInfererAdapt"):
            raise ValueError(f"inferer: {kind} is not a sliding window")
        arguments = self._arguments("inferer", WITHOUT_EFFECT)
        given = Entries({name: value for name, value in arguments.items() if value is not None}, "inferer")
        if unknown := sorted(given.keys() - INFERER):
            raise ValueError(f"inferer.{unknown[0]}: is not supported")
        sigma = given.get("sigma_scale", 0.125)
        if sigma != 0.125 and given.get("mode", "constant") == "gaussian":
            raise ValueError(f"inferer.sigma_scale: must be 0.125, got {sigma}")
        size = given["roi_size"]
        size = size if isinstance(size, list) else [size] * self._ndim()
        if any(not isinstance(n, int) or n < 1 for n in size):
            raise ValueError(f"inferer.roi_size: must be whole numbers of voxels, got {size}")
        shares = given.get("overlap", 0.25)
        shares = shares if isinstance(shares, list) else [shares] * len(size)
        mode = str(given.get("mode", "constant"))
        if mode not in BLENDING:
            raise ValueError(f"inferer.mode: must be one of {', '.join(BLENDING)}, got {mode}")
        return {
            "patch_size": tuple(size),
            "patch_overlap": tuple(n - max(1, int(n * (1 - share))) for n, share in zip(size, shares, strict=True)),
            "overlap_mode": BLENDING[mode],
            "batch_size": given.get("sw_batch_size", 1),
        }

    def _ndim(self) -> int:
        return int(self.value("network_def#spatial_dims"))

    def _transforms(self, name: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
        """Yield place, kind and arguments of the transforms before or after the network."""
        if name not in self.content:
            return
        content, place = self._at(name)
        if _kind(content) != "Compose":
            raise ValueError(f"{name}: must be a Compose, got {_kind(content)}")
        transforms, place = self._at(f"{place}#transforms")
        for number in range(len(transforms)):
            transform, inner = self._at(f"{place}#{number}")
            kind = _kind(transform)
            if isinstance(transform, Mapping) and transform.get("_disabled_", False) in (True, "true"):
                continue
            for ending in ("Dict", "D", "d"):
                if kind.endswith(ending):
                    kind = kind.removesuffix(ending)
                    break
            skipped = PASSED if name == "preprocessing" else RETURNED
            yield inner, kind, {} if kind in skipped else self._arguments(inner, WITHOUT_EFFECT)

    def _before(self) -> dict[str, Any]:
        """Return `preprocess` and `spacing`."""
        grid: dict[str, Any] = {}
        steps: list[dict[str, Any]] = []
        for place, kind, arguments in self._transforms("preprocessing"):
            if kind in PASSED:
                continue
            if kind in _STEPS:
                steps += _STEPS[kind](_named(place), arguments)
            elif kind == "Orientation" and not (steps or grid):
                grid["orientation"] = "RAS" if arguments.get("as_closest_canonical") else str(arguments["axcodes"])
            elif kind == "Spacing" and not (steps or "spacing" in grid):
                grid |= {"spacing": self._spacing(place, arguments), "from_center": True}
            else:
                order = " after other steps" if kind in ("Orientation", "Spacing") else ""
                raise ValueError(f"{_named(place)}: {kind} is not supported{order}")
        scores = int(self._interpolates_back())
        return {"spacing": ModelGrid(**grid, scores=scores, unit="millimeter") if grid else None, "preprocess": steps}

    def _spacing(self, place: str, arguments: Mapping[str, Any]) -> tuple[float, ...]:
        for name, value in arguments.items():
            value = value[0] if isinstance(value, list) and name != "pixdim" else value  # noqa: PLW2901
            if name in SPACING and value not in SPACING[name]:
                raise ValueError(f"{_named(place)}.{name}: must be {SPACING[name][0]}, got {value}")
        size = arguments["pixdim"]
        sizes = tuple(map(float, size if isinstance(size, list) else [size]))
        sizes += sizes[-1:] * (self._ndim() - len(sizes))
        if not all(one > 0 for one in sizes):
            raise ValueError(f"{_named(place)}.pixdim: must be above 0 along each axis, got {size}")
        return sizes

    def _interpolates_back(self) -> bool:
        """Return whether scores are interpolated as they come back to the volume's grid; MONAI takes the nearest."""
        inverts = [place for place, kind, _ in self._transforms("postprocessing") if kind == "Invert"]
        given = [f"{place}#nearest_interp" for place in inverts if "nearest_interp" in self._at(place)[0]]
        return any(not _single(self.value(place)) for place in given)

    def _after(self) -> list[str]:
        """Return `postprocess`."""
        steps: list[str] = []
        for place, kind, arguments in self._transforms("postprocessing"):
            if kind == "Invert" and steps and self._interpolates_back():
                if steps[-1] not in ("sigmoid", "softmax"):
                    raise ValueError(f"{_named(place)}.nearest_interp: must be true after AsDiscrete, got false")
                steps.append(RESAMPLE)
            elif kind not in RETURNED:
                steps += _after_step(_named(place), kind, arguments)
        return steps

    def classes(self) -> tuple[str, ...]:
        """Return the names of the output's channels from `configs/metadata.json`."""
        file = self.path / "configs" / "metadata.json"
        names: Mapping[str, Any] = {}
        if file.is_file():
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, StopIteration):
                outputs = json.loads(file.read_text())["network_data_format"]["outputs"]
                names = next(iter(outputs.values()))["channel_def"]
        numbers = list(map(str, range(len(names))))
        return tuple(str(names[number]) for number in numbers) if set(names) == set(numbers) else ()


def _named(place: str) -> str:
    return place.replace("::", "#").replace("#", ".")


def _kind(value: Any) -> str:
    """Return the name of the class that an object of the configuration is made of."""
    return str(value.get("_target_", "")).rpartition(".")[2] if isinstance(value, Mapping) else type(value).__name__


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let imports find the bundle's own modules, after everything else."""
    entry = str(folder.absolute())
    sys.path.append(entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(entry)


def _scale_intensity(place: str, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    if arguments.get("factor") is not None and arguments.get("minv", 0) is None:
        return [{"name": "scale", "divide": 1 / (1 + arguments["factor"])}]
    pooled = not arguments.get("channel_wise", False)
    low, high = arguments.get("minv", 0.0), arguments.get("maxv", 1.0)
    whole = {"name": "percentile", "low": 0, "high": 100, "clip": False, "pooled": pooled}
    return [whole, *_to_range(place, low, high)]


def _scale_range(place: str, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    start, stop = arguments["a_min"], arguments["a_max"]
    low, high = arguments.get("b_min"), arguments.get("b_max")
    steps: list[dict[str, Any]] = [{"name": "scale", "subtract": start, "divide": stop - start}]
    steps += _to_range(place, low, high)
    return [*steps, *_clipped(low, high)] if arguments.get("clip") else steps


def _scale_percentiles(place: str, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    if arguments.get("relative"):
        raise ValueError(f"{place}.relative: is not supported")
    low, high = arguments.get("b_min"), arguments.get("b_max")
    pooled = not arguments.get("channel_wise", False)
    of_range = {"low": arguments["lower"], "high": arguments["upper"], "clip": False, "pooled": pooled}
    steps = [{"name": "percentile", **of_range}, *_to_range(place, low, high)]
    return [*steps, *_clipped(low, high)] if arguments.get("clip") else steps


def _normalize(place: str, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    nonzero, subtract, divide = bool(arguments.get("nonzero")), arguments.get("subtrahend"), arguments.get("divisor")
    if subtract is None and divide is None:
        return [{"name": "zscore", "nonzero": nonzero, "pooled": not arguments.get("channel_wise", False)}]
    if subtract is None or divide is None:
        raise ValueError(f"{place}: must have both subtrahend and divisor, or none of them")
    return [{"name": "scale", "subtract": subtract, "divide": divide, "nonzero": nonzero}]


_STEPS = {
    "ScaleIntensity": _scale_intensity,
    "ScaleIntensityRange": _scale_range,
    "ScaleIntensityRangePercentiles": _scale_percentiles,
    "NormalizeIntensity": _normalize,
}
"""Transforms that become steps of `preprocess`."""


def _to_range(place: str, low: float | None, high: float | None) -> list[dict[str, Any]]:
    """Return the step from 0..1 to a range; none where there is no other range."""
    if (low is None) != (high is None) or (low is not None and low == high):
        raise ValueError(f"{place}: must have two different ends of the range of results, got {low} and {high}")
    if low is None or high is None or (low, high) == (0, 1):
        return []
    return [{"name": "scale", "subtract": -low / (high - low), "divide": 1 / (high - low)}]


def _clipped(low: float | None, high: float | None) -> list[dict[str, Any]]:
    limits = {name: value for name, value in (("low", low), ("high", high)) if value is not None}
    return [{"name": "clip", **limits}] if limits else []


def _after_step(place: str, kind: str, arguments: Mapping[str, Any]) -> list[str]:
    """Return the steps of `postprocess` of a transform after the network."""
    given = {name: _single(value) for name, value in arguments.items()}
    given = {name: value for name, value in given.items() if value not in (None, False)}
    if kind == "Activations" and len(given) == 1 and given.keys() <= {"sigmoid", "softmax"}:
        return list(given)
    if kind == "AsDiscrete" and given.keys() == {"argmax"}:
        return ["argmax"]
    if kind == "AsDiscrete" and given.keys() == {"threshold"}:
        return [f"threshold:{given['threshold']}"]
    shown = ", ".join(f"{name}={value}" for name, value in given.items())
    raise ValueError(f"{place}: {kind}({shown}) is not supported")


def _single(value: Any) -> Any:
    return value[0] if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1 else value
