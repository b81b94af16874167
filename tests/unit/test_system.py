"""What Linux or POSIX alone have is asked for in one module, and the package works without it."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dask.system
import numpy as np
import pytest
import torch
import zarr

import oocpatch
from oocpatch import system
from oocpatch.execution.payload import absolute_spec
from oocpatch.models import predictor
from oocpatch.models.loading import load_model
from oocpatch.models.packages.package import PackageSpec
from oocpatch.sampling.weighted import LabelSampler
from oocpatch.storage.paths import LocalPath, file_url_path, local_or_url
from oocpatch.volumes.formats.spec import parse_address
from tests.without_linux import MODULES, NAMES, rules_of_windows, without_linux

PACKAGE = Path(oocpatch.__file__).parent
DATA = np.random.default_rng(0).integers(0, 5, (24, 20, 28)).astype(np.float32)


@pytest.fixture
def elsewhere() -> Iterator[None]:
    with without_linux(), rules_of_windows():
        yield


def test_no_other_module_asks_for_what_linux_or_posix_alone_have() -> None:
    names = [rf"\b{module.__name__}\.{name}\b" for module, members in NAMES.items() for name in members]
    forbidden = re.compile(
        "|".join([*names, *(rf"import {name}\b" for name in MODULES), r"CDLL\(", r"os\.link\b", r"os\.O_CLOEXEC"])
    )
    found = [
        f"{path.relative_to(PACKAGE)}: {hit.group()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "system.py"
        for hit in forbidden.finditer(path.read_text())
    ]
    assert found == []


@pytest.mark.skipif(sys.platform != "linux", reason="containers have quotas on Linux")
def test_cores_and_threads_of_torch_are_no_more_than_a_container_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask.system, "_try_extract_cgroup_cpu_quota", lambda: (50_000, 100_000))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert system.usable_cores() == 1
    assert predictor.torch_threads() == 1


@pytest.mark.usefixtures("elsewhere")
def test_each_call_has_something_in_its_place(tmp_path: Path) -> None:
    assert not hasattr(os, "sched_getaffinity")
    assert system.usable_cores() == os.cpu_count()
    assert system.peak_memory() > 1 << 20
    assert system.c_function("mallopt") is None
    assert bytes(system.mapped_memory(1 << 16, huge=True)) == bytes(1 << 16)
    with system.folder_lock(tmp_path):
        system.after_fork(lambda: None)
    LocalPath(tmp_path).flush()


@pytest.mark.usefixtures("elsewhere")
def test_threads_read_and_write_at_places_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4096))
    file = os.open(tmp_path / "file", os.O_RDWR)

    def use(number: int) -> bool:
        written = bytes([number]) * 64
        assert system.write_at(file, memoryview(written), 64 * number) == 64
        out = bytearray(64)
        return system.read_at(file, memoryview(out), 64 * number) == 64 and out == written

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(64)))
    assert system.read_at(file, memoryview(bytearray(8)), 4096) == 0
    os.close(file)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_one_of_several_files_gets_a_name(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    if not links:  # as file systems such as FAT
        monkeypatch.setattr(os, "link", refuse)
    target, barrier = LocalPath(tmp_path / "lock"), threading.Barrier(8)

    def put(number: int) -> bool:
        barrier.wait()
        return target.put_if_absent(b"%d" % number)

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(put, range(8)))
    assert done.count(True) == 1
    assert target.read_bytes() == b"%d" % done.index(True)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("shards", [None, (16, 16, 16)], ids=["chunks", "shards"])
def test_a_run_reads_writes_and_resumes(shards: tuple[int, ...] | None, tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "in.zarr", data=DATA, chunks=(8, 8, 8), shards=shards)
    settings = {"patch_size": 8, "patch_overlap": 4, "block_shape": 8, "output_chunks": 8, "progress": False}
    plan = oocpatch.plan(tmp_path / "in.zarr", "identity", tmp_path / "out.zarr", **settings)
    assert plan.run(blocks=[0]).attrs["complete"] is False
    result = oocpatch.predict(tmp_path / "in.zarr", "identity", tmp_path / "out.zarr", **settings)
    np.testing.assert_allclose(result, DATA, rtol=1e-6)
    assert not oocpatch.verify(tmp_path / "out.zarr").damaged


@pytest.mark.usefixtures("elsewhere")
def test_training_counts_labels(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "labels.zarr", data=DATA.astype(np.uint8), chunks=(8, 8, 8))
    subject = oocpatch.Subject(t1=tmp_path / "labels.zarr", labels=tmp_path / "labels.zarr")
    sampler = LabelSampler(subject, 4, "labels", {3: 1}, num_patches=4, seed=0)
    for patch in sampler:
        corner = patch.patch_location.index
        assert DATA[tuple(c + 2 for c in corner)] == 3


def test_urls_of_files_name_drives_and_servers_on_windows() -> None:
    assert file_url_path("file:///C:/scans/a.zarr", windows=True) == "C:/scans/a.zarr"
    assert file_url_path("file://server/share/a.zarr", windows=True) == "//server/share/a.zarr"
    assert file_url_path("file:///data/a.zarr", windows=False) == "/data/a.zarr"


@pytest.mark.usefixtures("elsewhere")
def test_a_file_that_is_open_for_a_moment_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "CLOSING_SECONDS", 60.0)
    old, new = LocalPath(tmp_path / "old"), LocalPath(tmp_path / "new")
    new.write_bytes(b"new")
    reader = old.open("w+b")
    closing = threading.Timer(0.2, reader.close)
    closing.start()
    new.replace(old)
    assert reader.closed
    assert old.read_bytes() == b"new"
    monkeypatch.setattr(system, "CLOSING_SECONDS", 0.0)
    with old.open("rb"), pytest.raises(PermissionError):
        old.unlink()
    old.unlink()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["C:\\a.zarr", "C:/a.zarr", "C://a.zarr", "\\\\server\\share\\a.zarr"])
def test_a_path_of_windows_is_no_url(address: str) -> None:
    assert not system.is_url(address)
    assert str(local_or_url(address)) == str(Path(address))


@pytest.mark.parametrize(
    ("address", "path", "part"),
    [
        ("C:\\data\\a.h5::/entry/data", "C:\\data\\a.h5", "/entry/data"),
        ("C:/data/cells.n5::setup0/s1", "C:/data/cells.n5", "setup0/s1"),
        ("C:\\data\\cells.n5\\", "C:\\data\\cells.n5\\", ""),
    ],
)
def test_the_colon_of_a_drive_begins_no_part_of_a_file(address: str, path: str, part: str) -> None:
    spec = parse_address(address)
    assert spec is not None
    assert (spec.address, spec.part) == (path, part)


@pytest.mark.parametrize(
    ("spec", "kind"), [("C:\\nets\\a.onnx", "onnx"), ("C:/nets/a.pt2", "pt2"), ("C:\\a.py", "NAME")]
)
def test_the_colon_of_a_drive_ends_no_module(spec: str, kind: str) -> None:
    with pytest.raises(ValueError, match=f"{kind}") as error:
        load_model(spec)
    assert "neither a module" not in str(error.value)


def test_a_name_in_a_file_on_a_drive_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("C:\\net.py").write_text("import torch\nnet = torch.nn.Identity()\n")
    assert type(load_model("C:\\net.py:net")).__name__ == "Identity"
    assert absolute_spec("C:\\net.py:net") == f"{tmp_path}/C:\\net.py:net"
    assert PackageSpec.of("nnunet:C:\\results,folds=0") == PackageSpec("nnunet", "C:\\results", {"folds": "0"})
