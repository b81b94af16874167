"""Compare `nnunet:FOLDER` with nnU-Net itself, on the suite's small cases and on a folder and volume of one's own.

    python -m tests.interop.campaign_nnunet                           # the small cases
    python -m tests.interop.campaign_nnunet --store                   # and keep nnU-Net's labels for the suite
    python -m tests.interop.campaign_nnunet --folder FOLDER --image IMAGE.nii.gz [--folds 0+1] [--no-mirroring]

It needs an environment with both: `pip install nnunetv2 'oocpatch[nifti,nnunet]'`. Each line says which share of the
voxels differs: from nnU-Net as it is, and from nnU-Net with its sums in float32 instead of float16 (`--float32` for a
folder).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

import oocpatch
from tests.support.nnunet_cases import CASES, REFERENCE

Array = np.ndarray[Any, Any]


def nnunet_labels(folder: Path, image: Array, spacing: Any, *, folds: Any, mirrors: bool, wide: bool) -> Array:
    """What nnU-Net makes of an image `(C, z, y, x)`; `wide`: with sums in float32."""
    from nnunetv2.inference import predict_from_raw_data as nnunet  # noqa: PLC0415 - not in the suite's environment

    compute_gaussian, half = nnunet.compute_gaussian, torch.half
    if wide:
        torch.half = torch.float32
        nnunet.compute_gaussian = lambda *args, **more: compute_gaussian(*args, **{**more, "dtype": torch.float32})
        nnunet.compute_gaussian.cache_clear = compute_gaussian.cache_clear
    try:
        predictor = nnunet.nnUNetPredictor(use_mirroring=mirrors, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(folder), folds)
        return np.asarray(predictor.predict_single_npy_array(image, {"spacing": list(spacing)}))
    finally:
        torch.half, nnunet.compute_gaussian = half, compute_gaussian


def own_labels(spec: str, image: Array, spacing: Any, output: Path, **options: Any) -> Array:
    """What oocpatch makes of the same image."""
    coords = {name: np.arange(n) * step for name, n, step in zip("zyx", image.shape[1:], spacing, strict=True)}
    volume = xr.DataArray(image, coords, ("c", "z", "y", "x"))
    labels = oocpatch.predict(volume, spec, output, trust_pickle=True, progress=False, **options)
    return labels.values.reshape(image.shape[1:])


def main() -> None:
    """Run the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--image", type=Path, nargs="+")
    parser.add_argument("--spacing", type=float, nargs=3, help="pretend that the voxels (z, y, x) are this large")
    parser.add_argument("--folds", default="0")
    parser.add_argument("--no-mirroring", action="store_true")
    parser.add_argument("--max-memory", default="auto")
    arguments = parser.parse_args()
    stored: dict[str, Array] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for name, case in CASES.items() if arguments.folder is None else ():
            case.write(root / name / "folder")
            folds = tuple(range(case.folds))
            compare = {"folds": folds, "mirrors": True}
            theirs = nnunet_labels(root / name / "folder", case.volume, case.spacing, **compare, wide=False)
            ours = own_labels(f"nnunet:{root / name / 'folder'}", case.volume, case.spacing, root / name / "out.zarr")
            wide = nnunet_labels(root / name / "folder", case.volume, case.spacing, **compare, wide=True)
            stored[name] = wide.astype(np.uint8)
            shares = [f"{np.mean(one != other):.3%}" for one, other in ((ours, theirs), (ours, wide), (theirs, wide))]
            print(f"{name}: {shares[0]} differ, {shares[1]} from float32, from which nnU-Net differs by {shares[2]}")
        if arguments.folder is not None:
            of_folder(arguments, root)
    if arguments.store:
        np.savez_compressed(REFERENCE, **stored)


def of_folder(arguments: argparse.Namespace, root: Path) -> None:
    """Compare a folder of results on an image."""
    import nibabel  # noqa: PLC0415 - not in the suite's environment

    files = [nibabel.load(path) for path in arguments.image]
    image = np.stack([np.asarray(file.dataobj, np.float32).transpose(2, 1, 0) for file in files])
    spacing = arguments.spacing or [float(zoom) for zoom in files[0].header.get_zooms()[::-1]]
    folds = tuple(int(fold) for fold in arguments.folds.split("+"))
    begin = time.perf_counter()
    options: dict[str, Any] = {"augment": "none"} if arguments.no_mirroring else {}
    spec = f"nnunet:{arguments.folder},folds={arguments.folds}"
    ours = own_labels(spec, image, spacing, root / "out.zarr", max_memory=arguments.max_memory, **options)
    print(f"oocpatch {time.perf_counter() - begin:.1f} s", flush=True)
    for wide in (False, True) if arguments.float32 else (False,):
        begin, mirrors = time.perf_counter(), not arguments.no_mirroring
        theirs = nnunet_labels(arguments.folder, image, spacing, folds=folds, mirrors=mirrors, wide=wide)
        print(f"nnU-Net {time.perf_counter() - begin:.1f} s{', float32' if wide else ''}: ", end="")
        print(f"{np.mean(ours != theirs):.3%} differ of labels {np.unique(theirs, return_counts=True)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
