"""Code chunks by zarrs, where it is installed: whole boxes at a time, by threads that need no interpreter.

zarr-python codes chunk by chunk, and each chunk passes through several threads that take turns with the interpreter;
beside a model's own Python that costs more than the codec. zarr-python does the rest: other stores and codecs.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import math
import os
import re
import secrets
import shutil
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.buffer.cpu import NDBuffer
from zarr.storage import LocalStore

from oocpatch.planning.box import Box, selected, unit_positions, worthwhile
from oocpatch.storage.checksums import ABSENT, bytes_checksum, measured
from oocpatch.storage.chunk_reader import PlainArray
from oocpatch.storage.files import start_writing, write_file
from oocpatch.storage.forks import threads_lost
from oocpatch.storage.paths import LocalPath

Selection = tuple[slice, ...]

PORTION = 1 << 20
"""Bytes of chunks that are read at a time, at least, where chunks are small."""


class ZarrsArray:
    """A Zarr array in a local directory, coded by zarrs.

    One box at a time: its threads share out the chunks of a box, so that no more are on their way than it has threads.
    `open` makes it. Its threads do not survive a fork: a forked process opens none, and reads without one.
    """

    def __init__(self, array: zarr.Array[Any], threads: int) -> None:
        self._array = array
        self._threads = threads
        self._turn = threading.Lock()

    @classmethod
    def open(cls, array: zarr.Array[Any], threads: int) -> ZarrsArray | None:
        """Open an array to be coded by so many threads; None where zarrs is not installed, forked, or cannot do it.

        >>> ZarrsArray.open(zarr.ones((4,), store={}), 2) is None  # not in a local directory
        True
        """
        local = isinstance(array.store, LocalStore) and np.dtype(array.dtype).isnative
        if not local or threads_lost("zarrs") or importlib.util.find_spec("zarrs") is None:
            return None
        settings = {
            "codec_pipeline.path": "zarrs.ZarrsCodecPipeline",
            "codec_pipeline.strict": True,
            "threading.max_workers": threads,
        }
        with zarr.config.set(settings), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of what it cannot do, and then raises
            try:
                mode: Any = "r" if array.read_only else "r+"
                return cls(zarr.open_array(array.store, path=array.path, mode=mode), threads)
            except Exception:  # noqa: BLE001 - whatever it says, zarr-python will code the array, or say what is wrong
                return None

    def read_into(self, out: npt.NDArray[Any], selection: Selection) -> None:
        """Read a selection into a C-contiguous array of the array's dtype."""
        if threads_lost("zarrs"):  # opened before the fork, with a lock that may be held there
            out[...] = zarr.open_array(self._array.store, path=self._array.path, mode="r")[selection]
            return
        box = selected(selection, self._array.shape)
        with self._turn, os_errors():
            portions = list(self._portions(box))
            if len(portions) == 1:
                self._array.get_basic_selection(selection, out=NDBuffer.from_numpy_array(out))
                return
            for portion in portions:
                out[portion.slices(box.start)] = self._array[portion.slices()]

    def _portions(self, box: Box) -> Iterator[Box]:
        """Yield a box as it is where it holds whole chunks; else cut at their borders, a few chunks at a time.

        Whole chunks are decoded in place. Of the others zarrs decodes all that a call touches before it lets go of one.
        """
        chunks, whole = self._array.chunks, Box.of_shape(self._array.shape)
        low = tuple(a // n * n for a, n in zip(box.start, chunks, strict=True))
        around = Box(low, tuple(-(-b // n) * n for b, n in zip(box.stop, chunks, strict=True))) & whole
        if box == around:
            yield box
            return
        voxels = max(self._threads * math.prod(chunks), PORTION // self._array.dtype.itemsize)
        for portion in around.split(worthwhile(chunks, around.shape, voxels)):
            yield portion & box

    def write(self, selection: Selection, values: npt.NDArray[Any]) -> None:
        """Write a selection."""
        with self._turn, os_errors():
            self._array[selection] = values


class StagedArray:
    """An array of which whole write units are replaced, each in one step.

    A crash must not leave half of a file under its name: units are written to a directory beside those of the array,
    and renamed.

    Args:
        array: the array, in a local directory.
        staging: directory where units are coded.
        coders: the array in that directory, once for each box that zarrs may code at a time.
        plain: the array, where its plain chunks are coded without zarrs.
    """

    def __init__(
        self, array: zarr.Array[Any], staging: LocalPath, coders: Sequence[ZarrsArray], plain: PlainArray | None
    ) -> None:
        self._array = array
        self._plain = plain
        self._folder = staging.parent
        self._staging = staging
        self._coders: SimpleQueue[ZarrsArray] = SimpleQueue()
        for coder in coders:
            self._coders.put(coder)
        self._folders: set[Path] = set()

    @classmethod
    def open(cls, array: zarr.Array[Any], threads: int) -> StagedArray | None:
        """Open an array that so many threads of zarrs code, or the calling thread its plain chunks; None for others."""
        if not isinstance(array.store, LocalStore):
            return None
        folder = LocalPath(array.store.root, array.path)
        staging = folder / f"{os.getpid()}-{secrets.token_hex(4)}.partial"
        staging.mkdir()
        marker = MARKERS[array.metadata.zarr_format]
        shutil.copyfile(folder / marker, staging / marker)
        # Several threads in one shard put its chunks in the order in which they happen to be done: 207 different files
        # in 400 writes of the same values. So a shard is coded by one thread, and several shards at a time.
        boxes, each = (1, threads) if array.shards is None else (threads, 1)
        staged = zarr.open_array(LocalStore(staging), mode="r+")
        coders = [coder for _ in range(boxes) if (coder := ZarrsArray.open(staged, each)) is not None]
        plain = None if coders else PlainArray.of(array)
        if not coders and (plain is None or not plain.writes):
            shutil.rmtree(staging)
            return None
        return cls(array, staging, coders, plain)

    @property
    def by_unit(self) -> bool:
        """True where write units should be written a few at a time, by several callers."""
        return self._plain is not None or self._array.shards is not None

    def write(self, selection: Selection, values: npt.NDArray[Any]) -> list[int]:
        """Write a selection of whole write units; return the CRC of each file in C order, `ABSENT` for none."""
        if self._plain is not None:
            return [self._put(key, data) for key, data in self._plain.encoded(selection, values)]
        coder = self._coders.get()
        try:
            coder.write(selection, values)
        finally:
            self._coders.put(coder)
        self._refuse_after_end()
        positions = unit_positions(self._array.shards or self._array.chunks, selection)
        return [self._take(self._array.metadata.encode_chunk_key(position)) for position in positions]

    def _put(self, key: str, data: bytes | None) -> int:
        if data is None:
            return self._absent(key)
        source = self._staging / str(threading.get_ident())
        try:
            write_file(source, data)
            start_writing(source, len(data))
            self._rename(source, key)
        except FileNotFoundError:
            self._refuse_after_end()
            raise
        return bytes_checksum(data) or 1

    def _take(self, key: str) -> int:
        """Take over the file of a unit that zarrs coded, if it is not nothing but the fill value."""
        try:
            size, crc = measured(self._staging / key)
            start_writing(self._staging / key, size)
            self._rename(self._staging / key, key)
        except FileNotFoundError:
            if (self._staging / key).exists():
                raise
            return self._absent(key)
        return crc or 1

    def _rename(self, source: LocalPath, key: str) -> None:
        target = self._folder / key
        if target.parent not in self._folders:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._folders.add(target.parent)
        source.replace(target)

    def _absent(self, key: str) -> int:
        """Delete the file of a unit that has nothing but the fill value."""
        self._refuse_after_end()
        (self._folder / key).unlink(missing_ok=True)
        return ABSENT

    def _refuse_after_end(self) -> None:
        """Refuse to touch the array once the run is over: its directory was swept, so units are missing in there."""
        if not (self._staging / MARKERS[self._array.metadata.zarr_format]).exists():
            raise FileNotFoundError(errno.ENOENT, "the run that this belonged to is over", str(self._staging))

    def close(self) -> None:
        """Delete the directory where units were coded."""
        sweep_staging(self._staging)


MARKERS = {2: ".zarray", 3: "zarr.json"}
"""The array's metadata by the version of Zarr: a sign that a directory where units are coded is in use."""


def sweep_staging(path: Path) -> None:
    """Delete a directory where units were coded, the sign that it is in use first."""
    for marker in MARKERS.values():
        (path / marker).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def os_errors() -> Iterator[None]:
    """Raise faults of the operating system, which zarrs tells in words only, as `OSError`."""
    try:
        yield
    except RuntimeError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), str(error)) from error
        raise
