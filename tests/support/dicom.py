"""A series of DICOM, one file per slice, as a scanner would write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From right, anterior, superior to left, posterior, superior."""


def write_series(
    folder: Path, stack: np.ndarray, affine: Any = None, series: str = "1.2.3", names: Any = None, **attributes: Any
) -> list[Path]:
    """Write `(z, y, x)` or `(z, y, x, rgb)`; the affine goes from indices x, y, z to right, anterior, superior.

    Values of `attributes` that are lists of one value per slice are those of the slices.
    """
    folder.mkdir(exist_ok=True)
    paths = []
    for number, plane in enumerate(stack):
        name = f"{series}-{number:03}.dcm" if names is None else names[number]
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = f"{series}.{number + 1}"
        image = FileDataset(str(folder / name), Dataset(), file_meta=meta, preamble=b"\0" * 128)
        image.SOPClassUID, image.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        image.SeriesInstanceUID, image.Modality, image.InstanceNumber = series, "CT", number + 1
        image.Rows, image.Columns = plane.shape[:2]
        image.SamplesPerPixel = 1 if plane.ndim == 2 else 3
        image.PhotometricInterpretation = "MONOCHROME2" if plane.ndim == 2 else "RGB"
        if plane.ndim == 3:
            image.PlanarConfiguration = 0
        image.BitsAllocated = image.BitsStored = 8 * plane.dtype.itemsize
        image.HighBit = image.BitsStored - 1
        image.PixelRepresentation = int(plane.dtype.kind == "i")
        if affine is not None:
            world = LPS @ affine
            row, column = world[:3, 0], world[:3, 1]
            image.PixelSpacing = [float(np.linalg.norm(column)), float(np.linalg.norm(row))]
            image.ImageOrientationPatient = [
                f"{v:.10g}" for v in (*(row / np.linalg.norm(row)), *(column / np.linalg.norm(column)))
            ]
            image.ImagePositionPatient = [f"{v:.10g}" for v in (world @ [0, 0, number, 1])[:3]]
        for key, value in attributes.items():
            setattr(image, key, value[number] if isinstance(value, list) and len(value) == len(stack) else value)
        image.PixelData = plane.tobytes()
        image["PixelData"].VR = "OB" if plane.dtype.itemsize == 1 else "OW"
        image.save_as(folder / name)
        paths.append(folder / name)
    return paths
