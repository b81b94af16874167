"""Model packages: models together with settings of `predict` that they were made for, named by specs.

A spec is `KIND:PATH`, with options after commas (`NAME=VALUE`). Each kind has a module of this folder with a function
`load(path, options, *, trust_pickle, device)` that returns a `ModelPackage`, or raises ValueError with the name of the
part that cannot be honoured.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from oocpatch.errors import error_line
from oocpatch.models.input_spec import InputSpec
from oocpatch.models.predictor import resolve_device
from oocpatch.models.value_parts import file_digest
from oocpatch.storage.paths import expand_home

KINDS: tuple[str, ...] = ("bioimageio", "monai", "nnunet")
"""Kinds of packages, and the names of their modules."""

MALFORMED = (LookupError, TypeError, AttributeError, ArithmeticError, OSError)
"""Errors of reading a file whose content is of other types than expected, or that is none."""

_OPTION = re.compile(r",(\w+)=([^,=]*)$")


@dataclass(frozen=True, slots=True)
class ExpectedOutput:
    """An output that a package promises for its example.

    Attributes:
        values: the output, `(B, C, *spatial)`.
        relative, absolute: by how much values may differ: `absolute + relative * |value|`.
        share: share of the values that may differ by more.
    """

    values: npt.NDArray[Any]
    relative: float
    absolute: float
    share: float


@dataclass(frozen=True, slots=True)
class Example:
    """An input of a package, `(B, C, *spatial)`, and the outputs that it promises, by name."""

    values: npt.NDArray[Any]
    outputs: Mapping[str, ExpectedOutput]


@dataclass(frozen=True)
class ModelPackage:
    """A loaded model package.

    Attributes:
        models: the models; outputs of several are averaged.
        settings: arguments of `predict` by name, as users pass them, which hold where the caller gives none; `Refused`
            in the place of one that cannot be honoured.
        files: the files that the models depend on.
        classes: names of the output's channels, or of its labels from 0; may be empty.
        libraries: names of the libraries whose code computes; their versions identify the models, too.
        example: returns an example to compare the model with; None: the kind has none.
        normalizes_first: whether the package's preprocess comes before resampling, as the volume is read.
    """

    models: tuple[nn.Module | Callable[..., Any], ...]
    settings: Mapping[str, Any]
    files: tuple[Path, ...]
    classes: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    example: Callable[[], Example] | None = None
    normalizes_first: bool = False

    @property
    def fingerprint(self) -> str:
        """The digest of the package's files."""
        digest = hashlib.sha256()
        for file in sorted(self.files):
            digest.update(f"{file_digest(str(file))}\n".encode())
        for library in self.libraries:
            digest.update(f"{library} {importlib.metadata.version(library)}\n".encode())
        return digest.hexdigest()

    @property
    def names_axes(self) -> bool:
        """Return whether the models know the axes of patches by their names, and not by their order."""
        return isinstance(self.settings.get("patch_size"), Mapping)

    def check_channels(self, channels: int) -> None:
        """Refuse a volume of other channels than the models take, before its channels are preprocessed.

        Raises:
            ValueError: naming both numbers.
        """
        spec = getattr(self.models[0], "input_spec", InputSpec())
        InputSpec(channels=spec.channels).validate(channels, ())


def check_axes(patch_size: Any, names: Sequence[str]) -> None:
    """Refuse spatial axes, by their names, that the patches of a package do not have.

    Raises:
        ValueError: naming the axes.
    """
    if isinstance(patch_size, Mapping):
        is_right, shown = set(patch_size) == set(names), f" ({', '.join(patch_size)})"
    else:
        is_right, shown = not isinstance(patch_size, tuple) or len(patch_size) == len(names), ""
    if not is_right:
        raise ValueError(
            f"the model package takes patches of {len(patch_size)} spatial axes{shown}, and the volume has "
            f"{len(names)} ({', '.join(names)}); name its axes with axes, such as tyx to loop over the first of three, "
            "or give a picture an axis of one voxel"
        )


class NamedAxes(nn.Module):
    """A network that takes its spatial axes in another order than the volume's; of two axes, slices of patches.

    Args:
        network: takes `(B, C, *patch)`.
        axes: names of the spatial axes that the network takes, in its order.
        channels: number of channels that it takes.
    """

    def __init__(self, network: nn.Module, axes: Sequence[str], channels: int) -> None:
        super().__init__()
        self.network, self.axes, self.order = network, tuple(axes), tuple(range(len(axes)))
        self.input_spec = InputSpec(channels=channels, dtype=torch.float32)

    def for_axes(self, names: Sequence[str]) -> NamedAxes:
        """Let patches have spatial axes of these names, in this order.

        Raises:
            ValueError: if an axis of the network is missing, or there is more than one that it does not have.
        """
        others = [name for name in names if name not in self.axes]
        if set(self.axes) - set(names) or len(others) > 1:
            raise ValueError(
                f"the package's network takes spatial axes {', '.join(self.axes)}, got {', '.join(names)}; name those "
                "of the volume with axes"
            )
        self.order = tuple(names.index(name) for name in (*others, *self.axes))
        return self

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Return scores `(B, C', *patch)`."""
        values = patches.permute(0, 1, *(2 + axis for axis in self.order))
        if is_sliced := len(self.order) > len(self.axes):
            values = values[:, :, 0]  # patches of one slice
        scores: torch.Tensor = self.network(values)
        scores = scores[:, :, None] if is_sliced else scores
        return scores.permute(0, 1, *(2 + self.order.index(axis) for axis in range(len(self.order))))


@dataclass(frozen=True)
class PackageSpec:
    """The parts of a spec.

    >>> PackageSpec.of("package.module:name") is None
    True
    """

    kind: str
    path: str
    options: Mapping[str, str]

    @classmethod
    def of(cls, spec: Any) -> PackageSpec | None:
        """Return the parts of a spec; None for what names no package."""
        kind, _, path = spec.partition(":") if isinstance(spec, str) else ("", "", "")
        if kind not in KINDS:
            return None
        options: dict[str, str] = {}
        while found := _OPTION.search(path):
            options, path = {found[1]: found[2], **options}, path[: found.start()]
        return cls(kind, path, options)

    def absolute(self) -> str:
        """Return the spec with the absolute path of the package."""
        options = "".join(f",{name}={value}" for name, value in self.options.items())
        return f"{self.kind}:{Path(expand_home(self.path)).absolute()}{options}"


def load_package(model: Any, *, trust_pickle: bool = False, device: str = "cpu") -> ModelPackage | None:
    """Load a model package.

    Args:
        model: the argument of `predict`; None is returned where it names no package.
        trust_pickle: let the package run code of its own.
        device: where the models will run.

    Raises:
        ValueError: for what the package says that cannot be honoured, naming the part.
    """
    members = list(model) if isinstance(model, (list, tuple)) else [model]
    specs = [spec for spec in map(PackageSpec.of, members) if spec is not None]
    if not specs:
        return None
    if len(members) > 1:
        raise ValueError(f"a model package must be the only model, since it sets how patches are cut, got {members}")
    (spec,) = specs
    path = Path(expand_home(spec.path))
    if not path.exists():
        raise ValueError(f"the package of model spec {members[0]!r} does not exist: {str(path.absolute())!r}")
    loader = importlib.import_module(f"oocpatch.models.packages.{spec.kind}")
    try:
        package: ModelPackage = loader.load(
            path, spec.options, trust_pickle=trust_pickle, device=resolve_device(device)
        )
    except MALFORMED as error:
        raise ValueError(
            f"the package of model spec {members[0]!r} has a file or an entry that is missing or of another type: "
            f"{error_line(error)}"
        ) from error
    fingerprint = package.fingerprint
    for loaded in package.models:
        loaded.package_fingerprint = fingerprint  # type: ignore[union-attr]
    return package


class Entries(dict[str, Any]):
    """The entries of an object in a file of a package; each that is read by `[]` must be there.

    Args:
        entries: the entries.
        place: names the object in messages.

    >>> Entries({"size": 1}, "inputs.0")["shape"]
    Traceback (most recent call last):
    ValueError: inputs.0: must have an entry 'shape', got size
    """

    def __init__(self, entries: Mapping[str, Any], place: str) -> None:
        super().__init__(entries)
        self.place = place

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"{self.place}: must have an entry {name!r}, got {', '.join(self) or 'none'}")


class Refused(str):
    """A message in the place of a setting of a package that cannot be honoured; the caller may give another value."""

    __slots__ = ()


@contextlib.contextmanager
def refused_unless_given(settings: dict[str, Any], name: str) -> Iterator[None]:
    """Put a ValueError into the place of a setting: it is raised where the caller does not give the parameter."""
    try:
        yield
    except (ValueError, *MALFORMED) as error:
        message = str(error) if isinstance(error, ValueError) else f"{name} cannot be read: {error_line(error)}"
        settings[name] = Refused(f"{message}; pass {name}= to do without what the package says")


def package_fingerprint(model: Any) -> str | None:
    """Return the fingerprint of the package that a model comes from; None for other models."""
    return getattr(model, "package_fingerprint", None)


def refuse_options(options: Mapping[str, str], allowed: tuple[str, ...], kind: str) -> None:
    """Refuse options of a spec that its kind does not have.

    Raises:
        ValueError: naming them.
    """
    if unknown := sorted(options.keys() - set(allowed)):
        takes = f"takes {', '.join(allowed)}" if allowed else "takes no options"
        raise ValueError(f"a model spec {kind}:PATH {takes}, got {', '.join(unknown)}")
