"""Around the model: preprocessing before it, turned patches and several models in its place, and the mean of all.

```text
             +--> turn --> model 1 --> turn back --+
 patches --> |         --> model 2 --> turn back --| --> mean, float32
 preprocess  +--> turn --> model 1 --> turn back --|
             |         --> model 2 --> turn back --+
```

One turn after the other, one model after the other: memory is that of one call, and of the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from oocpatch.models.augmentation import Turn
from oocpatch.models.input_spec import Accepts, as_input, input_dtype
from oocpatch.models.wrappers import as_module

ONLY = "prediction"
"""Name of the output of a model that gives one tensor."""


def around(
    models: Sequence[nn.Module | Callable[..., Any]],
    preprocess: nn.Module | Callable[..., Any] | None = None,
    turns: Sequence[Turn] = (),
) -> nn.Module | Callable[..., Any]:
    """One model of several and what is around them; the model itself if it is alone and nothing is around it."""
    if len(models) == 1 and preprocess is None and len(turns) <= 1:
        return models[0]
    return Around(models, preprocess, turns)


class Around(nn.Module):
    """Several models, and what is around them, as one model.

    It takes patches in the volume's dtype, and casts what it gives each model to that model's.

    Args:
        models: whose outputs are averaged.
        preprocess: function of patches `(B, C, *patch)`.
        turns: ways to turn patches; see `oocpatch.models.augmentation`.

    >>> doubled, tripled = (lambda x: 2 * x), (lambda x: 3 * x)
    >>> Around([doubled, tripled], preprocess=lambda x: x + 1)(torch.ones(1, 1, 2)).tolist()
    [[[5.0, 5.0]]]
    """

    accepts = Accepts()
    """Patches of any dtype: it casts them itself."""

    def __init__(
        self,
        models: Sequence[nn.Module | Callable[..., Any]],
        preprocess: nn.Module | Callable[..., Any] | None = None,
        turns: Sequence[Turn] = (),
    ) -> None:
        super().__init__()
        self.models = nn.ModuleList([as_module(model) for model in models])
        self.preprocess = None if preprocess is None else as_module(preprocess)
        self.turns = tuple(turns)

    def forward(self, patches: torch.Tensor) -> Any:
        """The mean of all models over all turns; the model's own output if there is only one of both.

        Raises:
            ValueError: when outputs cannot be averaged.
        """
        if self.preprocess is not None:
            patches = self.preprocess(patches)
        calls = len(self.models) * max(1, len(self.turns))
        if calls == 1 and all(turn.identity for turn in self.turns):
            return _called(self.models[0], patches)
        sums: dict[str, torch.Tensor] = {}
        named = False
        for turn in self.turns or (None,):
            turned = patches if turn is None else turn.of(patches)
            for model in self.models:
                outputs = _called(model, turned)
                named = isinstance(outputs, dict)
                _add(sums, outputs if named else {ONLY: outputs}, turn, patches)
        means = {name: values.div_(calls) for name, values in sums.items()}
        return means if named else means[ONLY]


def _called(model: nn.Module, patches: torch.Tensor) -> Any:
    return model(as_input(patches, input_dtype(model)))


def _add(sums: dict[str, torch.Tensor], outputs: dict[str, Any], turn: Turn | None, patches: torch.Tensor) -> None:
    if sums and outputs.keys() != sums.keys():
        raise ValueError(
            "the model must return the same outputs each time to be averaged, "
            f"got {', '.join(sorted(sums))} and {', '.join(sorted(map(str, outputs)))}"
        )
    for name, value in outputs.items():
        values = _scores(name, value, patches)
        if turn is not None:
            values = turn.back(values)
        if name not in sums:
            kind = torch.float64 if values.dtype == torch.float64 else torch.float32
            sums[name] = values.to(kind, copy=True, memory_format=torch.contiguous_format)
        elif sums[name].shape != values.shape:
            raise ValueError(
                f"the model must return one shape for all that is averaged, got {tuple(sums[name].shape)} and "
                f"{tuple(values.shape)} of {name}: models of an ensemble must agree, and axes that augment exchanges "
                "must have one scale"
            )
        else:
            sums[name] += values


def _scores(name: str, value: Any, patches: torch.Tensor) -> torch.Tensor:
    """An output that can be averaged, as a tensor."""
    if value is None or isinstance(value, (str, list, tuple, dict)):
        raise ValueError(f"the model must return a tensor or a dict of tensors, got {type(value).__name__}")
    values = torch.as_tensor(value, device=patches.device)
    if values.ndim != patches.ndim:
        raise ValueError(f"the model must return {patches.ndim} axes (B, C, *patch), got shape {tuple(values.shape)}")
    if not values.is_floating_point():
        raise ValueError(
            f"the model must return floats to be averaged (augment, several models), got {values.dtype} for {name}; "
            "return scores, and leave the choice of a class to postprocess='argmax'"
        )
    return values
