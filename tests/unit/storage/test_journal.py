"""Promises on journals: what is committed is read in order, from a disk and from an object store alike."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oocpatch.errors import CorruptData
from oocpatch.storage.journal import (
    COMMIT_RECORDS,
    FEW,
    Journal,
    encode_record,
    find_journals,
    read_journal,
    read_journal_after,
    remove_journal,
    replace_journal,
)
from oocpatch.storage.paths import LocalPath, ObjectPath, StoragePath
from tests.support.cases import law
from tests.support.stores import Bucket, served


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with served(tmp_path_factory.mktemp("server")) as found:
        yield found


def places(bucket: Bucket, folder: str) -> list[StoragePath]:
    return [LocalPath(folder), ObjectPath.of(bucket.url(f"run-{uuid.uuid4().hex}"))]


STEPS = st.lists(st.sampled_from(["append", "append", "commit", "crash", "read"]), max_size=25)


@law(40)
@given(steps=STEPS)
def test_what_is_committed_is_read_in_order_by_all(steps: list[str], bucket: Bucket) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for root in places(bucket, folder):
            path = root / "ledger.1-of-2"
            journal, mark = Journal(path), ""
            committed: list[int] = []
            waiting: list[int] = []
            heard: list[int] = []
            for number, step in enumerate([*steps, "commit", "read"]):
                if step == "append":
                    waiting.append(number)
                    journal.append(number)
                elif step == "commit":
                    journal.commit()
                    committed, waiting = committed + waiting, []
                elif step == "crash":  # what a process appended to a file survives it
                    journal._lines.close()  # as the system closes the files of a dead process
                    journal = Journal(path)
                    committed, waiting = committed + (waiting if path.is_local else []), []
                elif find_journals(root, "ledger"):
                    values, mark = read_journal_after(path, mark)
                    heard += values
                    assert heard[: len(committed)] == committed
            journal.close()
            assert list(read_journal(path)) == committed == heard


def test_journals_of_parts_are_found_and_distinguished(bucket: Bucket, tmp_path: Path) -> None:
    for root in places(bucket, str(tmp_path)):
        assert find_journals(root, "ledger") == []
        for name in ("ledger.2-of-2", "ledger", "ledger.1-of-2", "plan.json"):
            with Journal(root / name) as journal:
                journal.append(name)
        found = find_journals(root, "ledger")
        assert [path.name for path in found] == ["ledger", "ledger.1-of-2", "ledger.2-of-2"]
        assert [list(read_journal(path)) for path in found] == [[path.name] for path in found]
        remove_journal(found[0])
        assert [path.name for path in find_journals(root, "ledger")] == ["ledger.1-of-2", "ledger.2-of-2"]


def test_many_small_objects_are_put_together_by_the_next_writer(bucket: Bucket) -> None:
    path = ObjectPath.of(bucket.url("many/ledger"))
    journal, wanted = Journal(path), list(range(FEW + 3))
    for number in wanted:
        journal.append(number)
        journal.commit()
    _, mark = read_journal_after(path, "")
    assert list(read_journal(path)) == wanted
    journal = Journal(path)
    assert len(bucket.objects("many/ledger/")) == 1
    assert list(read_journal(path)) == wanted
    assert read_journal_after(path, mark)[0] == [], "whoever has read them all has no news"
    journal.append("next")
    journal.commit()
    assert list(read_journal(path)) == [*wanted, "next"]
    assert read_journal_after(path, mark)[0] == ["next"]


def test_a_writer_that_was_frozen_and_is_back_overwrites_nothing(bucket: Bucket) -> None:
    path = ObjectPath.of(bucket.url("frozen/ledger"))
    frozen, other = Journal(path), Journal(path)
    for journal, value in ((other, "other"), (frozen, "frozen"), (other, "again")):
        journal.append(value)
        journal.commit()
    assert list(read_journal(path)) == ["other", "frozen", "again"]


def test_lost_answers_lose_and_repeat_nothing(bucket: Bucket) -> None:
    path = ObjectPath.of(bucket.url("lost/ledger"))
    journal = Journal(path)
    bucket.behave(every=2, drop="late")
    for number in range(5):
        journal.append(number)
        journal.commit()
    bucket.behave()
    assert list(read_journal(path)) == list(range(5))


def test_what_stands_in_place_of_a_journal_is_all_that_is_read(bucket: Bucket, tmp_path: Path) -> None:
    for root in places(bucket, str(tmp_path)):
        path = root / "ledger"
        for value in ("old", "older"):
            with Journal(path) as journal:
                journal.append(value)
        replace_journal(path, map(encode_record, ["new", "newer"]))
        assert list(read_journal(path)) == ["new", "newer"]


def test_a_torn_end_is_cut_off_and_a_damaged_record_is_left_out_or_refused(tmp_path: Path) -> None:
    path = LocalPath(tmp_path / "journal")
    with Journal(path) as journal:
        for number in range(3):
            journal.append(["block", number])
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    assert list(read_journal(path, strict=True)) == [["block", 0], ["block", 1]], "a crash tore it"
    with Journal(path) as journal:
        journal.append("after")
    assert list(read_journal(path, strict=True)) == [["block", 0], ["block", 1], "after"]
    path.write_bytes(whole.replace(b"1]", b"7]"))
    assert list(read_journal(path)) == [["block", 0], ["block", 2]]
    with pytest.raises(CorruptData, match=r"record 1 in .*journal is damaged"):
        list(read_journal(path, strict=True))


def test_records_are_committed_in_groups(tmp_path: Path) -> None:
    with Journal(LocalPath(tmp_path / "journal")) as journal:
        for number in range(COMMIT_RECORDS - 1):
            journal.append(number)
            journal.commit(if_due=True)
        assert not journal.due
        journal.append("last")
        assert journal.due
        journal.commit(if_due=True)
        assert not journal.due


def test_a_path_that_was_not_converted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be a StoragePath, got PosixPath"):
        Journal(tmp_path / "journal")
