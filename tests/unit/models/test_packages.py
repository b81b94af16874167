"""A model package brings its models and the settings that they were made for; what the caller gives wins."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import oocpatch
from oocpatch.cli.main import main
from oocpatch.execution.payload import absolute_spec
from oocpatch.models.packages import package
from oocpatch.models.packages.package import ModelPackage, PackageSpec

SCAN = np.random.default_rng(0).random((48, 64), dtype=np.float32)


class Times(nn.Module):
    """Multiplies by a number; gives as many channels as there are classes."""

    def __init__(self, factor: float, channels: int) -> None:
        super().__init__()
        self.factor, self.channels = factor, channels

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return torch.cat([patches * self.factor * (i + 1) for i in range(self.channels)], 1)


def load(path: Path, options: Mapping[str, str], *, trust_pickle: bool, device: str) -> ModelPackage:
    """Load a package of a test: a folder with one JSON file."""
    package.refuse_options(options, ("only",), "sample")
    content = json.loads((path / "sample.json").read_text())
    factors = content["factors"][: int(options.get("only", 9))]
    models = tuple(Times(factor, max(1, len(content["classes"]))) for factor in factors)
    return ModelPackage(models, content["settings"], (path / "sample.json",), tuple(content["classes"]), ("torch",))


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that writes a package and returns its spec; its kind has a module while a test runs."""
    module = types.ModuleType("oocpatch.models.packages.sample")
    module.load = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(package, "KINDS", ("sample",))

    def write(settings: Mapping[str, Any], factors: tuple[float, ...] = (2.0,), classes: tuple[str, ...] = ()) -> str:
        (tmp_path / "package").mkdir(exist_ok=True)
        content = {"settings": settings, "factors": factors, "classes": classes}
        (tmp_path / "package" / "sample.json").write_text(json.dumps(content))
        return f"sample:{tmp_path}/package"

    return write


def test_a_given_value_wins_where_it_is_the_default(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = write({"patch_size": 16, "patch_overlap": 8, "overlap_mode": "crop", "batch_size": 4})
    arguments: dict[str, Any] = {"overlap_mode": "hann", "patch_overlap": 0}
    oocpatch.predict(SCAN, spec, "out", **arguments, progress=False)
    record = json.loads((tmp_path / "out/zarr.json").read_text())["attributes"]["oocpatch"]
    settings, parameters = record["details"]["settings"], record["parameters"]
    assert {name: settings[name] for name in arguments} == arguments
    assert "batch_size" not in settings
    assert [parameters[n] for n in ("overlap_mode", "patch_overlap", "batch_size")] == ["hann", [0, 0], 4]
    typed = ["plan", "out", "new", "--model", spec, "--overlap-mode", "hann", "--json"]
    main(typed, standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["package"] == {"patch_size": 16, "patch_overlap": 8, "batch_size": 4}


def test_settings_come_from_the_package_unless_they_are_given(write: Any, tmp_path: Path) -> None:
    settings = {"patch_size": [16, 32], "patch_overlap": 8, "augment": "flips", "overlap_mode": "crop"}
    spec = write({**settings, "preprocess": {"name": "scale", "divide": 4}, "postprocess": "sigmoid"})
    planned = oocpatch.plan(SCAN, spec, tmp_path / "out", patch_size=24, augment="none", preprocess="none")
    assert planned.patch_size == (24, 24)
    assert planned.patch_overlap == (8, 8)
    assert planned.config.model.augment is None
    assert planned.config.model.preprocess is None
    assert planned.config.model.postprocess == "sigmoid"
    line = 'package  patch_overlap=8, overlap_mode="crop", postprocess="sigmoid"'
    assert line in str(planned).splitlines()
    assert json.loads(planned.to_json())["package"] == {
        "patch_overlap": 8,
        "overlap_mode": "crop",
        "postprocess": "sigmoid",
    }
    found = np.asarray(planned.run())
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-2 * SCAN)), rtol=1e-5)


def test_members_are_averaged_and_classes_named(write: Any, tmp_path: Path) -> None:
    spec = write({"patch_size": 32, "postprocess": "argmax"}, (1.0, 3.0), ("background", "cell"))
    labels = oocpatch.predict(SCAN, spec, tmp_path / "labels", progress=False)
    assert labels.attrs["classes"] == ["background", "cell"]
    np.testing.assert_array_equal(labels, SCAN > 0)
    scores = oocpatch.predict(SCAN, spec, tmp_path / "scores", postprocess="none", progress=False)
    assert scores.attrs["classes"] == ["background", "cell"]
    np.testing.assert_allclose(scores, [2 * SCAN, 4 * SCAN], rtol=1e-6)
    one = oocpatch.predict(SCAN, f"{spec},only=1", tmp_path / "one", postprocess="none", progress=False)
    np.testing.assert_allclose(one, [SCAN, 2 * SCAN], rtol=1e-6)


def test_other_content_is_another_run_and_another_place_is_not(write: Any, tmp_path: Path) -> None:
    spec = write({"patch_size": 32})
    oocpatch.predict(SCAN, spec, tmp_path / "out", progress=False)
    (tmp_path / "package").rename(tmp_path / "moved")
    oocpatch.predict(SCAN, f"sample:{tmp_path}/moved", tmp_path / "out", progress=False)
    spec = write({"patch_size": 32}, (2.5,))
    with pytest.raises(oocpatch.RunMismatch, match="model"):
        oocpatch.predict(SCAN, spec, tmp_path / "out", progress=False)


def test_a_package_is_compared_with_its_settings(write: Any) -> None:
    spec = write({"patch_size": 16, "patch_overlap": 8, "preprocess": ["zscore", {"name": "clip", "high": 1}]})
    report = oocpatch.check(SCAN, spec, boxes=1)
    assert report.passed
    assert report.boxes[0].patches > 1


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("sample:nowhere", {}, "package of model spec 'sample:nowhere' does not exist"),
        ("{},fold=0", {}, "model spec sample:PATH takes only, got fold"),
        (["{}", "{}"], {}, "a model package must be the only model"),
        ("{}", {"weights": "w.pth"}, "weights and model_args must be left out with a model package"),
        ("{}", {"orientation": "RAS"}, "orientation must be None for a model package that knows axes by their names"),
    ],
)
def test_what_cannot_go_with_a_package_is_refused(
    write: Any, tmp_path: Path, model: Any, arguments: dict[str, Any], message: str
) -> None:
    spec = write({"patch_size": {"y": 32, "x": 32}})
    model = [m.format(spec) for m in model] if isinstance(model, list) else model.format(spec)
    with pytest.raises(ValueError, match=message):
        oocpatch.plan(SCAN, model, tmp_path / "out", **arguments)


def test_specs_travel_with_absolute_paths(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write({})
    monkeypatch.chdir(tmp_path)
    assert absolute_spec("sample:package,only=1") == f"sample:{tmp_path}/package,only=1"
    assert PackageSpec.of("monai.networks:UNet") is None


def test_the_command_line_needs_no_patch_size_with_a_package(
    write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = write({"patch_size": 32, "patch_overlap": 16})
    monkeypatch.chdir(tmp_path)
    oocpatch.predict(SCAN, "identity", "scan.zarr", patch_size=32, progress=False)
    main(["predict", "scan.zarr", "out.zarr", "--model", spec, "--progress", "none"], standalone_mode=False)
    assert "package  patch_size=32, patch_overlap=16" in capsys.readouterr().err
    assert main(["check", "scan.zarr", "--model", spec, "--boxes", "1"], standalone_mode=False) is None
    assert capsys.readouterr().out.endswith("PASS\n")
    assert main(["plan", "scan.zarr", "new.zarr", "--model", "identity"], standalone_mode=False) == 2
    assert "predict and plan need patch_size" in capsys.readouterr().err
