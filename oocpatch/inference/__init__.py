"""Floor 2, compute: partials, the predictor, the stages and their scheduler. Owns torch, and dask in one file."""
