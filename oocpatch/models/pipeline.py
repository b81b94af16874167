"""The pipeline of a run: the loaded models with what is around them, as one function of batches."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from oocpatch.models.augmentation import FlipRotate, flips_and_rotations
from oocpatch.models.compilation import optimized_model, uses_graphs
from oocpatch.models.fingerprint import Fingerprint, model_fingerprint, read_fingerprint
from oocpatch.models.input_spec import InputSpec, input_spec_of
from oocpatch.models.loading import Model, load_models
from oocpatch.models.onnx import OnnxSession
from oocpatch.models.options import ModelOptions
from oocpatch.models.packages.package import ModelPackage, NamedAxes, package_fingerprint
from oocpatch.models.predictor import Predictor
from oocpatch.models.preprocess_steps import Statistics
from oocpatch.models.preprocessing import preprocess_function
from oocpatch.models.reach import Survey, callables_of
from oocpatch.models.reuse import loaded
from oocpatch.models.wrappers import NamedInputs, NumpyModel, ensemble
from oocpatch.planning.box import Ints

logger = logging.getLogger("oocpatch")


def load(options: ModelOptions, package: ModelPackage | None = None, axes: Sequence[str] = ()) -> tuple[Model, ...]:
    """Load the model, or the members of an ensemble, for the device; those of a package that is loaded are there.

    Networks whose axes have names take patches with spatial axes named `axes`, in this order.

    Raises:
        TypeError, ValueError: as `load_models`.
    """
    arguments = (options.weights, options.model_args, options.trust_pickle, options.device, options.eval_mode)
    load_them = functools.partial(
        load_models,
        options.model if package is None else package,
        weights=options.weights,
        model_args=options.model_args,
        trust_pickle=options.trust_pickle,
        device=options.device,
        eval_mode=options.eval_mode,
    )
    models = loaded(("models", options.model, *arguments), load_them)
    return tuple(model.for_axes(axes) if isinstance(model, NamedAxes) else model for model in models)


@dataclass(frozen=True, slots=True)
class Identity:
    """Identity of the model of a run.

    Attributes:
        value: `model_id`, else a digest per model.
        is_whole: whether it covers all that the model computes with.
    """

    value: Any
    is_whole: bool


def identity_of(options: ModelOptions, models: Sequence[Model], *, sources: bool = True) -> Identity:
    """Return what identifies the model of a run: `model_id`, else a digest per model; warn of what no digest covers.

    Args:
        options: the options.
        models: as `load` returns them.
        sources: whether the code of models that were given as objects is read from its source, which does not travel
            to other processes with them; else from its bytecode.
    """
    if options.model_id is not None:
        return Identity(options.model_id, is_whole=False)
    specs = list(options.model) if isinstance(options.model, (list, tuple)) else [options.model]
    specs *= len(models) // len(specs)  # one spec may be loaded with several weights
    fingerprints = [
        Fingerprint(digest, ())
        if (digest := package_fingerprint(model))
        else read_fingerprint(model, sources=sources or isinstance(spec, str))
        for model, spec in zip(models, specs, strict=True)
    ]
    unread = [part for fingerprint in fingerprints for part in fingerprint.unread]
    if unread and sources:  # once, not in each process again
        message = (
            "%s cannot be read, so that another value there counts as the same model: pass model_id= to identify it"
        )
        logger.warning(message, ", ".join(unread))
    digests = [fingerprint.digest for fingerprint in fingerprints]
    if not options.eval_mode:
        modes = [[called.training for called in callables_of(m) if isinstance(called, nn.Module)] for m in models]
        digests = [model_fingerprint(both) for both in zip(digests, modes, strict=True)]
    is_whole = not unread and not any(fingerprint.has_state for fingerprint in fingerprints)
    return Identity(digests[0] if len(digests) == 1 else digests, is_whole)


NOT_FOLLOWED = (torch.jit.ScriptModule, OnnxSession, NumpyModel)
"""Models whose code does not tell what a call writes, or which leave torch, and its threads, for long."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The loaded models of a run with what is around them, for patches of one geometry.

    Attributes:
        options: the options.
        models: as `load` returns them.
        axes: names of the spatial axes.
        patch_size: spatial size of the patches that the model takes, in voxels.
        looped: number of looped axes in front of the spatial ones.
        inputs: names and numbers of channels of the tensors that the models are called with; none: with one.
    """

    options: ModelOptions
    models: tuple[Model, ...]
    axes: tuple[str, ...]
    patch_size: Ints
    looped: int
    inputs: tuple[tuple[str, int], ...] = ()

    @property
    def transforms(self) -> tuple[FlipRotate, ...]:
        """The flips and rotations over which predictions are averaged."""
        return flips_and_rotations(self.options.augment, self.axes, self.patch_size)

    @property
    def input_spec(self) -> InputSpec:
        """The batches that all models take, flipped and rotated patches included."""
        return input_spec_of(ensemble(self.models, None, self.transforms))

    @property
    def is_stateless(self) -> bool:
        """Return whether threads may call the models at the same time: on the CPU, networks that write nothing."""
        options = self.options
        if torch.device(options.device).type != "cpu" or options.compile or not options.eval_mode:
            return False
        if not all(isinstance(model, nn.Module) for model in self.models):
            return False
        model = self.predictor().model
        for called in callables_of(model):
            if isinstance(called, NOT_FOLLOWED) or "forward" in getattr(called, "__dict__", ()):  # put in its place
                return False
        return not Survey(model).state

    def predictor(self, *, statistics: Statistics = (), compiled: bool = False, **settings: Any) -> Predictor:
        """Return the models and what is around them as a function of batches.

        Args:
            statistics: two numbers per channel, which a named preprocess needs.
            compiled: compile the models, if the options say so.
            settings: further arguments of `Predictor`.
        """
        options = self.options
        prepare = functools.partial(
            optimized_model,
            axes=len(self.axes),
            channels_last=options.channels_last,
            compile_mode=options.compile if compiled else None,
            device=options.device,
        )
        preprocess = preprocess_function(options.preprocess, statistics)
        models = [NamedInputs(model, self.inputs) for model in self.models] if self.inputs else self.models
        model = ensemble([prepare(member) for member in models], preprocess, self.transforms)
        return Predictor(
            model,
            device=options.device,
            autocast=options.autocast,
            looped=self.looped,
            eval_mode=options.eval_mode,
            own_thread=compiled and uses_graphs(options.compile, options.device),
            **settings,
        )
