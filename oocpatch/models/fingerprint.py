"""Fingerprints of models: digests that are equal in every process that loads the same model.

Outputs of two models must never be mixed in one result, so a fingerprint reads everything that a model computes with:
code, parameters, constants, configuration, files. It must not change by itself either, or no run could be resumed, so
it reads no memory address, no path of a source file, and nothing that the model writes while it computes (a counter, a
log). What a call writes is found first, by following the code from the model's call from object to object.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
from collections.abc import Iterable
from typing import NamedTuple

from oocpatch.models.reach import Survey
from oocpatch.models.value_parts import LARGE, UNREAD, VALUES, Reading, file_digest, is_own, parts_of


class Fingerprint(NamedTuple):
    """The fingerprint of a model."""

    digest: str  # the same for two models that compute the same
    unread: tuple[str, ...]  # places of values that cannot be read, such as `model.config.handle`
    has_state: bool = False  # whether calls write attributes or variables, which are not read


def model_fingerprint(model: object, *, sources: bool = True) -> str:
    """Return the digest of a model's fingerprint; see `read_fingerprint`.

    >>> from torch import nn
    >>> model_fingerprint(nn.Softplus(1.0)) == model_fingerprint(nn.Softplus(2.0))
    False
    """
    return read_fingerprint(model, sources=sources).digest


def read_fingerprint(model: object, *, sources: bool = True) -> Fingerprint:
    """Read everything that a model computes with.

    Modules are read with their submodules, parameters, buffers, hooks and attributes; functions with their code,
    defaults, closures and the globals that they use; files by their content; other objects as `pickle` takes them
    apart. Attributes and variables that the code writes during a call are state, and not read.

    Args:
        model: a module, a function, or a part of one.
        sources: whether code is read from its source where that is at hand, so that versions of Python agree; else
            from its bytecode, so that processes agree of which not all have the source. State and files are then those
            of the moment.

    >>> read_fingerprint([1, {"letters": (letter for letter in "ab")}]).unread
    ("model[1]['letters']",)
    """
    survey = Survey(model, sources=sources)
    walk = _Walk(survey.state if sources else (), survey.names, sources=sources)
    walk.read("model", model)
    walk.read_files()
    return Fingerprint(walk.hash.hexdigest(), tuple(walk.unread), bool(survey.state))


class _Walk(Reading):
    """A walk over a value and all that it is made of, which hashes the token of each part."""

    def __init__(self, state: Iterable[tuple[int, str]], names: frozenset[str], *, sources: bool) -> None:
        self.unread: list[str] = []
        self.hash = hashlib.sha256()
        self.sources = sources
        self.names = names
        self._state = frozenset(state)
        self._texts, self._source_folders = set[str](), set[str]()
        # The objects are kept alive: a freed one's id would be given to another.
        self._seen: dict[int, tuple[str, object]] = {}

    def digest(self, value: object) -> str:
        return model_fingerprint(value, sources=self.sources)

    def is_state(self, owner: object, name: str) -> bool:
        return (id(owner), name) in self._state

    def note_texts(self, *texts: str) -> None:
        self._texts |= {text for text in texts if _MAY_BE_PATH.fullmatch(text)}

    def note_source(self, file: str, *, is_named: bool) -> None:
        folder = pathlib.Path(file).absolute().parent
        self._source_folders.add(os.fspath(folder))
        self._texts |= {os.fspath(folder), os.fspath(folder.parent)} if is_named else set()

    def relative(self, path: str) -> str:
        for folder in self._source_folders if os.path.isabs(path) and os.path.isdir(path) else ():  # noqa: PTH112, PTH117
            inner = os.path.relpath(path, folder)
            if not inner.startswith(os.path.join("..", "..")):  # noqa: PTH118
                return inner
        return path

    def read(self, path: str, value: object) -> None:
        if id(value) in self._seen:
            self._hash_token("again", self._seen[id(value)][0])
            return
        self._seen[id(value)] = path, value
        token, parts = parts_of(value, self)
        kind = type(value)
        if isinstance(value, VALUES) and kind.__module__ != "builtins" and is_own(kind.__module__):
            attributes = getattr(value, "__dict__", value)
            more = () if attributes is value else sorted(attributes.items())
            parts = [("class", kind), *parts, *more]  # its methods compute, too
        if token == UNREAD:
            self.unread.append(path)
        self._hash_token(kind.__name__, f"{len(parts)} {token}")
        for name, part in parts:
            self._hash_token("part", name)
            self.read(f"{path}{name}" if name.startswith("[") else f"{path}.{name}", part)
        if isinstance(value, VALUES):  # compared by content: a copy in its place is the same
            del self._seen[id(value)]

    def read_files(self) -> None:
        """Hash the files that the texts of a model name, in the folders that they name."""
        folders = {"", *(text for text in self._texts if os.path.isabs(text) and os.path.isdir(text))}  # noqa: PTH112, PTH117
        for _ in range(2):  # folders in folders
            inner = {os.path.join(folder, text.strip("/")) for folder in folders for text in self._texts}  # noqa: PTH118
            folders |= {folder for folder in inner if os.path.isdir(folder)}  # noqa: PTH112
        digests = set[tuple[str, str]]()
        for text in (text for text in self._texts if "." in text or "/" in text):
            files = (os.path.join(folder, text.lstrip("/") if folder else text) for folder in folders)  # noqa: PTH118
            digests |= {(text.rpartition("/")[2], file_digest(file)) for file in files}
        for name, digest in sorted(digests):
            if digest:
                self._hash_token("file", f"{name} {digest}")
            self.unread += [name] if digest.startswith(LARGE) else []

    def _hash_token(self, kind: str, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        self.hash.update(f"{kind}:{len(data)}:".encode() + data)


_MAY_BE_PATH = re.compile(r"[^\0\n]{2,1024}")
