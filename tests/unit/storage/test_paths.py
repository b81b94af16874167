"""Promises on paths: one interface, kept alike by the local file system and by an object store."""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from oocpatch.storage.paths import LocalPath, ObjectPath, StoragePath, output_path, remove_trees, storage_path
from tests.support.stores import Bucket, served


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with served(tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture(params=["local", "objects"])
def root(request: pytest.FixtureRequest, bucket: Bucket, tmp_path: Path) -> StoragePath:
    if request.param == "local":
        return LocalPath(tmp_path / "root")
    return ObjectPath.of(bucket.url(f"root-{uuid.uuid4().hex}"))


def write(root: StoragePath, *names: str) -> None:
    for name in names:
        (root / name).parent.make_folder()
        (root / name).write_plain(name.encode())


def test_what_is_written_is_read_and_a_path_that_travels_is_the_same(root: StoragePath) -> None:
    root.make_folder()
    for number, content in enumerate(["text", b"bytes", [b"several ", b"pieces"]]):
        path = root / f"file-{number}"
        assert (path.exists(), path.is_file(), path.size(), path.state()) == (False, False, 0, None)
        path.write_atomic(content)
        expected = b"".join(content) if isinstance(content, list) else path.read_bytes()
        assert b"".join(path.read_pieces()) == path.read_bytes() == expected
        assert (path.exists(), path.is_file(), path.is_dir(), path.size()) == (True, True, False, len(expected))
        state = path.state()
        assert state is not None
        assert state.content == expected
    assert (root / "file-0").read_text() == "text"
    assert sorted(root.list_files()) == ["file-0", "file-1", "file-2"], "nothing is left beside them"
    travelled = pickle.loads(pickle.dumps(root))  # noqa: S301 - its own
    assert travelled == root == storage_path(str(root)) == output_path("output", str(root))
    assert (root / "a" / "b").parent == root / "a" == (root / "c").with_name("a")
    assert root in (root / "a" / "b").parents


def test_of_several_that_put_only_the_first_one_succeeds(root: StoragePath) -> None:
    root.make_folder()
    assert [(root / "lock").put_if_absent(content) for content in (b"first", b"second")] == [True, False]
    assert (root / "lock").read_bytes() == b"first"
    (root / "lock").unlink()
    (root / "lock").unlink(missing_ok=True)
    assert (root / "lock").put_if_absent(b"third")
    assert list(root.list_files()) == ["lock"]


def test_files_and_folders_are_listed_by_their_names_below(root: StoragePath) -> None:
    write(root, "zarr.json", "a/zarr.json", "a/c/0/0", "a/c/0/1", "b/7/manifest.json")
    assert sorted(root.list_files()) == ["a/c/0/0", "a/c/0/1", "a/zarr.json", "b/7/manifest.json", "zarr.json"]
    assert sorted(root.list_files(skip={"a/c"}.__contains__)) == ["a/zarr.json", "b/7/manifest.json", "zarr.json"]
    assert (root.list_folders(), root.list_folders(depth=2)) == (["a", "b"], ["a/c", "b/7"])
    assert list((root / "nowhere").list_files()) == (root / "nowhere").list_folders() == []
    write(root, "lock.part-1", "lock.part-2", "locksmith")
    assert [path.name for path in (root / "lock").list_siblings("lock.part-")] == ["lock.part-1", "lock.part-2"]


def test_what_lies_below_is_removed_and_nothing_else(root: StoragePath) -> None:
    write(root, "a/b/c", "ab", "d/e")
    remove_trees([root / "a", root / "nowhere"])
    assert sorted(root.list_files()) == ["ab", "d/e"]
    (root / "d").remove_if_empty()
    assert (root / "d/e").is_file()
    root.flush()


def test_numbers_are_read_as_they_were_written_and_not_if_there_are_fewer(root: StoragePath) -> None:
    root.make_folder()
    values = np.arange(6, dtype="<f4").reshape(2, 3)
    (root / "chunk").write_plain(values.reshape(-1).view(np.uint8).data)
    read = (root / "chunk").read_array("float32", (2, 3))
    assert read is not None
    np.testing.assert_array_equal(read, values)
    read += 1
    for shape in ((2, 2), (7,)):
        assert (root / "chunk").read_array("float32", shape) is None
    with pytest.raises(FileNotFoundError):
        (root / "nowhere").read_array("float32", (1,))
