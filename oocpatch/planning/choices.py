"""The names that parameters take, in one place: checks, the command line and the docs read them here."""

from __future__ import annotations

from typing import Literal, get_args

OverlapMode = Literal["crop", "average", "hann", "gaussian", "max", "vote"]
OVERLAP_MODES: tuple[str, ...] = get_args(OverlapMode)
PADDING_MODES = ("constant", "edge", "reflect", "symmetric", "wrap")
POSTPROCESSES = ("argmax", "softmax", "sigmoid", "threshold")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
WORKS = ("light", "heavy")
OUTPUT_FORMATS = ("auto", "zarr", "ome-zarr")
