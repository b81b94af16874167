"""A published text detector in ONNX format on a page as large as a scan: it finds the lines, and nothing else.

The network is the detector of PP-OCRv4 (Apache-2.0), in the wheel of `rapidocr-onnxruntime` 1.4.4. It takes images with
sides that are multiples of 32 and values in [-1, 1], and gives the probability that a pixel belongs to text.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import oocpatch
from tests.support import oracle

pytestmark = pytest.mark.real_data

PACKAGE = "rapidocr-onnxruntime==1.4.4"
MEMBER = "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx"
SHA256 = "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9"
SHAPE, PATCH, OVERLAP = (1400, 1000), 320, 96
LINE, FIRST, MARGIN = 70, 100, 120
"""Rows from one line of text to the next, the first line's, and columns on the left without text."""
SCALE = {"name": "scale", "subtract": 127.5, "divide": 127.5}
TEXT = 0.3
"""The probability from which its authors take a pixel for text."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Page:
    """A page, where its lines are, and the network."""

    image: Array
    ink: list[tuple[slice, slice]]
    volume: Path
    network: Path


def fetch() -> Path:
    """The network, downloaded unless it is in `$OOCPATCH_CACHE` or a folder below the temporary one."""
    cache = Path(os.environ.get("OOCPATCH_CACHE") or Path(tempfile.gettempdir()) / "oocpatch-real-data")
    cache.mkdir(parents=True, exist_ok=True)
    network = cache / "text_detector.onnx"
    if not network.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", PACKAGE]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"the network cannot be had: {done.stderr.strip()[-500:]}")
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                (Path(folder) / network.name).write_bytes(wheel.read(MEMBER))
            (Path(folder) / network.name).replace(network)  # moved when it is whole
    found = hashlib.sha256(network.read_bytes()).hexdigest()
    assert found == SHA256, f"{network} must have SHA-256 {SHA256}, got {found}; delete it to fetch it again"
    return network


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    pytest.importorskip("onnxruntime", reason="runs the network; it is in the extra `onnx`")
    drawing = pytest.importorskip("PIL.ImageDraw", reason="draws the page; it is in the extra `demo`")
    images, fonts = (
        pytest.importorskip(f"PIL.{name}", reason="draws the page; see above") for name in ("Image", "ImageFont")
    )
    image = images.new("RGB", SHAPE[::-1], "white")
    draw, font = drawing.Draw(image), fonts.load_default(size=32)
    words: list[str] = re.findall(r"\w+", "out of core patch volume seam block window halo plan ledger")
    ink: list[tuple[slice, slice]] = []
    for number, top in enumerate(range(FIRST, SHAPE[0] - LINE, LINE)):
        text = " ".join(words[number % 10 :] + words[: number % 10])[:40].strip()
        draw.text((MARGIN, top), text, fill=(30, 30, 60), font=font)
        left, up, right, down = draw.textbbox((MARGIN, top), text, font=font)
        ink.append((slice(int(up), int(down)), slice(int(left), int(right))))
    values = np.asarray(image)
    volume = tmp_path_factory.mktemp("page") / "page.zarr"
    zarr.create_array(volume, data=values, chunks=(256, 256, 3), dimension_names=("y", "x", "c"))
    return Page(values, ink, volume, fetch())


@pytest.fixture(scope="module")
def found(page: Page) -> Array:
    result = oocpatch.predict(
        page.volume,
        str(page.network),
        page.volume.with_name("found.zarr"),
        patch_size=PATCH,
        patch_overlap=OVERLAP,
        preprocess=SCALE,
        batch_size=2,
        max_memory="1GiB",
    )
    assert result.dims == ("c", "y", "x")
    return result.values[0]


def by_hand(page: Page) -> Any:
    """The network as a function of one patch, by onnxruntime alone."""
    runtime = pytest.importorskip("onnxruntime", reason="runs the network; it is in the extra `onnx`")
    session = runtime.InferenceSession(str(page.network), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda patch: session.run(None, {name: ((patch[None] - 127.5) / 127.5).astype(np.float32)})[0][0]


def test_patches_from_disk_give_what_onnxruntime_gives_in_memory(page: Page, found: Array) -> None:
    channels = page.image.transpose(2, 0, 1)
    expected = oracle.predict(channels, by_hand(page), patch=(PATCH,) * 2, overlap=(OVERLAP,) * 2, mode="hann")
    np.testing.assert_allclose(found, expected[0], atol=1e-4)


def test_the_detector_finds_each_line_and_nothing_on_the_margin(page: Page, found: Array) -> None:
    text = found > TEXT
    assert len(page.ink) == 18
    for rows, columns in page.ink:
        # It marks the core of a line, less high than the letters: hardly a column of the line is without.
        assert text[rows, columns].any(axis=0).mean() > 0.85
    between = np.ones(SHAPE, bool)
    for rows, columns in page.ink:
        between[rows.start - 12 : rows.stop + 12, columns.start - 24 : columns.stop + 24] = False
    assert text[between].mean() < 0.001


def test_patches_agree_with_the_whole_page_at_once(page: Page, found: Array) -> None:
    padded = np.pad(page.image.transpose(2, 0, 1), [(0, 0), *((0, -n % 32) for n in SHAPE)], mode="edge")
    whole = by_hand(page)(padded)[0][: SHAPE[0], : SHAPE[1]] > TEXT
    text = found > TEXT
    assert (
        2 * np.count_nonzero(whole & text) / (np.count_nonzero(whole) + np.count_nonzero(text)) > 0.85
    )  # a patch does not see the page around it
