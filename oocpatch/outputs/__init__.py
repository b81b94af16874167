"""Outputs that are written: Zarr and OME-Zarr, their metadata, checksums and pyramids."""
