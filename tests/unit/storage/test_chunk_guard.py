"""Promises on codecs of imagecodecs: the size that a chunk decodes to, or that it is too much, is known beforehand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from oocpatch.storage.chunk_guard import decoded_size_of

codecs: Any = pytest.importorskip("imagecodecs.numcodecs", reason="writes the chunks; it is in the extra `tiff`")

HONEST, LIMIT = 1 << 16, 1 << 20
CODECS = ["Zstd", "Blosc", "Blosc2", "Lzf", "Zlib", "Zlibng", "Deflate", "Bz2", "Lzma"]


def size_of(codec: Any, values: np.ndarray[Any, Any]) -> int:
    """The size that a chunk of these values is said to decode to."""
    decoded_size, chunk = decoded_size_of([codec]), codec.encode(values)
    assert decoded_size is not None
    return decoded_size(lambda start, count: bytes(chunk[start : start + count]), LIMIT)


@pytest.mark.parametrize("name", CODECS)
def test_the_size_of_an_honest_chunk_is_known_and_that_of_a_swollen_one_is_too_much(name: str) -> None:
    codec = getattr(codecs, name)()
    assert size_of(codec, np.random.default_rng(0).integers(0, 4, HONEST, np.uint8)) == HONEST
    assert size_of(codec, np.zeros(16 * LIMIT, np.uint8)) > LIMIT


def test_the_size_of_lz4_is_that_of_its_header_if_it_has_one() -> None:
    assert size_of(codecs.Lz4(header=True), np.zeros(HONEST, np.uint8)) == HONEST
    assert decoded_size_of([codecs.Lz4()]) is None


def test_filters_of_imagecodecs_do_not_count_and_two_compressors_are_refused() -> None:
    assert decoded_size_of([codecs.Delta()]) is None
    with pytest.raises(ValueError, match="compressed at most once, got zstd, zlib"):
        decoded_size_of([codecs.Zstd(), codecs.Zlib()])
