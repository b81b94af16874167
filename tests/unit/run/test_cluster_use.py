"""A plan for several workers says how they will be used, and what would help where they have nothing to do."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import oocpatch
from tests.support.children import file_digests

SETTINGS: dict[str, Any] = {"patch_size": 16, "patch_overlap": 8, "output_chunks": 16}
VOLUME = np.zeros((64, 64, 64), np.uint8)


def test_a_plan_prints_the_expected_use_of_processes() -> None:
    planned = oocpatch.plan(VOLUME, "identity", "none.zarr", work="heavy", workers=4, processes=True, **SETTINGS)
    assert "warning" not in str(planned)
    use = json.loads(planned.to_json())["occupancy"]
    assert use["workers"] == 4
    assert use["blocks_per_worker"] == planned.blocks / 4
    assert 0 <= use["idle_share"] < 0.5
    assert use["bytes_per_worker"] == round((planned.bytes_read + planned.bytes_written) / 4)
    assert f"workers  4, {planned.blocks / 4:.1f} blocks and" in str(planned)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, '1 block(s) for 16 workers, so 15 have nothing to do; the model counts as light: work="heavy"'),
        ({"block_shape": 64}, "1 block(s) for 16 workers, so 15 have nothing to do; a smaller block_shape"),
        ({"work": "heavy", "output_chunks": 64}, "so 15 have nothing to do; smaller output_chunks or patches"),
    ],
    ids=["light", "block_shape", "chunks"],
)
def test_fewer_blocks_than_workers_are_a_warning_with_advice(options: dict[str, Any], words: str) -> None:
    arguments = {**SETTINGS, **options}
    assert words in str(oocpatch.plan(VOLUME, "identity", "none.zarr", workers=16, processes=True, **arguments))
    parts = oocpatch.plan(VOLUME, "identity", "none.zarr", part=(1, 16), **arguments)
    assert words.replace("workers", "parts") in str(parts)
    assert words.replace("workers", "parts") in json.loads(parts.to_json())["warning"]


def test_one_device_is_used_where_new_processes_could_not_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("oocpatch.run.cluster_use.device_count", lambda _: 4)
    (tmp_path / "script.py").write_text("import oocpatch\noocpatch.predict('a.zarr', 'identity', 'b.zarr')\n")
    lock = threading.Lock()

    def held(patches: torch.Tensor) -> torch.Tensor:
        with lock:
            return patches

    def processes(model: Any, **options: Any) -> int | None:
        return oocpatch.plan(VOLUME, model, tmp_path / "out", **SETTINGS, **options).config.execution.workers

    assert processes("identity") == 4
    assert processes("identity", part=(1, 2)) is None
    assert not caplog.messages
    assert processes(held) is None
    assert "one of 4 devices is used: model must be a model spec" in caplog.messages[0]
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "script.py"), raising=False)
    assert processes("identity") is None
    assert "one of 4 devices is used: new processes would run the script again" in caplog.messages[1]


def test_threads_have_no_such_line_and_processes_need_their_number() -> None:
    planned = oocpatch.plan(VOLUME, "identity", "none.zarr", workers=2, **SETTINGS)
    assert planned.occupancy is None
    assert "workers" not in str(planned)
    with pytest.raises(ValueError, match="processes=True needs their number"):
        oocpatch.plan(VOLUME, "identity", "none.zarr", processes=True, **SETTINGS)
    with pytest.raises(ValueError, match="part must be None with processes"):
        oocpatch.plan(VOLUME, "identity", "none.zarr", processes=True, workers=2, part=(1, 2), **SETTINGS)


def test_processes_on_several_devices_are_the_default_and_write_the_bytes_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU stands in for two devices: nothing but their number is asked for."""
    monkeypatch.setattr("oocpatch.run.cluster_use.device_count", lambda _: 2)
    volume = np.random.default_rng(5).integers(0, 200, VOLUME.shape, np.uint8)
    for name, settings in {"threads": {"workers": 2}, "processes": {}}.items():
        output = tmp_path / f"{name}.zarr"
        planned = oocpatch.plan(volume, "identity", output, work="heavy", **settings, **SETTINGS)
        assert (planned.config.execution.processes, planned.config.execution.workers) == (name == "processes", 2)
        planned.run()
    chunks = [
        {name: digest for name, digest in file_digests(tmp_path / kind).items() if "/c/" in name}
        for kind in ("threads.zarr", "processes.zarr")
    ]
    assert len(chunks[0]) == 64
    assert chunks[0] == chunks[1]
