"""Promises on OME-Zarr out: valid by yaozarrs, the right values, axes, scales and units at every level."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
import yaozarrs
import zarr
from numpy.testing import assert_allclose, assert_array_equal

import oocpatch
from oocpatch.outputs.pyramid import mean, mode
from oocpatch.storage.paths import LocalPath
from tests.support.ome_checks import ome_faults, ome_image_paths
from tests.support.ome_runs import RUNS, Run, coarser, image_groups


def metadata(group: Path) -> dict[str, Any]:
    """The OME metadata of a group, read as text."""
    found: dict[str, Any] = json.loads((group / "zarr.json").read_text())["attributes"]["ome"]
    assert found["version"] == "0.5"
    return found


def level_0(name: str, head: str) -> np.ndarray:
    """What the model gives for the whole volume, axes as OME-Zarr has them (the order of the volumes is that)."""
    run = RUNS[name]
    data = torch.from_numpy(run.volume().values.astype("float32"))
    given = run.model(data[None, None])
    values = (given[head] if isinstance(given, dict) else given)[0, 0].numpy()
    return values.astype(run.options.get("dtype", values.dtype))


@pytest.mark.parametrize("name", RUNS, ids=lambda value: value.replace(" ", "-"))
def test_every_level_is_valid_and_has_the_right_values_scale_and_coordinates(name: str, tmp_path: Path) -> None:
    run, output = RUNS[name], tmp_path / "out.zarr"
    run.predict(output)
    yaozarrs.validate_zarr_store(str(output))
    for head, group in image_groups(name, output).items():
        assert_image(name, head, group)
    assert ome_faults(output) == []
    assert len(ome_image_paths(output)) == len(image_groups(name, output))


def assert_image(name: str, head: str, group: Path) -> None:
    run, (found,) = RUNS[name], metadata(group)["multiscales"]
    expected = level_0(name, head)
    assert "".join(axis["name"] for axis in found["axes"]) == run.axes
    kinds = {"t": ("time", "second"), "c": ("channel", None)}
    kinds_and_units = [(axis["type"], axis.get("unit")) for axis in found["axes"]]
    assert kinds_and_units == [kinds.get(axis, ("space", "micrometer")) for axis in run.axes]
    labels = name == "labels" or head in {"nuclei", "cells"}
    assert ("image-label" in metadata(group)) == labels
    if labels:
        assert "omero" not in metadata(group)
    else:
        assert_shown(metadata(group)["omero"], expected, run, head)
    factor = {"half": 2.0, "double": 0.5}.get(head, 1.0)
    sizes = [1.0 if a == "c" else run.sizes[a] * (factor if a in "yx" else 1) for a in run.axes]
    starts = [
        run.origins.get(a, 0.0) + (run.sizes[a] * (factor - 1) / 2 if a in "yx" else 0) if a != "c" else 0
        for a in run.axes
    ]
    levels = found["datasets"]
    assert [level["path"] for level in levels] == [f"scale{n}/image" for n in range(len(levels))]
    for number, level in enumerate(levels):
        array = zarr.open_array(group / level["path"], mode="r")
        if number:
            above = expected.shape
            step = tuple(1 if m == n else 2 for n, m in zip(above, array.shape, strict=True))
            assert step != (1,) * len(step)
            expected = coarser(expected, step, labels=labels)
            starts = [start + size * (f - 1) / 2 for start, size, f in zip(starts, sizes, step, strict=True)]
            sizes = [size * f for size, f in zip(sizes, step, strict=True)]
        assert_allclose(array[...], expected, rtol=1e-6, err_msg=level["path"])
        scale, translation = level["coordinateTransformations"]
        assert_allclose(scale["scale"], sizes, rtol=1e-12)
        assert_allclose(translation["translation"], starts, rtol=1e-12, atol=1e-12)
        dataset = xarray.open_zarr(group / f"scale{number}", consolidated=False)
        assert_array_equal(dataset["image"], array[...])
        assert dataset["image"].dims == tuple(run.axes)
        for axis, n, size, start in zip(run.axes, array.shape, sizes, starts, strict=True):
            if axis == "c":
                assert dataset["c"].values.tolist() == [f"stain {i}" for i in range(n)]
            else:
                assert_allclose(dataset[axis], np.arange(n) * size + start, rtol=1e-12, atol=1e-12)
    assert np.prod(expected.shape[-2 if "z" not in run.axes else -3 :]) <= 4 ** (3 if "z" in run.axes else 2)


def assert_shown(omero: dict[str, Any], values: np.ndarray, run: Run, head: str) -> None:
    """Each channel has its name, and a window from its darkest hundredth to its brightest half percent."""
    place = run.axes.find("c")
    each = [values] if place < 0 else list(np.moveaxis(values, place, 0))
    names = [head] if place < 0 else [f"stain {n}" for n in range(len(each))]
    assert [channel["label"] for channel in omero["channels"]] == names
    assert len({channel["color"] for channel in omero["channels"]}) == len(names)
    assert omero["rdefs"]["model"] == ("color" if len(names) > 1 else "greyscale")
    for channel, of_it in zip(omero["channels"], each, strict=True):
        window = [channel["window"][name] for name in ("min", "start", "end", "max")]
        assert_allclose(window, [of_it.min(), *np.percentile(of_it, (1, 99.5)), of_it.max()], rtol=1e-5, atol=1e-9)


def test_windows_of_scores_and_of_integers(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).integers(100, 1000, (2, 40, 40)).astype("uint16")
    settings = {"patch_size": 20, "axes": "cyx", "output_format": "ome-zarr"}
    oocpatch.predict(volume, torch.nn.Identity(), tmp_path / "i.zarr", **settings, output_dtype="uint16")
    first, second = (channel["window"] for channel in metadata(tmp_path / "i.zarr")["omero"]["channels"])
    low, high = np.percentile(volume[0], (1, 99.5))
    assert first == {"min": 0, "max": 65535, "start": np.floor(low), "end": np.ceil(high)}
    assert second != first
    oocpatch.predict(volume, torch.nn.Identity(), tmp_path / "s.zarr", **settings, postprocess="softmax")
    for channel in metadata(tmp_path / "s.zarr")["omero"]["channels"]:
        assert channel["window"] == {"min": 0.0, "max": 1.0, "start": 0.0, "end": 1.0}


def test_a_crash_while_channels_are_described_leaves_an_output_that_the_same_call_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, path, written = RUNS["scaled heads"], tmp_path / "out.zarr", []

    write = LocalPath.write_atomic

    def crash(file: LocalPath, text: str) -> None:
        if "omero" not in text or file.parent == path:
            write(file, text)
            return
        if written:
            raise RuntimeError("as if it was killed")
        written.append(file)
        write(file, text)

    with monkeypatch.context() as patched:
        patched.setattr(LocalPath, "write_atomic", crash)
        with pytest.raises(RuntimeError, match="as if"):
            run.predict(path)
    assert written == [path / "full/zarr.json"]
    run.predict(path)
    run.predict(tmp_path / "other.zarr")
    assert oocpatch.verify(path).passed
    for head in ("full", "half", "double"):
        assert "omero" in metadata(path / head)
        assert metadata(path / head) == metadata(tmp_path / "other.zarr" / head)


def test_the_result_is_the_finest_level_with_dims_coordinates_and_attributes(tmp_path: Path) -> None:
    run = RUNS["time and channels"]
    for _ in range(2):  # written, then opened again
        result = run.predict(tmp_path / "out.zarr")
        volume = run.volume()
        assert result.name == "prediction"
        assert result.dims == ("t", "c", "z", "y", "x")
        assert result.attrs == {"patient": 7}
        xarray.testing.assert_allclose(result.drop_attrs(), volume.drop_attrs())
    dataset = RUNS["labels beside an image"].predict(tmp_path / "heads.zarr")
    assert {name: str(array.dtype) for name, array in dataset.items()} == {
        "scores": "float32",
        "nuclei": "int32",
        "cells": "uint8",
    }
    tree = RUNS["scaled heads"].predict(tmp_path / "scales.zarr")
    assert tree["half/half"].shape == (18, 14)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # consolidated metadata are there
        opened = xarray.open_datatree(tmp_path / "out.zarr", engine="zarr")
        assert list(opened.children)[:2] == ["scale0", "scale1"]
        assert_array_equal(opened["scale0/image"], run.volume())


def test_labels_are_listed_beside_their_image(tmp_path: Path) -> None:
    RUNS["labels beside an image"].predict(tmp_path / "out.zarr")
    assert metadata(tmp_path / "out.zarr" / "labels")["labels"] == ["nuclei", "cells"]
    assert metadata(tmp_path / "out.zarr" / "labels/nuclei")["image-label"] == {"source": {"image": "../../"}}
    RUNS["scaled heads"].predict(tmp_path / "series.zarr")
    assert metadata(tmp_path / "series.zarr" / "OME")["series"] == ["full", "half", "double"]
    with pytest.raises(
        ValueError, match=r"holds 3; pass the path of one of them, such as .*series.zarr/full: full, half"
    ):
        oocpatch.Volume(tmp_path / "series.zarr")


def test_an_ome_zarr_in_gives_an_ome_zarr_out_and_any_of_its_levels_is_an_input(tmp_path: Path) -> None:
    RUNS["3-D"].predict(tmp_path / "first.zarr")
    settings = {"patch_size": 4, "overlap_mode": "crop", "output_chunks": 4}
    oocpatch.predict(tmp_path / "first.zarr", torch.nn.Identity(), tmp_path / "second.zarr", level=1, **settings)
    first, second = (metadata(tmp_path / name)["multiscales"][0] for name in ("first.zarr", "second.zarr"))
    assert second["axes"] == first["axes"]
    assert [d["coordinateTransformations"] for d in second["datasets"]] == [
        d["coordinateTransformations"] for d in first["datasets"][1:]
    ]
    array = zarr.open_array(tmp_path / "second.zarr/scale0/image", mode="r")
    assert_array_equal(array, zarr.open_array(tmp_path / "first.zarr/scale1/image", mode="r"))


def test_means_are_rounded_half_to_even_and_modes_take_the_smallest_of_equals() -> None:
    generator = np.random.default_rng(0)
    for shape, step in (((5, 4), (2, 2)), ((3, 5, 6), (1, 2, 2)), ((4, 3, 7), (2, 2, 2)), ((1, 5), (1, 2))):
        for dtype in ("uint8", "int16", "float32", "uint64"):
            values = generator.integers(0, 5, shape).astype(dtype)
            assert_array_equal(mean(values, step), coarser(values, step, labels=False))
            assert_array_equal(mode(values, step), coarser(values, step, labels=True))
    assert mode(np.array([[True, False], [False, True]]), (2, 2)).tolist() == [[False]]


def test_coordinates_that_are_not_evenly_spaced_are_kept_and_the_scale_is_their_mean(tmp_path: Path) -> None:
    y = np.array([0.0, 1.0, 3.0, 6.0, 7.0, 11.0, 12.0, 14.0])
    volume = xarray.DataArray(np.zeros((8, 8), np.float32), dims=("y", "x"), coords={"y": y, "x": 2.0 * np.arange(8)})
    settings = {"patch_size": 4, "output_chunks": 4, "output_format": "ome-zarr"}
    oocpatch.predict(volume, torch.nn.Identity(), tmp_path / "out.zarr", **settings)
    tree = xarray.open_datatree(tmp_path / "out.zarr", engine="zarr")
    assert_array_equal(tree["scale0/y"], y)
    assert_array_equal(tree["scale1/y"], [0.5, 4.5, 9.0, 13.0])
    transforms = metadata(tmp_path / "out.zarr")["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    assert transforms[0]["scale"] == [2.0, 2.0]


@pytest.mark.parametrize(
    ("volume", "options", "message"),
    [
        (np.zeros(16, "f4"), {"axes": "x"}, "an OME-Zarr must have two or three axes in space"),
        (np.zeros((4,) * 4, "f4"), {"axes": "wzyx"}, "two or three axes in space .* got w, z, y, x"),
        (
            xarray.DataArray(np.zeros((8, 8), "f4"), dims=("y", "x"), coords={"y": np.zeros(8)}),
            {},
            "coordinates must increase or decrease along each axis in an OME-Zarr, got 0.0 to 0.0 along y",
        ),
        (np.zeros((8, 8), "f4"), {"output_format": "ome"}, "output_format must be one of auto, zarr, ome-zarr, got"),
    ],
    ids=["one axis", "four axes", "constant", "unknown"],
)
def test_what_no_ome_zarr_can_be_is_refused(volume: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings = {"patch_size": 4, "output_format": "ome-zarr", **options}
    with pytest.raises(ValueError, match=message):
        oocpatch.predict(volume, torch.nn.Identity(), tmp_path / "out.zarr", **settings)
    assert not (tmp_path / "out.zarr").exists()


def test_another_format_is_another_run_and_overwrite_changes_it(tmp_path: Path) -> None:
    run = Run("yx", (16, 16), {"y": 1.0, "x": 1.0})
    formats = ["ome-zarr", "zarr", "ome-zarr"]
    run.predict(tmp_path / "out.zarr", output_format=formats[0])
    zarr.create_array(tmp_path / "out.zarr" / "mine", data=np.arange(3))
    for output_format in formats[1:]:
        with pytest.raises(oocpatch.RunMismatch, match="output_format"):
            run.predict(tmp_path / "out.zarr", output_format=output_format)
        result = run.predict(tmp_path / "out.zarr", output_format=output_format, overwrite=True)
        assert_array_equal(result, run.volume())
        if output_format != "zarr":
            yaozarrs.validate_zarr_store(str(tmp_path / "out.zarr"))
        names = {p.name for p in (tmp_path / "out.zarr").iterdir()}
        assert names & {"scale0", "prediction"} == ({"prediction"} if output_format == "zarr" else {"scale0"})
        assert zarr.open_array(tmp_path / "out.zarr" / "mine", mode="r")[...].tolist() == [0, 1, 2]


def test_a_pyramid_that_needs_too_much_memory_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    volume = zarr.create_array(tmp_path / "in.zarr", shape=(2048, 4096), chunks=(256, 256), dtype="float32")
    settings = {"patch_size": 64, "output_format": "ome-zarr", "output_shards": 2048, "output_chunks": 256}
    plain = oocpatch.plan(volume, torch.nn.Identity(), tmp_path / "o", **{**settings, "output_format": "zarr"})
    plan = oocpatch.plan(volume, torch.nn.Identity(), tmp_path / "out.zarr", **settings)
    assert plan.projected_memory >= plain.projected_memory
    with pytest.raises(oocpatch.PlanTooLarge, match="max_memory"):
        oocpatch.plan(volume, torch.nn.Identity(), tmp_path / "out.zarr", **settings, max_memory="40MiB")
    assert not (tmp_path / "out.zarr").exists()


def halved(patches: torch.Tensor) -> torch.Tensor:
    return patches[(..., *(slice(None, None, 2),) * (patches.ndim - 2))]


def doubled(patches: torch.Tensor) -> torch.Tensor:
    for axis in range(2, patches.ndim):
        patches = patches.repeat_interleave(2, axis)
    return patches


HEADS: dict[str, Any] = {
    "image and labels": lambda p: {"image": p / 2, "labels": p[:, :1].int()},
    "smaller labels": lambda p: {"image": p / 2, "labels": halved(p[:, :1]).int()},
    "labels of a smaller image": lambda p: {"image": halved(p) / 2, "labels": p[:, :1].int()},
    "larger labels": lambda p: {"image": p / 2, "labels": doubled(p[:, :1]).int()},
    "labels of two sizes": lambda p: {"image": p / 2, "labels": p[:, :1].int(), "small": halved(p[:, :1]).int()},
    "two images and labels": lambda p: {"image": p / 2, "half": halved(p) / 2, "labels": halved(p[:, :1]).int()},
    "labels alone": lambda p: {"labels": p[:, :1].int(), "small": halved(p[:, :1]).int()},
    "small image": lambda p: {"half": halved(p) / 2},
    "labels of several channels": lambda p: {"image": p / 2, "labels": torch.cat([p[:, :1]] * 2, 1).int()},
    "as many labels as channels": lambda p: {"image": p / 2, "labels": p.int()},
    "images of several channels": lambda p: {"image": p / 2, "two": torch.cat([p[:, :1]] * 2, 1) / 2},
    "scores and labels": lambda p: {"scores": torch.cat([p[:, :1]] * 4, 1) / 2, "labels": p[:, :1].int()},
}


@pytest.mark.parametrize(
    ("case", "axes"),
    [(case, axes) for number, case in enumerate(HEADS) for axes in (("yx", "cyx")[number % 2], "tczyx")],
)
def test_heads_of_any_scale_and_channels_are_valid_and_have_their_values(case: str, axes: str, tmp_path: Path) -> None:
    model = HEADS[case]
    sizes = {"t": 2, "c": 3, "z": 8, "y": 8, "x": 16}
    data = np.random.default_rng(2).integers(0, 9, [sizes[a] for a in axes]).astype("float32")
    coords = {a: (a, np.arange(sizes[a]) * 0.5 + 3, {"units": "um"}) for a in axes if a in "zyx"}
    volume = xarray.DataArray(data, {**coords, **({"c": ["r", "g", "b"]} if "c" in axes else {})}, dims=tuple(axes))
    output = tmp_path / "out.zarr"
    settings: dict[str, Any] = {"patch_size": 8, "overlap_mode": "crop", "output_chunks": 4, "progress": False}
    result = oocpatch.predict(volume, model, output, output_format="ome-zarr", **settings)
    yaozarrs.validate_zarr_store(str(output))
    assert ome_faults(output) == []
    plain = oocpatch.predict(volume, model, tmp_path / "plain.zarr", output_format="zarr", **settings)
    batch = torch.from_numpy(data if "t" in axes else data[None])
    expected = {k: v.numpy() for k, v in model(batch if "c" in axes else batch[:, None]).items()}
    for given in (result, plain):
        is_tree = isinstance(given, xarray.DataTree)
        heads = {name: node[name] for name, node in given.children.items()} if is_tree else given
        heads = {"half": given} if isinstance(given, xarray.DataArray) else heads
        for name, right in expected.items():
            assert np.array_equal(np.ravel(heads[name]), np.ravel(right))
            assert heads[name].squeeze().shape == right.squeeze().shape


@pytest.mark.parametrize("axes", ["yx", "zyx", "cyx", "tyx", "tcyx", "tczyx", "yxc"])
def test_labels_have_the_axes_that_viewers_give_their_image(axes: str, tmp_path: Path) -> None:
    """They split the image by channels, and the sliders of both must be the same ones."""
    sizes = {"t": 2, "c": 3, "z": 8, "y": 16, "x": 24}
    volume = xarray.DataArray(np.ones([sizes[a] for a in axes], np.float32), dims=tuple(axes))
    settings: dict[str, Any] = {"patch_size": 8, "overlap_mode": "crop", "output_format": "ome-zarr"}
    out, other = tmp_path / "out.zarr", tmp_path / "out.zarr/labels/other"
    oocpatch.predict(volume, HEADS["image and labels"], out, **settings)
    oocpatch.predict(volume, lambda p: p[:, :1], other, **settings, postprocess="threshold")
    layers = [axis["name"] for axis in metadata(out)["multiscales"][0]["axes"] if axis["type"] != "channel"]
    for labels in (out / "labels/labels", other):
        assert [axis["name"] for axis in metadata(labels)["multiscales"][0]["axes"]] == layers
    assert ome_faults(out) == []


def test_coordinates_of_heads_with_other_channels_are_their_own(tmp_path: Path) -> None:
    volume = xarray.DataArray(np.ones((3, 8, 8), np.float32), {"c": ["r", "g", "b"]}, dims=("c", "y", "x"))
    for name in ("zarr", "ome-zarr"):
        result = oocpatch.predict(
            volume, lambda p: {"one": p[:, :1], "all": p}, tmp_path / name, patch_size=8, output_format=name
        )
        assert {n: a.dims for n, a in result.items()} == {"one": ("c_one", "y", "x"), "all": ("c", "y", "x")}
        assert result["all"]["c"].values.tolist() == ["r", "g", "b"]
