"""Promises of the queue: how many patches it holds, which come out, and that no thread decides it by being faster."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchio
import zarr
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, SequentialSampler, WeightedRandomSampler

import oocpatch
from oocpatch.sampling.subject import read_patches
from tests.support.cases import law
from tests.support.counting_store import CountingStore
from tests.support.draws import assert_fits, centre_distribution, torchio_subject

Ints = tuple[int, ...]


def subjects(number: int, shape: Ints = (6, 6)) -> list[oocpatch.Subject]:
    """Volumes that hold the number of their subject."""
    return [oocpatch.Subject(t1=np.full(shape, i, np.int16), number=i) for i in range(number)]


def queue_of(number: int, patch: int | Ints = 3, in_all: int | None = None, **options: Any) -> oocpatch.Queue:
    some = subjects(number)
    return oocpatch.Queue(some, oocpatch.UniformSampler(some[0], patch, in_all), **options)


def drawn(queue: Any) -> list[tuple[int, Ints]]:
    return [(patch.number, patch.patch_location.index) for patch in queue]


@law(120)
@given(st.data())
def test_counts_are_those_of_torchio(data: st.DataObject) -> None:
    """However long the buffer, however many threads, shuffled or not, with a bounded sampler or an endless one."""
    number = data.draw(st.integers(1, 5))
    in_all = data.draw(st.one_of(st.none(), st.integers(1, 6)))
    options: dict[str, Any] = {
        "max_length": data.draw(st.integers(1, 12)),
        "patches_per_volume": data.draw(st.integers(1, 7)),
        "num_workers": data.draw(st.sampled_from((0, 0, 1, 3))),
        "shuffle_subjects": data.draw(st.booleans()),
        "shuffle_patches": data.draw(st.booleans()),
    }
    ours = queue_of(number, in_all=in_all, **options)
    volumes = [torchio_subject(t1=np.zeros((3, 3, 3), np.float32)) for _ in range(number)]
    for i, volume in enumerate(volumes):
        volume.metadata["number"] = i
    theirs = torchio.Queue(volumes, torchio.UniformSampler(volumes[0], 2, in_all), **options)
    mine, other = list(ours), list(theirs)
    assert Counter(p.number for p in mine) == Counter(p.number for p in other)
    assert len(mine) == ours.patches_per_epoch <= theirs.patches_per_epoch
    assert ours.num_subjects == theirs.num_subjects == number
    if not options["shuffle_subjects"] and not options["shuffle_patches"]:
        assert [p.number for p in mine] == sorted(p.number for p in mine)
    else:
        together = data.draw(st.integers(1, min(3, options["max_length"])))
        assert len(list(queue_of(number, in_all=in_all, patches_per_region=together, **options))) == len(mine)


class Alive:
    """Counts patches that have been made and are not gone yet, and the largest number of them."""

    def __init__(self, slow: float = 0.0) -> None:
        self._patches: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._slow = slow
        self.most = 0

    def __call__(self, patch: Any) -> Any:
        with self._lock:
            self._patches.add(patch.t1)
            self.most = max(self.most, len(self._patches))
        time.sleep(self._slow)
        return patch


@pytest.mark.parametrize("num_workers", [0, 1, 4])
@pytest.mark.parametrize("together", [1, 5])
def test_no_more_patches_are_alive_than_max_length(num_workers: int, together: int) -> None:
    """Those under way in threads included."""
    alive = Alive(slow=0.001)
    queue = queue_of(
        12, max_length=20, patches_per_volume=25, num_workers=num_workers, transform=alive, patches_per_region=together
    )
    gc.collect()
    count = 0
    for patch in queue:
        count += 1
        del patch
    assert count == 300
    assert alive.most <= 20
    assert alive.most > 20 - together, "the buffer is used"


def test_torchio_holds_all_patches_at_once() -> None:
    """The divergence: 30 subjects of 10 patches each, with `max_length=20` and threads."""
    volumes = [torchio_subject(t1=np.zeros((4, 4, 4), np.float32)) for _ in range(30)]
    made: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Sampler(torchio.UniformSampler):  # type: ignore[misc]
        def __call__(self, subject: Any, num_patches: int | None = None) -> Iterator[Any]:
            nonlocal most
            for patch in super().__call__(subject, num_patches):
                made.add(patch)
                most = max(most, len(made))
                yield patch

    def slow(subject: Any) -> Any:
        time.sleep(0.005)
        return subject

    queue = torchio.Queue(volumes, Sampler(volumes[0], 2), max_length=20, num_workers=2, transform=slow)
    assert sum(1 for _ in queue) == 300
    assert most > 200


@pytest.mark.parametrize(("num_workers", "in_flight", "expected"), [(0, None, 1), (3, None, 3), (4, 2, 2)])
def test_no_more_regions_are_read_at_a_time_than_stated(
    monkeypatch: pytest.MonkeyPatch, num_workers: int, in_flight: int | None, expected: int
) -> None:
    now, most, lock = 0, 0, threading.Lock()

    def watched(*arguments: Any) -> Any:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.004)
        with lock:
            now -= 1
        return read_patches(*arguments)

    monkeypatch.setattr("oocpatch.sampling.queue.read_patches", watched)
    queue = queue_of(10, max_length=50, num_workers=num_workers, regions_in_flight=in_flight)
    assert sum(1 for _ in queue) == 100
    assert most == expected


@pytest.mark.parametrize("together", [1, 3])
def test_the_same_seed_gives_the_same_patches_in_the_same_order_on_any_threads(together: int) -> None:
    def run(num_workers: int, **options: Any) -> list[tuple[int, Ints]]:
        jitter = np.random.default_rng(num_workers)

        def delay(patch: Any) -> Any:
            time.sleep(float(jitter.random()) * 0.001)
            return patch

        options = {"max_length": 12, "patches_per_region": together, "seed": 0, **options}
        return drawn(queue_of(5, num_workers=num_workers, transform=delay, regions_in_flight=2, **options))

    first = run(0)
    assert run(1) == run(3) == first
    assert run(0, seed=1) != first
    assert Counter(run(0, max_length=40)) == Counter(first), "the buffer only changes the order"
    assert Counter(run(0, shuffle_patches=False)) == Counter(first)


def test_without_a_seed_torch_manual_seed_governs() -> None:
    queue = queue_of(4, max_length=8)
    torch.manual_seed(0)
    first, second = drawn(queue), drawn(queue)
    torch.manual_seed(0)
    assert [drawn(queue), drawn(queue)] == [first, second]
    assert first != second
    some = subjects(4)
    seeded = [oocpatch.Queue(some, oocpatch.UniformSampler(some[0], 3, seed=5), 8) for _ in range(2)]
    assert drawn(seeded[0]) == drawn(seeded[1]), "the seed of the sampler counts when the queue has none"


def test_each_pass_is_another_epoch_and_set_epoch_goes_to_one() -> None:
    queue = queue_of(4, max_length=8, seed=0)
    passes = [drawn(queue) for _ in range(3)]
    assert passes[0] != passes[1] != passes[2]
    queue.set_epoch(1)
    assert [drawn(queue), drawn(queue)] == passes[1:]


@pytest.mark.parametrize(("kind", "together"), [("uniform", 4), ("weighted", 4), ("label", 1), ("label", 4)])
def test_every_place_in_the_queue_has_the_distribution_of_its_sampler(
    kind: str, together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oocpatch.sampling.map_cells.CELL_VOXELS", 1)
    weights = np.random.default_rng(1).integers(0, 4, (9, 8)).astype(np.uint8)
    zarr.create_array(tmp_path / "map.zarr", data=weights, chunks=(4, 3))
    subject = oocpatch.Subject(map=tmp_path / "map.zarr")
    if kind == "uniform":
        sampler = oocpatch.UniformSampler(subject, (3, 4))
        weights = np.ones_like(weights)
    elif kind == "weighted":
        sampler = oocpatch.WeightedSampler(subject, (3, 4), "map")
    else:
        sampler = oocpatch.LabelSampler(subject, (3, 4), "map", {0: 2, 3: 1})
        weights = np.array([2, 0, 0, 1])[weights]
    queue = oocpatch.Queue([subject], sampler, 8, 4, seed=0, patches_per_region=together, shuffle_patches=False)
    counts: list[Counter[Ints]] = [Counter() for _ in range(4)]
    for _ in range(400):
        for place, patch in enumerate(queue):
            counts[place][patch.patch_location.index] += 1
    for count in (counts[0], counts[-1]):
        assert_fits(count, centre_distribution(weights, (3, 4)))


def test_patches_come_shuffled_over_the_whole_buffer() -> None:
    """With a buffer for all, the first patch out comes from any subject; with none, in order."""
    firsts = Counter(
        drawn(queue_of(5, max_length=50, patches_per_volume=2, seed=s, shuffle_subjects=False))[0][0]
        for s in range(300)
    )
    assert_fits({(k,): n for k, n in firsts.items()}, dict.fromkeys([(i,) for i in range(5)], 1 / 5))
    queue = queue_of(5, max_length=1, patches_per_volume=2, shuffle_subjects=False)
    assert [number for number, _ in drawn(queue)] == sorted([*range(5)] * 2)


def test_patches_know_their_subject_and_hold_its_voxels() -> None:
    for patch in queue_of(4, max_length=7):
        assert patch.patch_location.subject_index == patch.number
        assert (patch.t1.data == patch.number).all()


def test_a_transform_is_applied_to_each_patch() -> None:
    def darker(patch: oocpatch.Subject) -> oocpatch.Subject:
        assert patch.spatial_shape == (3, 3)
        patch.t1.data = -patch.t1.data.float()
        return patch

    batches = list(DataLoader(queue_of(3, max_length=9, transform=darker), batch_size=6))
    assert sum(len(batch) for batch in batches) == 30
    for batch in batches:
        assert torch.equal(batch.t1.data, -torch.tensor(batch.number).float()[:, None, None, None].expand(-1, 1, 3, 3))


def test_an_error_in_a_thread_reaches_the_loop_and_the_threads_end() -> None:
    def broken(patch: oocpatch.Subject) -> oocpatch.Subject:
        if patch.number == 2:
            raise RuntimeError("out of paint")
        return patch

    before = threading.active_count()
    for num_workers in (0, 2):
        with pytest.raises(RuntimeError, match="out of paint"):
            list(queue_of(4, max_length=7, num_workers=num_workers, transform=broken))
    patches = iter(queue_of(4, max_length=7, num_workers=2))
    next(patches)
    del patches
    gc.collect()
    assert threading.active_count() == before


def test_a_subject_sampler_gives_the_subjects_of_an_epoch() -> None:
    some = subjects(4)
    sampler = oocpatch.UniformSampler(some[0], 3)
    queue = oocpatch.Queue(some, sampler, 7, 2, shuffle_subjects=False, subject_sampler=SequentialSampler([0] * 3))
    assert queue.num_subjects == 3
    assert queue.patches_per_epoch == 6
    assert Counter(number for number, _ in drawn(queue)) == {0: 2, 1: 2, 2: 2}
    weighted = WeightedRandomSampler([0.0, 1.0, 0.0, 0.0], 5)
    queue = oocpatch.Queue(some, sampler, 7, 2, shuffle_subjects=False, subject_sampler=weighted)
    assert Counter(number for number, _ in drawn(queue)) == {1: 10}
    endless = oocpatch.Queue(some, sampler, shuffle_subjects=False, subject_sampler=NoLength())
    assert len(drawn(endless)) == 10
    with pytest.raises(TypeError, match="subject_sampler must have a length"):
        _ = endless.num_subjects


class NoLength(torch.utils.data.Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter([3])


def test_a_random_subject_sampler_gives_one_order_per_seed_and_leaves_torch_alone() -> None:
    some = subjects(6)

    def order(seed: int, of_torch: int) -> list[int]:
        torch.manual_seed(of_torch)
        chosen = torch.utils.data.RandomSampler(some)
        sampler = oocpatch.UniformSampler(some[0], 3)
        queue = oocpatch.Queue(
            some, sampler, 3, 1, shuffle_subjects=False, shuffle_patches=False, subject_sampler=chosen, seed=seed
        )
        before = torch.get_rng_state()
        numbers = [number for number, _ in drawn(queue)]
        assert torch.equal(torch.get_rng_state(), before)
        return numbers

    assert order(0, 1) == order(0, 2)
    assert len({tuple(order(seed, 1)) for seed in range(5)}) > 1


def test_patches_of_an_epoch_differ() -> None:
    wide = oocpatch.Subject(t1=np.zeros((500, 500), np.uint8))
    for together, least in ((1, 80), (5, 70)):
        sampler = oocpatch.UniformSampler(wide, 40)
        queue = oocpatch.Queue([wide] * 4, sampler, patches_per_volume=20, seed=0, patches_per_region=together)
        assert len({(p.patch_location.index, p.patch_location.subject_index) for p in queue}) >= least


def test_a_subject_that_comes_again_gives_other_patches() -> None:
    wide = oocpatch.Subject(t1=np.zeros((500, 500), np.uint8))
    again = torch.utils.data.WeightedRandomSampler([1.0], 5)
    queue = oocpatch.Queue(
        [wide], oocpatch.UniformSampler(wide, 3), shuffle_subjects=False, subject_sampler=again, seed=0
    )
    assert len({patch.patch_location.index for patch in queue}) == 50


def test_a_custom_sampler_chooses_the_patches() -> None:
    class Diagonal(oocpatch.UniformSampler):
        def draw(self, subject: oocpatch.Subject, random: Any, count: int = 1) -> list[Ints]:
            return [(int(random.integers(4)),) * 2 for _ in range(count)]

    some = subjects(3)
    for together in (1, 4):
        queue = oocpatch.Queue(some, Diagonal(some[0], 3), 6, 10, 2, patches_per_region=together)
        assert {index for _, index in drawn(queue)} == {(i, i) for i in range(4)}


def test_max_memory_is_that_of_a_full_buffer_with_true_item_sizes() -> None:
    subject = oocpatch.Subject(t1=np.zeros((2, 8, 8, 8), np.float64), label=np.zeros((8, 8, 8), np.uint8), age=4)
    queue = oocpatch.Queue([subject], oocpatch.UniformSampler(subject, 4), max_length=100)
    assert queue.max_memory == 100 * 64 * (2 * 8 + 1)
    assert queue.max_memory_pretty == "106.2 KiB"
    patches = list(itertools.islice(queue, 1))
    assert sum(v.data.nbytes for v in patches[0].images.values()) * 100 == queue.max_memory


def test_patches_of_one_region_are_read_at_once() -> None:
    """Ten patches as large as a chunk: at most 4 chunks of a plane together, up to 40 alone."""

    def chunks_read(together: int) -> int:
        store = CountingStore()
        subject = oocpatch.Subject(t1=zarr.create_array(store, data=np.ones((64, 64), np.uint8), chunks=(16, 16)))
        queue = oocpatch.Queue([subject], oocpatch.UniformSampler(subject, 16), 10, 10, seed=0, patches_per_region=together)  # fmt: skip # noqa: E501
        store.reads.clear()
        assert sum(1 for _ in queue) == 10
        return len(store.reads)

    assert chunks_read(10) <= 4
    assert chunks_read(1) > 20


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"subject_sampler": SequentialSampler([0])}, ValueError, "shuffle_subjects must be False"),
        ({"max_length": 0}, ValueError, "max_length must be an int of at least 1, got 0"),
        ({"patches_per_volume": 0}, ValueError, "patches_per_volume must be an int of at least 1"),
        ({"num_workers": -1}, ValueError, "num_workers must be an int of at least 0"),
        ({"num_workers": 1.5}, ValueError, "num_workers must be an int"),
        ({"patches_per_region": 5, "max_length": 4}, ValueError, "at least patches_per_region, got 4 and 5"),
        ({"regions_in_flight": 0}, ValueError, "regions_in_flight must be an int of at least 1"),
        ({"seed": -1}, ValueError, "seed must be an int of at least 0"),
        ({"patch_sampler": lambda subject: iter([subject])}, TypeError, "patch_sampler must be a uniform, weighted"),
        ({"subjects": []}, ValueError, "subjects must hold at least one subject"),
        ({"subjects": oocpatch.Subject(t1=np.zeros((6, 6)))}, TypeError, r"got one Subject; pass \[subject\]"),
        ({"subjects": [1]}, TypeError, "subject 0 must be a Subject of oocpatch or of TorchIO, got int"),
        ({"subjects": [*subjects(1), oocpatch.Subject(t1=np.zeros((6, 2)))]}, ValueError, "subject 1: patch_size must"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    some = subjects(2)
    arguments = {"subjects": some, "patch_sampler": oocpatch.UniformSampler(some[0], 3), **options}
    with pytest.raises(error, match=message):
        oocpatch.Queue(**arguments)


def test_a_map_that_a_subject_lacks_is_refused_before_anything_is_read() -> None:
    some = [oocpatch.Subject(map=np.ones((6, 6))), oocpatch.Subject(t1=np.ones((6, 6)))]
    with pytest.raises(ValueError, match="subject 1: probability_map must be one of t1, got 'map'"):
        oocpatch.Queue(some, oocpatch.WeightedSampler(some[0], 3, "map"))


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("kind", [oocpatch.LabelSampler, oocpatch.WeightedSampler])
def test_a_subject_whose_map_is_empty_is_named(threads: int, on_disk: bool, kind: Any, tmp_path: Path) -> None:
    subjects = []
    for index in range(3):
        chances: Any = np.full((16, 16), index != 1, np.uint8)
        if on_disk:
            zarr.create_array(tmp_path / f"{index}.zarr", data=chances, chunks=(8, 8))
            chances = tmp_path / f"{index}.zarr"
        subjects.append(oocpatch.Subject(t1=np.zeros((16, 16)), chances=chances))
    queue = oocpatch.Queue(subjects, kind(subjects[0], 4, "chances"), patches_per_volume=2, num_workers=threads)
    with pytest.raises(ValueError, match=r"^subject 1: .*'chances'"):
        list(queue)


# Grids


def grid_queue(number: int = 3, **options: Any) -> oocpatch.Queue:
    """A queue of grids of 6, 9 and 12 patches (and so on), whose overlap begins outside of the volume."""
    some = [oocpatch.Subject(t1=np.random.default_rng(i).random((6, 4 + 2 * i)), number=i) for i in range(number)]
    return oocpatch.Queue(some, oocpatch.GridSampler(some[0], 4, 2, "reflect"), **options)


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("threads", [0, 2])
def test_a_grid_in_a_queue_gives_its_first_patches_or_all(together: int, threads: int) -> None:
    for limit in (5, None, 100):
        queue = grid_queue(patches_per_volume=limit, num_workers=threads, patches_per_region=together, seed=1)
        grids = [oocpatch.GridSampler(s, 4, 2, "reflect") for s in queue.subjects]
        expected = {
            (i, p.patch_location.index): p.t1.data
            for i, grid in enumerate(grids)
            for p in itertools.islice(grid, limit)
        }
        patches = list(queue)
        assert len(patches) == len(expected) == queue.patches_per_epoch
        assert {(p.patch_location.subject_index, p.patch_location.index) for p in patches} == expected.keys()
        for patch in patches:
            assert torch.equal(patch.t1.data, expected[patch.number, patch.patch_location.index])
    assert [len(grid) for grid in grids] == [6, 9, 12]


def test_a_grid_in_a_queue_comes_in_its_order_unless_shuffled_by_the_seed() -> None:
    ordered = drawn(grid_queue(shuffle_subjects=False, shuffle_patches=False, patches_per_volume=None))
    assert ordered == sorted(ordered)
    shuffled, again, other = (drawn(grid_queue(patches_per_volume=None, seed=seed)) for seed in (1, 1, 2))
    assert shuffled == again != other
    assert sorted(shuffled) == sorted(other) == ordered


def test_patches_of_a_grid_are_transformed_and_counted() -> None:
    def doubled(patch: oocpatch.Subject) -> oocpatch.Subject:
        patch.t1.data = patch.t1.data * 2
        return patch

    plain, twice = grid_queue(seed=0), grid_queue(seed=0, transform=doubled)
    for a, b in zip(plain, twice, strict=True):
        assert torch.equal(2 * a.t1.data, b.t1.data)
    assert plain.patches_per_epoch == 6 + 9 + 10
    assert plain.max_memory == 300 * 16 * 8
    picked = grid_queue(shuffle_subjects=False, subject_sampler=SequentialSampler(range(3)), patches_per_volume=None)
    assert picked.patches_per_epoch == 36  # at most: another sampler might choose the longest grid each time


def test_a_subject_that_the_grid_of_a_queue_does_not_fit_is_named() -> None:
    some = subjects(2) + subjects(1, (3, 3))
    with pytest.raises(ValueError, match=r"subject 2: patch_size must not be larger than the volume"):
        oocpatch.Queue(some, oocpatch.GridSampler(some[0], 4))


def test_all_patches_of_a_random_sampler_need_a_number() -> None:
    assert len(drawn(queue_of(2, in_all=7, patches_per_volume=None))) == 14
    with pytest.raises(ValueError, match="patches_per_volume must be an int when patch_sampler has no num_patches"):
        queue_of(2, patches_per_volume=None)
