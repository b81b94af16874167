"""Bundles of MONAI do what their configuration says, or name the part that cannot be honoured."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
import xarray
from torch import nn

import oocpatch
from oocpatch.models.packages.package import load_package

SCAN = np.random.default_rng(0).normal(60, 90, (40, 50)).astype(np.float32)
CONFIG: dict[str, Any] = {
    "image_key": "image",
    "patch": [16, 24],
    "device": "$torch.device('cpu')",
    "network_def": {
        "_target_": "UNet",
        "spatial_dims": 2,
        "in_channels": 1,
        "out_channels": 3,
        "channels": [4, 8],
        "strides": [2],
    },
    "transforms": [
        {"_target_": "LoadImaged", "keys": "@image_key"},
        {"_target_": "EnsureChannelFirstd", "keys": "@image_key"},
        {"_target_": "CropForegroundd", "keys": "image", "source_key": "image", "_disabled_": True},
        {
            "_target_": "monai.transforms.ScaleIntensityRanged",
            "keys": "image",
            "a_min": -50,
            "a_max": 200,
            "b_min": -1,
            "b_max": 1,
            "clip": True,
        },
        {"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True, "channel_wise": True},
    ],
    "preprocessing": {"_target_": "Compose", "transforms": "@transforms"},
    "inferer": {
        "_target_": "SlidingWindowInferer",
        "roi_size": "@patch",
        "sw_batch_size": 2,
        "overlap": 0.6,
        "mode": "gaussian",
        "device": "@device",
    },
    "postprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "Activationsd", "keys": "pred", "softmax": True},
            {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
            {"_target_": "SaveImaged", "keys": "pred", "output_dir": "out"},
        ],
    },
}
CLASSES = {"network_data_format": {"outputs": {"pred": {"channel_def": {"0": "none", "1": "liver", "2": "tumor"}}}}}

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a bundle, changed by a function of its configuration, and returns its spec."""

    def write(change: Callable[[dict[str, Any]], Any] = lambda _: None) -> str:
        folder = tmp_path / "bundle"
        (folder / "configs").mkdir(parents=True, exist_ok=True)
        (folder / "models").mkdir(exist_ok=True)
        config = copy.deepcopy(CONFIG)
        change(config)
        (folder / "configs" / "inference.json").write_text(json.dumps(config))
        (folder / "configs" / "metadata.json").write_text(json.dumps(CLASSES))
        if not (folder / "models" / "model.ts").exists():
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                traced: Any = torch.jit.trace(nn.Conv2d(1, 3, 5, padding=2), torch.zeros(1, 1, 16, 24))
            traced.save(folder / "models" / "model.ts")
        return f"monai:{folder}"

    return write


def prepared(scan: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What the transforms of the configuration make of a scan."""
    scaled = ((scan + 50) / 250 * 2 - 1).clip(-1, 1)
    inside = scaled != 0
    return np.where(inside, (scaled - scaled[inside].mean()) / scaled[inside].std(), 0).astype(np.float32)


def test_a_bundle_brings_its_window_and_its_transforms(write: Write, tmp_path: Path) -> None:
    spec = write()
    planned = oocpatch.plan(SCAN, spec, tmp_path / "out")
    assert planned.patch_size == (16, 24)
    assert planned.patch_overlap == (16 - int(16 * 0.4), 24 - int(24 * 0.4))
    assert planned.batch_size == 2
    scores = oocpatch.predict(SCAN, spec, tmp_path / "scores", postprocess="none", progress=False)
    labels = oocpatch.predict(SCAN, spec, tmp_path / "labels", progress=False)
    expected = sliding_window(prepared(SCAN), load_package(spec).models[0], (16, 24), 0.6)  # type: ignore[union-attr]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    np.testing.assert_array_equal(labels, np.asarray(scores).argmax(0))
    assert labels.attrs["classes"] == ["none", "liver", "tumor"]


def sliding_window(image: np.ndarray[Any, Any], model: Any, roi: tuple[int, int], overlap: float) -> Any:
    """MONAI's sliding window with a gaussian of two axes and its floor, in plain torch."""
    distance = [torch.arange(n) - (n - 1) / 2 for n in roi]
    factors = [torch.exp(-0.5 * (d / (n / 8)) ** 2) for d, n in zip(distance, roi, strict=True)]
    weight = torch.outer(*factors)
    weight = weight.clamp(min=max(float(weight.min()), 1e-3))
    sums, weights = torch.zeros(3, *image.shape), torch.zeros(image.shape)
    steps = [int(n * (1 - overlap)) for n in roi]
    starts = [[*range(0, n - r, s), n - r] for n, r, s in zip(image.shape, roi, steps, strict=True)]
    for y in starts[0]:
        for x in starts[1]:
            box = slice(y, y + roi[0]), slice(x, x + roi[1])
            with torch.no_grad():
                sums[:, *box] += model(torch.from_numpy(image[box])[None, None])[0] * weight
            weights[box] += weight
    return (sums / weights).numpy()


def _change(name: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config[name].update(values)


def _transform(name: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["transforms"].append({"_target_": name, "keys": "image", **values})


def _spacing(**values: Any) -> Callable[[dict[str, Any]], None]:
    step = {"_target_": "Spacingd", "keys": "image", "pixdim": 2, **values}
    return lambda config: config["transforms"].insert(2, step)


def _after(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["postprocessing"]["transforms"].append({"keys": "pred", **values})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change("inferer", _target_="SimpleInferer"), "SimpleInferer is not a sliding window; pass patch_size="),
        (_change("inferer", with_coord=True), "inferer.with_coord: is not supported"),
        (_change("inferer", sigma_scale=0.2), "inferer.sigma_scale: must be 0.125, got 0.2"),
        (_change("inferer", roi_size=[-1, 24]), "inferer.roi_size: must be whole numbers"),
        (_change("inferer", overlap="$0.5"), "inferer.overlap: '.0.5' is code of the bundle; pass --trust-pickle"),
        (_change("inferer", overlap="@lost"), "lost: is not in the configuration of the bundle"),
        (_change("inferer", overlap="@inferer#overlap"), "references that lead back to themselves"),
        (lambda c: c["inferer"].pop("roi_size"), "inferer: must have an entry 'roi_size', got sw_batch_size, overlap"),
        (_change("inferer", overlap="half"), "patch_size cannot be read: TypeError: .*; pass patch_size="),
        (lambda c: c["transforms"][3].pop("a_min"), "transforms.3: must have an entry 'a_min', got a_max"),
        (_transform("CropForegroundd"), "transforms.5: CropForeground is not supported; pass preprocess="),
        (_spacing(scale_extent=True), "transforms.2.scale_extent: must be False, got True; pass preprocess="),
        (_spacing(mode=["nearest"]), "transforms.2.mode: must be bilinear, got nearest"),
        (_spacing(pixdim=[1, -1]), "transforms.2.pixdim: must be above 0 along each axis"),
        (_transform("Spacingd", pixdim=[1, 1]), "transforms.5: Spacing is not supported after other steps"),
        (_after(_target_="KeepLargestConnectedComponentd"), "postprocessing.transforms.3: KeepLargest"),
        (_after(_target_="Invertd", nearest_interp=False), "nearest_interp: must be true after AsDiscrete, got false"),
        (_after(_target_="AsDiscreted", to_onehot=3), r"AsDiscrete\(to_onehot=3\) is not supported; pass postprocess="),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_its_part(
    write: Write, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        oocpatch.plan(SCAN, write(change), tmp_path / "out")


def test_orientation_and_spacing_are_the_grid_of_the_model(write: Write) -> None:
    def change(config: dict[str, Any]) -> None:
        config["transforms"][2:2] = [
            {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
            {"_target_": "Spacingd", "keys": ["image"], "pixdim": [1.5, 1.5, 2.0], "mode": ["bilinear"]},
        ]

    grid = load_package(write(change)).settings["spacing"]  # type: ignore[union-attr]
    assert (grid.orientation, grid.spacing) == ("RAS", (1.5, 1.5, 2.0))


@pytest.mark.parametrize("nearest", [True, False])
def test_a_spacing_begins_at_the_centre_of_the_first_voxel_and_statistics_are_of_its_grid(
    nearest: bool, write: Write, tmp_path: Path
) -> None:
    own, size = (0.8, 1.1), (1.3, 0.9)

    def change(config: dict[str, Any]) -> None:
        config["transforms"].insert(2, {"_target_": "Spacingd", "keys": "image", "pixdim": size, "diagonal": False})
        invert = {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "nearest_interp": nearest}
        config["postprocessing"]["transforms"][1] = invert

    def at(image: Any, step: tuple[float, float], shape: tuple[int, ...], order: int) -> Any:
        places = np.meshgrid(*(s * np.arange(n) for s, n in zip(step, shape, strict=True)), indexing="ij")
        return scipy.ndimage.map_coordinates(image, places, order=order, mode="nearest")

    spec = write(change)
    scan = xarray.DataArray(SCAN, dims=("y", "x"))
    scan = scan.assign_coords(
        {n: (n, s * np.arange(scan.sizes[n]), {"units": "mm"}) for n, s in zip("yx", own, strict=True)}
    )
    shares = oocpatch.predict(scan, spec, tmp_path / "shares", progress=False)
    ratio = tuple(b / a for a, b in zip(own, size, strict=True))
    shape = tuple(round((n - 1) / r) + 1 for n, r in zip(SCAN.shape, ratio, strict=True))
    patches = prepared(at(SCAN, ratio, shape, 1))
    scores = sliding_window(patches, load_package(spec).models[0], (16, 24), 0.6)  # type: ignore[union-attr]
    on_grid = torch.from_numpy(scores).softmax(dim=0).numpy()
    back = (1 / ratio[0], 1 / ratio[1])
    expected = np.stack([at(of_class, back, SCAN.shape, int(not nearest)) for of_class in on_grid])
    np.testing.assert_allclose(shares, expected, atol=1e-5)


def test_a_volume_of_other_axes_is_refused(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"takes patches of 2 spatial axes, and the volume has 3 \(z, y, x\)"):
        oocpatch.plan(np.zeros((8, 40, 50), np.float32), write(), tmp_path / "out")


@pytest.mark.parametrize("name", ["configs", "models/model.ts"])
def test_an_incomplete_bundle_is_refused(write: Write, name: str) -> None:
    spec = write()
    place = Path(spec.removeprefix("monai:")) / name
    place.rename(place.with_name("elsewhere"))
    with pytest.raises(ValueError, match=r"must have configs/inference.json|models/model.pt: is not in the bundle"):
        load_package(spec)


def test_a_network_is_built_by_monai_and_others_only_if_trusted(write: Write, tmp_path: Path) -> None:
    monai = pytest.importorskip("monai")
    spec = write()
    arguments = {k: v for k, v in CONFIG["network_def"].items() if k != "_target_"}
    torch.manual_seed(1)
    network = monai.networks.nets.UNet(**arguments).eval()
    torch.save(network.state_dict(), tmp_path / "bundle" / "models" / "model.pt")
    scores = oocpatch.predict(SCAN, spec, tmp_path / "out", postprocess="none", progress=False)
    inferer = monai.inferers.SlidingWindowInferer((16, 24), sw_batch_size=2, overlap=0.6, mode="gaussian")
    with torch.no_grad():
        expected = inferer(torch.from_numpy(prepared(SCAN))[None, None], network)[0]
    np.testing.assert_allclose(scores, expected, atol=1e-5)

    (tmp_path / "bundle" / "own.py").write_text("from monai.networks.nets import UNet\nclass Own(UNet): pass\n")
    spec = write(_change("network_def", _target_="own.Own", out_channels="$1 + 2"))
    with pytest.raises(ValueError, match=r"network_def.out_channels: '.1 . 2' is code of the bundle"):
        load_package(spec)
    trusted = load_package(spec, trust_pickle=True)
    sys.modules.pop("own")
    assert type(trusted.models[0]).__name__ == "Own"  # type: ignore[union-attr]


def test_without_monai_it_is_said_what_to_install(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write()
    torch.save({}, Path(spec.removeprefix("monai:")) / "models" / "model.pt")
    monkeypatch.setitem(sys.modules, "monai", None)
    monkeypatch.setitem(sys.modules, "monai.networks.nets", None)
    with pytest.raises(ValueError, match=r"needs monai.*pip install 'oocpatch\[monai\]'"):
        load_package(spec)
