"""Polygons: what is inside of them are the pixels of their objects, whatever the blocks, and they are valid."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from oocpatch.objects import polygons
from tests.support.measured_objects import boxes_of, filled, signed_area


def polygons_of(labels, block=None):
    dtype = polygons.corner_dtype(0)
    parts = [
        polygons.find_corners(labels[box], [s.start for s in box], (), dtype)
        for box in boxes_of(labels.shape, block or max(labels.shape))
    ]
    corners = polygons.merge_corners(parts)
    ids = np.unique(corners["label"]).tolist()
    return dict(zip(ids, polygons.trace(corners), strict=True))


def check(labels, shapes):
    assert list(shapes) == [i for i in np.unique(labels).tolist() if i]
    for label, of_label in shapes.items():
        np.testing.assert_array_equal(filled(of_label, labels.shape), labels == label)
        for exterior, *holes in of_label:
            assert signed_area(exterior) > 0
            assert all(signed_area(hole) < 0 for hole in holes)
            rings = [exterior, *holes]
            for ring in rings:
                assert len(set(ring)) == len(ring)  # it does not touch itself
                turns = zip(ring, [*ring[1:], ring[0]], [*ring[2:], *ring[:2]], strict=True)
                assert all((a[0] == b[0]) != (b[0] == c[0]) for a, b, c in turns)  # it turns at every corner
            for one, other in itertools.combinations(rings, 2):
                assert not edges_of(one) & edges_of(other)
                assert len(set(one) & set(other)) <= 1 or is_connected(filled([rings], labels.shape))
            assert is_connected(filled([rings], labels.shape))


def edges_of(ring):
    """The unit edges of a ring."""
    return {
        (min(x, u) + i * (y == v), min(y, v) + i * (x == u), x == u)
        for (x, y), (u, v) in zip(ring, [*ring[1:], ring[0]], strict=True)
        for i in range(abs(x - u) + abs(y - v))
    }


def is_connected(mask):
    """Whether pixels are connected by their faces."""
    seen, todo = set(), [tuple(np.argwhere(mask)[0])]
    while todo:
        y, x = todo.pop()
        if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x] and (y, x) not in seen:
            seen.add((y, x))
            todo += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return len(seen) == mask.sum()


def test_a_pixel_is_the_square_from_its_number_to_the_next():
    labels = np.zeros((4, 5), np.uint8)
    labels[1, 3] = 9
    assert polygons_of(labels) == {9: [[[(3, 1), (4, 1), (4, 2), (3, 2)]]]}


@pytest.mark.parametrize(
    "picture",
    [
        "##|##",
        "#.|.#",
        ".#|#.",
        "###|#.#|###",
        "###|#.#|##.",  # a ring that touches itself at a corner
        "####|#..#|#.##|##.#",
        "#####|#...#|#.#.#|#...#|#####",  # an island in a hole
        "####|#.##|##.#|####",  # holes that touch
        "#.#|.#.|#.#",
        "####.|#..##|#.#.#|##.##|.###.",
    ],
)
def test_pictures_become_valid_polygons_in_all_blocks(picture):
    labels = np.array([[7 * (c == "#") for c in line] for line in picture.split("|")], np.uint16)
    shapes = polygons_of(labels)
    check(labels, shapes)
    for block in (1, 2, 3):
        assert polygons_of(labels, block) == shapes


def test_random_labels_become_valid_polygons_in_all_blocks():
    rng = np.random.default_rng(0)
    for _ in range(60):
        labels = rng.integers(0, rng.integers(2, 5), rng.integers(1, 11, 2)).astype(np.uint32)
        shapes = polygons_of(labels)
        check(labels, shapes)
        assert polygons_of(labels, 3) == shapes


def test_labels_may_be_any_numbers():
    labels = np.array([[2**64 - 1, 2**63]], np.uint64)
    assert list(polygons_of(labels)) == [2**63, 2**64 - 1]


def test_nothing_has_no_polygons():
    assert polygons_of(np.zeros((3, 3), np.uint8)) == {}
