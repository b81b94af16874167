"""Runs of one process have the probe of a model in common, as long as nothing changes that it depends on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import oocpatch
from oocpatch.configuration import make_plan
from oocpatch.models.probe import Probe


class Counting(nn.Module):
    """A network whose calls write an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.calls = nn.Parameter(torch.ones(1)), 0

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return patches * self.scale


class Opaque:
    """A model with a part that no fingerprint reads."""

    def __init__(self) -> None:
        self.part = (letter for letter in "ab")

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        return patches if self.part else -patches


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[Probe]:
    """The probes that are made from now on."""
    made: list[Probe] = []

    def probe_model(*arguments: Any) -> Probe:
        made.append(real(*arguments))
        return made[-1]

    real = make_plan.probe_model
    monkeypatch.setattr(make_plan, "probe_model", probe_model)
    return made


def volume(seed: int, dtype: str = "float32") -> np.ndarray[Any, Any]:
    """Voxels from 0 to 255."""
    return np.random.default_rng(seed).integers(0, 256, (12, 10 + seed)).astype(dtype)


def test_volumes_in_a_row_have_one_probe_and_the_plans_of_single_calls(probes: list[Probe], tmp_path: Path) -> None:
    net = nn.Conv2d(1, 2, 1)
    settings: dict[str, Any] = {"patch_size": 8, "patch_overlap": 4, "progress": False}
    for seed in range(3):
        with torch.no_grad():
            right = net(torch.from_numpy(volume(seed))[None])
        result = oocpatch.predict(volume(seed), net, tmp_path / f"{seed}.zarr", **settings)
        np.testing.assert_allclose(result.values, right, atol=1e-3)
        fresh = nn.Conv2d(1, 2, 1)
        fresh.load_state_dict(net.state_dict())
        plan = oocpatch.plan(volume(seed), net, "new.zarr", **settings)
        assert plan.to_json() == oocpatch.plan(volume(seed), fresh, "new.zarr", **settings).to_json()
    assert len(probes) == 1 + 3, "one of the network, and one of each of its copies"


@pytest.mark.parametrize(
    "change",
    [
        lambda net, call: call(net, volume(0, "uint8")),
        lambda net, call: call(net, volume(0), patch_size=4),
        lambda net, call: call(net, volume(0), autocast=True),
        lambda net, call: call(net, volume(0), augment="flips"),
        lambda net, call: call(net, volume(0), max_memory="200MiB"),
        lambda net, call: call(net, volume(0)[None], axes="cyx"),
        lambda net, call: (net.append(nn.Conv2d(2, 3, 1)), call(net, volume(0))),
        lambda net, call: (nn.init.zeros_(net[0].weight), call(net, volume(0))),
    ],
    ids=["dtype", "patch", "autocast", "augment", "memory", "axes", "layer", "weights"],
)
def test_what_a_probe_depends_on_makes_another_one(change: Callable[..., Any], probes: list[Probe]) -> None:
    def call(net: nn.Module, data: Any, **settings: Any) -> None:
        oocpatch.plan(data, net, "new.zarr", **{"patch_size": 8, **settings})

    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1))
    call(net, volume(0))
    call(net, volume(1))
    assert len(probes) == 1
    change(net, call)
    assert len(probes) == 2


@pytest.mark.parametrize("kind", [Counting, Opaque])
def test_a_model_that_no_fingerprint_covers_is_probed_each_time(kind: Callable[[], Any], probes: list[Probe]) -> None:
    model = kind()
    for _ in range(2):
        oocpatch.plan(volume(0), model, "new.zarr", patch_size=8)
    assert len(probes) == 2


def test_a_model_with_an_identity_of_its_own_is_probed_each_time(probes: list[Probe]) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1))
    for heads in (2, 3):
        plan = oocpatch.plan(volume(0), net, "new.zarr", patch_size=8, model_id="mine")
        assert plan.heads[0].channels == heads
        net.append(nn.Conv2d(2, 3, 1))
    assert len(probes) == 2
