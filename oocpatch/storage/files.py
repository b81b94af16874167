"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    aside = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    with aside.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
