"""Volumes that could not be opened, or were opened as something else: each has the values that its writer gave it."""

from __future__ import annotations

import itertools
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import torch
import xarray
import zarr

import oocpatch
from oocpatch.planning.box import Box
from tests.conftest import Command
from tests.support.web import web_server

Array = npt.NDArray[Any]
DATA = np.random.default_rng(0).integers(1, 1000, (8, 24, 32)).astype(np.uint16)
AXES = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]


def values(volume: oocpatch.Volume) -> Array:
    return volume.read(Box.of_shape(volume.shape))


def scale(*numbers: float) -> dict[str, Any]:
    return {"type": "scale", "scale": list(numbers)}


def translation(*numbers: float) -> dict[str, Any]:
    return {"type": "translation", "translation": list(numbers)}


def image(path: Path | zarr.Group, name: str = "", paths: tuple[str, ...] = ("0", "1", "2"), factor: int = 1) -> None:
    """Write an OME-Zarr of version 0.5, a level of which is twice as coarse as the one before."""
    group = zarr.create_group(path) if isinstance(path, Path) else path
    datasets = []
    for level, inner in enumerate(paths):
        group.create_array(inner, data=factor * DATA[:: 2**level, :: 2**level, :: 2**level], chunks=(4, 8, 8))
        datasets.append({"path": inner, "coordinateTransformations": [scale(*[2.0**level] * 3)]})
    multiscale = {"name": name, "axes": AXES, "datasets": datasets}
    ome = dict(group.attrs).get("ome", {"version": "0.5", "multiscales": []})
    group.attrs["ome"] = {**ome, "multiscales": [*ome["multiscales"], multiscale]}


@pytest.mark.parametrize("consolidated", [False, True])
@pytest.mark.parametrize("level", [0, 1, 2, -1, "0", "1", "2"], ids=repr)
def test_levels_that_are_there_are_read_and_others_are_named(
    level: int | str, consolidated: bool, tmp_path: Path
) -> None:
    image(tmp_path / "a.zarr")
    if consolidated:
        with pytest.warns():
            zarr.consolidate_metadata(tmp_path / "a.zarr")
    shutil.rmtree(tmp_path / "a.zarr/1")
    if level in (1, "1"):
        with pytest.raises(ValueError, match=r"level must be one that is there.*level .?1.? of .*1 \(1: is missing\)"):
            oocpatch.Volume(tmp_path / "a.zarr", level=level)
        return
    step = 4 if level in (2, -1, "2") else 1
    assert np.array_equal(values(oocpatch.Volume(tmp_path / "a.zarr", level=level))[0], DATA[::step, ::step, ::step])


def test_a_pyramid_with_a_missing_level_is_a_tree_of_the_others(tmp_path: Path) -> None:
    image(tmp_path / "a.zarr")
    shutil.rmtree(tmp_path / "a.zarr/1")
    tree = xarray.open_datatree(tmp_path / "a.zarr", engine="oocpatch")
    assert sorted(tree.children) == ["scale0", "scale2"]


SYSTEMS_06: dict[str, tuple[dict[str, Any], list[float], list[float]]] = {
    "scale": (scale(2, 0.5, 0.5), [2, 0.5, 0.5], [0, 0, 0]),
    "translation": (translation(1, 2, 3), [1, 1, 1], [1, 2, 3]),
    "identity": ({"type": "identity"}, [1, 1, 1], [0, 0, 0]),
    "scale, then translation": (
        {"type": "sequence", "transformations": [scale(2, 1, 1), translation(1, 2, 3)]}, [2, 1, 1], [1, 2, 3]
    ),
    "translation, then scale": (
        {"type": "sequence", "transformations": [translation(1, 2, 3), scale(2, 1, 1)]}, [2, 1, 1], [2, 2, 3]
    ),
    "nested": (
        {"type": "sequence", "transformations": [
            {"type": "sequence", "transformations": [scale(2, 1, 1), {"type": "identity"}]}, translation(1, 0, 0)]},
        [2, 1, 1], [1, 0, 0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SYSTEMS_06)
@pytest.mark.parametrize("as_objects", [False, True])
def test_version_06_has_the_axes_and_the_transformation_of_its_own_system(
    kind: str, as_objects: bool, tmp_path: Path
) -> None:
    transformation, steps, starts = SYSTEMS_06[kind]
    ends = {"input": {"path": "s0"}, "output": {"name": "own"}} if as_objects else {"input": "s0", "output": "own"}
    others = [{"name": name, "type": "space"} for name in "abc"]
    multiscale = {
        "coordinateSystems": [{"name": "other", "axes": others}, {"name": "own", "axes": AXES}],
        "datasets": [{"path": "s0", "coordinateTransformations": [{**transformation, **ends}]}],
        "coordinateTransformations": [{**scale(9, 9, 9), "input": "own", "output": "other"}],
    }
    group = zarr.create_group(tmp_path / "a.zarr", attributes={"ome": {"version": "0.6", "multiscales": [multiscale]}})
    group.create_array("s0", data=DATA, chunks=(4, 8, 8))
    volume = oocpatch.Volume(tmp_path / "a.zarr")
    assert volume.names == ("z", "y", "x")
    for name, n, step, start in zip("zyx", DATA.shape, steps, starts, strict=True):
        assert np.allclose(volume.source.coords[name], start + step * np.arange(n))
        assert volume.source.coords[name].attrs == {"units": "micrometer"}


@pytest.mark.parametrize("kind", ["affine", "rotation", "mapAxis", "displacements", None])
def test_what_version_06_cannot_have_as_coordinates_is_refused_with_the_version(kind: str, tmp_path: Path) -> None:
    transformation = {"type": kind, "input": "s0", "output": "own"}
    datasets = [{"path": "s0", "coordinateTransformations": [transformation]}]
    multiscale = {"coordinateSystems": [{"name": "own", "axes": AXES}], "datasets": datasets}
    group = zarr.create_group(tmp_path / "a.zarr", attributes={"ome": {"version": "0.6", "multiscales": [multiscale]}})
    group.create_array("s0", data=DATA, chunks=(4, 8, 8))
    with pytest.raises(ValueError, match=rf"version 0\.6.*scaled and translated.*{kind}"):
        oocpatch.Volume(tmp_path / "a.zarr")


def test_a_series_of_one_image_is_that_image(tmp_path: Path) -> None:
    root = zarr.create_group(tmp_path / "a.zarr", attributes={"ome": {"version": "0.5", "bioformats2raw.layout": 3}})
    image(root.create_group("0"))
    volume = oocpatch.Volume(tmp_path / "a.zarr", level=1)
    assert np.array_equal(values(volume)[0], DATA[::2, ::2, ::2])
    assert volume.source.coords["z"][1] == 2


def test_a_plate_with_a_missing_well_lists_the_others(tmp_path: Path) -> None:
    wells = [{"path": f"A/{number}", "rowIndex": 0, "columnIndex": number} for number in (1, 2, 3)]
    plate = zarr.create_group(tmp_path / "a.zarr", attributes={"ome": {"version": "0.5", "plate": {"wells": wells}}})
    for number in (2, 3):
        well = {"version": "0.5", "well": {"images": [{"path": "0"}]}}
        image(plate.create_group(f"A/{number}", attributes={"ome": well}).create_group("0"))
    with pytest.raises(ValueError, match=r"holds 2; pass the path of one of them, such as .*A/2/0: A/2/0, A/3/0$"):
        oocpatch.Volume(tmp_path / "a.zarr")
    assert np.array_equal(values(oocpatch.Volume(tmp_path / "a.zarr/A/3/0"))[0], DATA)
    with web_server(tmp_path) as url:  # which lists no members
        with pytest.raises(ValueError, match=rf"holds 2; .* such as {url}/a.zarr/A/2/0: A/2/0, A/3/0$"):
            oocpatch.Volume(f"{url}/a.zarr")
        field = oocpatch.Volume(f"{url}/a.zarr/A/3/0", level=1)
        assert np.array_equal(values(field)[0], DATA[::2, ::2, ::2])
        assert field.source.coords["z"][1] == 2


def test_of_two_images_in_a_group_the_first_is_taken_and_named_and_another_can_be_chosen(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "a.zarr")
    image(group, "raw", ("a0", "a1"))
    image(group, "denoised", ("b0", "b1"), factor=2)
    with pytest.warns(UserWarning, match=r"holds 2 images; the first of them was opened: raw .*; denoised \(b0, b1\)"):
        volume = oocpatch.Volume(tmp_path / "a.zarr")
    assert np.array_equal(values(volume)[0], DATA)
    assert np.array_equal(values(oocpatch.Volume(tmp_path / "a.zarr", level="denoised"))[0], 2 * DATA)
    assert np.array_equal(values(oocpatch.Volume(tmp_path / "a.zarr", level="b1"))[0], 2 * DATA[::2, ::2, ::2])


def zipped(folder: Path, archive: Path, *, inside: str = "") -> Path:
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            file.write(path, Path(inside, path.relative_to(folder)))
    return archive


@pytest.mark.parametrize("name", ["a.zarr.zip", "a.ozx", "a.ZIP"])
@pytest.mark.parametrize("inside", ["", "a.zarr"])
def test_a_zarr_in_a_zip_file_is_read_by_its_path(name: str, inside: str, tmp_path: Path) -> None:
    image(tmp_path / "a.zarr")
    archive = zipped(tmp_path / "a.zarr", tmp_path / name, inside=inside)
    volume = oocpatch.Volume(archive, level=1)
    assert np.array_equal(values(volume)[0], DATA[::2, ::2, ::2])
    assert np.array_equal(values(pickle.loads(pickle.dumps(volume)))[0], DATA[::2, ::2, ::2])  # noqa: S301 - our own
    assert np.array_equal(values(oocpatch.Volume(archive / "2"))[0], DATA[::4, ::4, ::4])
    mask = zipped(tmp_path / "a.zarr", tmp_path / f"mask-{name}", inside=inside)
    settings: dict[str, Any] = {"patch_size": 8, "overlap_mode": "crop", "progress": False}
    result = oocpatch.predict(archive, "identity", tmp_path / "out.zarr", mask=mask, **settings)
    assert np.array_equal(np.asarray(result).squeeze(), DATA)
    image(tmp_path / "b.zarr", factor=3)
    zipped(tmp_path / "b.zarr", tmp_path / name, inside=inside)
    with pytest.raises(oocpatch.RunMismatch, match="volume"):
        oocpatch.predict(archive, "identity", tmp_path / "out.zarr", mask=mask, **settings)


@pytest.mark.parametrize("name", ["out.zarr.zip", "out.ozx"])
def test_a_zip_file_is_no_output(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"output must be a directory.*write out\.zarr and zip it"):
        oocpatch.predict(DATA, "identity", tmp_path / name, patch_size=8, progress=False)
    with pytest.raises(ValueError, match="output must be a directory"):
        oocpatch.convert(DATA, tmp_path / name)


def test_a_zip_file_of_something_else_is_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"volume cannot be read: .*a\.zip must be a Zarr array or group"):
        oocpatch.Volume(tmp_path / "a.zip")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    zarr.create_array(tmp_path / "home/a.zarr", data=DATA, chunks=(4, 8, 8), dimension_names="zyx")
    np.save(tmp_path / "home/mask.npy", DATA)
    return tmp_path / "home"


def test_a_tilde_is_the_home_directory_in_every_path(home: Path) -> None:
    (home / "net.py").write_text("import torch\nnet = torch.nn.Conv3d(1, 1, 1)\n")
    weights = {"weight": torch.full((1, 1, 1, 1, 1), 2.0), "bias": torch.zeros(1)}
    torch.save(weights, home / "weights.pt")
    tifffile.imwrite(home / "a.tif", DATA, photometric="minisblack")
    assert np.array_equal(values(oocpatch.Volume("~/a.tif"))[0], DATA)
    assert np.array_equal(values(oocpatch.Volume(Path("~/a.zarr")))[0], DATA)
    result = oocpatch.predict(
        "~/a.zarr", "~/net.py:net", "~/out.zarr", patch_size=8, mask="~/a.zarr", weights="~/weights.pt",
        workspace="~/work", progress=False,
    )  # fmt: skip
    assert np.allclose(result, 2.0 * DATA)
    oocpatch.convert("~/a.zarr", "~/copy.zarr", progress=False)
    assert np.array_equal(values(oocpatch.Volume(home / "copy.zarr"))[0], DATA)
    assert (home / "out.zarr").is_dir()
    assert not list(Path().iterdir())


def test_a_tilde_is_the_home_directory_on_the_command_line_and_in_toml(home: Path, command: Command) -> None:
    (home / "run.toml").write_text(
        'volume = "~/a.zarr"\noutput = "~/toml.zarr"\nmodel = "identity"\npatch_size = 8\nmask = "~/a.zarr"\n'
    )
    code, _, err = command("predict", "--config=~/run.toml")
    assert code == 0, err
    assert (home / "toml.zarr").is_dir()
    assert not list(Path().iterdir())


def test_a_name_that_only_begins_with_a_tilde_is_a_name(home: Path) -> None:
    shutil.copytree(home / "a.zarr", "~draft.zarr")
    assert np.array_equal(values(oocpatch.Volume("~draft.zarr"))[0], DATA)


FIVE = np.random.default_rng(1).integers(0, 255, (2, 3, 4, 20, 24)).astype(np.uint8)
NAMED: dict[str, tuple[Array, dict[str, Any], str | None, str]] = {
    "five without names": (FIVE, {}, None, "tczyx"),
    "five without names, given": (FIVE, {}, "tzcyx", "tzcyx"),
    "four without names": (FIVE[0], {}, None, "czyx"),
    "four without names, given": (FIVE[0], {}, "tzyx", "tzyx"),
    "three, given": (FIVE[0, 0], {}, "cyx", "cyx"),
    "three, given a name of its own": (FIVE[0, 0], {}, "ayx", "ayx"),
    "six, given": (np.stack([FIVE] * 2), {}, "stczyx", "stczyx"),
    "ImageJ, wrong": (FIVE[0], {"imagej": True, "metadata": {"axes": "ZCYX"}}, "czyx", "czyx"),
    "ImageJ, right": (FIVE[0], {"imagej": True, "metadata": {"axes": "ZCYX"}}, None, "zcyx"),
    "OME, planes as channels": (FIVE[0, 0], {"ome": True, "metadata": {"axes": "CYX"}}, "zyx", "zyx"),
    "OME, time as planes": (FIVE[0], {"ome": True, "metadata": {"axes": "ZCYX"}}, "tcyx", "tcyx"),
    "OME, as they are": (FIVE[0], {"ome": True, "metadata": {"axes": "ZCYX"}}, "zcyx", "zcyx"),
}


@pytest.mark.parametrize("kind", NAMED)
def test_axes_of_a_tiff_are_those_that_the_user_gives(kind: str, tmp_path: Path) -> None:
    data, options, axes, expected = NAMED[kind]
    path = tmp_path / ("a.ome.tif" if options.get("ome") else "a.tif")
    tifffile.imwrite(path, data, photometric="minisblack", **options)
    volume = oocpatch.Volume(path, axes)
    result = oocpatch.predict(
        path, "identity", tmp_path / "out.zarr", axes=axes, patch_size=4, overlap_mode="crop", progress=False
    )
    wanted = xarray.DataArray(data, dims=tuple(expected))
    assert volume.axes.names == tuple(expected)
    assert np.array_equal(result.transpose(*expected), wanted)


def test_axes_that_were_renamed_lose_the_coordinates_of_another_axis(tmp_path: Path) -> None:
    metadata = {"axes": "ZYX", "PhysicalSizeZ": 3.0, "PhysicalSizeX": 0.5}
    tifffile.imwrite(tmp_path / "a.ome.tif", DATA, metadata=metadata, photometric="minisblack")
    assert sorted(oocpatch.Volume(tmp_path / "a.ome.tif").source.coords) == ["x", "z"]
    assert sorted(oocpatch.Volume(tmp_path / "a.ome.tif", "tyx").source.coords) == ["x"]


def test_six_axes_without_names_need_axes(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.stack([FIVE] * 2), photometric="minisblack")
    with pytest.raises(ValueError, match="axes must be given for a volume"):
        oocpatch.Volume(tmp_path / "a.tif")


BASE = torch.arange(2 * 9 * 10 * 11, dtype=torch.float32).reshape(2, 9, 10, 11)
TENSORS: dict[str, tuple[torch.Tensor, Array]] = {
    "contiguous": (BASE, BASE.numpy()),
    "slices": (BASE[:, ::2, 1:], BASE.numpy()[:, ::2, 1:]),
    "transposed": (BASE.permute(0, 3, 1, 2), BASE.numpy().transpose(0, 3, 1, 2)),
    "flipped": (BASE.flip(1), BASE.numpy()[:, ::-1]),
    "expanded": (BASE[:1].expand(2, -1, -1, -1), BASE.numpy()[[0, 0]]),
    "with gradients": (BASE.clone().requires_grad_(), BASE.numpy()),
    "a parameter": (torch.nn.Parameter(BASE), BASE.numpy()),
    "negative view": (torch._neg_view(BASE), -BASE.numpy()),
    "half": (BASE.half(), BASE.numpy().astype(np.float16)),
    "bfloat16": (BASE.bfloat16(), BASE.bfloat16().float().numpy()),
    "bool": (BASE % 2 == 0, BASE.numpy() % 2 == 0),
    "int16": (BASE.short(), BASE.numpy().astype(np.int16)),
    "uint16": (BASE.to(torch.uint16), BASE.numpy().astype(np.uint16)),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_torch_tensor_is_a_volume(kind: str, tmp_path: Path) -> None:
    tensor, expected = TENSORS[kind]
    assert np.array_equal(values(oocpatch.Volume(tensor)), expected)
    result = oocpatch.predict(
        tensor, "identity", tmp_path / "out.zarr", patch_size=4, overlap_mode="crop", progress=False
    )
    assert np.array_equal(result, expected)
    assert result.dtype == expected.dtype


def test_a_tensor_without_values_is_refused() -> None:
    for tensor in (torch.empty(4, 4, device="meta"), torch.eye(4).to_sparse()):
        with pytest.raises(TypeError, match="a tensor must be dense and have values"):
            oocpatch.Volume(tensor)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("patch_size", [8, 16, (16, 8), 5])
@pytest.mark.parametrize("shape", [(48, 32), (50, 37)])
def test_one_answer_per_patch_is_a_voxel_per_patch(
    channels: int, patch_size: Any, shape: tuple[int, int], tmp_path: Path
) -> None:
    data = np.random.default_rng(0).random((2, *shape), dtype=np.float32)
    sides = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size

    def model(patches: torch.Tensor) -> torch.Tensor:
        return patches.amax((1, 2, 3))[:, None, None, None] * torch.arange(1, channels + 1)[None, :, None, None]

    result = oocpatch.predict(
        data, model, tmp_path / "out.zarr", axes="cyx", patch_size=patch_size, overlap_mode="crop", progress=False
    )
    counts = [-(-n // side) for n, side in zip(shape, sides, strict=True)]
    padded = np.pad(data, [(0, 0), *((0, c * s - n) for c, s, n in zip(counts, sides, shape, strict=True))], "edge")
    wanted = padded.reshape(2, counts[0], sides[0], counts[1], sides[1]).max((0, 2, 4))
    wanted = np.stack([wanted * c for c in range(1, channels + 1)])
    assert np.allclose(result, wanted[0] if channels == 1 else wanted)
    assert np.allclose(result.y, (sides[0] - 1) / 2 + sides[0] * np.arange(counts[0]))


def test_one_answer_per_patch_says_how_to_overlap_and_what_to_return(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"axes": "cyx", "patch_size": 8, "progress": False}
    data = np.zeros((1, 32, 32), np.float32)
    with pytest.raises(
        ValueError, match=r"patch_overlap must be 0, or even where all .* one answer .* expand its answer"
    ):
        oocpatch.plan(data, lambda p: p.mean((2, 3), True), tmp_path / "a.zarr", patch_overlap=3, **settings)
    with pytest.raises(ValueError, match=r"return answer\[:, None\] for rows, answer\[:, None, None, None\] for a map"):
        oocpatch.plan(data, lambda p: p.mean((1, 2, 3)), tmp_path / "a.zarr", **settings)


def test_one_answer_per_patch_is_a_voxel_per_stride_in_the_middle_of_its_patch(tmp_path: Path) -> None:
    data = np.random.default_rng(0).random((37, 45), dtype=np.float32)
    result = oocpatch.predict(
        data, lambda p: p.mean((2, 3), True), tmp_path / "a.zarr", axes="yx", patch_size=(8, 12), patch_overlap=(4, 2),
        overlap_mode="crop", block_shape=16, progress=False,
    )  # fmt: skip
    padded = np.pad(data, [(2, 14), (1, 21)], "edge")
    starts = [range(0, 37, 4), range(0, 45, 10)]
    wanted = [[padded[y : y + 8, x : x + 12].mean() for x in starts[1]] for y in starts[0]]
    assert np.allclose(result, wanted)
    assert np.allclose(result.y, 1.5 + np.arange(0, 37, 4))
    assert np.allclose(result.x, 4.5 + np.arange(0, 45, 10))


@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=3)), ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_a_nifti_of_any_orientation_becomes_an_ome_zarr_with_its_coordinates(
    signs: tuple[int, ...], turned: bool, tmp_path: Path
) -> None:
    data = np.random.default_rng(0).integers(0, 999, (20, 18, 16)).astype(np.int16)
    affine = np.diag([*(sign * zoom for sign, zoom in zip(signs, (1.5, 2.0, 0.5), strict=True)), 1.0])
    affine[:3, 3] = (10, -20, 5)
    nibabel.save(nibabel.Nifti1Image(data, affine[[1, 2, 0, 3]] if turned else affine), tmp_path / "a.nii")
    result = oocpatch.predict(
        tmp_path / "a.nii", "identity", tmp_path / "out.zarr", patch_size=8, overlap_mode="crop", progress=False,
        output_format="ome-zarr", output_chunks=8,
    )  # fmt: skip
    again = oocpatch.Volume(tmp_path / "out.zarr")
    coarse = oocpatch.Volume(tmp_path / "out.zarr", level=1)
    stored = dict(zarr.open_group(tmp_path / "out.zarr", mode="r").attrs)["ome"]["multiscales"][0]
    assert np.array_equal(result.transpose("x", "y", "z"), data)
    for axis, name in enumerate("xyz"):
        step, start = (abs(affine[axis, axis]), 0.0) if turned else (affine[axis, axis], affine[axis, 3])
        expected = start + step * np.arange(data.shape[axis])
        assert np.allclose(result[name], expected)
        assert np.allclose(again.source.coords[name], expected)
        centres = coarse.source.coords[name]
        assert np.allclose(centres, expected.reshape(len(centres), -1).mean(1))
    for dataset in stored["datasets"]:
        assert all(value > 0 for value in dataset["coordinateTransformations"][0]["scale"])
