"""Promises on prepared models: channels last and compiled, values stay close, bytes stay the same from call to call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner
from torch import nn

import oocpatch
from oocpatch.cli.main import main
from oocpatch.errors import RunMismatch
from oocpatch.models import compilation as prepared
from oocpatch.models.fingerprint import model_fingerprint
from oocpatch.outputs.record import inspect_output
from oocpatch.storage.paths import LocalPath
from oocpatch.visualization.html_report import command_of
from tests.support.children import file_digests, unchanged

# torch itself, when it imports its compiler; and the model of TorchScript that is refused
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

ROOT = Path(__file__).parents[3]
SHAPE = (40, 44)
SETTINGS: dict[str, Any] = {
    "patch_size": 8, "patch_overlap": 4, "batch_size": 5, "block_shape": 16, "output_chunks": 8, "progress": False,
}  # fmt: skip
NET = """
import os
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, patches):
        die_in_time()
        return self.inner(patches)

@torch.compiler.disable
def die_in_time():
    left = os.environ.get("NET_DIES_AFTER")
    if left is not None:
        if left == "0":
            os._exit(9)
        os.environ["NET_DIES_AFTER"] = str(int(left) - 1)
"""


class Net(nn.Module):
    """Two channels to three; each convolution has weights of four axes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 3, 3, padding=1))
        self.seen: set[tuple[torch.Size, bool, bool]] = set()

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.inner(patches)


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    data = np.random.default_rng(0).random((2, *SHAPE), dtype=np.float32)
    zarr.create_array(tmp_path / "volume.zarr", data=data, chunks=(1, 16, 16), dimension_names=("c", "y", "x"))
    return tmp_path / "volume.zarr"


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[list[torch.Size]]:
    """The shapes that torch was asked to compile for: its own tracing, with a backend that only counts."""
    found: list[list[torch.Size]] = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        found.append([tensor.shape for tensor in inputs if not isinstance(tensor, nn.Parameter)])
        return graph.forward

    monkeypatch.setattr(prepared, "_compiled", lambda model, mode: torch.compile(model, dynamic=False, backend=count))
    torch.compiler.reset()
    return found


def test_the_model_is_compiled_once_for_full_batches_and_gives_the_same_bytes(
    graphs: list[list[torch.Size]], volume: Path, tmp_path: Path
) -> None:
    """90 patches in six blocks: no block's are a multiple of five."""
    model = Net()
    before = model_fingerprint(model)
    plain = oocpatch.predict(volume, model, tmp_path / "plain", **SETTINGS)
    assert not graphs
    result = oocpatch.predict(volume, model, tmp_path / "out", compile=True, workers=2, **SETTINGS)
    assert graphs == [[torch.Size((5, 2, 8, 8))]]
    assert model_fingerprint(model) == before, "the model is left as it was"
    # what the batches are filled up with changes nothing, but torch rounds by the size of a batch
    np.testing.assert_allclose(result, plain, atol=1e-6)


def test_one_patch_at_a_time_is_compiled_once_too(graphs: list[list[torch.Size]], volume: Path, tmp_path: Path) -> None:
    """Else views of the ring would reach the model, and their strides differ from block to block."""
    settings = {**SETTINGS, "batch_size": 1}
    plain = oocpatch.predict(volume, Net(), tmp_path / "plain", **settings)
    result = oocpatch.predict(volume, Net(), tmp_path / "out", compile="default", **settings)
    assert graphs == [[torch.Size((1, 2, 8, 8))]]
    np.testing.assert_array_equal(result, plain)


def test_turns_ensembles_and_functions_are_compiled_model_by_model(
    graphs: list[list[torch.Size]], volume: Path, tmp_path: Path
) -> None:
    models: Any = [Net(), lambda patches: patches.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)]
    settings = {**SETTINGS, "augment": "flips", "preprocess": "zscore"}
    plain = oocpatch.predict(volume, models, tmp_path / "plain", **settings)
    result = oocpatch.predict(volume, models, tmp_path / "out", compile=True, **settings)
    assert graphs == [[torch.Size((5, 2, 8, 8))]] * 2
    np.testing.assert_allclose(result, plain, atol=1e-6)


def test_planning_compiles_nothing_and_counts_the_compiler(
    graphs: list[list[torch.Size]], volume: Path, tmp_path: Path
) -> None:
    plain = oocpatch.plan(volume, Net(), tmp_path / "out", **SETTINGS)
    made = oocpatch.plan(volume, Net(), tmp_path / "out", compile=True, **SETTINGS)
    assert not graphs
    assert made.projected_memory >= plain.projected_memory + prepared.COMPILER_BYTES
    assert "compiled (default)" in str(made)
    with pytest.raises(oocpatch.PlanTooLarge):
        oocpatch.plan(volume, Net(), tmp_path / "out", compile=True, max_memory="200MiB", **SETTINGS)


@pytest.mark.compiler
def test_really_compiled_a_run_that_died_in_one_part_ends_in_the_bytes_of_one_call(
    volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's own compiler: one process is the reference, another dies, the first one goes on."""
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.delenv("NET_DIES_AFTER", raising=False)
    model = f"{tmp_path}/net.py:Net"
    settings = {**SETTINGS, "compile": True, "model_id": "net"}  # it reads in the environment when to die
    plain = oocpatch.predict(volume, model, tmp_path / "plain", **SETTINGS)
    expected = oocpatch.predict(volume, model, tmp_path / "expected", **settings)
    np.testing.assert_allclose(expected, plain, atol=1e-5)

    code = f"import oocpatch; oocpatch.predict({str(volume)!r}, {model!r}, {str(tmp_path / 'out')!r}, part=(1, 2), "
    code += f"**{settings!r})"
    environment = {**os.environ, "NET_DIES_AFTER": "9", "PYTHONPATH": str(ROOT)}
    died = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert died.returncode == 9, died.stderr
    for number in (2, 1):
        result = oocpatch.predict(volume, model, tmp_path / "out", part=(number, 2), **settings)
    assert "complete" not in result.attrs
    assert file_digests(tmp_path / "out" / "prediction") == file_digests(tmp_path / "expected" / "prediction")


class Looks(Net):
    """Notes how its patches and weights lie in memory."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        last = torch.channels_last
        weight = self.inner[0].weight
        self.seen.add((patches.shape[1:], patches.is_contiguous(memory_format=last),
                       weight.is_contiguous(memory_format=last)))  # fmt: skip
        return super().forward(patches)


@pytest.mark.parametrize("augment", [None, "flips"])
def test_channels_last_reaches_patches_and_weights_and_is_taken_back(
    augment: Any, volume: Path, tmp_path: Path
) -> None:
    model, settings = Looks(), {**SETTINGS, "augment": augment}
    plain = oocpatch.predict(volume, model, tmp_path / "plain", **settings)
    assert model.seen == {(torch.Size((2, 8, 8)), False, False)}
    model.seen.clear()
    result = oocpatch.predict(volume, model, tmp_path / "out", channels_last=True, **settings)
    assert model.seen == {(torch.Size((2, 8, 8)), True, True)}
    np.testing.assert_allclose(result, plain, atol=1e-6)
    assert model.inner[0].weight.is_contiguous()
    again = oocpatch.predict(volume, model, tmp_path / "again", **settings)
    np.testing.assert_array_equal(again, plain)


def test_channels_last_in_three_dimensions(tmp_path: Path) -> None:
    seen = []

    def look(patches: torch.Tensor) -> torch.Tensor:
        seen.append(patches.is_contiguous(memory_format=torch.channels_last_3d))
        return patches

    data = np.random.default_rng(0).random((2, 12, 13, 14), dtype=np.float32)
    settings: dict[str, Any] = {"patch_size": 6, "patch_overlap": 2, "overlap_mode": "crop", "progress": False}
    result = oocpatch.predict(data, look, tmp_path / "out", axes="czyx", channels_last=True, **settings)
    assert all(seen)
    np.testing.assert_array_equal(result, data)


def test_how_a_model_is_prepared_is_part_of_the_run_and_what_is_off_leaves_no_trace(
    graphs: list[list[torch.Size]], volume: Path, tmp_path: Path
) -> None:
    oocpatch.predict(volume, Net(), tmp_path / "off", **SETTINGS)
    found = inspect_output(LocalPath(tmp_path / "off"))
    assert found is not None
    assert not {"compile", "channels_last"} & found.parameters.keys()
    off = oocpatch.plan(volume, Net(), tmp_path / "other", **SETTINGS)
    run_ids = {off.run_id, found.run_id}
    assert len(run_ids) == 1
    for more in ({"compile": True}, {"channels_last": True}):
        (name,) = more
        assert oocpatch.plan(volume, Net(), tmp_path / "other", **more, **SETTINGS).run_id not in run_ids
        with pytest.raises(RunMismatch, match=rf"{name}: None before"):
            oocpatch.predict(volume, Net(), tmp_path / "off", **more, **SETTINGS)
        oocpatch.predict(volume, Net(), tmp_path / name, **more, **SETTINGS)
        with pytest.raises(RunMismatch, match=rf"{name}: .* before, None now"):
            oocpatch.predict(volume, Net(), tmp_path / name, **SETTINGS)


def script() -> Any:
    return torch.jit.trace(nn.ReLU(), torch.ones(1, 2, 8, 8))


def test_the_command_line_has_both_and_a_report_repeats_them(volume: Path, tmp_path: Path) -> None:
    settings = ["--patch-size", "8", "--model", "identity", "--channels-last", "--compile", "reduce-overhead"]
    done = CliRunner().invoke(main, ["plan", str(volume), str(tmp_path / "out"), *settings, "--json"])
    assert done.exit_code == 0, done.output
    parameters = json.loads(done.stdout)["parameters"]
    assert (parameters["channels_last"], parameters["compile"]) == (True, "reduce-overhead")
    told = {"volume": "a", "output": "b", "model": "identity", "patch_size": 8, "autocast": False}
    assert "compile" not in command_of({**told, "compile": False, "channels_last": False})
    words = command_of({**told, "compile": True, "channels_last": True})
    assert "--compile default" in words
    assert "--channels-last" in words.split()


REFUSED: dict[str, tuple[dict[str, Any], Any, str]] = {
    "a mode there is not": ({"compile": "fast"}, Net, r"compile must be True, False or one of default.*'fast'"),
    "a number": ({"compile": 3}, Net, r"compile must be True, False or one of default.*3"),
    "a text for a switch": ({"channels_last": "yes"}, Net, r"channels_last must be True or False, got 'yes'"),
    "TorchScript": ({"compile": True}, script, r"compile must be False for a TorchScript model"),
    "numpy": ({"compile": True}, lambda: "numpy:numpy:negative", r"compile must be False for a function of numpy"),
    "one axis": ({"channels_last": True, "axes": "cty", "patch_size": 8}, Net, r"channels_last must be False.* 1 spat"),
}


@pytest.mark.parametrize(("options", "make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_prepared_is_refused_before_anything_is_written(
    options: dict[str, Any], make: Callable[[], Any], message: str, volume: Path, tmp_path: Path
) -> None:
    with unchanged(tmp_path), pytest.raises((ValueError, TypeError), match=message):
        oocpatch.predict(volume, make(), tmp_path / "out", **{**SETTINGS, **options})


def test_without_a_compiler_compile_is_refused(volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with unchanged(tmp_path), pytest.raises(ValueError, match=r"needs a C\+\+ compiler \(no-such-compiler\)"):
        oocpatch.predict(volume, Net(), tmp_path / "out", compile=True, **SETTINGS)


def test_the_calls_of_graphs_are_made_by_one_thread_and_their_outputs_are_copies(
    volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that gives the same memory each time, and fails on any other thread, as a CUDA graph would."""

    def as_graphs(model: Any, mode: str) -> Any:
        mine: list[Any] = []

        def call(patches: torch.Tensor) -> torch.Tensor:
            mine[:] = mine or [threading.get_ident(), torch.empty_like(patches)]
            assert mine[0] == threading.get_ident()
            return mine[1].copy_(patches)

        return call

    monkeypatch.setattr(prepared, "_compiled", as_graphs)
    for module in ("oocpatch.models.pipeline", "oocpatch.models.compilation"):
        monkeypatch.setattr(f"{module}.uses_graphs", lambda mode, device: mode == "reduce-overhead")
    settings = {**SETTINGS, "compile": "reduce-overhead", "workers": 3}
    result = oocpatch.predict(volume, nn.Identity(), tmp_path / "out", **settings)
    np.testing.assert_allclose(result, zarr.open_array(volume, mode="r")[...], rtol=1e-6)
