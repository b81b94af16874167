"""Promises across processes: workers of a loader and ranks share out the patches that one process would yield."""

from __future__ import annotations

import multiprocessing
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchio
import zarr
from torch.utils.data import DataLoader, DistributedSampler

import oocpatch
from oocpatch.sampling.random_streams import Share
from tests.support.draws import torchio_subject
from tests.without_linux import needs_fork

pytestmark = [
    # Python 3.12 and later warn of every fork in a process that has threads, as Zarr's; what follows needs forks.
    pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning"),
    # torch warns of more workers than cores; three of them tell more than two, whatever the machine.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

Ints = tuple[int, ...]
DATA = np.arange(40 * 30, dtype=np.int32).reshape(40, 30)


@pytest.fixture
def subject(tmp_path: Path) -> oocpatch.Subject:
    zarr.create_array(tmp_path / "t1.zarr", data=DATA, chunks=(16, 16))
    zarr.create_array(tmp_path / "map.zarr", data=(DATA % 7).astype(np.uint8), chunks=(16, 16))
    return oocpatch.Subject(t1=tmp_path / "t1.zarr", map=tmp_path / "map.zarr", name="a")


def loaded(dataset: Any, num_workers: int, **options: Any) -> list[Ints]:
    """The corners that a loader yields; each patch holds the voxels there."""
    loader = options.pop("loader", DataLoader)(dataset, batch_size=4, num_workers=num_workers, **options)
    return collected(loader)


def collected(loader: Any) -> list[Ints]:
    found = []
    for batch in loader:
        for data, location in zip(batch.t1.data, batch.patch_location, strict=True):
            assert np.array_equal(data[0].numpy(), DATA[location.to_slices()])
            found.append(location.index)
    return found


def random_datasets(subject: oocpatch.Subject, seed: int | None = 0) -> Iterator[Any]:
    yield oocpatch.UniformSampler(subject, (8, 5), 100, seed=seed)
    yield oocpatch.WeightedSampler(subject, (8, 5), "map", 100, seed=seed)
    yield oocpatch.LabelSampler(subject, (8, 5), "map", {3: 1, 5: 2}, 100, seed=seed)
    yield oocpatch.Queue([subject] * 5, oocpatch.UniformSampler(subject, (8, 5)), 12, 20, 2, seed=seed)
    yield oocpatch.Queue(
        [subject] * 5, oocpatch.WeightedSampler(subject, 8, "map"), 12, 20, seed=seed, patches_per_region=4
    )


def test_workers_share_out_the_patches_that_one_process_yields(subject: oocpatch.Subject) -> None:
    for kind in range(5):
        alone = loaded(list(random_datasets(subject))[kind], 0)
        shared = loaded(list(random_datasets(subject))[kind], 3)
        assert len(alone) == 100
        assert Counter(shared) == Counter(alone)
        assert len(set(alone)) > 50


def test_workers_share_out_the_grids_of_several_subjects(subject: oocpatch.Subject) -> None:
    """As a data set of its own, for a loop of validation, and in a queue."""
    grids = oocpatch.GridSampler.of([subject] * 3, (8, 5), (2, 0))
    queue = oocpatch.Queue([subject] * 3, oocpatch.GridSampler(subject, (8, 5), (2, 0)), patches_per_volume=None)
    for dataset in (grids, queue):
        found = Counter[tuple[int, Ints]]()
        for batch in DataLoader(dataset, batch_size=4, num_workers=2):
            for data, place in zip(batch.t1.data, batch.patch_location, strict=True):
                assert np.array_equal(data[0].numpy(), DATA[place.to_slices()])
                found[place.subject_index, place.index] += 1
        assert found == Counter((place.subject_index, place.index) for place in grids.locations)


def test_workers_of_torchio_each_draw_all_patches() -> None:
    """The divergence: three workers yield three times as many."""
    data = np.arange(40 * 30, dtype=np.float32).reshape(40, 30, 1)
    theirs = torchio.UniformSampler(torchio_subject(t1=data), (8, 5, 1), num_patches=20)
    loader = torchio.SubjectsLoader(theirs, batch_size=4, num_workers=3)
    assert sum(len(batch) for batch in loader) == 60


@pytest.mark.parametrize("method", [pytest.param("fork", marks=needs_fork), "spawn"])
def test_workers_may_be_started_in_any_way(method: str, subject: oocpatch.Subject) -> None:
    grid = oocpatch.GridSampler(subject, 8, 2)
    assert Counter(loaded(grid, 2, multiprocessing_context=method)) == Counter(p.index for p in grid.locations)
    sampler = oocpatch.WeightedSampler(subject, (8, 5), "map", 30, seed=0)
    alone = loaded(pickle.loads(pickle.dumps(sampler)), 0)  # noqa: S301 - our own
    queue = oocpatch.Queue([subject] * 3, sampler, 12, 10, 1)
    in_queue = loaded(pickle.loads(pickle.dumps(queue)), 0)  # noqa: S301 - our own
    # To start a process anew takes seconds: one way does both.
    for dataset, expected in ((queue, in_queue), (sampler, alone))[: 1 if method == "spawn" else 2]:
        loader = DataLoader(
            dataset, batch_size=4, num_workers=2, multiprocessing_context=method, persistent_workers=True
        )
        assert Counter(collected(loader)) == Counter(expected)
        second = collected(loader)
        assert Counter(second) != Counter(expected), "workers that live on count their passes"
        dataset.set_epoch(0)
        assert Counter(collected(loader)) == Counter(expected), "set_epoch reaches workers that live on"


def test_the_loader_counts_the_passes_of_workers_that_do_not_live_on(subject: oocpatch.Subject) -> None:
    def alone(epochs: int) -> list[Counter[Ints]]:
        sampler = oocpatch.UniformSampler(subject, 4, 30, seed=0)
        return [Counter(loaded(sampler, 0)) for _ in range(epochs)]

    expected = alone(4)
    for persistent in (False, True):
        sampler = oocpatch.UniformSampler(subject, 4, 30, seed=0)
        ours = oocpatch.SubjectsLoader(sampler, batch_size=4, num_workers=2, persistent_workers=persistent)
        assert [Counter(collected(ours)) for _ in range(3)] == expected[:3]
        sampler.set_epoch(1)
        assert [Counter(collected(ours)) for _ in range(3)] == expected[1:4]
    sampler = oocpatch.UniformSampler(subject, 4, 30, seed=0)
    plain = DataLoader(sampler, batch_size=4, num_workers=2)
    assert [Counter(collected(plain)) for _ in range(2)] == [expected[0]] * 2, "what set_epoch is there for"
    sampler.set_epoch(1)
    assert Counter(collected(plain)) == expected[1]


def test_without_a_seed_torch_manual_seed_governs_workers_too(subject: oocpatch.Subject) -> None:
    for loader in (DataLoader, oocpatch.SubjectsLoader):
        sampler = oocpatch.UniformSampler(subject, 4, 30)
        torch.manual_seed(0)
        first, second = (Counter(loaded(sampler, 2, loader=loader)) for _ in range(2))
        torch.manual_seed(0)
        assert [Counter(loaded(sampler, 2, loader=loader)) for _ in range(2)] == [first, second]
        assert first != second
        assert first.total() == 30
        assert len(first) > 20, "the workers do not repeat each other"


def test_workers_share_out_the_subjects_of_a_random_subject_sampler(subject: oocpatch.Subject) -> None:
    """RandomSampler asks torch, which is seeded differently in each worker: still each subject comes once."""
    subjects = [oocpatch.Subject(t1=subject.t1, number=i) for i in range(7)]
    queue = oocpatch.Queue(
        subjects,
        oocpatch.UniformSampler(subjects[0], 4),
        12,
        1,
        shuffle_subjects=False,
        subject_sampler=torch.utils.data.RandomSampler(subjects),
    )
    numbers = [number for batch in DataLoader(queue, batch_size=2, num_workers=3) for number in batch.number]
    assert Counter(numbers) == dict.fromkeys(range(7), 1)


def test_too_many_workers_for_the_buffer_are_refused(
    subject: oocpatch.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = oocpatch.Queue([subject], oocpatch.UniformSampler(subject, 4), max_length=2)
    # made up: torch takes 5 s to end each real worker in which something was raised
    monkeypatch.setattr("oocpatch.sampling.queue.get_worker_info", lambda: SimpleNamespace(id=0, num_workers=3))
    with pytest.raises(ValueError, match="max_length must be at least patches_per_region for each of 3 workers"):
        iter(queue)


def rank_main(rank: int, folder: Path, subject: oocpatch.Subject) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    samplers = list(random_datasets(subject))
    corners = [loaded(dataset, workers) for dataset in samplers for workers in (0, 2) if not dataset.set_epoch(0)]
    chosen = DistributedSampler(range(6), shuffle=False)
    numbered = [oocpatch.Subject(t1=subject.t1, number=i) for i in range(6)]
    queue = oocpatch.Queue(
        numbered, oocpatch.UniformSampler(numbered[0], 4), 9, 5, shuffle_subjects=False, subject_sampler=chosen
    )
    numbers = [patch.number for patch in queue]
    travelled = pickle.dumps(samplers[0].epochs)
    (folder / f"rank{rank}").write_bytes(pickle.dumps((corners, numbers, travelled)))
    torch.distributed.destroy_process_group()


@needs_fork
def test_ranks_share_out_the_patches_that_one_process_yields(subject: oocpatch.Subject, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank_main, args=(rank, tmp_path, subject)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    (one, first, a), (other, second, b) = (
        pickle.loads((tmp_path / f"rank{rank}").read_bytes())  # noqa: S301 - our own
        for rank in range(2)
    )
    expected = [Counter(loaded(dataset, 0)) for dataset in random_datasets(subject) for _ in range(2)]
    alone = [expected[2 * i] for i in range(5) for _ in range(2)]
    assert [Counter(x + y) for x, y in zip(one, other, strict=True)] == alone
    assert all(len(x) == len(y) == 50 for x, y in zip(one[:6], other[:6], strict=True))
    assert Counter(first) == dict.fromkeys([0, 2, 4], 5), "a DistributedSampler has shared out the subjects already"
    assert Counter(second) == dict.fromkeys([1, 3, 5], 5)
    passes = [pickle.loads(x) for x in (a, b)]  # noqa: S301 - our own
    assert [p.share() for p in passes] == [Share(0, 2), Share(1, 2)], "a spawned worker knows its parent's rank"
