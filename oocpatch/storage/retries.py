"""Retries: which faults of storage may pass, and how often what met one is tried again."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import tenacity

from oocpatch.errors import ClusterLost, DeviceLost, InvalidVolume

ATTEMPTS = 4
"""How often a task is tried when reading or writing fails in a way that may pass."""


HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}
"""Faults of the storage that no retry mends, and that stop the run, since every other block would meet them."""


def transient(error: BaseException) -> bool:
    """Return whether trying again may help."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return isinstance(error, OSError) and error.errno is not None and error.errno not in HOPELESS | {errno.ENOENT}


def hopeless(error: BaseException) -> bool:
    """Return whether every block would fail like this one, or the user has to change the input."""
    is_general = isinstance(error, ClusterLost | DeviceLost | InvalidVolume)
    return is_general or (isinstance(error, OSError) and error.errno in HOPELESS)


def with_retries(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, tried again with exponential back-off while its faults are transient."""
    return tenacity.retry(
        retry=tenacity.retry_if_exception(transient),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=5.0),
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        reraise=True,
    )(function)
