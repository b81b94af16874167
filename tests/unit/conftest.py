"""Fixtures of the tests that a wrong argument is refused before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.children import unchanged
from tests.support.small_volume import make_small_volume


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A small volume on disk."""
    return make_small_volume(tmp_path / "volume.zarr")


@pytest.fixture
def output(tmp_path: Path, volume: Path) -> Iterator[Path]:
    """A path for the output. Nothing may be written to it, beside the volume, or to the volume."""
    with unchanged(tmp_path):
        yield tmp_path / "out.zarr"
    assert sorted(path.name for path in tmp_path.iterdir()) == [volume.name]
