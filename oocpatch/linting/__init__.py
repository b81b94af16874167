"""Lint: what an OME-Zarr says of itself, held against what it holds."""
