"""Pictures: what lies in the volume lies in the PNG, in its colour, at its place, in its proportions."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tifffile
import torch
import zarr
from click.testing import CliRunner
from PIL import Image

import oocpatch
from oocpatch.cli import main as cli
from oocpatch.visualization.canvas import Panel
from oocpatch.visualization.colormaps import GREENS, label_colour, labels_to_rgb
from oocpatch.visualization.display_source import open_display_source
from oocpatch.visualization.picture import figure_of
from oocpatch.visualization.slices import places, plane, projection, sample
from oocpatch.volumes.volume import Volume

Array = np.ndarray[Any, Any]


def labels() -> Array:
    """Label 3 in one octant of `(z, y, x)`, label 1 in a thin plate that no middle slice but one touches."""
    volume = np.zeros((32, 48, 64), np.uint8)
    volume[16:, 24:, 32:] = 3
    volume[:4, :10, :12] = 1
    return volume


def drawn(sheet_path: Path, panels: list[tuple[tuple[int, int], Panel]]) -> list[Array]:
    """The panels as they are in the PNG."""
    picture = np.asarray(Image.open(sheet_path))
    return [picture[y : y + p.picture.shape[0], x : x + p.picture.shape[1]] for (x, y), p in panels]


def test_a_label_has_its_colour_at_its_place_in_each_panel(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "labels.zarr", data=labels(), chunks=(8, 16, 16), dimension_names=("z", "y", "x"))
    made = oocpatch.view(tmp_path / "labels.zarr", pixels=128)
    assert made == tmp_path / "labels.zarr.png"
    yx, zx, zy, highest = drawn(made, figure_of(tmp_path / "labels.zarr", pixels=128).corners())
    assert [p.shape[:2] for p in (yx, zx, zy, highest)] == [(96, 128), (64, 128), (64, 96), (96, 128)]
    for panel, upper in ((yx, (0, 0, 0)), (zx, (0, 0, 0)), (zy, (0, 0, 0)), (highest, label_colour(1))):
        height, width = panel.shape[:2]
        assert (panel[height // 2 :, width // 2 :] == label_colour(3)).all()
        assert (panel[2, 2] == upper).all()
        assert (panel[height // 2 - 1, width - 1] == 0).all()
    # 10 of 48 rows and 12 of 64 columns, at twice the size
    assert (highest[:20, :24] == label_colour(1)).all()
    assert (highest[:48, 24:] == 0).all()


def test_a_result_is_laid_over_the_input_that_its_run_noted(tmp_path: Path) -> None:
    values = np.zeros((32, 40), np.float32)
    values[:, 20:] = 1
    values[8:16, 30:] = 2
    zarr.create_array(tmp_path / "in.zarr", data=values, chunks=(16, 16), dimension_names=("y", "x"))

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([(x < 2) * 1.0, (x == 2) * 1.0], 1)

    oocpatch.predict(
        tmp_path / "in.zarr", model, tmp_path / "out.zarr", patch_size=8, postprocess="argmax", progress=False
    )
    made = oocpatch.view(tmp_path / "out.zarr", pixels=80)
    above, below = drawn(made, figure_of(tmp_path / "out.zarr", pixels=80).corners())
    assert above.shape == below.shape == (64, 80, 3)
    assert (above[:, :40] == 0).all()
    assert (above[40:, 40:] == 128).all()  # 1 of 0 to 2
    np.testing.assert_array_equal(below[40:], above[40:])
    mixed = 0.55 * 255 + 0.45 * np.array(label_colour(1))
    assert np.abs(below[17:31, 61:] - mixed).max() <= 1
    for edge in (below[16, 60:], below[31, 60:], below[16:32, 60]):
        assert (edge == label_colour(1)).all()
    alone = oocpatch.view(tmp_path / "out.zarr", tmp_path / "alone.png", volume=False, pixels=80)
    (only,) = drawn(alone, figure_of(tmp_path / "out.zarr", volume=False, pixels=80).corners())
    assert (only[16:32, 60:] == label_colour(1)).all()
    assert (only[:16] == 0).all()


def test_an_image_stands_below_its_input_each_channel_in_a_window_of_its_own(tmp_path: Path) -> None:
    values = np.zeros((32, 40), np.float32)
    values[:, 20:] = 1
    zarr.create_array(tmp_path / "in.zarr", data=values, chunks=(16, 16), dimension_names=("y", "x"))

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([1000 + x, -5 * x], 1)

    oocpatch.predict(tmp_path / "in.zarr", model, tmp_path / "out.zarr", patch_size=8, progress=False)
    made = oocpatch.view(tmp_path / "out.zarr", pixels=80)
    sheet = figure_of(tmp_path / "out.zarr", pixels=80)
    assert [row[0].caption for row in sheet.rows] == ["input, yx", "result, yx"]
    _, below = drawn(made, sheet.corners())
    assert (below[:, :40] == label_colour(2)).all()  # the second is at its highest where the first is at its lowest
    assert (below[:, 40:] == label_colour(1)).all()
    assert [text for _, text in sheet.legend] == ["channel 0", "channel 1"]


def test_channels_have_the_colours_of_an_ome_zarr(tmp_path: Path) -> None:
    axes = [{"name": "c", "type": "channel"}, *({"name": name, "type": "space"} for name in "yx")]
    datasets = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1, 1, 1]}]}]
    channels = [{"label": "DAPI", "color": "0000FF"}, {"label": "cFos", "color": "FF8000"}]
    ome = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}], "omero": {"channels": channels}}
    values = np.zeros((2, 16, 16), np.uint16)
    values[0, :, :8] = values[1, :, 8:] = 1000
    group = zarr.create_group(tmp_path / "a.zarr", attributes={"ome": ome})
    group.create_array("0", data=values)
    sheet = figure_of(tmp_path / "a.zarr", pixels=16)
    assert sheet.legend == (((0, 0, 255), "DAPI"), ((255, 128, 0), "cFos"))
    (panel,) = drawn(oocpatch.view(tmp_path / "a.zarr", pixels=16), sheet.corners())
    assert (panel[:, :8] == (0, 0, 255)).all()
    assert (panel[:, 8:] == (255, 128, 0)).all()
    with pytest.raises(ValueError, match=r"picture must end in \.png, got .*a\.jpg"):
        oocpatch.view(tmp_path / "a.zarr", tmp_path / "a.jpg")


def test_scores_over_a_bright_picture_are_dark_and_no_stain(tmp_path: Path) -> None:
    slide = np.full((3, 32, 40), 240, np.uint8)
    slide[:, 8:16] = 200
    zarr.create_array(tmp_path / "in.zarr", data=slide, chunks=(3, 16, 16), dimension_names=("c", "y", "x"))

    def model(x: torch.Tensor) -> torch.Tensor:
        return (x[:, :1] < 220) * 1.0

    oocpatch.predict(tmp_path / "in.zarr", model, tmp_path / "out.zarr", patch_size=8, progress=False)
    made = oocpatch.view(tmp_path / "out.zarr", pixels=80)
    sheet = figure_of(tmp_path / "out.zarr", pixels=80)
    _, below = drawn(made, sheet.corners())
    assert (below[16:32] == GREENS[1][-1]).all()
    assert (below[:16] == 240).all()
    assert sheet.legend[-1] == (GREENS[1][-1], "1")


def test_the_colour_of_a_label_depends_on_nothing_else_and_differs_from_that_of_numbers_nearby() -> None:
    labels = np.arange(20_000).reshape(100, 200)
    colours = labels_to_rgb(labels)
    np.testing.assert_array_equal(labels_to_rgb(labels[50:60, ::3]), colours[50:60, ::3])
    np.testing.assert_allclose(colours[3, 7], np.array(label_colour(607)) / 255, atol=0.5 / 255)
    assert colours[0, 0].max() == 0
    assert colours.reshape(-1, 3)[1:].max(axis=1).min() > 0.6  # none is as dark as the background
    flat = colours.reshape(-1, 3)
    for step in (1, 2, 3, 5, 8, 13, 144, 233):  # numbers of neighbours differ by about the objects in a row
        assert (np.abs(flat[step + 11 :] - flat[11:-step]).max(axis=1) < 0.1).mean() < 0.03


def test_objects_of_label_are_labels_with_outlines_where_they_touch_and_no_legend(tmp_path: Path) -> None:
    cells = np.arange(1, 65).reshape(8, 8).repeat(8, axis=0).repeat(8, axis=1).astype(np.uint16)
    zarr.create_array(tmp_path / "in.zarr", data=cells, chunks=(32, 32), dimension_names=("y", "x"))
    oocpatch.label(tmp_path / "in.zarr", tmp_path / "out.zarr", per_class=True, progress=False)
    done = CliRunner().invoke(cli.main, ["view", str(tmp_path / "out.zarr"), str(tmp_path / "a.png"), "--json"])
    assert json.loads(done.stdout) == {"picture": str(tmp_path / "a.png"), "objects": 64}
    sheet = figure_of(tmp_path / "out.zarr", pixels=64)
    assert sheet.rows[1][0].caption == "labels over it, yx"
    assert sheet.legend == ()
    assert "64 objects" in sheet.subtitle
    over, plain = sheet.rows[1][0].picture, labels_to_rgb(cells)
    np.testing.assert_array_equal(over[7, 8:16], plain[7, 8:16])
    np.testing.assert_array_equal(over[8, 8:16], plain[8, 8:16])
    ground = sheet.rows[0][0].picture
    np.testing.assert_allclose(over[10:14, 10:14], 0.55 * ground[10:14, 10:14] + 0.45 * plain[10:14, 10:14])


def test_integers_of_32_bits_without_negative_ones_are_labels_and_others_are_not(tmp_path: Path) -> None:
    values = np.arange(256).reshape(16, 16)
    for number, (array, legend) in enumerate(((values.astype("u4"), 0), (values.astype("u2"), 5), (values - 9, 5))):
        zarr.create_array(tmp_path / f"{number}.zarr", data=array)
        assert len(figure_of(tmp_path / f"{number}.zarr", pixels=16).legend) == legend


def test_proportions_are_those_of_the_world(tmp_path: Path) -> None:
    made = oocpatch.convert(np.zeros((10, 20, 40), np.float32), tmp_path / "a.zarr", axes="zyx", progress=False)
    steps = made.assign_coords(z=np.arange(10) * 2.0, y=np.arange(20) * 1.0, x=np.arange(40) * 1.0)
    sizes = [p.picture.shape[:2] for _, p in figure_of(steps, pixels=80).corners()]
    assert sizes == [(40, 80), (40, 80), (40, 40), (40, 80)]


def test_an_rgb_picture_is_shown_in_its_colours_from_the_level_that_serves(tmp_path: Path) -> None:
    colour = np.array([200, 30, 90], np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for level in range(3):
            shape = (256 >> level, 512 >> level, 1)
            picture = np.tile(colour + np.uint8(level), shape)
            reduced = 0 if level == 0 else 1
            file.write(picture, tile=(64, 64), photometric="rgb", subfiletype=reduced, metadata=None)
    assert open_display_source(tmp_path / "a.tif", 200).level == 1
    assert open_display_source(tmp_path / "a.tif", 64).level == 2
    made = oocpatch.view(tmp_path / "a.tif", pixels=200)
    (panel,) = drawn(made, figure_of(tmp_path / "a.tif", pixels=200).corners())
    assert panel.shape == (100, 200, 3)
    assert (panel == colour + 1).all()


def test_the_smallest_level_of_an_ome_zarr_that_serves_is_read(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    datasets = []
    for level in range(3):
        side = 64 >> level
        group.create_array(f"s{level}", data=np.full((side, side, side), level + 1, np.uint8), chunks=(16, 16, 16))
        scale = [4.0 * 2**level, 1.0 * 2**level, 1.0 * 2**level]
        datasets.append({"path": f"s{level}", "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    axes = [{"name": n, "type": "space"} for n in "zyx"]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    sight = open_display_source(tmp_path / "a.zarr", 32)
    assert (sight.level, sight.volume.shape, sight.spacing) == (1, (32, 32, 32), (8.0, 2.0, 2.0))
    assert [p.picture.shape[:2] for _, p in figure_of(tmp_path / "a.zarr", pixels=32).corners()][1] == (32, 8)


@pytest.mark.parametrize("chunks", [(4, 8, 8), (32, 48, 64), (1, 48, 64)])
def test_what_is_sampled_is_what_indexing_gives(chunks: tuple[int, ...], tmp_path: Path) -> None:
    data = np.arange(32 * 48 * 64, dtype=np.int32).reshape(32, 48, 64)
    volume = Volume(zarr.create_array(tmp_path / "a.zarr", data=data, chunks=chunks))
    at = [places(7, 32), places(100, 48), places(64, 64)]
    np.testing.assert_array_equal(sample(volume, at)[0], data[np.ix_(*at)])
    found = plane(volume, (2, 0), (20, 10), (0.5, 0.5, 0.5))
    np.testing.assert_array_equal(found[0], data[np.ix_(places(10, 32), [24], places(20, 64))][:, 0].T)
    highest, seen = projection(volume, 0, (1, 2), (24, 32), (0.5, 0.5, 0.5))
    np.testing.assert_array_equal(highest[0], data.max(axis=0)[np.ix_(places(24, 48), places(32, 64))])
    assert seen == 1


def test_a_projection_of_what_is_very_large_sees_a_share_of_it_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oocpatch.visualization.slices.PROJECTED", 3 * 8 * 64 * 64)
    zarr.create_array(tmp_path / "a.zarr", data=np.ones((64, 64, 64), np.uint8), chunks=(8, 64, 64))
    captions = [p.caption for _, p in figure_of(tmp_path / "a.zarr", pixels=64).corners()]
    assert captions[-1] == "highest along z of 38% of it"


def test_a_result_that_is_not_finished_can_be_looked_at(tmp_path: Path) -> None:
    volume = np.arange(1, 32 * 32 + 1, dtype=np.float32).reshape(32, 32)

    def fragile(x: torch.Tensor) -> torch.Tensor:
        if float(x.max()) == 1024:
            raise RuntimeError("no")
        return x

    sizes = {"patch_size": 8, "block_shape": 8, "output_chunks": 8}
    with pytest.raises(oocpatch.BlockFailed):
        oocpatch.predict(volume, fragile, tmp_path / "out.zarr", progress=False, **sizes)
    sheet = figure_of(tmp_path / "out.zarr", pixels=32)
    assert "not finished yet" in sheet.subtitle
    ((_, panel),) = sheet.corners()
    assert (panel.picture[-8:, -8:] == 0).all()
    assert panel.picture[16, 16].min() > 0


def test_heads_are_chosen_by_name(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "in.zarr", data=np.ones((16, 16), np.float32), chunks=(8, 8))

    def heads(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"a": x * 0, "b": x[..., ::2, ::2]}

    oocpatch.predict(tmp_path / "in.zarr", heads, tmp_path / "out.zarr", patch_size=8, progress=False)
    ((_, first),) = figure_of(tmp_path / "out.zarr", volume=False, pixels=16).corners()
    ((_, second),) = figure_of(tmp_path / "out.zarr", volume=False, head="b", pixels=16).corners()
    assert first.picture.max() < 0.1
    assert second.picture.min() > 0.7
    with pytest.raises(ValueError, match="head must be one of a, b, got 'c'"):
        oocpatch.view(tmp_path / "out.zarr", head="c")


def test_the_command_writes_the_picture_and_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    zarr.create_array("a.zarr", data=labels(), chunks=(8, 16, 16))
    result = CliRunner().invoke(cli.main, ["view", "a.zarr", "--json", "--pixels", "64"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"picture": "a.zarr.png"}
    assert Image.open(io.BytesIO(Path("a.zarr.png").read_bytes())).size[0] > 64
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    result = CliRunner().invoke(cli.main, ["view", "a.zarr"])
    assert result.exit_code == 2
    assert "needs PIL.Image, which is not installed; pip install 'oocpatch[view]'" in result.stderr


def patient() -> nibabel.Nifti1Image:
    """Axes to the right, front and head, in voxels of 2 x 2 x 4 mm: 9 where all three meet, 5 up, behind and left."""
    values = np.ones((9, 13, 5), np.int16)  # the middle belongs to right, front and head
    values[4:, 6:, 2:] = 9
    values[:4, :6, 2:] = 5
    return nibabel.Nifti1Image(values, np.diag([2, 2, 4, 1]))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SLA"])
@pytest.mark.parametrize("turned", [0.0, 0.3])
def test_a_scan_is_shown_with_the_right_on_the_left_however_it_is_stored(
    codes: str, turned: float, tmp_path: Path
) -> None:
    axes = nibabel.orientations.axcodes2ornt(tuple(codes))
    stored = patient().as_reoriented(nibabel.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], axes))
    rotation = np.eye(4)
    rotation[:2, :2] = [[np.cos(turned), -np.sin(turned)], [np.sin(turned), np.cos(turned)]]
    nibabel.save(nibabel.Nifti1Image(np.asarray(stored.dataobj), rotation @ stored.affine), tmp_path / "a.nii")
    oocpatch.predict(
        tmp_path / "a.nii", torch.nn.Identity(), tmp_path / "out.zarr", patch_size=4, overlap_mode="crop",
        progress=False,
    )  # fmt: skip
    for source, rows in ((tmp_path / "a.nii", 1), (tmp_path / "out.zarr", 2)):
        figure = figure_of(source, kind="image", pixels=26)  # 1 per mm
        assert len(figure.rows) == rows
        axial, coronal, sagittal, highest = figure.rows[-1]
        assert [p.ends for p in figure.rows[-1]] == ["RLAP", "RLSI", "APSI", "RLAP"]
        expected = np.zeros((26, 18, 1))
        expected[:14, :10], expected[14:, 10:] = 1, 0.5  # front and right, back and left
        for panel in (axial, highest):
            np.testing.assert_array_equal(panel.picture[..., :1], expected)
        for panel, width, inner in ((coronal, 18, 10), (sagittal, 26, 14)):
            expected = np.zeros((20, width, 1))
            expected[:12, :inner] = 1  # up, and right or front
            np.testing.assert_array_equal(panel.picture[..., :1], expected)
    assert figure.rows[-1][0].caption.startswith("result, axial at ")
