"""Promises on segments of a ledger: what is committed is read in order, from a disk and from an object store alike."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oocpatch.storage.paths import Address, ObjectPath
from oocpatch.workspace.segments import FEW, lines_after, lines_of, open_segment, remove_segment, rewritten, segments
from tests.support.stores import Bucket, served


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with served(tmp_path_factory.mktemp("server")) as found:
        yield found


def places(bucket: Bucket, folder: str) -> list[Address]:
    return [Path(folder), ObjectPath.of(bucket.url(f"run-{uuid.uuid4().hex}"))]


STEPS = st.lists(st.sampled_from(["append", "append", "commit", "crash", "news"]), max_size=25)


@settings(max_examples=40)
@given(steps=STEPS)
def test_what_is_committed_is_read_in_order_by_all(steps: list[str], bucket: Bucket) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for root in places(bucket, folder):
            path = root / "ledger.1-of-2"
            segment, mark = open_segment(path), ""
            committed: list[bytes] = []
            waiting: list[bytes] = []
            heard: list[bytes] = []
            for number, step in enumerate([*steps, "commit", "news"]):
                if step == "append":
                    waiting.append(f"line {number}\n".encode())
                    segment.append(waiting[-1])
                elif step == "commit":
                    segment.commit()
                    committed, waiting = committed + waiting, []
                elif step == "crash":  # what a process appended to a file survives it
                    segment = open_segment(path)
                    committed, waiting = committed + (waiting if isinstance(path, Path) else []), []
                elif segments(root):
                    lines, mark = lines_after(path, mark)
                    heard += lines
                    assert heard[: len(committed)] == committed
            segment.close()
            assert list(lines_of(path)) == committed == heard


def test_segments_of_parts_are_found_and_told_apart(bucket: Bucket, tmp_path: Path) -> None:
    for root in places(bucket, str(tmp_path)):
        assert segments(root) == []
        for name in ("ledger.2-of-2", "ledger", "ledger.1-of-2", "plan.json"):
            segment = open_segment(root / name)
            segment.append(name.encode() + b"\n")
            segment.commit()
            segment.close()
        found = segments(root)
        assert [path.name for path in found] == ["ledger", "ledger.1-of-2", "ledger.2-of-2"]
        assert [list(lines_of(path)) for path in found] == [[path.name.encode() + b"\n"] for path in found]
        remove_segment(found[0])
        assert [path.name for path in segments(root)] == ["ledger.1-of-2", "ledger.2-of-2"]


def test_many_small_objects_are_put_together_by_the_next_writer(bucket: Bucket) -> None:
    path = ObjectPath.of(bucket.url("many/ledger"))
    segment, wanted = open_segment(path), []
    for number in range(FEW + 3):
        wanted.append(f"{number}\n".encode())
        segment.append(wanted[-1])
        segment.commit()
    _, mark = lines_after(path, "")
    assert list(lines_of(path)) == wanted
    segment = open_segment(path)
    assert len(bucket.objects("many/ledger/")) == 1
    assert list(lines_of(path)) == wanted
    assert lines_after(path, mark)[0] == [], "whoever has read them all has no news"
    segment.append(b"next\n")
    segment.commit()
    assert list(lines_of(path)) == [*wanted, b"next\n"]
    assert lines_after(path, mark)[0] == [b"next\n"]


def test_a_writer_that_was_frozen_and_is_back_overwrites_nothing(bucket: Bucket) -> None:
    path = ObjectPath.of(bucket.url("frozen/ledger"))
    frozen, other = open_segment(path), open_segment(path)
    for segment, line in ((other, b"other\n"), (frozen, b"frozen\n"), (other, b"again\n")):
        segment.append(line)
        segment.commit()
    assert list(lines_of(path)) == [b"other\n", b"frozen\n", b"again\n"]


def test_lost_answers_lose_and_repeat_nothing(bucket: Bucket) -> None:
    path = ObjectPath.of(bucket.url("lost/ledger"))
    segment = open_segment(path)
    bucket.behave(every=2, drop="late")
    for number in range(5):
        segment.append(f"{number}\n".encode())
        segment.commit()
    bucket.behave()
    assert list(lines_of(path)) == [f"{number}\n".encode() for number in range(5)]


def test_what_stands_in_place_of_a_segment_is_all_that_is_read(bucket: Bucket, tmp_path: Path) -> None:
    for root in places(bucket, str(tmp_path)):
        path = root / "ledger"
        for line in (b"old\n", b"older\n"):
            segment = open_segment(path)
            segment.append(line)
            segment.commit()
            segment.close()
        with rewritten(path) as target:
            target.write_bytes(b"new\n")
        assert list(lines_of(path)) == [b"new\n"]
