"""A series of DICOM, one file per slice, as a scanner would write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, VLWholeSlideMicroscopyImageStorage

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


def write_slide(folder: Path, levels: list[np.ndarray], *, tile: int = 64, series: str = "1.2.9") -> list[Path]:
    """Write the levels `(y, x, rgb)` of a slide, a file each, in tiles; pixels of the largest are 0.25 um wide."""
    folder.mkdir(exist_ok=True)
    paths = []
    for number, level in enumerate(levels):
        height, width = level.shape[:2]
        padded = np.pad(level, ((0, -height % tile), (0, -width % tile), (0, 0)))
        rows, columns = padded.shape[0] // tile, padded.shape[1] // tile
        tiles = padded.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2)
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = VLWholeSlideMicroscopyImageStorage
        meta.MediaStorageSOPInstanceUID = f"{series}.{number + 1}"
        path = folder / f"{series}-{len(levels) - number}.dcm"  # the largest comes last
        image = FileDataset(str(path), Dataset(), file_meta=meta, preamble=b"\0" * 128)
        image.SOPClassUID, image.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        image.SeriesInstanceUID, image.Modality, image.StudyInstanceUID = series, "SM", "1.2.8"
        image.FrameOfReferenceUID, image.ContainerIdentifier = "1.2.7", "slide"
        image.ImageType = ["DERIVED" if number else "ORIGINAL", "PRIMARY", "VOLUME", "RESAMPLED" if number else "NONE"]
        image.Rows = image.Columns = tile
        image.TotalPixelMatrixRows, image.TotalPixelMatrixColumns = height, width
        image.NumberOfFrames, image.DimensionOrganizationType = rows * columns, "TILED_FULL"
        image.SamplesPerPixel, image.PhotometricInterpretation, image.PlanarConfiguration = 3, "RGB", 0
        image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 8, 8, 7, 0
        image.ImagedVolumeWidth, image.ImagedVolumeHeight = levels[0].shape[1] / 4000, levels[0].shape[0] / 4000
        measures = Dataset()
        measures.PixelSpacing = [0.25e-3 * levels[0].shape[axis] / level.shape[axis] for axis in (0, 1)]
        measures.SliceThickness = 0.001
        shared = Dataset()
        shared.PixelMeasuresSequence = [measures]
        image.SharedFunctionalGroupsSequence = [shared]
        light = Dataset()
        light.OpticalPathIdentifier = "1"
        image.OpticalPathSequence, image.NumberOfOpticalPaths = [light], 1
        image.PixelData = tiles.tobytes()
        image["PixelData"].VR = "OB"
        image.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths
