"""Model packages against the libraries that define them: `python -m tests.interop.campaign_packages`.

Packages of bioimage.io with all formats of weights, written and validated by bioimageio.spec, are compared with their
test tensors. Bundles of MONAI with random networks, windows and transforms are run by MONAI's own parser, transforms
and inferer, and compared with `predict`. Needs `oocpatch[bioimageio,monai,nifti,onnx]`, onnx and pillow, in an
environment where bioimageio.spec can write (0.5.12 needs pydantic before 2.12). Exits with 1 if one differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import oocpatch
from tests.support.package_network import NETWORK

INTENSITY: list[dict[str, Any]] = [
    {"_target_": "ScaleIntensityRanged", "a_min": -50, "a_max": 200, "b_min": -1, "b_max": 1, "clip": True},
    {"_target_": "ScaleIntensityRanged", "a_min": 0, "a_max": 90},
    {"_target_": "ScaleIntensityd", "minv": -1.0, "maxv": 2.0},
    {"_target_": "ScaleIntensityRangePercentilesd", "lower": 2, "upper": 97, "b_min": 0, "b_max": 1, "clip": True},
    {"_target_": "NormalizeIntensityd", "channel_wise": True},
    {"_target_": "NormalizeIntensityd", "nonzero": True},
    {"_target_": "NormalizeIntensityd", "subtrahend": 60, "divisor": 90},
]


def bioimageio_package(folder: Path) -> Path:
    """Write a package with its own library, and return its folder."""
    import PIL.Image  # noqa: PLC0415 - needed by this half only
    from bioimageio.spec import common, save_bioimageio_package_as_folder  # noqa: PLC0415
    from bioimageio.spec.model import v0_5 as m  # noqa: PLC0415

    def space(name: str) -> Any:
        return m.SpaceInputAxis(id=m.AxisId(name), size=m.ParameterizedSize(min=32, step=16))

    def cropped(name: str) -> Any:
        size = m.SizeReference(tensor_id=m.TensorId("raw"), axis_id=m.AxisId(name))
        return m.SpaceOutputAxisWithHalo(id=m.AxisId(name), size=size, halo=4)

    (folder / "net.py").write_text(NETWORK)
    (folder / "README.md").write_text("# net\n\n## Validation\nnone\n")
    PIL.Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "cover.png")
    scope: dict[str, Any] = {}
    exec(NETWORK, scope)  # noqa: S102 - of our own making
    network = scope["Net"](6).eval()
    torch.save(network.state_dict(), folder / "w.pth")
    free = {0: "b", 2: "h", 3: "w"}
    sample = torch.zeros(1, 2, 32, 32)
    torch.jit.trace(network, sample).save(folder / "w.pt")
    names = {"input_names": ["raw"], "output_names": ["cells"], "dynamic_axes": {"raw": free, "cells": free}}
    torch.onnx.export(network, (sample,), folder / "w.onnx", dynamo=False, opset_version=17, **names)
    values = np.random.default_rng(0).normal(100, 30, (1, 2, 48, 64)).astype(np.float32)
    axes = (0, 2, 3)
    patches = (values - values.mean(axes, keepdims=True)) / (values.std(axes, keepdims=True) + 1e-6)
    with torch.no_grad():
        np.save(folder / "out.npy", torch.sigmoid(network(torch.from_numpy(patches.clip(-2, 2.5)))).numpy())
    np.save(folder / "in.npy", values)
    over = m.ZeroMeanUnitVarianceKwargs(axes=[m.AxisId("y"), m.AxisId("x")])
    steps = [m.ZeroMeanUnitVarianceDescr(kwargs=over), m.ClipDescr(kwargs=m.ClipKwargs(min=-2.0, max=2.5))]
    source = m.ArchitectureFromFileDescr(source=folder / "net.py", callable=m.Identifier("Net"), kwargs={"width": 6})
    digest = m.Sha256(hashlib.sha256((folder / "w.pth").read_bytes()).hexdigest())
    version = m.Version("2.13.0")
    description = m.ModelDescr(
        name="small net",
        description="a network of two layers",
        authors=[m.Author(name="somebody")],
        cite=[m.CiteEntry(text="nothing", doi=m.Doi("10.1234/nothing"))],
        license=m.LicenseId("MIT"),
        documentation=common.FileDescr(source=folder / "README.md"),
        covers=[common.FileDescr(source=folder / "cover.png")],
        inputs=[
            m.InputTensorDescr(
                id=m.TensorId("raw"),
                axes=[m.BatchAxis(), m.ChannelAxis(channel_names=["red", "green"]), space("y"), space("x")],
                test_tensor=common.FileDescr(source=folder / "in.npy"),
                preprocessing=steps,
            )
        ],
        outputs=[
            m.OutputTensorDescr(
                id=m.TensorId("cells"),
                axes=[m.BatchAxis(), m.ChannelAxis(channel_names=["inside", "edge"]), cropped("y"), cropped("x")],
                test_tensor=common.FileDescr(source=folder / "out.npy"),
                postprocessing=[m.SigmoidDescr()],
            )
        ],
        weights=m.WeightsDescr(
            pytorch_state_dict=m.PytorchStateDictWeightsDescr(
                source=folder / "w.pth", sha256=digest, architecture=source, pytorch_version=version
            ),
            torchscript=m.TorchscriptWeightsDescr(
                source=folder / "w.pt", parent="pytorch_state_dict", pytorch_version=version
            ),
            onnx=m.OnnxWeightsDescr(source=folder / "w.onnx", parent="pytorch_state_dict", opset_version=17),
        ),
    )
    save_bioimageio_package_as_folder(description, output_path=folder / "package")
    return folder / "package"


def bundle(folder: Path, random: np.random.Generator) -> dict[str, Any]:
    """Write a bundle with a random network, window and transforms, and return its configuration."""
    chosen = random.choice(len(INTENSITY), size=int(random.integers(0, 3)), replace=False)
    # none that makes voxels of one grid lie upon those of the other, or between two: there MONAI's rounding decides
    pixdim = [round(float(size), 2) + 0.00371 for size in random.uniform(0.7, 1.6, 3)]
    placing: list[dict[str, Any]] = [
        {"_target_": "Orientationd", "keys": "image", "axcodes": str(random.choice(["RAS", "LPS", "SAR"]))},
        {"_target_": "Spacingd", "keys": "image", "pixdim": pixdim, "mode": "bilinear"},
    ]
    placing = [step for step in placing if random.random() < 0.6]
    invert = {
        "_target_": "Invertd",
        "keys": "pred",
        "transform": "@preprocessing",
        "orig_keys": "image",
        "nearest_interp": bool(random.random() < 0.5),
    }
    activation = {"_target_": "Activationsd", "keys": "pred", str(random.choice(["softmax", "sigmoid"])): True}
    reading = [{"_target_": "LoadImaged", "keys": "image"}, {"_target_": "EnsureChannelFirstd", "keys": "image"}]
    config: dict[str, Any] = {
        "network_def": {
            "_target_": "UNet",
            "spatial_dims": 3,
            "in_channels": 1,
            "out_channels": 3,
            "channels": [4, 8, 16],
            "strides": [2, 2],
            "num_res_units": int(random.integers(0, 2)),
        },
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [*reading, *placing, *({**INTENSITY[i], "keys": "image"} for i in chosen)],
        },
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": [int(n) * 4 for n in random.integers(4, 9, 3)],
            "sw_batch_size": int(random.integers(1, 4)),
            "overlap": round(float(random.uniform(0, 0.75)), 2),
            "mode": str(random.choice(["constant", "gaussian"])),
        },
        "postprocessing": {"_target_": "Compose", "transforms": [activation, invert]},
    }
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    return config


def compare_bundle(folder: Path, seed: int) -> float:
    """Return the largest difference of `predict` from MONAI's own run, as a share of the largest score."""
    import nibabel  # noqa: PLC0415 - needed by this half only
    from monai.bundle import ConfigParser  # noqa: PLC0415
    from monai.data import MetaTensor  # noqa: PLC0415
    from nibabel.orientations import axcodes2ornt, inv_ornt_aff  # noqa: PLC0415

    random = np.random.default_rng(seed)
    config = bundle(folder, random)
    torch.manual_seed(seed)
    parser = ConfigParser(config)
    network = parser.get_parsed_content("network_def").eval()
    torch.save(network.state_dict(), folder / "models" / "model.pt")
    shape = tuple(int(n) for n in random.integers(56, 72, 3))  # no smaller than a patch at any spacing
    scan = random.normal(60, 90, shape).astype(np.float32)
    if not any(step["_target_"] == "Spacingd" for step in config["preprocessing"]["transforms"]):
        scan *= random.random(shape) > 0.2  # else rounding decides which zeros on the first planes of a grid are zero
    affine = inv_ornt_aff(axcodes2ornt(str(random.choice(["RAS", "LPS", "PIR"]))), shape)
    affine[:3, :3] *= np.round(random.uniform(0.9, 1.3, 3), 2)
    nibabel.save(nibabel.Nifti1Image(scan.astype(np.float32), affine), folder / "scan.nii")
    item = parser.get_parsed_content("preprocessing")({"image": str(folder / "scan.nii")})
    with torch.no_grad():
        scores = parser.get_parsed_content("inferer")(item["image"].as_tensor()[None], network)[0]
    item["pred"] = MetaTensor(scores, meta=item["image"].meta)
    expected = parser.get_parsed_content("postprocessing")(item)["pred"].numpy()
    found = oocpatch.predict(folder / "scan.nii", f"monai:{folder}", folder / "out", progress=False)
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def main() -> int:
    """Run the campaign; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundles", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        package = bioimageio_package(folder)
        for weights in ("pytorch_state_dict", "torchscript", "onnx"):
            report: Any = oocpatch.check(f"bioimageio:{package},weights={weights}", trust_pickle=True)
            failed += not report.passed
            print(f"bioimageio {weights:20} {report.outputs[0].largest_absolute:9.2e}")
        for seed in range(arguments.seed, arguments.seed + arguments.bundles):
            difference = compare_bundle(folder / str(seed), seed)
            failed += not difference <= 1e-4  # NaN is no agreement
            print(f"monai {seed:4} {difference:9.2e}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
