"""Packages of bioimage.io do what their description says, or name the part that cannot be honoured."""

from __future__ import annotations

import copy
import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import oocpatch
from oocpatch.cli.main import main
from oocpatch.models.packages.package import load_package
from tests.support.package_network import NETWORK

pytest.importorskip("bioimageio.spec")
pytestmark = [  # the library leaves files open
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SIZE = {"min": 32, "step": 16}


def axis(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "space", "id": name, **more}


def reference(name: str, **more: Any) -> dict[str, Any]:
    return axis(name, size={"tensor_id": "raw", "axis_id": name}, **more)


DESCRIPTION: dict[str, Any] = {
    "format_version": "0.5.3",
    "type": "model",
    "name": "small net",
    "description": "a network of two layers",
    "authors": [{"name": "somebody"}],
    "cite": [{"text": "nothing", "doi": "10.1234/nothing"}],
    "license": "MIT",
    "documentation": "README.md",
    "inputs": [
        {
            "id": "raw",
            "axes": [
                {"type": "batch"},
                {"type": "channel", "channel_names": ["red", "green"]},
                axis("y", size=SIZE),
                axis("x", size=SIZE),
            ],
            "test_tensor": {"source": "in.npy"},
            "data": {"type": "float32"},
            "preprocessing": [
                {"id": "zero_mean_unit_variance", "kwargs": {"axes": ["y", "x"]}},
                {"id": "clip", "kwargs": {"min": -2.0, "max": 2.5}},
            ],
        }
    ],
    "outputs": [
        {
            "id": "cells",
            "axes": [
                {"type": "batch"},
                {"type": "channel", "channel_names": ["inside", "edge"]},
                reference("y", halo=4),
                reference("x", halo=4),
            ],
            "test_tensor": {"source": "out.npy"},
            "postprocessing": [{"id": "sigmoid"}],
        }
    ],
    "weights": {
        "pytorch_state_dict": {
            "source": "w.pth",
            "architecture": {"source": "net.py", "callable": "Net", "kwargs": {"width": 4}},
            "pytorch_version": "2.4",
        },
        "torchscript": {"source": "w.pt", "parent": "pytorch_state_dict", "pytorch_version": "2.4"},
    },
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files of a package but its description."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "net.py").write_text(NETWORK)
    (folder / "README.md").write_text("# small net")
    scope: dict[str, Any] = {}
    exec(NETWORK, scope)  # noqa: S102 - of our own making
    torch.manual_seed(0)
    network: nn.Module = scope["Net"](4)
    torch.save(network.state_dict(), folder / "w.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(network, torch.zeros(1, 2, 32, 32)).save(folder / "w.pt")
    values = np.random.default_rng(0).normal(100, 30, (2, 2, 48, 64)).astype(np.float32)
    np.save(folder / "in.npy", values)
    np.save(folder / "out.npy", promised(network, values))
    return folder


def promised(network: nn.Module, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What the description says, in plain numpy and torch."""
    mean, deviation = values.mean((2, 3), keepdims=True), values.std((2, 3), keepdims=True)
    patches = ((values - mean) / (deviation + 1e-6)).clip(-2, 2.5)
    with torch.no_grad():
        return torch.sigmoid(network(torch.from_numpy(patches))).numpy()


Write = Callable[..., str]


@pytest.fixture
def write(files: Path) -> Write:
    """Return a function that writes a description, changed by a function of it, and returns the package's spec."""

    def write(change: Callable[[dict[str, Any]], Any] = lambda _: None) -> str:
        description = copy.deepcopy(DESCRIPTION)
        change(description)
        (files / "rdf.yaml").write_text(json.dumps(description))
        return f"bioimageio:{files}"

    return write


@pytest.mark.parametrize("weights", ["pytorch_state_dict", "torchscript"])
def test_the_test_tensors_of_a_package_are_what_predict_gives(write: Write, weights: str) -> None:
    report: Any = oocpatch.check(f"{write()},weights={weights}", trust_pickle=weights.startswith("pytorch"))
    assert report.passed
    assert report.outputs[0].shape == (2, 2, 48, 64)
    assert report.outputs[0].largest_absolute < 1e-6


def test_wrong_test_tensors_fail(write: Write, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = write(lambda d: d["outputs"][0].update(postprocessing=[]))
    with pytest.raises(SystemExit) as ended:
        main(["check", spec, "--json"])
    assert ended.value.code == 1
    assert json.loads(capsys.readouterr().out)["outputs"][0]["mismatched"] > 0.9


def test_a_package_is_predicted_with_its_halo_and_statistics_of_the_whole_volume(
    write: Write, files: Path, tmp_path: Path
) -> None:
    spec = write()
    scan = np.random.default_rng(1).normal(100, 30, (2, 100, 130)).astype(np.float32)
    planned = oocpatch.plan(scan, spec, tmp_path / "plan", axes="cyx")
    assert planned.patch_size == (256, 256)
    assert planned.patch_overlap == (8, 8)
    found = oocpatch.predict(scan, spec, tmp_path / "out", axes="cyx", patch_size=48, progress=False)
    network = load_package(spec, trust_pickle=True).models[0].program.network  # type: ignore[union-attr]
    np.testing.assert_allclose(found, promised(network, scan[None])[0], atol=1e-5)  # halo 4, and 2 would do
    assert found.attrs["classes"] == ["inside", "edge"]


def test_a_zip_is_the_same_package(write: Write, files: Path, tmp_path: Path) -> None:
    write()
    with zipfile.ZipFile(tmp_path / "package.zip", "w") as archive:
        for file in files.iterdir():
            if file.is_file():
                archive.write(file, file.name)
    package = tmp_path / "package.zip"
    assert oocpatch.check(f"bioimageio:{package}").passed
    content = bytearray(package.read_bytes())
    content[content.index(b"PK\x01\x02") - 20] ^= 255  # in the last file's data
    package.write_bytes(content)
    with pytest.raises(ValueError, match=r"package.zip' is damaged: BadZipFile: Bad CRC-32.*; download it again"):
        load_package(f"bioimageio:{package}")


def test_version_0_4_and_axes_in_another_order_are_honoured(files: Path, tmp_path: Path) -> None:
    for name in ("w.pt", "README.md"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    for name in ("in.npy", "out.npy"):
        np.save(tmp_path / name, np.load(files / name))
    step = {"name": "zero_mean_unit_variance", "kwargs": {"mode": "per_dataset", "axes": "yx"}}
    clip = {"name": "clip", "kwargs": {"min": -2.0, "max": 2.5}}
    shape = {"reference_tensor": "raw", "scale": [1.0] * 4, "offset": [0.0] * 4}
    limits = {"min": [1, 2, 32, 32], "step": [0, 0, 16, 16]}
    kept = {name: DESCRIPTION[name] for name in ("type", "name", "description", "authors", "cite", "license")}
    tensors = {"axes": "bcyx", "data_type": "float32"}
    description = {
        **kept,
        "format_version": "0.4.10",
        "documentation": "README.md",
        "timestamp": "2024-01-01T00:00:00",
        "test_inputs": ["in.npy"],
        "test_outputs": ["out.npy"],
        "inputs": [{"name": "raw", **tensors, "shape": limits, "preprocessing": [step, clip]}],
        "outputs": [
            {"name": "cells", **tensors, "shape": shape, "halo": [0, 0, 4, 4], "postprocessing": [{"name": "sigmoid"}]}
        ],
        "weights": {"torchscript": {"source": "w.pt", "pytorch_version": "2.4"}},
    }
    (tmp_path / "rdf.yaml").write_text(json.dumps(description))
    assert oocpatch.check(f"bioimageio:{tmp_path}").passed
    assert load_package(f"bioimageio:{tmp_path}").settings["patch_overlap"] == (8, 8)  # type: ignore[union-attr]


def test_axes_may_stand_in_any_order(write: Write, files: Path) -> None:
    def last(description: dict[str, Any]) -> None:
        for tensor in (description["inputs"][0], description["outputs"][0]):
            tensor["axes"].append(tensor["axes"].pop(1))

    class ChannelsLast(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, patches: torch.Tensor) -> torch.Tensor:
            return self.network(patches.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    spec = write(last)
    package = load_package(spec)
    wrapper = package.models[0].program  # type: ignore[union-attr]
    patches = torch.rand(1, 2, 32, 48)
    expected = wrapper.network(patches)
    wrapper.network = ChannelsLast(wrapper.network)
    torch.testing.assert_close(wrapper(patches), expected)


def _in_range(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    low, high = np.percentile(values, (5, 90))
    return np.asarray((values - low) / (high - low + 1e-6))


GAIN = {"gain": [2.0, 0.5], "offset": 1.0, "axis": "channel"}
STEPS: list[tuple[dict[str, Any], Callable[[Any], Any]]] = [
    ({"id": "scale_linear", "kwargs": GAIN}, lambda v: v * np.reshape([2, 0.5], (2, 1, 1)) + 1),
    ({"id": "scale_range", "kwargs": {"min_percentile": 5, "max_percentile": 90}}, _in_range),
    ({"id": "fixed_zero_mean_unit_variance", "kwargs": {"mean": 3.0, "std": 2.0}}, lambda v: (v - 3) / 2),
    ({"id": "binarize", "kwargs": {"threshold": 100.0}}, lambda v: (v > 100).astype(np.float32)),
    ({"id": "sigmoid"}, lambda v: 1 / (1 + np.exp(-v))),
]


@pytest.mark.parametrize(("step", "formula"), STEPS, ids=[step["id"] for step, _ in STEPS])
def test_steps_before_a_model_are_those_of_the_specification(
    write: Write, tmp_path: Path, step: dict[str, Any], formula: Callable[[Any], Any]
) -> None:
    spec = write(lambda d: d["inputs"][0].update(preprocessing=[step]))
    package = load_package(spec)
    scan = np.random.default_rng(1).normal(100, 30, (2, 40, 50)).astype(np.float32)
    found = oocpatch.predict(
        scan,
        nn.Identity(),
        tmp_path / "out",
        axes="cyx",
        patch_size=32,
        preprocess=package.settings["preprocess"],  # type: ignore[union-attr]
        progress=False,
    )
    np.testing.assert_allclose(found, formula(scan.astype(np.float64)), rtol=1e-5, atol=1e-5)


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(description: dict[str, Any]) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        target: Any = description
        for parent in parents:
            target = target[parent]
        target[last] = value

    return change


PER_PLANE = [{"id": "zero_mean_unit_variance", "kwargs": {"axes": ["x"]}}]
PERCENTILES = [{"id": "clip", "kwargs": {"min_percentile": 1}}]
MEASURED = [{"id": "zero_mean_unit_variance"}]
KERAS = {"keras_hdf5": {"source": "w.h5", "tensorflow_version": "2.1"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("inputs.0.preprocessing", PER_PLANE), r"inputs.0.preprocessing.1 \(zero_mean.*not for each index of y"),
        (_set("inputs.0.preprocessing", PERCENTILES), r"inputs.0.preprocessing.1 \(clip\): is not supported with"),
        (_set("outputs.0.postprocessing", MEASURED), r"outputs.0.postprocessing.0 \(zero_mean.*pass postprocess="),
        (_set("weights", KERAS), "weights: none of the package can be used; keras_hdf5 is not run here"),
        (_set("weights.torchscript.source", "lost.pt"), "weights.torchscript.source: 'lost.pt' is not in the package"),
        (_set("name", 3), "is not a valid model of bioimage.io"),
        (_set("inputs.0.axes.2", {"type": "time", "id": "y", "size": SIZE}), "inputs.0.axes.y: an axis of type time"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_part(
    write: Write, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        oocpatch.plan(np.zeros((2, 64, 64), np.float32), write(change), tmp_path / "out", axes="cyx")


def test_a_given_preprocess_takes_the_place_of_one_that_is_not_supported(write: Write, tmp_path: Path) -> None:
    spec = write(_set("inputs.0.preprocessing", PERCENTILES))
    planned = oocpatch.plan(np.zeros((2, 64, 64), np.float32), spec, tmp_path / "out", axes="cyx", preprocess="zscore")
    assert planned.config.model.preprocess is not None


def test_source_code_of_a_package_runs_only_if_it_is_trusted(write: Write) -> None:
    spec = write(lambda d: d["weights"].pop("torchscript"))
    with pytest.raises(ValueError, match="pytorch_state_dict runs code of the package: pass --trust-pickle"):
        load_package(spec)
    assert load_package(spec, trust_pickle=True) is not None
