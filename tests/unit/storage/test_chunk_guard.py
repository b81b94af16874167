"""Promises on codecs of imagecodecs: what a chunk decodes to, or that it is too much, is known before it is decoded."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from oocpatch.storage.decoded import nothing, told_by

codecs: Any = pytest.importorskip("imagecodecs.numcodecs", reason="writes the chunks; it is in the extra `tiff`")

HONEST, LIMIT = 1 << 16, 1 << 20
CODECS = ["Zstd", "Blosc", "Blosc2", "Lzf", "Zlib", "Zlibng", "Deflate", "Bz2", "Lzma"]


@pytest.mark.parametrize("name", CODECS)
def test_the_size_of_an_honest_chunk_is_told_and_a_swollen_one_is_too_much(name: str) -> None:
    codec = getattr(codecs, name)()
    told = told_by([codec])
    values = np.random.default_rng(0).integers(0, 4, HONEST, np.uint8)
    assert told(io.BytesIO(codec.encode(values)), LIMIT) == HONEST
    assert told(io.BytesIO(codec.encode(np.zeros(16 * LIMIT, np.uint8))), LIMIT) > LIMIT


def test_lz4_is_told_by_its_header_if_it_has_one() -> None:
    values = np.zeros(HONEST, np.uint8)
    with_header = codecs.Lz4(header=True)
    assert told_by([with_header])(io.BytesIO(with_header.encode(values)), LIMIT) == HONEST
    assert told_by([codecs.Lz4()]) is nothing


def test_filters_of_imagecodecs_do_not_count_and_two_compressors_are_refused() -> None:
    assert told_by([codecs.Delta()]) is nothing
    with pytest.raises(ValueError, match="compressed at most once, got zstd, zlib"):
        told_by([codecs.Zstd(), codecs.Zlib()])
