"""Turns are the flips and right-angle rotations of a patch, all of them once, and each has its way back."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from oocpatch.models.augmentation import checked_augmentation, flips_and_rotations


def images(name: str, shape: tuple[int, ...], axes: str = "zyx") -> list[np.ndarray[Any, Any]]:
    used = axes[-len(shape) :]
    patch = torch.arange(np.prod(shape), dtype=torch.float64).reshape(1, 1, *shape)
    return [
        turn.apply(patch).numpy()[0, 0] for turn in flips_and_rotations(checked_augmentation(name, used), used, shape)
    ]


def test_rotations_of_a_square_are_numpys() -> None:
    found = images("rotations", (3, 3))
    square = np.arange(9.0).reshape(3, 3)
    assert {image.tobytes() for image in found} == {np.rot90(square, k).tobytes() for k in range(4)}
    assert len(found) == 4


def test_flips_are_numpys() -> None:
    found = images("flips", (2, 3, 4))
    block = np.arange(24.0).reshape(2, 3, 4)
    expected = {np.flip(block, axes).tobytes() for n in range(4) for axes in itertools.combinations(range(3), n)}
    assert {image.tobytes() for image in found} == expected
    assert len(found) == 8


def quarter_turns(shape: tuple[int, ...]) -> set[bytes]:
    """All that quarter turns in planes of equal sides, and half turns in the others, make of a block."""
    block = np.arange(float(np.prod(shape))).reshape(shape)
    seen, waiting = {block.tobytes()}, [block]
    while waiting:
        image = waiting.pop()
        for plane in itertools.combinations(range(len(shape)), 2):
            turned = np.rot90(image, 1 if shape[plane[0]] == shape[plane[1]] else 2, plane)
            if turned.tobytes() not in seen:
                seen.add(turned.tobytes())
                waiting.append(turned)
    return seen


@pytest.mark.parametrize(("shape", "count"), [((3, 3, 3), 24), ((2, 3, 3), 8), ((3, 2, 3), 8)])
def test_rotations_are_all_that_quarter_turns_reach(shape: tuple[int, ...], count: int) -> None:
    found = {image.tobytes() for image in images("rotations", shape)}
    assert found == quarter_turns(shape)
    assert len(images("rotations", shape)) == len(found) == count


def test_all_are_the_rotations_and_their_mirror_images() -> None:
    mirrored = {np.flip(np.frombuffer(data).reshape(3, 3, 3), 0).tobytes() for data in quarter_turns((3, 3, 3))}
    found = {image.tobytes() for image in images("all", (3, 3, 3))}
    assert found == quarter_turns((3, 3, 3)) | mirrored
    assert len(found) == 48


@pytest.mark.parametrize("name", ["flips", "rotations", "all"])
@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 3), (4, 4, 4), (2, 2, 3, 3)])
def test_each_turn_has_its_way_back_at_any_scale(name: str, shape: tuple[int, ...]) -> None:
    axes = "wzyx"[-len(shape) :]
    for factor in (1, 2):
        patch = torch.randn(2, 3, *(factor * n for n in shape))
        for turn in flips_and_rotations(checked_augmentation(name, axes), axes, shape):
            assert torch.equal(turn.invert(turn.apply(patch)), patch)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "uint32", "uint64", "int64", "float16", "float64"])
def test_patches_of_any_dtype_can_be_turned(dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 2, 32, dtype=np.uint8).astype(dtype).reshape(1, 2, 4, 4)
    for turn in flips_and_rotations(checked_augmentation("all", "yx"), "yx", (4, 4)):
        turned = turn.apply(torch.from_numpy(values))
        expected = np.flip(values.transpose(0, 1, *(2 + a for a in turn.order)), [2 + a for a in turn.flipped])
        np.testing.assert_array_equal(turned.numpy(), expected)
        np.testing.assert_array_equal(turn.invert(turned).numpy(), values)


def test_the_first_turn_changes_nothing() -> None:
    first = flips_and_rotations(checked_augmentation("all", "yx"), "yx", (4, 4))[0]
    patch = torch.randn(1, 1, 4, 4)
    assert first.apply(patch) is patch
    assert first.invert(patch) is patch


def test_axes_that_are_not_named_stay_as_they_are() -> None:
    found = flips_and_rotations(checked_augmentation({"name": "all", "axes": "yx"}, "zyx"), "zyx", (4, 4, 4))
    assert len(found) == 8
    assert all(turn.order[0] == 0 and 0 not in turn.flipped for turn in found)
    assert [turn.flipped for turn in flips_and_rotations(checked_augmentation(["y"], "zyx"), "zyx", (4, 4, 4))] == [
        (),
        (1,),
    ]


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ("mirrors", r"one of flips, rotations, all.*got 'mirrors'"),
        (["y", "q"], r"spatial axes of the volume \(z, y, x\), got y, q"),
        (["y", "y"], r"got y, y"),
        ([], r"spatial axes"),
        ({"name": "flips", "angle": 3}, r"a dict with name and axes"),
        ({"axes": ["x"]}, r"one of flips"),
    ],
)
def test_an_augmentation_that_is_none_is_refused(augment: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_augmentation(augment, "zyx")


def test_rotations_without_axes_to_exchange_are_refused() -> None:
    with pytest.raises(ValueError, match=r"patch_size \(3, 4\) along y, x"):
        flips_and_rotations(checked_augmentation("rotations", "yx"), "yx", (3, 4))
    with pytest.raises(TypeError, match="got int"):
        checked_augmentation(3, "yx")  # type: ignore[arg-type]
