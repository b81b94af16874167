"""Execution of tasks: by threads of this process, a Dask cluster, or the parts of an array job."""
