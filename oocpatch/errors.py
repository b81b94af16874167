"""The errors a caller may act on. Each also derives from the builtin it is closest to."""

from __future__ import annotations

from collections.abc import Mapping


class OocpatchError(Exception):
    """Root of all errors raised on purpose by oocpatch (besides `ValueError`/`TypeError` for bad arguments)."""


class PlanTooLarge(OocpatchError, ValueError):
    """The projected memory or disk exceeds what is allowed; nothing was read or written."""


class InvalidVolume(OocpatchError, ValueError):
    """The volume holds values that the call does not take; the run stops at the first of them."""


class TooManyObjects(InvalidVolume):
    """The ids do not fit the dtype of the output.

    Attributes:
        count: number of objects.
        dtype: the dtype.
    """

    def __init__(self, count: int, dtype: str) -> None:
        super().__init__(
            f"output_dtype must hold the number of objects, {count:,}, got {dtype}; pass a larger one, or none, with "
            "overwrite=True"
        )
        self.count, self.dtype = count, dtype

    def __reduce__(self) -> tuple[type[TooManyObjects], tuple[int, str]]:
        return type(self), (self.count, self.dtype)


class RunMismatch(OocpatchError, ValueError):
    """The output belongs to a run with other parameters; the message names each one that differs.

    Attributes:
        fields: names of the parameters that differ.
    """

    def __init__(self, message: str, fields: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.fields = fields


class OutputExists(OocpatchError, FileExistsError, ValueError):
    """The output holds data that oocpatch did not write, or may not replace."""


class OutputBusy(OocpatchError, RuntimeError):
    """Another process is running the same output."""


class BlockFailed(OocpatchError, RuntimeError):
    """Some blocks failed. What succeeded is kept; the same call again retries only the failed ones.

    Attributes:
        failures: message of each block that failed, by its number.
    """

    def __init__(self, message: str, failures: Mapping[int, str] | None = None) -> None:
        super().__init__(message)
        self.failures = dict(failures or {})


class ClusterLost(OocpatchError, ConnectionError):
    """The scheduler or the workers are gone, or cannot do the work; the same call continues."""


class DeviceLost(OocpatchError, RuntimeError):
    """An accelerator does not work any more in this process; the same call in a new one continues."""


class CorruptData(OocpatchError, RuntimeError):
    """Stored data is not what was written, and recomputing cannot repair it."""


class CorruptPartial(CorruptData):
    """A partial in the workspace is missing or damaged; its block is computed anew.

    Attributes:
        block: index of the block whose partial is damaged, or another key of what tasks read: -1: the ids that were
            merged of all blocks; below: the table of a block, see `workspace.ledger.table_key`.
    """

    def __init__(self, block: int, detail: str) -> None:
        what = f"partial of block {block} is" if block >= 0 else f"table of block {-2 - block} is"
        what = what if block != -1 else "the ids of objects in the workspace are"
        super().__init__(f"{what} damaged: {detail}")
        self.block = block
        self.detail = detail

    def __reduce__(self) -> tuple[type[CorruptPartial], tuple[int, str]]:
        return type(self), (self.block, self.detail)


LONGEST = 300
"""Characters of another library's message; a state dict that does not fit fills a screen."""


def error_line(error: BaseException) -> str:
    r"""The error's kind and message on one line, without torch's stack of C++ frames.

    >>> error_line(RuntimeError("no\n  such thing"))
    'RuntimeError: no such thing'
    """
    text = " ".join(str(error).split("\nException raised from")[0].split())
    return f"{type(error).__name__}: {text if len(text) <= LONGEST else text[:LONGEST] + '...'}"
