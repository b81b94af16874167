"""`array.oocpatch`: the functions of this package as methods of xarray's arrays.

`import oocpatch.xarray` registers the accessor. `import oocpatch` does so where xarray is imported already; it does not
import xarray itself, which takes half a second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import xarray

if TYPE_CHECKING:
    import os

    from oocpatch.outputs.output import Result
    from oocpatch.run.predict import PlannedRun


@xarray.register_dataarray_accessor("oocpatch")  # type: ignore[no-untyped-call] # xarray gives it no type
class Accessor:
    """The functions of this package with the array as their volume."""

    def __init__(self, array: xarray.DataArray) -> None:
        self._array = array

    def __repr__(self) -> str:
        return "oocpatch on this array: .predict(model, output, ...), .plan(model, output, ...) and .lazy(model, ...)"

    def predict(self, model: Any, output: str | os.PathLike[str], **arguments: Any) -> Result:
        """Run a model over the array and write the result to `output`: see `oocpatch.predict`.

        >>> import tempfile, numpy as np, torch, xarray, oocpatch.xarray
        >>> array = xarray.DataArray(np.ones((40, 50), np.float32), dims=("y", "x"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     array.oocpatch.predict(torch.nn.Identity(), f"{folder}/out", patch_size={"y": 16, "x": 32}).sizes
        Frozen({'y': 40, 'x': 50})
        """
        from oocpatch.run.predict import predict  # noqa: PLC0415 - torch is heavy

        return predict(self._array, model, output, **arguments)

    def plan(self, model: Any, output: str | os.PathLike[str], **arguments: Any) -> PlannedRun:
        """Plan `predict` with the same arguments, and stop there: see `oocpatch.plan`."""
        from oocpatch.run.predict import plan  # noqa: PLC0415 - torch is heavy

        return plan(self._array, model, output, **arguments)

    def lazy(self, model: Any, **arguments: Any) -> Result:
        """Return what `predict` would write as a lazy array, and write nothing: see `oocpatch.lazy`."""
        from oocpatch.run.lazy import lazy  # noqa: PLC0415 - torch is heavy

        return lazy(self._array, model, **arguments)
