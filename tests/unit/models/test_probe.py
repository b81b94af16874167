"""The probe counts the memory of a call, by means of torch that it does not promise."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _python_dispatch

from oocpatch.models.footprint import Footprint
from oocpatch.models.predictor import version


def test_torch_still_shows_the_results_of_operators() -> None:
    """`TorchDispatchMode` is documented for users and lies in a private module: there is no public one."""
    assert issubclass(Footprint, _python_dispatch.TorchDispatchMode)
    with Footprint([]) as footprint:
        torch.stack(torch.zeros(4, 1024).unbind())
    assert footprint.peak == 2 * 4 * 1024 * 4


def test_tensors_still_count_what_is_written_to_them() -> None:
    """`Tensor._version` is documented in the notes on autograd, and has no public name."""
    tensor = torch.zeros(3)
    before = version(tensor)
    tensor[0] = 1
    assert version(tensor) == before + 1


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_the_compiler_still_lists_the_options_of_its_modes(mode: str) -> None:
    """`torch.compile` takes a mode or options; torch's documentation names this function for what a mode stands for."""
    from torch import _inductor  # noqa: PLC0415 - a second of imports

    assert _inductor.list_mode_options(mode)
    assert "deterministic" in _inductor.list_options()
