"""A model is called as promised: in evaluation mode wherever it hides, and what it answers is its own no longer."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import oocpatch
from oocpatch.configuration import make_plan
from oocpatch.models.named_outputs import named_outputs, owned_outputs
from oocpatch.models.predictor import Predictor

DATA = np.random.default_rng(0).random((48, 48), dtype=np.float32)
SETTINGS: dict[str, Any] = {"patch_size": 16, "patch_overlap": 8, "axes": "yx", "progress": False}


class Net(nn.Module):
    """A network with everything that training mode changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 1, 1)
        )

    def forward(self, patches: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.layers(patches), None

    def scores(self, patches: torch.Tensor) -> torch.Tensor:
        return self(patches)[0]


class Caller:
    def __init__(self, net: Any) -> None:
        self.net = net

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        return self.net(patches)[0]


class Slotted:
    __slots__ = ("net",)

    def __init__(self, net: Any) -> None:
        self.net = net

    def run(self, patches: torch.Tensor) -> torch.Tensor:
        return self.net(patches)[0]

    def double(self, patches: torch.Tensor) -> torch.Tensor:
        return patches + patches


class Unregistered(nn.Module):
    """A module that holds networks where torch does not see them."""

    def __init__(self, nets: Any) -> None:
        super().__init__()
        self.nets = nets

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.nets["nets"][0](patches)[0]


GLOBAL = types.SimpleNamespace(net=None, others=[])


def by_global(patches: torch.Tensor) -> torch.Tensor:
    return GLOBAL.net(patches)[0]


def _through_global(net: Net) -> Callable[..., Any]:
    GLOBAL.net = net
    return by_global


def _in_class(net: Net) -> Any:
    return type("Model", (), {"net": net, "__call__": lambda self, patches: self.net(patches)[0]})()


def _decorated(net: Net) -> Any:
    @torch.no_grad()
    @functools.wraps(net.forward)
    def model(patches: torch.Tensor, *, net: Any = net) -> torch.Tensor:
        return net(patches)[0]

    return model


def _by_cached_property(net: Net) -> Any:
    class Lazy:
        @functools.cached_property
        def net(self) -> Net:
            return net

        def __call__(self, patches: torch.Tensor) -> torch.Tensor:
            return self.net(patches)[0]

    return Lazy()


def _per_thread(net: Net) -> Any:
    """A network for each thread, made when it is first needed."""
    local = threading.local()

    def model(patches: torch.Tensor) -> torch.Tensor:
        if not hasattr(local, "net"):
            local.net = Net()
        return local.net(patches)[0]

    return model


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda net: net,
    "lambda": lambda net: lambda patches: net(patches)[0],
    "object": Caller,
    "object of objects": lambda net: Caller(Caller(lambda patches: (net(patches), None))),
    "slots": lambda net: Slotted(net).run,
    "bound method": lambda net: net.scores,
    "partial": lambda net: functools.partial(lambda held, patches: held(patches)[0], net),
    "keyword of a partial": lambda net: functools.partial(lambda patches, held: held(patches)[0], held=net),
    "numpy model": lambda net: oocpatch.NumpyModel(lambda array: net(torch.from_numpy(array))[0].detach().numpy()),
    "dict of lists": lambda net: Unregistered({"nets": [net]}),
    "deque": lambda net: Unregistered({"nets": collections.deque([net])}),
    "namespace": lambda net: Caller(types.SimpleNamespace(net=net).net),
    "global": _through_global,
    "class attribute": _in_class,
    "decorated": _decorated,
    "cache": lambda net: Caller(functools.lru_cache(net)),
    "cached property": _by_cached_property,
    "made per thread": _per_thread,
    "TorchScript": lambda net: functools.partial(lambda script, patches: script(patches), torch.jit.script(net.layers)),
    "preprocessed lambda": lambda net: [lambda patches: net(patches)[0]] * 2,
}


@pytest.fixture(scope="module")
def right() -> np.ndarray[Any, Any]:
    """The values of evaluation mode, computed with torch alone, patch by patch."""
    net, size, stride = Net().eval(), 16, 8
    total, weights = np.zeros(DATA.shape), np.zeros(DATA.shape)
    for y in range(0, 33, stride):
        for x in range(0, 33, stride):
            box = (slice(y, y + size), slice(x, x + size))
            with torch.no_grad():
                total[box] += net(torch.from_numpy(DATA[box])[None, None])[0][0, 0].numpy()
            weights[box] += 1
    return total / weights


def state_of(net: nn.Module) -> list[Any]:
    return [module.training for module in net.modules()] + [
        (name, value.clone().numpy().tolist()) for name, value in net.state_dict().items()
    ]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_network_is_in_evaluation_mode_wherever_it_hides(
    name: str, tmp_path: Path, right: np.ndarray[Any, Any]
) -> None:
    net = Net()
    net.layers[2].eval()  # as somebody left it
    before = state_of(net)
    model = WRAPPERS[name](net)
    result = oocpatch.predict(
        DATA, model, tmp_path / "out", workers=2, block_shape=16, overlap_mode="average", **SETTINGS
    )
    np.testing.assert_allclose(result.values, right, atol=1e-5)
    assert state_of(net) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_mode_is_put_back_after_an_error(error: type[BaseException], tmp_path: Path) -> None:
    net = Net()
    calls: list[int] = []

    def model(patches: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise error
        return net(patches)[0]

    before = state_of(net)
    with pytest.raises((error, oocpatch.BlockFailed)):
        oocpatch.predict(DATA, model, tmp_path / "out", workers=1, **SETTINGS)
    assert state_of(net) == before


def test_runs_that_share_a_network_leave_it_as_the_first_found_it(tmp_path: Path, right: np.ndarray[Any, Any]) -> None:
    """A run begins and ends while another is at work."""
    net = Net()
    before = state_of(net)
    at_work, other_is_done = threading.Event(), threading.Event()

    def pause(_: object) -> None:
        at_work.set()
        other_is_done.wait(30)

    def run(name: str, progress: Any) -> np.ndarray[Any, Any]:
        settings = {**SETTINGS, "overlap_mode": "average", "progress": progress}
        return np.asarray(oocpatch.predict(DATA, lambda x: net(x)[0], tmp_path / name, **settings).values)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run, "first", pause)
        assert at_work.wait(30)
        second = run("second", False)
        assert not net.training
        other_is_done.set()
        np.testing.assert_allclose(first.result(), right, atol=1e-5)
    np.testing.assert_allclose(second, right, atol=1e-5)
    assert state_of(net) == before


def test_predictors_that_share_a_network_count(tmp_path: Path) -> None:
    net = Net()
    inner = net.layers
    one, other = (Predictor(model, device="cpu") for model in (net.scores, functools.partial(inner)))
    with one.ready():
        with other.ready():
            assert not any(module.training for module in net.modules())
        assert not any(module.training for module in net.modules())
    assert all(module.training for module in net.modules())
    mixed = Predictor(net, device="cpu", eval_mode=False)
    with one.ready(), pytest.raises(ValueError, match="eval_mode must be True, as for another run"), mixed.ready():
        pass
    assert all(module.training for module in net.modules())


def test_runs_that_share_an_engine_take_turns() -> None:
    engine = Slotted(None)
    one, other, third = (
        Predictor(model, device="cpu") for model in (engine.double, functools.partial(engine.double), torch.neg)
    )
    patches = torch.ones(1, 1, 2, 2)
    with one.ready(), other.ready(), third.ready(), ThreadPoolExecutor(1) as pool:
        with one._mode.turn():
            waiting = pool.submit(other, patches)
            third(patches)
            assert not wait([waiting], 0.2).done
        assert not isinstance(waiting.exception(30), BaseException)


class Engine:
    """Answers in memory of its own, as engines do: doubled, in several channels."""

    def __init__(self, answer: Callable[[torch.Tensor], Any] = lambda memory: memory) -> None:
        self.memory: dict[Any, torch.Tensor] = {}
        self.answer = answer

    def __call__(self, patches: torch.Tensor) -> Any:
        shape = (len(patches), 16, *patches.shape[2:])
        memory = self.memory.setdefault(shape, torch.empty(shape))
        torch.mul(patches.expand(shape), 2, out=memory)
        return self.answer(memory)


def _numpy_engine() -> Any:
    memory = np.empty((1, 16, 16, 16), np.float32)

    def double(patches: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.multiply(patches, 2, out=memory[:, : 16 * patches.shape[1]])

    return oocpatch.NumpyModel(double)


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(1, 16, 16, 16))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.get_buffer("memory").copy_(patches.expand(1, 16, 16, 16) * 2)


ENGINES: dict[str, Callable[[], Any]] = {
    "memory": Engine,
    "view": lambda: Engine(lambda memory: memory[:]),
    "detached": lambda: Engine(lambda memory: memory.detach()),
    "data": lambda: Engine(lambda memory: memory.data),
    "numpy view": lambda: Engine(lambda memory: memory.numpy()),
    "tuple": lambda: Engine(lambda memory: (memory, None)),
    "dict": lambda: Engine(lambda memory: {"prediction": memory}),
    "two halves": lambda: Engine(lambda memory: {"a": memory[:, :8], "b": memory[:, 8:]}),
    "dlpack": lambda: Engine(torch.from_dlpack),
    "NumpyModel": _numpy_engine,
    "buffer of a module": Scripted,
    "behind a partial": lambda: functools.partial(lambda engine, patches: engine(patches), Engine()),
}


@pytest.mark.parametrize(
    ("name", "workers"), [*((name, 4) for name in ENGINES), ("memory", 1), ("two halves", 1), ("NumpyModel", 1)]
)
def test_a_model_that_answers_in_memory_of_its_own_gives_right_values(name: str, workers: int, tmp_path: Path) -> None:
    data = np.random.default_rng(1).random((64, 96), dtype=np.float32)
    settings = {**SETTINGS, "block_shape": 16, "output_chunks": 16, "model_id": name}
    result = oocpatch.predict(data, ENGINES[name](), tmp_path / "out", workers=workers, **settings)
    for values in (result,) if isinstance(result, xr.DataArray) else result.values():
        np.testing.assert_allclose(values.values, np.broadcast_to(2 * data, values.shape), atol=1e-5)


def test_halves_of_a_batch_are_not_mixed() -> None:
    engine = Engine()

    def short_of_memory(patches: torch.Tensor) -> Any:
        if len(patches) > 1:
            raise MemoryError
        return engine(patches)

    patches = torch.arange(4.0)[:, None, None, None].expand(4, 1, 2, 2)
    predictor = Predictor(short_of_memory, device="cpu")
    assert predictor(patches)["prediction"][:, 0, 0, 0].tolist() == [0, 2, 4, 6]


def _pointers(model: Callable[..., Any], patches: torch.Tensor) -> tuple[int, int]:
    """The memory that a model answered in, and that which is handed on."""
    answered = []

    def call(inputs: torch.Tensor) -> Any:
        result = model(inputs)
        answered.append(result.untyped_storage().data_ptr())
        return result

    output = owned_outputs(call, patches)["prediction"]
    return answered[0], output.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ["network", "function", "expanded", "identity", "view of the input"])
def test_what_nobody_else_holds_is_not_copied(name: str) -> None:
    models: dict[str, Any] = {
        "network": nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True)),
        "function": lambda x: x + 1,
        "expanded": lambda x: x.mean((2, 3), keepdim=True).expand(1, 1, 8, 8),
        "identity": nn.Identity(),
        "view of the input": lambda x: x.flip(0)[:, :1] if x.ndim == 3 else x[:, :1],
    }
    with torch.no_grad():
        before, after = _pointers(models[name], torch.ones(1, 1, 8, 8))
    assert before == after


@pytest.mark.parametrize("name", ["identity", "view", "flat view", "two views"])
def test_outputs_in_the_memory_of_the_input_stay_right(name: str, tmp_path: Path) -> None:
    models: dict[str, Any] = {
        "identity": nn.Identity(),
        "view": lambda x: x[:, :1],
        "flat view": lambda x: x.flatten(1).view(x.shape),
        "two views": lambda x: (x, x[:]),
    }
    settings = {**SETTINGS, "block_shape": 16, "overlap_mode": "crop"}
    result = oocpatch.predict(DATA, models[name], tmp_path / "out", workers=2, **settings)
    for values in (result,) if isinstance(result, xr.DataArray) else result.values():
        np.testing.assert_array_equal(values.values, DATA)


class Pair(NamedTuple):
    scores: Any
    edges: Any


@dataclasses.dataclass
class Record:
    scores: Any
    edges: Any = None


Several = collections.namedtuple("Several", ["first", "second", "third"])  # noqa: PYI024 - as people write it

HEADS: dict[str, tuple[Callable[[Any], Any], dict[str, int]]] = {
    "tensor": (lambda x: x, {"prediction": 1}),
    "tuple of one": (lambda x: (x,), {"prediction": 1}),
    "with None": (lambda x: (x, None), {"prediction": 1}),
    "None first": (lambda x: [None, x], {"prediction": 1}),
    "pair": (lambda x: (x, 2 * x), {"0": 1, "1": 2}),
    "list": (lambda x: [x, 2 * x, 3 * x], {"0": 1, "1": 2, "2": 3}),
    "gap": (lambda x: (x, None, 3 * x), {"0": 1, "2": 3}),
    "named tuple": (lambda x: Pair(x, 2 * x), {"scores": 1, "edges": 2}),
    "named tuple with None": (lambda x: Pair(x, None), {"scores": 1}),
    "collections.namedtuple": (lambda x: Several(x, None, 3 * x), {"first": 1, "third": 3}),
    "dataclass": (lambda x: Record(x, 2 * x), {"scores": 1, "edges": 2}),
    "dataclass with None": (Record, {"scores": 1}),
    "dict": (lambda x: {"a": x, "b": None}, {"a": 1}),
    "ordered dict": (lambda x: collections.OrderedDict(b=2 * x, a=x), {"b": 2, "a": 1}),
    "proxy": (lambda x: types.MappingProxyType({"a": x}), {"a": 1}),
    "nested dict": (lambda x: {"a": {"b": x, "c": 2 * x}}, {"a.b": 1, "a.c": 2}),
    "deep supervision": (lambda x: {"main": x, "aux": [2 * x, 3 * x]}, {"main": 1, "aux.0": 2, "aux.1": 3}),
    "nested tuple": (lambda x: (x, (2 * x, None)), {"0": 1, "1": 2}),
    "tuple in a tuple": (lambda x: ((x, 2 * x),), {"0": 1, "1": 2}),
    "arrays": (lambda x: (x.numpy(), 2 * x.numpy()), {"0": 1, "1": 2}),
}


@pytest.mark.parametrize("name", HEADS)
def test_outputs_are_named_by_what_holds_them(name: str, tmp_path: Path) -> None:
    model, factors = HEADS[name]
    assert list(named_outputs(model(torch.ones(1)))) == list(factors)
    result = oocpatch.predict(DATA, model, tmp_path / "out", **SETTINGS)
    heads = {"prediction": result} if isinstance(result, xr.DataArray) and len(factors) == 1 else dict(result.items())
    assert len(heads) == len(factors)
    for (_, values), (_, factor) in zip(sorted(heads.items()), sorted(factors.items()), strict=True):
        np.testing.assert_allclose(values.values, factor * DATA, atol=1e-5)


def test_tuples_are_averaged_by_name(tmp_path: Path) -> None:
    models = [lambda x: (x, 2 * x, None), lambda x: [3 * x, 4 * x]]
    result = oocpatch.predict(DATA, models, tmp_path / "out", augment="flips", **SETTINGS)
    np.testing.assert_allclose(result["0"].values, 2 * DATA, atol=1e-5)
    np.testing.assert_allclose(result["1"].values, 3 * DATA, atol=1e-5)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: {}, "empty dict"),
        (lambda x: (None, None), "empty tuple"),
        (lambda x: {0: x}, "keys can be names of arrays, got 0"),
        (lambda x: {"a b": x}, "keys can be names of arrays, got 'a b'"),
        (lambda x: {"a.b": x, "a": {"b": x}}, "different names, got 'a.b' twice"),
        (lambda x: (x, x.mean()), "for '1'"),
        (lambda x: (x, "text"), "must return a tensor for '1', got str"),
        (lambda x: types.SimpleNamespace(a=x), "must return a tensor, got SimpleNamespace"),
    ],
)
def test_what_cannot_be_named_is_refused(answer: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model must return") as error:
        oocpatch.predict(DATA, answer, tmp_path / "out", **SETTINGS)
    assert message in str(error.value)


class Norm(nn.Module):
    """Batch statistics of each call, and dropout that is off."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm2d(1), nn.Dropout(0.5)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.norm(patches))


@pytest.fixture
def norm() -> Iterator[Norm]:
    net = Norm()
    net.dropout.eval()
    before = state_of(net)
    yield net
    assert state_of(net) == before


@pytest.mark.parametrize("wrap", [lambda net: net, functools.partial], ids=["module", "partial"])
def test_layers_stay_in_their_mode_where_they_are_to(wrap: Callable[[Any], Any], norm: Norm, tmp_path: Path) -> None:
    settings = {"patch_size": 16, "axes": "yx", "progress": False, "overlap_mode": "crop"}
    result = oocpatch.predict(DATA, wrap(norm), tmp_path / "out", eval_mode=False, **settings)
    for y in range(0, 48, 16):
        for x in range(0, 48, 16):
            patch = DATA[y : y + 16, x : x + 16]
            expected = (patch - patch.mean()) / np.sqrt(patch.var() + norm.norm.eps)
            np.testing.assert_allclose(result.values[y : y + 16, x : x + 16], expected, atol=1e-4)
    again = oocpatch.predict(DATA, wrap(norm), tmp_path / "out", eval_mode=False, **settings)
    np.testing.assert_array_equal(again, result)
    with pytest.raises(oocpatch.RunMismatch, match="eval_mode"):
        oocpatch.predict(DATA, wrap(norm), tmp_path / "out", **settings)


def test_the_mode_of_each_layer_counts_where_it_matters(norm: Norm, tmp_path: Path) -> None:
    settings = {"patch_size": 16, "axes": "yx", "progress": False}
    other = Norm().eval()
    oocpatch.predict(DATA, norm, tmp_path / "on", **settings)
    oocpatch.predict(DATA, other, tmp_path / "on", **settings)
    oocpatch.predict(DATA, norm, tmp_path / "off", eval_mode=False, **settings)
    with pytest.raises(oocpatch.RunMismatch, match="model"):
        oocpatch.predict(DATA, other, tmp_path / "off", eval_mode=False, **settings)


def test_dropout_samples_where_it_is_asked_to(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\n\nNet = lambda: nn.Dropout(0.5)\n")
    settings = {"patch_size": 16, "axes": "yx", "progress": False, "overlap_mode": "crop"}
    spec = f"{tmp_path / 'net.py'}:Net"
    plain = oocpatch.predict(DATA, spec, tmp_path / "plain", **settings)
    np.testing.assert_array_equal(plain.values, DATA)
    sampled = oocpatch.predict(DATA, spec, tmp_path / "sampled", eval_mode=False, **settings).values
    assert 0.4 < (sampled == 0).mean() < 0.6
    np.testing.assert_allclose(sampled[sampled != 0], 2 * DATA[sampled != 0])


class Meeting(nn.Module):
    """A network whose calls wait until there are two of them; the probe calls it without patches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(self.layer.weight, 2)
        self.barrier = threading.Barrier(2)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        if len(patches):
            self.barrier.wait(30)
        return self.layer(patches)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_network_without_state_is_called_by_two_threads_at_a_time(batch_size: int, tmp_path: Path) -> None:
    settings = {**SETTINGS, "padding_mode": "edge", "batch_size": batch_size}  # six patches in each layer
    plan = oocpatch.plan(DATA, Meeting(), tmp_path / "out.zarr", **settings)
    assert (plan.calls, plan.torch_threads) == (2, 1)
    np.testing.assert_allclose(plan.run().values, 2 * DATA, rtol=1e-6)


@pytest.mark.usefixtures("two_threads")
def test_calls_run_on_into_the_next_layer(tmp_path: Path) -> None:
    """With three patches in a layer, the last one of each meets the first one of the next."""
    volume = np.random.default_rng(1).random((56, 32), dtype=np.float32)
    settings = {**SETTINGS, "block_shape": (56, 32)}
    plan = oocpatch.plan(volume, Meeting(), tmp_path / "out.zarr", **settings)
    assert (plan.calls, plan.axes[plan.sweep], plan.patches, plan.layers_per_group) == (2, "y", 18, 1)
    np.testing.assert_allclose(plan.run().values, 2 * volume, rtol=1e-6)


@pytest.mark.usefixtures("two_threads")
def test_bytes_do_not_depend_on_the_calls_at_a_time_but_on_their_threads(tmp_path: Path) -> None:
    two = oocpatch.plan(DATA, Net(), tmp_path / "two.zarr", **SETTINGS)
    torch.set_num_threads(1)
    one = oocpatch.plan(DATA, Net(), tmp_path / "one.zarr", **SETTINGS)
    assert [(plan.calls, plan.torch_threads) for plan in (two, one)] == [(2, 1), (1, 1)]
    parts = [dict(plan.memory_parts) for plan in (two, one)]
    assert parts[0]["model"] == 2 * parts[1]["model"]
    assert parts[0]["batch"] == 2 * parts[1]["batch"]
    assert two.run_id == one.run_id
    assert two.run().values.tobytes() == one.run().values.tobytes()


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("classes", [1, 64])  # with many, the stage that normalizes needs more than one call
def test_a_run_is_resumed_with_fewer_calls_where_memory_is_short(classes: int, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, classes, 1))
    settings = {**SETTINGS, "block_shape": 16, "output_chunks": 16, "workers": 2}
    planned = oocpatch.plan(DATA, net, tmp_path / "out.zarr", **settings)
    assert (planned.calls, planned.concurrency, planned.blocks) == (2, 2, 9)
    assert "2 calls at a time, 1 thread(s) each" in str(planned)
    assert json.loads(planned.to_json())["calls"] == 2
    planned.run(blocks=[0])
    torch.set_num_threads(1)
    alone = oocpatch.plan(DATA, net, tmp_path / "one.zarr", **{**settings, "workers": 1})
    assert (alone.calls, alone.concurrency) == (1, 1)
    assert "calls at a time" not in str(alone)
    torch.set_num_threads(2)
    least = alone.projected_memory - alone.retained_memory
    with pytest.raises(oocpatch.PlanTooLarge, match="raise max_memory"):
        oocpatch.plan(DATA, net, tmp_path / "out.zarr", **settings, max_memory=least - 1)
    resumed = oocpatch.plan(DATA, net, tmp_path / "out.zarr", **settings, max_memory=least)
    assert (resumed.calls, resumed.torch_threads, resumed.concurrency) == (1, 1, 1)
    assert resumed.projected_memory == least
    assert resumed.run().values.tobytes() == alone.run().values.tobytes()


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("enough", "most", "largest"), [(1e12, 4, 3), (1.0, 1, 1)])
def test_calls_side_by_side_share_a_batch_or_take_less_if_that_is_enough_work(
    enough: float, most: int, largest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    run = Predictor._run
    monkeypatch.setattr(Predictor, "_run", lambda self, inputs: (sizes.append(len(inputs)), run(self, inputs))[1])
    monkeypatch.setattr(make_plan, "CALL_OPERATIONS", enough)
    net = nn.Conv2d(1, 1, 3, padding=1)
    settings = {**SETTINGS, "padding_mode": "edge", "batch_size": 8}  # 12 patches in two layers, and 36 in all
    plan = oocpatch.plan(DATA, net, tmp_path / "out.zarr", **settings)
    assert (plan.calls, plan.batch_size, plan.patches_per_call) == (2, 8, most)
    sizes.clear()
    result = plan.run()
    assert (max(sizes), sum(sizes)) == (largest, 36)
    alone = oocpatch.predict(DATA, net, tmp_path / "alone.zarr", **{**settings, "batch_size": 1})
    np.testing.assert_allclose(result.values, alone.values, atol=1e-6)


class Reading(nn.Module):
    """A network whose calls change nothing that outlives them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)
        self.register_buffer("total", torch.zeros(()))
        self.seen: list[int] = []
        self.last: torch.Tensor | None = None

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        parts = []
        parts.append(self.layer(patches))
        return parts.pop()


class WritesAttribute(Reading):
    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        self.last = self.layer(patches)
        return self.last


class WritesItems(Reading):
    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(patches))
        return self.layer(patches)


class WritesBuffer(Reading):
    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.layer(patches) + self.total.mul_(0)


def _replaced() -> nn.Module:
    net = Reading()
    net.forward = WritesItems.forward.__get__(net)  # type: ignore[method-assign]
    return net


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("make", "settings", "calls"),
    [
        (Reading, {}, 2),
        (WritesAttribute, {}, 1),
        (WritesItems, {}, 1),
        (WritesBuffer, {}, 1),
        (_replaced, {}, 1),
        (lambda: nn.BatchNorm2d(1), {"eval_mode": False}, 1),
        (lambda: torch.jit.script(nn.Conv2d(1, 1, 3, padding=1)), {}, 1),
        (lambda: torch.neg, {}, 1),
        (nn.Identity, {}, 1),  # without an operation that torch counts
        (nn.ReLU, {}, 1),
        (Reading, {"batch_size": 64}, 2),  # which share the patches of a batch
    ],
    ids=[
        "reads",
        "attribute",
        "list",
        "buffer",
        "replaced",
        "training",
        "TorchScript",
        "function",
        "identity",
        "light",
        "one batch",
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_a_call_writes_is_not_written_by_two_at_a_time(
    make: Callable[[], Any], settings: dict[str, Any], calls: int, tmp_path: Path
) -> None:
    plan = oocpatch.plan(DATA, make(), tmp_path / "out.zarr", **SETTINGS, **settings)
    assert (plan.calls, plan.torch_threads) == (calls, 2 // calls)


@pytest.mark.usefixtures("two_threads")
def test_a_model_that_changes_between_calls_is_looked_at_again(tmp_path: Path) -> None:
    net = Reading()

    def calls(**settings: Any) -> int:
        return oocpatch.plan(DATA, net, tmp_path / "out.zarr", **SETTINGS, **settings).calls

    assert [calls(), calls(eval_mode=False), calls()] == [2, 1, 2]
    net.forward = WritesItems.forward.__get__(net)  # type: ignore[method-assign]
    assert calls() == 1
