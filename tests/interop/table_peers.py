"""Tables of 20,000 objects beside scikit-image; their files in AnnData, GeoPandas and rasterio. A script of two steps.

`python -m tests.interop.table_peers make FOLDER` writes labels, images and tables with oocpatch.
`python tests/interop/table_peers.py compare FOLDER` needs scikit-image, pandas, anndata, geopandas and rasterio, which
may be in an environment of their own, and prints what it found.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

SHAPES = {"plane": (4096, 4096), "volume": (64, 200, 200)}
CELLS = {"plane": 29, "volume": 5}


def cells(name: str) -> np.ndarray:
    """Touching cells around jittered centres, numbered at random; some in several pieces."""
    rng, shape, edge = np.random.default_rng(0), SHAPES[name], CELLS[name]
    counts = tuple(-(-n // edge) for n in shape)
    place = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij", sparse=False)) // edge
    offsets = rng.integers(0, edge, (len(shape), *counts))
    near = np.full(shape, np.inf, np.float32)
    labels, numbers = np.zeros(shape, np.uint32), rng.permutation(np.prod(counts)).reshape(counts).astype(np.uint32)
    for step in np.ndindex((3,) * len(shape)):
        other = tuple(np.clip(place[a] + step[a] - 1, 0, counts[a] - 1).astype(np.int32) for a in range(len(shape)))
        distance = sum(
            (np.arange(shape[a]).reshape([-1 if b == a else 1 for b in range(len(shape))])
             - (other[a] * edge + offsets[a][other])) ** 2.0
            for a in range(len(shape))
        ).astype(np.float32)  # fmt: skip
        closer = distance < near
        near[closer], labels[closer] = distance[closer], numbers[other][closer] + 1
    labels[near > (0.62 * edge) ** 2] = 0
    return labels


def make(folder: Path) -> None:
    """Write labels, images and tables."""
    import zarr  # noqa: PLC0415 - of this step

    import oocpatch  # noqa: PLC0415 - of this step

    for name in SHAPES:
        labels = cells(name)
        image = (np.random.default_rng(1).random((2, *labels.shape)) * 60000).astype(np.float32)
        image[1] = np.rint(image[1])
        np.save(folder / f"{name}.npy", labels)
        np.save(folder / f"{name}-image.npy", image)
        zarr.create_array(folder / f"{name}.zarr", data=labels, chunks=(64, 128, 128)[-labels.ndim :])
        shape = ("orientation",) if labels.ndim == 2 else ()
        properties = ("area", "bbox", "centroid", "equivalent_diameter", "axis_major_length", "axis_minor_length")
        for suffix in (".csv", ".parquet", ".h5ad", *((".geojson",) if labels.ndim == 2 else ())):
            output = folder / f"{name}{suffix}"
            options = {"properties": (*properties, *shape), "max_memory": "256MiB", "progress": False}
            oocpatch.objects(folder / f"{name}.zarr", output, intensity=image, **options)


def compare(folder: Path, say: Callable[[str], None]) -> None:
    """Compare tables with those of scikit-image, and read their files."""
    import anndata  # noqa: PLC0415 - of this step
    import geopandas  # noqa: PLC0415
    import pandas as pd  # noqa: PLC0415
    from rasterio.features import rasterize  # noqa: PLC0415
    from skimage.measure import regionprops_table  # noqa: PLC0415

    for name in SHAPES:
        labels, image = np.load(folder / f"{name}.npy"), np.load(folder / f"{name}-image.npy")
        table = pd.read_csv(folder / f"{name}.csv", float_precision="round_trip")
        names = ["label", "area", "bbox", "centroid", "equivalent_diameter_area"]
        names += ["axis_major_length", "axis_minor_length", *(["orientation"] if labels.ndim == 2 else [])]
        names += [f"intensity_{kind}" for kind in ("mean", "min", "max", "std")]
        # In float64, since scikit-image adds in the dtype of the image.
        theirs = regionprops_table(labels, np.moveaxis(image.astype(np.float64), 0, -1), properties=names)
        assert (table["label"] == theirs["label"]).all()
        assert (table["area"] == theirs["area"]).all()
        worst = {}
        for axis, letter in enumerate("zyx"[-labels.ndim :]):
            assert (table[f"bbox_{letter}_start"] == theirs[f"bbox-{axis}"]).all()
            assert (table[f"bbox_{letter}_stop"] == theirs[f"bbox-{axis + labels.ndim}"]).all()
            worst["centroid"] = np.abs(table[f"centroid_{letter}"] - theirs[f"centroid-{axis}"]).max()
        for kind in ("axis_major_length", "axis_minor_length"):
            worst[kind] = np.abs(table[kind] - theirs[kind]).max()
        if labels.ndim == 2:
            turned = np.abs(table["orientation"] - theirs["orientation"]) % np.pi
            worst["orientation"] = np.minimum(turned, np.pi - turned).max()
        for kind in ("mean", "min", "max", "std"):
            for channel in range(2):
                own, other = table[f"{kind}_{channel}"], theirs[f"intensity_{kind}-{channel}"]
                worst[kind] = max(worst.get(kind, 0), (np.abs(own - other) / np.abs(other).clip(1e-12)).max())
        say(f"{name}: {len(table):,} objects; areas and boxes equal; largest differences {worst}")
        cellular = anndata.read_h5ad(folder / f"{name}.h5ad")
        places = table[[f"centroid_{letter}" for letter in "xyz"[: labels.ndim]]]
        assert (cellular.obsm["spatial"] == places.to_numpy()).all()
        assert (table[["mean_0", "mean_1"]].to_numpy() == cellular.X).all()
        pd.testing.assert_frame_equal(cellular.obs.reset_index(drop=True), table, check_dtype=False)
        say(f"{name}: {cellular.shape} in AnnData")
    shapes = geopandas.read_file(folder / "plane.geojson")
    labels = np.load(folder / "plane.npy")
    assert bool(shapes.geometry.is_valid.all())
    assert len(shapes) == len(np.unique(labels)) - 1
    burnt = rasterize(zip(shapes.geometry, shapes["label"], strict=True), labels.shape, dtype="uint32")
    assert (burnt == labels).all()
    kinds = shapes.geometry.geom_type.value_counts().to_dict()
    say(f"plane: {kinds}, all valid; burnt back, every pixel has its label again (IoU 1.0)")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    step, place = sys.argv[1], Path(sys.argv[2])
    if step == "make":
        place.mkdir(parents=True, exist_ok=True)
        make(place)
    else:
        compare(place, print)
