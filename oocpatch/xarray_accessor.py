"""`array.oocpatch`: the methods of this package on xarray's arrays.

xarray takes half a second to import, and `import oocpatch` does not import it. So the accessor is registered when
xarray is there: at once, or when somebody imports it. This module needs xarray; `arrange` does not.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    import xarray

    from oocpatch.outputs.output import Result
    from oocpatch.planning.plan import Plan

NAME = "oocpatch"


class Accessor:
    """What `array.oocpatch` is: this package's functions, with the array as their volume."""

    def __init__(self, array: xarray.DataArray) -> None:
        self._array = array

    def __repr__(self) -> str:
        return "oocpatch on this array: .predict(model, output, ...) and .plan(model, output, ...)"

    def predict(self, model: Any, output: str | os.PathLike[str], **arguments: Any) -> Result:
        """Run a model over the array and write the result to `output`: see `oocpatch.predict`.

        >>> import tempfile, numpy as np, torch, xarray, oocpatch
        >>> array = xarray.DataArray(np.ones((40, 50), np.float32), dims=("y", "x"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     array.oocpatch.predict(torch.nn.Identity(), f"{folder}/out", patch_size={"y": 16, "x": 32}).sizes
        Frozen({'y': 40, 'x': 50})
        """
        from oocpatch.run.predict import predict  # noqa: PLC0415 - torch is heavy

        return predict(self._array, model, output, **arguments)

    def plan(self, model: Any, output: str | os.PathLike[str], **arguments: Any) -> Plan:
        """Decide what `predict` with the same arguments would do, and stop: see `oocpatch.plan`."""
        from oocpatch.run.predict import plan  # noqa: PLC0415 - torch is heavy

        return plan(self._array, model, output, **arguments)


def register() -> None:
    """Register the accessor; xarray is there."""
    import xarray  # noqa: PLC0415 - see above

    if getattr(xarray.DataArray, NAME, None) is not Accessor:
        xarray.register_dataarray_accessor(NAME)(Accessor)  # type: ignore[no-untyped-call] # xarray's own


def arrange() -> None:
    """Register the accessor now if xarray is imported, else as soon as it is."""
    if "xarray" in sys.modules:
        register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport("xarray", register))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function once, after a module was imported for the first time; finds nothing itself."""

    def __init__(self, name: str, function: Callable[[], None]) -> None:
        self.name = name
        self.function = function

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target  # the module is not a part of another, and not loaded anew
        if fullname != self.name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader, function = spec.loader, self.function
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            function()

        loader.exec_module = exec_module  # type: ignore[method-assign] # this module's own loader, used once
        return spec
