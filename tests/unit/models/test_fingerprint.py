"""Fingerprints tell models apart by all that they compute with, and by nothing else."""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import importlib
import linecache
import logging
import re
import sys
import textwrap
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from torch import nn

from oocpatch.models import source_code
from oocpatch.models.fingerprint import model_fingerprint, read_fingerprint
from oocpatch.models.options import ModelOptions
from oocpatch.models.pipeline import identity_of
from oocpatch.models.source_code import code_usage


class Config:
    def __init__(self, gain: float) -> None:
        self.gain = gain


class Slotted:
    __slots__ = ("gain",)

    def __init__(self, gain: float) -> None:
        self.gain = gain


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    gain: float
    levels: tuple[float, ...] = (0.5,)


class Mode(enum.Enum):
    ONE = 1
    THREE = 3


class Holding(nn.Module):
    """A module that appends to lists, and fills dicts, of its own."""

    def __init__(self, item: Any) -> None:
        super().__init__()
        self.item = item

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        results, outputs = [], {}
        results.append(patches)
        outputs["scores"] = results[0]
        return outputs["scores"]


def closing_over(item: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def model(patches: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(patches)
        result[:] = item
        return result

    return model


def decorated(gain: float) -> Callable[[torch.Tensor], torch.Tensor]:
    @torch.no_grad()
    def model(patches: torch.Tensor) -> torch.Tensor:
        return patches * gain

    return model


def cached(gain: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return functools.lru_cache(closing_over(gain))


def marked(gain: float) -> Callable[[torch.Tensor], torch.Tensor]:
    model: Any = closing_over(1)
    model.gain = gain
    return model


ITEMS: dict[str, Callable[[float], Any]] = {
    "object": Config,
    "slots": Slotted,
    "dataclass": Settings,
    "namespace": lambda gain: types.SimpleNamespace(gain=gain),
    "list": lambda gain: [gain],
    "dict": lambda gain: {"gain": gain},
    "dict-of-objects": lambda gain: {"settings": [Config(gain)]},
    "partial": lambda gain: functools.partial(max, gain),
    "method": lambda gain: Config(gain).__eq__,
    "tensor": lambda gain: {"table": torch.tensor([gain])},
    "sparse": lambda gain: torch.eye(3).mul(gain).to_sparse(),
    "device": lambda gain: torch.device("cpu" if gain == 1 else "meta"),
    "type": lambda gain: Config if gain == 1 else Slotted,
    "enum": lambda gain: Mode.ONE if gain == 1 else Mode.THREE,
    "ufunc": lambda gain: np.sin if gain == 1 else np.cos,
    "pattern": lambda gain: re.compile(str(gain)),
}


@pytest.mark.parametrize("sources", [True, False], ids=["source", "bytecode"])
@pytest.mark.parametrize("hold", [Holding, closing_over], ids=["attribute", "closure"])
@pytest.mark.parametrize("name", ITEMS)
def test_whatever_a_model_holds_tells_it_from_another(name: str, hold: Callable[[Any], Any], sources: bool) -> None:
    one, same, other = (model_fingerprint(hold(ITEMS[name](gain)), sources=sources) for gain in (1.0, 1.0, 3.0))
    assert one == same
    assert one != other
    assert not read_fingerprint(hold(ITEMS[name](1.0))).unread


@pytest.mark.parametrize("make", [decorated, cached, marked])
def test_wrapped_functions_have_different_fingerprints(make: Callable[[float], Any]) -> None:
    assert model_fingerprint(make(1.0)) == model_fingerprint(make(1.0))
    assert model_fingerprint(make(1.0)) != model_fingerprint(make(3.0))


def test_functions_around_a_function_have_different_fingerprints() -> None:
    model = closing_over(1)
    around = [model, torch.vmap(model), torch.no_grad()(model), functools.lru_cache(model)]
    assert len({model_fingerprint(function) for function in around}) == len(around)


def test_lambdas_of_one_line_have_different_fingerprints() -> None:
    models: list[Any] = [lambda x: x + 1, lambda x: x - 1, lambda x: sorted(x, key=lambda y: y + 1)]  # fmt: skip
    texts = ["lambda x: x + 1", "lambda x: x - 1", "lambda x: sorted(x, key=lambda y: y + 1)"]
    parsed = [source_code.canonical(ast.parse(text, mode="eval").body) for text in texts]
    assert [code_usage(model.__code__).source for model in models] == parsed
    assert len({model_fingerprint(model) for model in models}) == 3


def imported(folder: Path, name: str, source: str) -> types.ModuleType:
    """The module of a file that is written, or written anew."""
    (folder / f"{name}.py").write_text(textwrap.dedent(source))
    sys.modules.pop(name, None)
    linecache.checkcache()
    importlib.invalidate_caches()
    return importlib.import_module(name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


@pytest.mark.parametrize(
    "call",
    ["import steps\ndef model(x): return steps.step(x)", "from steps import step as f\ndef model(x): return f(x)"],
)
def test_functions_of_the_users_other_modules_are_part_of_the_model(folder: Path, call: str) -> None:
    digests = []
    for step in ("x + 1", "x + 1  # more", "x + 2"):
        imported(folder, "steps", f"def step(x):\n    return {step}")
        digests.append(model_fingerprint(imported(folder, "calling", call).model))
    assert digests[0] == digests[1] != digests[2]


def test_layout_annotations_and_place_do_not_make_another_model(folder: Path) -> None:
    plain = imported(folder, "plain", "def model(x, k=2):\n    return x * (k + 1)").model
    other = imported(
        folder,
        "other",
        """
        from torch import Tensor

        def model(x: Tensor, k: int = 2) -> Tensor:
            \"\"\"Scale.\"\"\"
            # a comment
            return (x
                    * (k + 1))
        """,
    ).model
    assert model_fingerprint(plain) == model_fingerprint(other)


def test_a_source_that_was_changed_after_the_import_is_not_taken_for_the_code(folder: Path) -> None:
    model = imported(folder, "edited", "def model(x): return x + 1").model
    assert code_usage(model.__code__).source
    before = model_fingerprint(model)
    (folder / "edited.py").write_text("def model(x): return x + 22")
    assert model_fingerprint(model) == before  # still in memory
    source_code._DEFINITIONS.clear()
    stale = model_fingerprint(model)
    assert not code_usage(model.__code__).source
    assert stale != model_fingerprint(imported(folder, "edited", "def model(x): return x + 22").model)


def test_bytecode_agrees_with_that_of_a_model_that_travelled() -> None:
    for model in (Holding(Config(1.0)), closing_over([Settings(1.0)]), decorated(1.0)):
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        try:
            travelled = cloudpickle.loads(cloudpickle.dumps(model))
        finally:
            cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
        assert model_fingerprint(travelled, sources=False) == model_fingerprint(model, sources=False)


class Counting:
    """A model that counts and keeps records, in ways that people write."""

    def __init__(self) -> None:
        self.calls, self.shapes, self.lock = 0, dict[str, list[int]](), threading.Lock()

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        with self.lock:
            self.calls += 1
            self.shapes.setdefault("all", []).append(len(patches))
            self.shapes["last"] = [len(patches)]
        return patches


def test_what_a_call_writes_does_not_count() -> None:
    model = Counting()
    before = read_fingerprint(model)
    model(torch.ones(3))
    assert read_fingerprint(model) == before
    assert not before.unread


class Levels(nn.Module):
    """A module with a variable of the name of an attribute."""

    def __init__(self, levels: list[float]) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        levels = []
        for level in self.levels:
            levels.append((patches > level).float())  # noqa: PERF401 - as people write it
        return torch.cat(levels, 1)


def test_a_variable_that_changes_is_not_taken_for_an_attribute() -> None:
    assert model_fingerprint(Levels([0.1])) != model_fingerprint(Levels([0.2]))


def test_what_cannot_be_read_is_named() -> None:
    held = Holding({"settings": [(letter for letter in "ab")]})
    held.add_module("inner", Holding(letter for letter in "ab"))
    assert read_fingerprint(held).unread == ("model.item['settings'][0]", "model.inner.item")


@pytest.mark.parametrize("model_id", [None, "mine"])
def test_a_run_warns_once_of_what_cannot_be_read(model_id: str | None, caplog: pytest.LogCaptureFixture) -> None:
    models = [Holding(letter for letter in "ab"), Holding({"letters": (letter for letter in "ab")})]
    options = ModelOptions(model=models, model_id=model_id)
    with caplog.at_level(logging.WARNING, "oocpatch"):
        identity_of(options, models)
        identity_of(options, models, sources=False)  # as the processes of the run do
    assert len(caplog.messages) == (model_id is None)
    for message in caplog.messages:
        assert message.startswith("model.item, model.item['letters'] cannot be read")
        assert "pass model_id=" in message


def test_containers_that_contain_themselves_are_read() -> None:
    cycle: list[Any] = [1]
    cycle.append(cycle)
    assert model_fingerprint(closing_over(cycle)) == model_fingerprint(closing_over(cycle))


@pytest.mark.parametrize("name", ["_forward_pre_hooks", "_forward_hooks", "_orig_mod"])
def test_names_that_torch_does_not_promise_are_there(name: str) -> None:
    """Hooks are attributes of modules without a public list; a compiled module holds the one that it was made of."""
    compiled = torch.compile(nn.Identity(), backend="eager")
    assert name in (*vars(nn.Identity()), *(child for child, _ in compiled.named_children()))


def test_a_compiled_module_has_the_fingerprint_of_its_module() -> None:
    one, same, other = (torch.compile(nn.Softplus(beta), backend="eager") for beta in (1.0, 1.0, 2.0))
    assert model_fingerprint(one) == model_fingerprint(same) != model_fingerprint(other)
    assert model_fingerprint(one) != model_fingerprint(nn.Softplus(1.0))
