"""Compare a model package with the example that it brings: run `predict` on its input, with its settings."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import xarray

from oocpatch.models.packages.package import ExpectedOutput, load_package
from oocpatch.run.predict import predict


@dataclasses.dataclass(frozen=True, slots=True)
class OutputReport:
    """Comparison of one output of an example."""

    output: str
    shape: tuple[int, ...]
    largest_absolute: float
    """Largest difference from the package's own output."""
    mismatched: float
    """Share of the values that differ by more than the package's tolerance."""
    allowed: float
    """Share of the values that may do so."""

    @property
    def passed(self) -> bool:
        return self.mismatched <= self.allowed


@dataclasses.dataclass(frozen=True, slots=True)
class PackageReport:
    """Comparison of all outputs. Prints as a table."""

    package: str
    outputs: tuple[OutputReport, ...]

    @property
    def passed(self) -> bool:
        """True if no output differs by more than its tolerance."""
        return all(output.passed for output in self.outputs)

    def to_json(self) -> str:
        """Return the report as a JSON object."""
        outputs = [{**dataclasses.asdict(output), "passed": output.passed} for output in self.outputs]
        return json.dumps({"passed": self.passed, "package": self.package, "outputs": outputs}, indent=1)

    def __str__(self) -> str:
        lines = [f"{'output':<20} {'shape':<20} {'absolute':>9} {'mismatched':>11} {'allowed':>9}"]
        for o in self.outputs:
            shape = "x".join(map(str, o.shape))
            numbers = f"{o.largest_absolute:9.2e} {o.mismatched:11.2e} {o.allowed:9.2e}"
            lines.append(f"{o.output:<20} {shape:<20} {numbers} {'PASS' if o.passed else 'FAIL'}")
        return "\n".join([*lines, "PASS" if self.passed else "FAIL"])

    __repr__ = __str__


def check_example(spec: str, *, trust_pickle: bool = False, device: str = "auto") -> PackageReport:
    """Compare the outputs of a model package for its own example with those that it brings.

    Raises:
        ValueError: when the package cannot be loaded, or has no example.
    """
    package = load_package(spec, trust_pickle=trust_pickle, device=device)
    if package is None or package.example is None:
        raise ValueError(f"a package must bring test tensors to be compared alone, got {spec!r}; give a volume, too")
    example = package.example()
    spatial = "zyx"[-(example.values.ndim - 2) :] if example.values.ndim <= 5 else None
    computed: dict[str, list[Any]] = {name: [] for name in example.outputs}
    with tempfile.TemporaryDirectory(prefix="oocpatch-check-") as folder:
        for number, values in enumerate(example.values):
            result = predict(
                values,
                spec,
                Path(folder) / str(number),
                axes=None if spatial is None else f"c{spatial}",
                patch_size=values.shape[1:],
                patch_overlap=(0,) * (values.ndim - 1),
                trust_pickle=trust_pickle,
                device=device,
                progress=False,
            )
            for name, arrays in computed.items():
                array = result if isinstance(result, xarray.DataArray) else result[name]
                array = array if isinstance(array, xarray.DataArray) else array[name]
                arrays.append(np.asarray(array).reshape(-1, *array.shape[-(values.ndim - 1) :]))
    reports = [_compare(name, np.stack(computed[name]), expected) for name, expected in example.outputs.items()]
    return PackageReport(spec, tuple(reports))


def _compare(name: str, found: Any, expected: ExpectedOutput) -> OutputReport:
    if found.shape != expected.values.shape:
        raise ValueError(f"the package promises output {name!r} of shape {expected.values.shape}, got {found.shape}")
    distance = np.abs(found.astype(np.float64) - expected.values)
    mismatched = distance > expected.absolute + expected.relative * np.abs(expected.values)
    return OutputReport(name, found.shape, float(distance.max()), float(mismatched.mean()), expected.share)
