"""Words that messages about model files share."""

from __future__ import annotations

import pathlib

LONGEST = 300
"""Characters of another library's message; a state dict that does not fit fills a screen."""


def existing(path: str, spec: str) -> pathlib.Path:
    """The file that a spec names.

    Raises:
        ValueError: when it is not there.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise ValueError(f"the file of model spec {spec!r} does not exist: {str(file.absolute())!r}; check the path")
    return file


def say(error: BaseException) -> str:
    r"""The error's kind and message on one line, without torch's stack of C++ frames.

    >>> say(RuntimeError("no\n  such thing"))
    'RuntimeError: no such thing'
    """
    text = " ".join(str(error).split("\nException raised from")[0].split())
    return f"{type(error).__name__}: {text if len(text) <= LONGEST else text[:LONGEST] + '...'}"
