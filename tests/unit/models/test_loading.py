"""Model specs load what they name, refuse the rest in one line, and identity says when two models are the same."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from oocpatch.models.fingerprint import model_fingerprint, read_fingerprint
from oocpatch.models.loading import load_model
from oocpatch.models.predictor import resolve_device

Model = Any  # a module or a function
State = dict[str, torch.Tensor]
Saved = tuple[Path, nn.Module, torch.Tensor]

NETWORKS = '''
"""Models for the tests."""
import functools
import torch
from torch import nn

FACTOR = 3.0


class Doubling(nn.Module):
    def __init__(self, factor=2.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, x):
        return x * self.scale


class Needing(nn.Module):
    def __init__(self, channels, depth):
        super().__init__()


class Adding:
    def __init__(self, amount=5):
        self.amount = amount

    def __call__(self, x):
        return x + self.amount


def triple(x):
    """Three times."""
    return x * FACTOR


def build():
    return Doubling(4.0)


def build_nothing():
    return 42


def fail():
    raise RuntimeError("no such checkpoint")


def two(x, y):
    return x + y


def outer():
    class Inner:
        """x."""
    return Inner()


instance = Doubling(6.0)
partial_factory = functools.partial(Doubling, 7.0)
partial_model = functools.partial(two, y=8.0)
cached_factory = functools.lru_cache(build)
number = 42


class space:
    nested = Adding
'''


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file networks.py, in the current directory."""
    (tmp_path / "networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("networks", "oocpatch_model_networks"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Doubling", 2.0),
        ("build", 4.0),
        ("instance", 6.0),
        ("partial_factory", 7.0),
        ("partial_model", 9.0),
        ("cached_factory", 4.0),
        ("triple", 3.0),
        ("Adding", 6.0),
        ("space.nested", 6.0),
    ],
)
@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize("place", ["networks", "networks.py"])
def test_spec_of_a_name_loads_module_callable_or_factory(place: str, name: str, expected: float) -> None:
    model = load_model(f"{place}:{name}")
    assert float(model(torch.ones(1, 1, 2)).detach()[0, 0, 0]) == expected


def test_identity_spec_gives_the_patch_back() -> None:
    patch = torch.arange(8.0).reshape(1, 1, 8)
    assert torch.equal(load_model("identity")(patch), patch)


def test_builtin_of_an_installed_package_is_a_model() -> None:
    assert load_model("torch:neg")(torch.ones(1)).item() == -1.0


@pytest.mark.usefixtures("networks")
def test_loaded_modules_are_in_inference_mode() -> None:
    model = load_model("networks:Doubling")
    assert isinstance(model, nn.Module)
    assert not model.training


def test_siblings_of_a_file_are_importable_and_the_path_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "sibling_layers.py").write_text("def halve(x):\n    return x / 2\n")
    (tmp_path / "net.py").write_text("from sibling_layers import halve\n")
    before = list(sys.path)
    assert load_model(f"{tmp_path / 'net.py'}:halve")(torch.ones(1)).item() == 0.5
    assert sys.path == before
    del sys.modules["sibling_layers"]


@pytest.mark.usefixtures("networks")
def test_a_folder_that_is_on_the_path_already_stays_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.path)
    load_model("networks:Doubling")
    assert sys.path == before


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The same small network in every file format."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.ReLU(), nn.BatchNorm3d(2)).eval()
    patch = torch.randn(2, 1, 8, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted: Any = torch.jit.script(network)
        scripted.save(folder / "scripted.pt")
        torch.jit.freeze(scripted).save(folder / "frozen.ts")
        torch.jit.trace(network, patch).save(folder / "traced.torchscript")
        batch = torch.export.Dim("batch", min=1, max=16)
        torch.export.save(torch.export.export(network, (patch,), dynamic_shapes=({0: batch},)), folder / "net.pt2")
    torch.save(network.state_dict(), folder / "state.pt")
    torch.save(network, folder / "pickled.pt")
    torch.save(network.state_dict(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    return folder, network, patch


@pytest.mark.parametrize("file", ["scripted.pt", "frozen.ts", "traced.torchscript", "net.pt2"])
def test_model_files_compute_what_the_saved_network_computes(saved: Saved, file: str) -> None:
    folder, network, patch = saved
    with torch.no_grad():
        torch.testing.assert_close(load_model(str(folder / file))(patch), network(patch))
        torch.testing.assert_close(load_model(str(folder / file))(patch[:1]), network(patch[:1]))


@pytest.mark.parametrize("file", ["pickled.pt", "state.pt", "legacy.pt"])
def test_a_pickle_in_place_of_torchscript_is_refused_without_being_unpickled(saved: Saved, file: str) -> None:
    with pytest.raises(ValueError, match=r"must be TorchScript.*--weights.*torch\.export\.save"):
        load_model(str(saved[0] / file))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", r"a model spec is package\.module:name.*got 'nowhere'"),
        ("", r"a model spec is"),
        (":name", r"a model spec is"),
        ("networks:", r"a model spec is"),
        ("networks.py", r"write networks\.py:NAME"),
        ("missing.py:net", r"does not exist: '.*missing\.py'"),
        ("missing.pt2", r"does not exist: '.*missing\.pt2'"),
        ("missing.pt", r"does not exist: '.*missing\.pt'"),
        ("net.onnx", r"does not exist: '.*net\.onnx'"),
        ("no_such_package.net:Net", r"no module 'no_such_package'"),
        ("networks.deeper:Net", r"no module 'networks\.deeper'"),
        ("not a module:Net", r"'not a module' is neither a module's name"),
        ("networks:absent", r"'networks:absent' names nothing.*choose from Adding, Doubling"),
        ("networks:number", r"must name a module, a callable or a factory.*a int"),
        ("networks:Needing", r"requires channels, depth; give model_args \(--model-args channels="),
        ("networks:two", r"requires x, y"),
        ("networks:fail", r"factory 'networks:fail' failed: RuntimeError: no such checkpoint"),
        ("networks:build_nothing", r"must return a module or a callable, got a int"),
        ("networks:outer", r"must return a module or a callable, got a Inner"),
        ("broken.py:net", r"running 'broken\.py'.*SyntaxError"),
        ("needy.py:net", r"running 'needy\.py'.*no_such_dependency"),
        ("needy:net", r"importing 'needy'.*no_such_dependency"),
        ("garbage.pt2", r"torch\.export\.save, got 'garbage\.pt2'"),
        ("garbage.pt", r"must be TorchScript"),
    ],
)
def test_a_spec_that_cannot_be_used_is_refused_in_one_line(networks: Path, spec: str, message: str) -> None:
    (networks / "broken.py").write_text("def net(:\n")
    (networks / "needy.py").write_text("import no_such_dependency\n")
    (networks / "garbage.pt2").write_bytes(b"not an archive")
    (networks / "garbage.pt").write_bytes(b"not an archive")
    with pytest.raises(ValueError, match=message) as caught:
        load_model(spec)
    assert "\n" not in str(caught.value)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"device must be one that torch can use here.*got 'abacus'"):
        load_model("identity", device="abacus")


@pytest.mark.parametrize(("cuda", "mps", "device"), [(1, 1, "cuda"), (1, 0, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_auto_takes_cuda_then_mps_then_the_cpu(
    cuda: int, mps: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert resolve_device("auto") == device


WEIGHTS_SPEC = "weighted.py:Net"


@pytest.fixture
def weighted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    """A network of a file, and weights that differ from those it starts with."""
    (tmp_path / "weighted.py").write_text(
        "from torch import nn\n\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.line = nn.Linear(2, 2)\n\n    def forward(self, x):\n        return self.line(x)\n"
    )
    monkeypatch.chdir(tmp_path)
    yield {"line.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "line.bias": torch.tensor([5.0, 6.0])}
    sys.modules.pop("oocpatch_model_weighted", None)


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda state: state, id="plain"),
        pytest.param(lambda state: {"epoch": 3, "state_dict": state}, id="checkpoint"),
        pytest.param(lambda state: {"model": state, "optimizer": {}}, id="model-key"),
        pytest.param(lambda state: {"network_weights": state, "current_epoch": 9}, id="nnunet"),
        pytest.param(lambda state: {f"module.{key}": value for key, value in state.items()}, id="data-parallel"),
    ],
)
def test_weights_of_a_state_dict_reach_the_model(weighted: State, wrap: Callable[[State], dict[str, Any]]) -> None:
    torch.save(wrap(weighted), "weights.pth")
    model = load_model(WEIGHTS_SPEC, weights="weights.pth")
    assert model(torch.tensor([[1.0, 1.0]])).tolist() == [[8.0, 13.0]]


def test_weights_of_safetensors_reach_the_model(weighted: State) -> None:
    safetensors = pytest.importorskip(
        "safetensors.torch", reason="writes the weights; it is in the extra `safetensors`"
    )
    safetensors.save_file(weighted, "weights.safetensors")
    model = load_model(WEIGHTS_SPEC, weights="weights.safetensors")
    assert model(torch.tensor([[1.0, 1.0]])).tolist() == [[8.0, 13.0]]


@pytest.mark.usefixtures("weighted")
def test_missing_safetensors_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("weights.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match=r"pip install 'oocpatch\[safetensors\]'"):
        load_model(WEIGHTS_SPEC, weights="weights.safetensors")


class Trap:
    """Unpickling it leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("sprung",)


def test_weights_that_need_code_run_none_of_it(weighted: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # what torch falls back to when it is not told
    torch.save({"state_dict": weighted, "trap": Trap()}, "trap.pth")
    with pytest.raises(ValueError, match=r"needs code of its own.*--trust-pickle"):
        load_model(WEIGHTS_SPEC, weights="trap.pth")
    assert not Path("sprung").exists()


def test_a_trusted_pickle_of_a_whole_module_gives_its_weights(weighted: State) -> None:
    donor = load_model(WEIGHTS_SPEC)
    assert isinstance(donor, nn.Module)
    donor.load_state_dict(weighted)
    torch.save(donor, "whole.pth")
    with pytest.raises(ValueError, match="needs code of its own"):
        load_model(WEIGHTS_SPEC, weights="whole.pth")
    model = load_model(WEIGHTS_SPEC, weights="whole.pth", trust_pickle=True)
    assert model(torch.tensor([[1.0, 1.0]])).tolist() == [[8.0, 13.0]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param({"line.weight": torch.zeros(3, 2)}, r"does not fit.*Missing key.*line\.bias", id="wrong-keys"),
        pytest.param([torch.zeros(2)], r"must be a state dict.*a list", id="list"),
        pytest.param({}, r"must be a state dict", id="empty"),
        pytest.param(b"rubbish", r"weights must be a plain state dict|cannot be read", id="rubbish"),
    ],
)
@pytest.mark.usefixtures("weighted")
def test_weights_that_do_not_fit_are_refused_in_one_line(content: object, message: str) -> None:
    if isinstance(content, bytes):
        Path("weights.pth").write_bytes(content)
    else:
        torch.save(content, "weights.pth")
    with pytest.raises(ValueError, match=message) as caught:
        load_model(WEIGHTS_SPEC, weights="weights.pth")
    assert "\n" not in str(caught.value)


def test_weights_for_a_model_without_any_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights need a module that has parameters, but 'identity' has none"):
        load_model("identity", weights=str(tmp_path / "weights.pth"))


# Identity: which pairs are the same model, and which are not.


class Scaling(nn.Module):
    """A module with a plain attribute, a counter and a log, like those that people write."""

    def __init__(self, factor: float, table: Sequence[int] = ()) -> None:
        super().__init__()
        self.line = nn.Linear(2, 2)
        self.factor = factor
        self.table = list(table)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> Any:
        self.calls += 1
        return self.line(x) * self.factor


class Logging:
    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.log: list[tuple[int, ...]] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.note(x)
        return x * self.factor

    def note(self, x: torch.Tensor) -> None:
        self.log.append(tuple(x.shape))


def scaling(factor: float = 2.0, table: Sequence[int] = (), seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Scaling(factor, table)


def counting(factor: float) -> Model:
    calls = 0
    log = []

    def model(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        log.append(calls)
        return x * factor

    return model


def with_network(seed: int) -> Model:
    network = scaling(seed=seed)
    return lambda x: network(x) + 1


def sequence(seed: int = 0, slope: float = 0.1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.LeakyReLU(slope), nn.BatchNorm2d(3))


def buffered(value: float) -> nn.Module:
    module = nn.Identity()
    module.register_buffer("table", torch.tensor(value), persistent=False)
    return module


def hooked(factor: float) -> nn.Module:
    module = nn.Identity()
    module.register_forward_hook(lambda _module, _inputs, output: output * factor)
    return module


def plus_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def plus_two(x: torch.Tensor) -> torch.Tensor:
    return x + 2


def membership(x: torch.Tensor) -> torch.Tensor | None:
    return x if x.ndim in {2, 3, 4, 5, 6} else None


SAME = {
    "sequence": sequence,
    "attributes": scaling,
    "function": lambda: plus_one,
    "closure": lambda: counting(2),
    "object": lambda: Logging(2),
    "partial": lambda: functools.partial(torch.clamp, min=0.0),
    "closure-over-network": lambda: with_network(0),
    "method": lambda: Logging(3).__call__,
    "lambda": lambda: lambda x: x * 2,
    "tuple-table": lambda: scaling(table=(1, 2)),
    "bfloat16": lambda: sequence().to(torch.bfloat16),
    "double": lambda: sequence().double(),
    "hook": lambda: hooked(2),
    "lazy": lambda: nn.LazyLinear(3),
    "set": lambda: membership,
}


@pytest.mark.parametrize("make", SAME.values(), ids=SAME.keys())
def test_two_of_the_same_making_are_the_same_model(make: Callable[[], Model]) -> None:
    assert model_fingerprint(make()) == model_fingerprint(make())


DIFFERENT = {
    "weight": (sequence, lambda: sequence(seed=1)),
    "slope": (sequence, lambda: sequence(slope=0.2)),
    "dtype": (sequence, lambda: sequence().double()),
    "attribute": (scaling, lambda: scaling(factor=3.0)),
    "table": (scaling, lambda: scaling(table=[1, 2])),
    "hidden-buffer": (lambda: buffered(1.0), lambda: buffered(2.0)),
    "hook": (lambda: hooked(2), lambda: hooked(3)),
    "no-hook": (nn.Identity, lambda: hooked(3)),
    "code": (lambda: plus_one, lambda: plus_two),
    "closure": (lambda: counting(2), lambda: counting(3)),
    "object": (lambda: Logging(2), lambda: Logging(3)),
    "partial": (lambda: functools.partial(torch.clamp, min=0.0), lambda: functools.partial(torch.clamp, min=1.0)),
    "closure-over-network": (lambda: with_network(0), lambda: with_network(1)),
    "builtin": (lambda: torch.sin, lambda: torch.cos),
    "bound-state": (lambda: Logging(2).__call__, lambda: Logging(3).__call__),
}


@pytest.mark.parametrize(("make", "other"), DIFFERENT.values(), ids=DIFFERENT.keys())
def test_a_model_that_differs_in_one_thing_is_another_model(
    make: Callable[[], Model], other: Callable[[], Model]
) -> None:
    assert model_fingerprint(make()) != model_fingerprint(other())


def test_one_changed_bit_of_a_parameter_makes_another_model() -> None:
    network = sequence()
    before = model_fingerprint(network)
    bits = network[0].weight.detach().numpy().view(np.int32)
    bits.flat[5] ^= 1
    assert model_fingerprint(network) != before


@pytest.mark.parametrize(
    "make", [scaling, lambda: counting(2), lambda: Logging(2)], ids=["module", "closure", "object"]
)
def test_calls_do_not_change_what_a_model_is(make: Callable[[], Model]) -> None:
    model = make()
    before = model_fingerprint(model)
    model(torch.ones(1, 2))
    assert model_fingerprint(model) == before


@pytest.mark.parametrize("zeros", [1, 2**20])  # a search for lines in the larger one would not end
def test_traced_functions_with_other_constants_are_other_models(zeros: int) -> None:
    def traced(constant: float) -> Model:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = torch.cat([torch.zeros(zeros), torch.tensor([constant])])
            return torch.jit.trace(lambda x: x * table, torch.zeros(1))

    assert model_fingerprint(traced(2.0)) == model_fingerprint(traced(2.0))
    assert model_fingerprint(traced(2.0)) != model_fingerprint(traced(3.0))


def functions_of(source: str) -> Model:
    namespace: dict[str, Any] = {"__name__": "written", "torch": torch}
    exec(compile(textwrap.dedent(source), "written.py", "exec"), namespace)  # noqa: S102  # source made to differ
    return namespace["model"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(
            "SCALE = 2\ndef model(x): return x * SCALE", "SCALE = 3\ndef model(x): return x * SCALE", id="global"
        ),
        pytest.param(
            "def step(x): return x + 1\ndef model(x): return step(x)",
            "def step(x): return x + 2\ndef model(x): return step(x)",
            id="helper",
        ),
        pytest.param("def model(x, k=2): return x * k", "def model(x, k=3): return x * k", id="default"),
        pytest.param("def model(x, *, k=2): return x * k", "def model(x, *, k=3): return x * k", id="keyword-default"),
        pytest.param("def model(x): return x.sin()", "def model(x): return x.cos()", id="method-name"),
        pytest.param(
            "def model(x): return (lambda y: y + 1)(x)",
            "def model(x): return (lambda y: y + 2)(x)",
            id="nested-constant",
        ),
        pytest.param(
            "net = torch.nn.PReLU(init=0.1)\ndef model(x): return net(x)",
            "net = torch.nn.PReLU(init=0.2)\ndef model(x): return net(x)",
            id="global-network",
        ),
    ],
)
def test_a_function_is_another_model_when_anything_it_computes_with_changes(one: str, other: str) -> None:
    assert model_fingerprint(functions_of(one)) == model_fingerprint(functions_of(one))
    assert model_fingerprint(functions_of(one)) != model_fingerprint(functions_of(other))


def test_comments_documentation_and_place_do_not_make_another_model() -> None:
    plain = functions_of('def model(x):\n    """One."""\n    return x + 1')
    moved = functions_of('# a comment\n\n\ndef model(x):\n    """One, better said."""\n    # why\n    return x + 1')
    assert model_fingerprint(plain) == model_fingerprint(moved)


def test_model_files_have_one_identity_each_however_often_they_are_loaded(saved: Saved) -> None:
    files = ["scripted.pt", "frozen.ts", "traced.torchscript", "net.pt2"]
    identities = [model_fingerprint(load_model(str(saved[0] / file))) for file in files]
    again = [read_fingerprint(load_model(str(saved[0] / file))) for file in files]
    assert identities == [fingerprint.digest for fingerprint in again]
    assert not any(fingerprint.unread for fingerprint in again)
    assert len(set(identities)) == len(files)


@pytest.mark.parametrize("freeze", [False, True], ids=["scripted", "frozen"])
def test_torchscript_with_other_weights_or_attributes_is_another_model(tmp_path: Path, freeze: bool) -> None:
    class Net(nn.Module):
        def __init__(self, seed: int, scale: float) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.line = nn.Linear(2, 2)
            self.scale = scale

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.line(x) * self.scale

    def identity(seed: int, scale: float, name: str) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scripted = torch.jit.script(Net(seed, scale).eval())
            (torch.jit.freeze(scripted) if freeze else scripted).save(tmp_path / name)
        return model_fingerprint(load_model(str(tmp_path / name)))

    identities = [identity(0, 1.0, "a.pt"), identity(1, 1.0, "b.pt"), identity(0, 2.0, "c.pt")]
    assert identity(0, 1.0, "d.pt") == identities[0]
    for one, other in itertools.combinations(identities, 2):
        assert one != other


IDENTITIES = """
import sys
from oocpatch.models.fingerprint import model_fingerprint
from oocpatch.models.loading import load_model
for spec in sys.argv[1:]:
    print(model_fingerprint(load_model(spec)))
"""


def test_identity_is_the_same_in_another_process_and_another_place(
    networks: Path, saved: Saved, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "networks.py").write_text(NETWORKS)
    for folder in (networks, elsewhere):
        (folder / "scripts.py").write_text("import torch\npool = torch.jit.script(torch.nn.AvgPool2d(2))")
    names = ["Doubling", "build", "instance", "partial_factory", "triple", "Adding"]
    files = [str(saved[0] / name) for name in ("scripted.pt", "frozen.ts", "traced.torchscript", "net.pt2")]

    def identities(hash_seed: str, folder: Path, specs: list[str]) -> list[str]:
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", IDENTITIES, *specs],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        )
        return run.stdout.split()

    specs = [*(f"networks.py:{name}" for name in names), "scripts.py:pool"]
    first = identities("1", networks, [*specs, *files])
    # Other order, other directory, other hashing: the same models.
    second = identities("2", elsewhere, [*files[::-1], *specs[::-1]])
    assert first == second[::-1]
    assert len(set(first)) == len(first)
