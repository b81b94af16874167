"""Volumes that are read: Zarr, OME-Zarr, arrays and files of other formats, seen lazily as `(C, *axes)`."""
