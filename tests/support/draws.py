"""Counting draws, and the question whether the counts fit a distribution."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torchio

import oocpatch
from oocpatch.sampling.random_streams import stream

Corner = tuple[int, ...]


def corners(patches: Iterable[oocpatch.Subject]) -> list[Corner]:
    return [patch.patch_location.index for patch in patches]


def drawn(sampler: Any, number: int, seed: int = 0, together: int = 1, which: int = 0) -> Counter[Corner]:
    """How often each corner came, without reading patches; of `together` drawn at once, the one at `which`."""
    return Counter(sampler.draw(sampler.subject, stream(seed, i), together)[which] for i in range(number))


def centre_distribution(weights: np.ndarray[Any, Any], patch: Corner) -> dict[Corner, float]:
    """The probability of each corner, from the definition: proportional to the weight at its `corner + patch // 2`.

    Every corner at which the patch lies in the volume is there, also those of probability 0.
    """
    ranges = [range(n - p + 1) for n, p in zip(weights.shape, patch, strict=True)]
    mass = {
        corner: float(weights[tuple(c + p // 2 for c, p in zip(corner, patch, strict=True))])
        for corner in itertools.product(*ranges)
    }
    total = math.fsum(mass.values())
    return {corner: m / total for corner, m in mass.items()}


def assert_fits(counts: Mapping[Corner, int], distribution: Mapping[Corner, float]) -> None:
    """Pearson's test at four sigma, rare corners taken together; nothing may be drawn that has no probability."""
    total = sum(counts.values())
    impossible = [corner for corner in counts if not distribution.get(corner)]
    assert not impossible, f"drawn without probability: {impossible[:5]}"
    observed, expected = [], []
    rest_observed, rest_expected = 0, 0.0
    for corner, probability in distribution.items():
        if probability * total >= 5:
            observed.append(counts.get(corner, 0))
            expected.append(probability * total)
        else:
            rest_observed += counts.get(corner, 0)
            rest_expected += probability * total
    if rest_expected >= 5:
        observed.append(rest_observed)
        expected.append(rest_expected)
    assert len(observed) > 1, "a test with one bin cannot fail"
    freedom = len(observed) - 1
    chi2 = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    # Wilson and Hilferty (1931): the cube root of chi2 / freedom is nearly normal
    sigma = ((chi2 / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))
    assert sigma < 4, f"chi2 {chi2:.1f} with {freedom} degrees of freedom, {sigma:.1f} sigma"


def torchio_subject(**volumes: np.ndarray[Any, Any]) -> torchio.Subject:
    """The same volumes for TorchIO, which takes `(C, I, J, K)`; integers become labels."""
    images = {}
    for name, array in volumes.items():
        tensor = torch.from_numpy(array)[None]
        images[name] = torchio.LabelMap(tensor) if array.dtype.kind in "iu" else torchio.ScalarImage(tensor)
    return torchio.Subject(**images)
