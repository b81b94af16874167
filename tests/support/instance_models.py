"""Models of objects for tests: they know all objects of a volume by values, and number them anew in every patch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Array = npt.NDArray[Any]


def renumbered(values: Array, seed: int) -> Array:
    """Number the values of a patch anew, 0 stays 0, in an order that the seed says."""
    found = np.unique(values)
    found = found[found > 0]
    numbers = np.random.default_rng(seed).permutation(len(found)) + 1
    result = np.zeros(values.shape, np.int64)
    inside = values > 0
    result[inside] = numbers[np.searchsorted(found, values[inside])]
    return result


class Renumber(nn.Module):
    """Objects are the voxels of one value: what a perfect model finds in a volume of labels."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        patches = batch[:, 0].numpy(force=True)
        return torch.from_numpy(np.stack([renumbered(p, int(p.sum()) % 2**32) for p in patches])[:, None])


class WithScores(Renumber):
    """The same, and a score that is blended."""

    def forward(self, batch: torch.Tensor) -> Any:
        return {"cells": super().forward(batch), "prob": batch[:, :1].to(torch.float32) / 100}
