"""The names that parameters take, in one place: checks, the command line and the docs read them here."""

from __future__ import annotations

from typing import Literal, get_args

OverlapMode = Literal["crop", "average", "hann", "gaussian", "nnunet", "monai", "max", "vote", "instances"]
OVERLAP_MODES: tuple[str, ...] = get_args(OverlapMode)
FOLDED_PADDING = ("edge", "reflect", "symmetric", "wrap")
"""Rules of padding that repeat voxels of the volume."""
STATISTIC_PADDING = ("mean", "median", "minimum")
"""Rules of padding by one value of the whole volume."""
PADDING_SYNONYMS = {"replicate": "edge", "circular": "wrap"}
"""Names of PyTorch and TorchIO, each with that of NumPy."""
PADDING_MODES = ("constant", *FOLDED_PADDING, *STATISTIC_PADDING, *PADDING_SYNONYMS)
PATCH_STARTS = ("regular", "even")
POSTPROCESSES = ("argmax", "softmax", "sigmoid", "threshold", "label", "clip", "linear", "none")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
WORKS = ("light", "heavy")
OUTPUT_FORMATS = ("auto", "zarr", "ome-zarr")
OUTPUT_GRIDS = ("volume", "model")
