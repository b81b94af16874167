"""The use that a run is expected to make of a cluster's workers, of processes, or of the parts of an array job."""

from __future__ import annotations

import logging
import multiprocessing
import sys
from dataclasses import replace
from pathlib import Path

from oocpatch.configuration.run_config import RunConfig
from oocpatch.models.predictor import device_count
from oocpatch.planning.plan import Plan, human
from oocpatch.planning.schedule import Occupancy, occupancy, occupancy_of_parts

logger = logging.getLogger("oocpatch")


def on_all_devices(config: RunConfig) -> RunConfig:
    """Return a configuration whose blocks are computed by a process on each device, where there are several.

    Nothing is changed where other processes, threads or a part were asked for, or where new processes cannot work.
    """
    execution, count = config.execution, device_count(config.model.device)
    asked = execution.workers is not None or execution.is_distributed or execution.part is not None
    if count == 1 or asked or config.labelling is not None or config.table is not None:
        return config
    if obstacle := _obstacle(config):
        logger.warning("one of %d devices is used: %s", count, obstacle)
        return config
    return replace(config, execution=replace(execution, processes=True, workers=count))


def _obstacle(config: RunConfig) -> str:
    """Return why new processes cannot compute; nothing where they can."""
    from oocpatch.execution.payload import check_cluster  # noqa: PLC0415 - a second of imports, for processes only

    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    if script.suffix == ".py" and script.is_file() and "__name__" not in script.read_text(errors="replace"):
        return "new processes would run the script again: put the call below if __name__ == '__main__':"
    if multiprocessing.parent_process() is not None:
        return "this is a process of multiprocessing, which may start no others"
    try:
        check_cluster(config.model, None)
    except ValueError as error:
        return str(error)
    return ""


def expected_occupancy(config: RunConfig, plan: Plan) -> Occupancy | None:
    """Return the expected use of workers; None for threads, and for a cluster that has no worker yet."""
    execution, counts, traffic = config.execution, plan.block_patches, float(plan.bytes_read + plan.bytes_written)
    if execution.part is not None:
        return occupancy_of_parts(counts, execution.part[1], traffic)
    workers = execution.workers or 0 if execution.processes else 0
    if execution.client is not None:
        there = len(execution.client.nthreads())
        workers = min(there, execution.workers or there)
    return occupancy(counts, plan.block_grid.layer, workers, traffic) if workers else None


def idle_workers(config: RunConfig, plan: Plan, use: Occupancy | None) -> str:
    """Say that there are fewer blocks than workers, and which parameter would help; nothing where there are enough."""
    if use is None or use.blocks >= use.workers or plan.scores:
        return ""
    if config.limits.block_shape is not None:
        advice = "a smaller block_shape makes more blocks"
    elif plan.crash_limit is None:
        advice = 'the model counts as light: work="heavy" makes more blocks'
    else:
        advice = "smaller output_chunks or patches make more blocks"
    kind = "parts" if config.execution.part is not None else "workers"
    return f"{use.blocks} block(s) for {use.workers} {kind}, so {use.workers - use.blocks} have nothing to do; {advice}"


def describe_occupancy(config: RunConfig, plan: Plan, use: Occupancy | None) -> dict[str, str]:
    """Return rows about the expected use of workers, as a plan shows them."""
    if use is None:
        return {"workers": "none yet"} if config.execution.client is not None else {}
    kind = "parts" if config.execution.part is not None else "workers"
    each = f"{use.blocks / use.workers:.1f} blocks and {human(use.bytes_each)} of traffic each"
    rows = {kind: f"{use.workers}, {each}, {use.idle:.0%} of their time idle at the end"}
    warning = idle_workers(config, plan, use)
    return {**rows, "warning": warning} if warning else rows
