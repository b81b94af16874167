"""Options of the model: how it is loaded, what is done before and after it, and how it is called.

They travel to the processes that run tasks, with the plan: nothing else of a call's arguments does. This module imports
no heavy library, since the command line makes its options of these fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oocpatch.planning.choices import COMPILE_MODES, POSTPROCESSES
from oocpatch.provenance import option

if TYPE_CHECKING:
    from oocpatch.models.augmentation import Augmentation
    from oocpatch.models.preprocessing import CheckedPreprocess


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """The model of a run and what is around it. Fields are parameters of `predict`, with checked values."""

    model: Any = option(
        kind="many",
        metavar="SPEC",
        help="Model: package.module:name, file.py:name, a .pt2, .pt or .onnx file, or KIND:PATH. Repeat it to average.",
    )
    weights: Any = option(
        None,
        kind="many",
        metavar="FILE",
        help="Load a state dict or safetensors file into the model. Repeat it for a model with each, averaged.",
    )
    model_args: Mapping[str, Any] | None = option(
        None,
        kind="pairs",
        metavar="NAME=VALUE",
        help="Pass an argument to the factory that the model spec names, as JSON or text. Repeat it for several.",
    )
    trust_pickle: bool = option(False, check="switch", kind="flag", help="Allow model and weights files to run code.")
    model_id: str | None = option(
        None, metavar="TEXT", help="Identify the model by this text instead of its fingerprint."
    )
    eval_mode: bool = option(
        True,
        check="switch",
        identity=True,
        kind="switch",
        help="Call networks in evaluation mode; else each layer in the mode that it is in.",
    )
    preprocess: CheckedPreprocess = option(
        None,
        check="preprocess",
        identity="code",
        kind="json",
        metavar="[zscore|percentile|scale|clip|binarize|sigmoid|none|JSON]",
        help='Normalize patches first; arguments, and several steps, as JSON: [{"name": "clip", "low": 0}, "zscore"].',
    )
    augment: Augmentation | None = option(
        None,
        check="augment",
        identity="augmentation",
        kind="json",
        metavar="[flips|rotations|all|none|JSON]",
        help='Average predictions over flipped and rotated patches; axes as JSON: {"name": "flips", "axes": ["x"]}.',
    )
    postprocess: Any = option(
        None,
        check="postprocess",
        identity="code_per_head",
        kind="per_head",
        choices=POSTPROCESSES,
        metavar="[argmax|softmax|sigmoid|threshold|threshold:NUMBER|label|label:NUMBER|none]",
        help="Apply a function to the blended scores; HEAD=NAME,... for several outputs.",
    )
    device: str = option(
        "auto",
        check="device",
        identity="device_type",
        metavar="NAME",
        help="Run the model on this device: cpu, cuda, cuda:1, mps.",
    )
    autocast: bool = option(
        False,
        check="switch",
        identity=True,
        kind="flag",
        help="Run the model in mixed precision.",
    )
    channels_last: bool = option(
        False,
        check="switch",
        identity=True,
        kind="flag",
        help="Store patches and weights in the channels-last memory format.",
    )
    compile: str | None = option(
        False,
        check="compile_mode",
        identity=True,
        kind="choice",
        choices=COMPILE_MODES,
        help="Compile the model with torch.compile in this mode.",
    )
