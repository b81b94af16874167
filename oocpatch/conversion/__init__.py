"""Conversion of any readable volume to a chunked Zarr v3 within a memory limit."""
