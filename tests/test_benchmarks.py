"""The benchmarks run: each step of one that takes minutes, on a few blocks."""

from __future__ import annotations

from benchmarks import ledger_tasks


def test_the_ledger_benchmark_drives_records_and_reads_every_block(tmp_path):
    directory, edge = str(tmp_path), 4
    assert ledger_tasks.plan_blocks(directory, edge)["result"] == "343 patches, 7 seams"
    # the first block, which no seam enters, needs no second stage
    assert ledger_tasks.drive(directory, edge)["result"].startswith(f"{2 * edge**3 - 1} records")
    assert ledger_tasks.read_progress(directory, edge)["result"] == "64 of 64 blocks"
    assert ledger_tasks.keep(directory, edge)["result"] == "0 MiB"
    assert (tmp_path / "kept").stat().st_size > 0
    assert ledger_tasks.tell_status(directory, edge)["result"] == "64 blocks done"
