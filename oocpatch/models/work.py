"""The work of a patch, in operations: counted by torch where it can be, else assumed to be much.

Counted and not timed, so that plans do not vary between runs. Torch sees what its operators do. It does not see what a
plain function, onnxruntime, TorchScript or a compiler does besides, nor a module that calls none of its operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from oocpatch.models.onnx import OnnxSession
from oocpatch.models.probe import Probe
from oocpatch.models.wrappers import Function
from oocpatch.planning.workload import ACCELERATOR, CPU, HEAVY, Workload

_UNSEEN = (Function, OnnxSession, torch.jit.ScriptModule)


def workload_of(
    work: float | str | None, probe: Probe, models: Sequence[Any], transforms: int, device: str
) -> Workload:
    """Return the work of a patch.

    Args:
        work: `"light"`, `"heavy"`, or the number of operations; None: counted.
        probe: of all models with what is around them.
        models: the models.
        transforms: number of flips and rotations for which each model is called.
        device: the device of the models.
    """
    speed = CPU if torch.device(device).type == "cpu" else ACCELERATOR
    if work == "light":
        return Workload(0.0, speed, note='light, as work="light" says')
    if work is not None and work != "heavy":
        return Workload(float(work), speed)
    assumed = [work == "heavy" or is_uncounted(model, ran_operators=probe.ran_operators) for model in models]
    if not any(assumed):
        return Workload(probe.operations, speed)
    note = 'heavy, as work="heavy" says' if work else 'heavy, unless work="light" says not'
    return Workload(max(probe.operations, transforms * sum(assumed) * HEAVY), speed, is_assumed=True, note=note)


def is_uncounted(model: Any, *, ran_operators: bool) -> bool:
    """Return whether a model may work where torch does not count.

    >>> is_uncounted(nn.Identity(), ran_operators=False), is_uncounted(lambda patches: patches, ran_operators=True)
    (False, True)
    """
    if not isinstance(model, nn.Module):
        return True
    modules = list(model.modules())
    if any(isinstance(module, _UNSEEN) or hasattr(module, "_orig_mod") for module in modules):
        return True
    return not ran_operators and any(type(module).__module__.partition(".")[0] != "torch" for module in modules)
