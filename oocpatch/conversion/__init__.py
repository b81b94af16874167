"""Conversion of any readable volume to a chunked Zarr v3, or to a NIfTI or OME-TIFF, within a memory limit."""
