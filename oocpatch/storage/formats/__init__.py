"""Files of other formats than Zarr, seen lazily; each is opened by its own library, where it is needed."""
