"""Floor 1, remember: volumes, outputs, the workspace and the ledger. Owns zarr and xarray."""
