"""Where tasks run: threads of this process, a Dask cluster, or the parts of an array job."""
