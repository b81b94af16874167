"""Models in files run as they would in memory; what a file fixes is found out, and nothing in it runs unasked."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner, Result
from torch import nn

import oocpatch
from oocpatch.cli import main as cli
from oocpatch.models.fingerprint import model_fingerprint
from oocpatch.models.input_spec import InputSpec, input_spec_of
from oocpatch.models.loading import load_model, load_models

onnx = pytest.importorskip("onnx", reason="writes ONNX files; it is in the extra `test`")
pytest.importorskip("onnxruntime", reason="runs ONNX files; it is in the extra `onnx`")

Array = np.ndarray[Any, Any]
SHAPE = (20, 27)
SETTINGS: dict[str, Any] = {"patch_size": 8, "patch_overlap": 4, "progress": False}
Dim = torch.export.Dim


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU()).eval()


def export(path: Path, model: nn.Module, patches: torch.Tensor, sizes: dict[int, Any] | None = None) -> Path:
    torch.export.save(torch.export.export(model, (patches,), dynamic_shapes=(sizes,) if sizes else None), path)
    return path


def to_onnx(
    path: Path, model: nn.Module, shape: list[Any], dtype: int = onnx.TensorProto.FLOAT, outputs: int = 1
) -> Path:
    """The convolution and ReLU of `network` as an ONNX model of one input; as a second output, its negative."""
    convolution = model.get_submodule("0")
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.bias is not None
    helper, tensor = onnx.helper, onnx.numpy_helper.from_array
    named = [f"n{axis}" if size is None else size for axis, size in enumerate(shape)]
    nodes = [
        helper.make_node("Cast", ["x"], ["given"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Conv", ["given", "w", "b"], ["y"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["y"], ["scores"]),
        helper.make_node("Neg", ["scores"], ["negative"]),
    ]
    out = [named[0], 2, *named[2:]]
    names = ("scores", "negative")[:outputs]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", dtype, named)],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, out) for name in names],
        [tensor(convolution.weight.detach().numpy(), "w"), tensor(convolution.bias.detach().numpy(), "b")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(made, path)
    return path


@pytest.fixture
def data() -> Array:
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


@pytest.fixture
def volume(data: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    zarr.create_array(tmp_path / "volume", data=data, chunks=(7, 9), dimension_names=("y", "x"))
    return tmp_path / "volume"


BATCH = {0: Dim("batch", min=1, max=16)}
SIDES = {**BATCH, 2: Dim("y"), 3: Dim("x")}
FILES: dict[str, tuple[Callable[[Path], Path], InputSpec]] = {
    "fixed.pt2": (lambda p: export(p, network(), torch.zeros(4, 1, 8, 8)), InputSpec(4, 4, 1, (8, 8), torch.float32)),
    "batch.pt2": (
        lambda p: export(p, network(), torch.zeros(4, 1, 8, 8), BATCH),
        InputSpec(1, 16, 1, (8, 8), torch.float32),
    ),
    "free.pt2": (
        lambda p: export(p, network(), torch.zeros(4, 1, 8, 8), SIDES),
        InputSpec(1, 16, 1, (None, None), torch.float32),
    ),
    "fixed.onnx": (lambda p: to_onnx(p, network(), [4, 1, 8, 8]), InputSpec(4, 4, 1, (8, 8), torch.float32)),
    "free.onnx": (
        lambda p: to_onnx(p, network(), [None, 1, None, None]),
        InputSpec(1, None, 1, (None, None), torch.float32),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_what_a_file_takes_is_found_out(name: str, tmp_path: Path) -> None:
    make, expected = FILES[name]
    assert input_spec_of(load_model(str(make(tmp_path / name)))) == expected


@pytest.mark.parametrize("name", FILES)
def test_any_batch_size_gives_what_the_network_gives(name: str, volume: Path, tmp_path: Path) -> None:
    path = FILES[name][0](tmp_path / name)
    expected = oocpatch.predict(volume, network(), tmp_path / "expected", **SETTINGS)
    for batch in (1, 3, 4, 7, 20, "auto"):
        result = oocpatch.predict(volume, str(path), tmp_path / f"out-{batch}", batch_size=batch, **SETTINGS)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["fixed.pt2", "fixed.onnx"])
def test_auto_is_what_a_file_fixes(name: str, volume: Path, tmp_path: Path) -> None:
    path = FILES[name][0](tmp_path / name)
    plan = oocpatch.plan(volume, str(path), tmp_path / "out", patch_size="auto", batch_size="auto")
    assert (plan.patch_size, plan.batch_size) == ((8, 8), 4)
    assert "always called with 4 patch(es)" in str(plan)


@pytest.mark.parametrize("name", ["fixed.pt2", "fixed.onnx"])
def test_other_sizes_than_a_file_fixes_are_answered_with_those(name: str, volume: Path, tmp_path: Path) -> None:
    path = str(FILES[name][0](tmp_path / name))
    with pytest.raises(ValueError, match=r"the model takes patches of 8 x 8 only, got 16 x 16; patch_size=\"auto\""):
        oocpatch.predict(volume, path, tmp_path / "out", patch_size=16)
    cube = np.zeros((9, 9, 9), np.float32)
    with pytest.raises(ValueError, match="the model takes patches of 2 axes, got 3: 8 x 8 x 8"):
        oocpatch.predict(cube, path, tmp_path / "out", patch_size=8)
    colour = np.zeros((3, 9, 9), np.float32)
    with pytest.raises(ValueError, match=r"the model takes 1 channel\(s\), and the volume has 3"):
        oocpatch.predict(colour, path, tmp_path / "out", patch_size=8, axes="cyx")


def test_a_volume_of_integers_reaches_a_file_as_what_it_takes(volume: Path, tmp_path: Path) -> None:
    counts = np.random.default_rng(0).integers(0, 255, SHAPE, dtype=np.uint8)
    for name in ("free.pt2", "free.onnx"):
        path = FILES[name][0](tmp_path / name)
        result = oocpatch.predict(counts, str(path), tmp_path / f"{name}.out", **SETTINGS)
        expected = oocpatch.predict(counts, network(), tmp_path / f"{name}.expected", **SETTINGS)
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)
    integers = to_onnx(tmp_path / "integers.onnx", network(), [None, 1, None, None], onnx.TensorProto.UINT8)
    result = oocpatch.predict(counts, str(integers), tmp_path / "integers", **SETTINGS)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="takes patches of uint8, which do not hold float32"):
        oocpatch.predict(volume, str(integers), tmp_path / "floats", **SETTINGS)


def test_several_outputs_of_an_onnx_model_are_heads(volume: Path, tmp_path: Path) -> None:
    path = to_onnx(tmp_path / "two.onnx", network(), [None, 1, None, None], outputs=2)
    result = oocpatch.predict(volume, str(path), tmp_path / "out", **SETTINGS)
    expected = oocpatch.predict(volume, network(), tmp_path / "expected", **SETTINGS)
    np.testing.assert_allclose(result["scores"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(result["negative"], -result["scores"])


def test_the_memory_that_onnxruntime_takes_is_in_the_plan(volume: Path, tmp_path: Path) -> None:
    path = str(to_onnx(tmp_path / "free.onnx", network(), [None, 1, None, None]))
    sizes = [(64, 1), (512, 1), (512, 4)]
    image = np.zeros((1024, 1024), np.float32)
    plans = [oocpatch.plan(image, path, tmp_path / "out", patch_size=n, batch_size=b) for n, b in sizes]
    model = [dict(plan.memory_parts)["model"] for plan in plans]
    # Input, both convolutions' output and the result live at a time: at least two channels of float32.
    for (n, b), found in zip(sizes, model, strict=True):
        assert found >= b * n * n * 4 * 3
    assert model == [
        dict(oocpatch.plan(image, path, tmp_path / "out", patch_size=n, batch_size=b).memory_parts)["model"]
        for n, b in sizes
    ]


def test_identity_of_a_file_is_that_of_its_content(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("fixed.pt2", "free.onnx"):
        first = FILES[name][0](tmp_path / name)
        second = FILES[name][0](tmp_path / "elsewhere" / f"copy-{name}")
        assert model_fingerprint(load_model(str(first))) == model_fingerprint(load_model(str(second)))
    other = to_onnx(tmp_path / "other.onnx", network(seed=1), [None, 1, None, None])
    assert model_fingerprint(load_model(str(other))) != model_fingerprint(load_model(str(tmp_path / "free.onnx")))


def test_identity_covers_weights_that_lie_beside_an_onnx_file(tmp_path: Path) -> None:
    def beside(folder: str, seed: int) -> str:
        (tmp_path / folder).mkdir()
        path = to_onnx(tmp_path / folder / "net.onnx", network(seed), [None, 1, None, None])
        external = {"save_as_external_data": True, "location": "net.data", "size_threshold": 0}
        onnx.save(onnx.load(path), path, **external)
        assert (path.parent / "net.data").exists()
        return model_fingerprint(load_model(str(path)))

    assert beside("a", 0) == beside("b", 0)
    assert beside("c", 1) != beside("d", 0)
    first, second = (tmp_path / folder / "net.onnx" for folder in "ac")
    assert first.read_bytes() == second.read_bytes()


def test_without_onnxruntime_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = to_onnx(tmp_path / "net.onnx", network(), [None, 1, None, None])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=re.escape("pip install 'oocpatch[onnx]'")):
        load_model(str(path))


def test_a_file_that_is_no_onnx_model_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"net.onnx' cannot be loaded as an ONNX model") as error:
        load_model(str(tmp_path / "net.onnx"))
    assert "\n" not in str(error.value)


def test_programs_of_several_inputs_are_refused(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    patch = torch.zeros(2, 1, 8, 8)
    torch.export.save(torch.export.export(Two(), (patch, patch)), tmp_path / "two.pt2")
    with pytest.raises(ValueError, match=r"must take one tensor \(B, C, \*patch\), got .*8, 8.*, .*8, 8"):
        load_model(str(tmp_path / "two.pt2"))


# Nothing in a file runs unless it is trusted.


class Trap:
    """Unpickling it leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("sprung",)


def tampered(path: Path, change: Callable[[str, bytes], bytes], **more: bytes) -> Path:
    """A `.pt2` file with some members changed."""
    original = export(path.with_name("original.pt2"), network(), torch.zeros(4, 1, 8, 8), SIDES)
    with zipfile.ZipFile(original) as source, zipfile.ZipFile(path, "w") as target:
        root = source.namelist()[0].partition("/")[0]
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
        for name, content in more.items():
            target.writestr(f"{root}/{name}", content)
    return path


def trap(wrapped: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(wrapped, stream)
    return stream.getvalue()


def in_inputs(name: str, content: bytes) -> bytes:
    return trap(((Trap(),), {})) if "sample_inputs" in name else content


def in_weights(name: str, content: bytes) -> bytes:
    if name.endswith("weights_config.json"):
        return content.replace(b'"use_pickle": false', b'"use_pickle": true')
    return trap(Trap()) if "weights/weight_" in name else content


def in_a_size(name: str, content: bytes) -> bytes:
    code = rb'"expr_str": "exec(chr(112)+chr(97)+chr(115)+chr(115))"'
    return re.sub(rb'"expr_str": "[^"]*"', code, content) if name.endswith("model.json") else content


def in_a_range(name: str, content: bytes) -> bytes:
    pattern, code = rb'"range_constraints": \{"\w+"', b'"range_constraints": {"exec(chr(112))"'
    return re.sub(pattern, code, content) if name.endswith("model.json") else content


TAMPERED: dict[str, tuple[Callable[[str, bytes], bytes], dict[str, bytes], str]] = {
    "inputs": (in_inputs, {}, "needs code of its own to be unpickled"),
    "weights": (in_weights, {}, "needs code of its own to be unpickled"),
    "size": (in_a_size, {}, r"holds code in place of a size \('exec\("),
    "range": (in_a_range, {}, r"holds code in place of a size \('exec\("),
    "objects": (lambda _, content: content, {"data/constants/opaque_obj_0": b"x"}, "holds compiled or pickled code"),
    "library": (lambda _, content: content, {"data/aotinductor/model/a.so": b"x"}, "holds compiled or pickled code"),
}


def forced() -> dict[str, str]:
    """What the environment tells `torch.load`."""
    return {name: value for name, value in os.environ.items() if name.startswith("TORCH_FORCE")}


@pytest.mark.parametrize("override", [None, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"])
@pytest.mark.parametrize("case", TAMPERED)
def test_a_program_that_could_run_code_is_refused_and_runs_none(
    case: str, override: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if override is not None:
        monkeypatch.setenv(override, "1")
    before = forced()
    change, more, message = TAMPERED[case]
    path = tampered(tmp_path / "net.pt2", change, **more)
    with pytest.raises(ValueError, match=f"{message}.*--trust-pickle"):
        load_model(str(path))
    assert not Path("sprung").exists()
    assert forced() == before


def test_the_trap_would_have_sprung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="must hold a program"):
        load_model(str(tampered(tmp_path / "net.pt2", in_weights)), trust_pickle=True)
    assert Path("sprung").exists()


def test_an_untouched_program_with_formulas_for_its_sizes_is_loaded(tmp_path: Path) -> None:
    model = nn.Sequential(nn.MaxPool2d(2), nn.Upsample(scale_factor=2))
    sizes = {0: Dim("batch", min=1, max=16), 2: 8 * Dim("y", min=1, max=100), 3: 8 * Dim("x")}
    path = export(tmp_path / "net.pt2", model, torch.zeros(2, 1, 16, 16), sizes)
    patches = torch.randn(3, 1, 24, 32)
    assert torch.equal(load_model(str(path))(patches), model(patches))


# Arguments, several models, functions of arrays.

CODE = '''
import numpy as np
from torch import nn


class Scaled(nn.Module):
    def __init__(self, factor, name="net", **more):
        super().__init__()
        self.line = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(self.line.weight, factor * len(more or [1]))

    def forward(self, x):
        return self.line(x)


def build(factor=1.0):
    return Scaled(factor)


def times(x, factor=2.0):
    return x * factor


def flat(patches):
    """Of arrays: tensors have no astype."""
    return patches.astype("float32").mean(axis=(2, 3), keepdims=True) + patches * 0


instance = Scaled(5.0)
'''


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.py").write_text(CODE)
    return tmp_path


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize(
    ("spec", "arguments", "expected"),
    [
        ("code.py:Scaled", {"factor": 3}, 3.0),
        ("code.py:Scaled", {"factor": 3, "depth": 1, "width": 2}, 6.0),
        ("code.py:build", {"factor": 7}, 7.0),
        ("code.py:build", {}, 1.0),
        ("code.py:times", {"factor": 9}, 9.0),
        ("code.py:times", {}, 2.0),
    ],
)
def test_factories_get_their_arguments(spec: str, arguments: dict[str, Any], expected: float) -> None:
    patch = torch.ones(1, 1, 2, 2)
    with torch.no_grad():
        assert load_model(spec, model_args=arguments)(patch).unique().tolist() == [expected]


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        ("code.py:build", {"depth": 3}, r"must be arguments of 'code.py:build' \(factor\), got depth"),
        ("code.py:instance", {"factor": 3}, "'code.py:instance' is a Scaled; leave them out"),
        ("identity", {"factor": 3}, "'identity' names none; leave them out"),
        ("code.py:Scaled", {"factor": "three"}, "calling the factory 'code.py:Scaled' failed: TypeError"),
        ("code.py:Scaled", {}, r"requires factor; give model_args \(--model-args factor=\.\.\.\)"),
        ("numpy:code.py:instance", {}, "numpy: is for functions of numpy arrays"),
        ("numpy:code.py:absent", {}, "names nothing that is there"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(spec: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(spec, model_args=arguments)


def test_one_factory_and_several_weights_are_an_ensemble(code: Path, volume: Path, data: Array) -> None:
    for factor in (1.0, 2.0, 6.0):
        torch.save({"line.weight": torch.full((1, 1, 1, 1), factor)}, f"{factor}.pth")
    weights = ["1.0.pth", "2.0.pth", "6.0.pth"]
    result = oocpatch.predict(volume, "code.py:Scaled", "out", weights=weights, model_args={"factor": 0.0}, **SETTINGS)
    np.testing.assert_allclose(result, data * 3, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("code")
def test_weights_and_models_must_match() -> None:
    torch.save({"line.weight": torch.ones(1, 1, 1, 1)}, "w.pth")
    with pytest.raises(ValueError, match="one file for each model, got 3 for 2 models"):
        load_models(["code.py:build", "code.py:build"], weights=["w.pth"] * 3)
    with pytest.raises(ValueError, match="must not be empty lists"):
        load_models([])
    with pytest.raises(TypeError, match="a callable or a model spec, got int"):
        load_models([nn.Identity(), 3])


def test_weights_loaded_twice_into_one_object_are_refused(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(code))
    (code / "shared_network.py").write_text(CODE)
    torch.save({"line.weight": torch.ones(1, 1, 1, 1)}, "w.pth")
    with pytest.raises(ValueError, match=r"made anew each time, got 'shared_network:instance' twice; name a factory"):
        load_models("shared_network:instance", weights=["w.pth", "w.pth"])
    del sys.modules["shared_network"]


@pytest.mark.parametrize("given", ["numpy:code.py:flat", "object"])
def test_a_function_of_arrays_runs(given: str, code: Path, volume: Path, data: Array) -> None:
    def flat(patches: Array) -> Array:
        assert isinstance(patches, np.ndarray)
        return patches.mean(axis=(2, 3), keepdims=True) + patches * 0

    model = oocpatch.NumpyModel(flat) if given == "object" else given
    result = oocpatch.predict(volume, model, "out", patch_size=(20, 9))
    for start in (0, 9, 18):
        window = data[:, start : start + 9]
        np.testing.assert_allclose(result.values[:, start : start + 9], window.mean(), atol=1e-6)


def test_functions_of_arrays_have_different_fingerprints() -> None:
    def adding(amount: int) -> oocpatch.NumpyModel:
        return oocpatch.NumpyModel(lambda patches: patches + amount)

    assert model_fingerprint(adding(1)) != model_fingerprint(adding(2))
    assert model_fingerprint(adding(1)) == model_fingerprint(adding(1))
    assert model_fingerprint(oocpatch.NumpyModel(np.sin)) != model_fingerprint(np.sin)


# On the command line.


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, [str(item) for item in arguments])


def test_the_command_line_has_all_of_it(code: Path, volume: Path, data: Array) -> None:
    for factor in (2.0, 6.0):
        torch.save({"line.weight": torch.full((1, 1, 1, 1), factor)}, f"{factor}.pth")
    done = run(
        *(
            "predict",
            "volume",
            "out",
            "--model",
            "code.py:Scaled",
            "--model-args",
            "factor=1",
            "--model-args",
            "name=a",
        ),
        *("--weights", "2.0.pth", "--weights", "6.0.pth", "--preprocess", '{"name": "scale", "divide": 2}'),
        *("--augment", "all", "--patch-size", "auto", "--batch-size", "auto", "--progress", "none", "--json"),
    )
    assert done.exit_code == 0, done.output
    assert "mean of 2 models, mean of 8 flips and rotations, preprocess scale" in done.stderr
    result = oocpatch.predict(
        "volume",
        "code.py:Scaled",
        "out",
        weights=["2.0.pth", "6.0.pth"],
        model_args={"factor": 1, "name": "a"},
        preprocess={"name": "scale", "divide": 2},
        augment="all",
        patch_size="auto",
        batch_size="auto",
    )
    np.testing.assert_allclose(result, data * 2, rtol=1e-5, atol=1e-6)
    checked = run("check", "volume", "--model", "identity", "--patch-size", "auto", "--preprocess", "zscore", "--json")
    assert checked.exit_code == 0, checked.output
    assert json.loads(checked.stdout)["passed"]


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "missing.onnx"], "does not exist"),
        (["--model", "code.py:build", "--model-args", "factor"], "NAME=VALUE"),
        (["--model", "code.py:build", "--model-args", "depth=3"], "must be arguments of"),
        (["--model", "code.py:build", "--weights", "missing.pth"], "does not exist"),
        (["--model", "identity", "--preprocess", "whiten"], "preprocess must be one of"),
        (
            ["--model", "identity", "--preprocess", '{"name": "zscore", "by": 3}'],
            "takes channels, epsilon, pooled, nonzero, got by",
        ),
        (["--model", "identity", "--augment", "mirrors"], "augment must be one of"),
        (["--model", "identity", "--batch-size", "many"], "got 'many'"),
    ],
)
def test_a_wrong_model_is_one_message_and_exit_code_2(arguments: list[str], message: str, volume: Path) -> None:
    done = run("predict", str(volume), "out", "--patch-size", "8", *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not Path("out").exists()
