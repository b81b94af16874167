"""Readers of other formats than Zarr, one module per library, each imported only when it is needed."""
