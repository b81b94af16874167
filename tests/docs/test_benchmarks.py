"""The benchmarks run: each step of one that takes minutes, on a few blocks."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import zarr

from benchmarks import drawings, gpu, ledger_tasks, many_tasks, training_tasks
from benchmarks.__main__ import main
from benchmarks.measure import ROOT, TaskFailed, in_fresh_process
from benchmarks.models import UNet3d
from benchmarks.tables import ratios, speed_table, targets_table
from benchmarks.workloads import WORKLOADS


def test_the_drawing_of_matching_is_what_oocpatch_makes_of_its_scenes():
    assert (ROOT / "docs/pictures/matching.svg").read_text() == drawings.matching()
    results = [drawings.joined(*drawings.patches_of(scene)) for scene in drawings.SCENES.values()]
    assert [result.max() for result in results] == [1, 2, 2, 2]


def test_the_ledger_benchmark_drives_records_and_reads_every_block(tmp_path):
    directory, edge = str(tmp_path), 4
    assert ledger_tasks.plan_huge(directory, edge)["result"] == "2,679,826,869 patches"
    assert ledger_tasks.plan_blocks(directory, edge)["result"] == "343 patches, 7 seams"
    # the first block, which no seam enters, needs no second stage
    assert ledger_tasks.drive(directory, edge)["result"].startswith(f"{2 * edge**3 - 1} records")
    assert ledger_tasks.read_progress(directory, edge)["result"] == "64 of 64 blocks"
    assert ledger_tasks.keep(directory, edge)["result"] == "0 MiB"
    assert (tmp_path / "kept").stat().st_size > 0
    assert ledger_tasks.tell_status(directory, edge)["result"] == "64 blocks done"


def test_many_volumes_have_one_result_from_python_and_from_the_command_line(tmp_path):
    folder = str(tmp_path)
    many_tasks.make_volumes(folder, 1)
    for task in (many_tasks.python, many_tasks.command_line):
        assert task(folder, "layers", 64, 0)["cpu"] > 0
    results = [zarr.open_array(tmp_path / f"{kind}-scans/0000.zarr/prediction")[:] for kind in ("python", "files")]
    np.testing.assert_array_equal(*results)
    assert results[0].shape == (3, 64, 64, 64)


def test_the_report_measures_resumes_and_writes_tables_and_pictures(tmp_path, capsys):
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text("Before.\n<!-- table: half -->\nold\n<!-- end of table -->\nAfter.\n")
    command = ["--results", results, "--workloads", "half", "--shrink", "8", "--page", page, "--pictures", tmp_path]
    copy, ours = "copy, zarr-python, 4 threads", "oocpatch, 1 GiB"
    main(["report", *map(str, command), "--rounds", "1", "--contenders", copy, ours])
    begun = capsys.readouterr().err
    assert begun.count(copy) == begun.count(ours) == 1
    records = json.loads(results.read_text())["workloads"]["half"]["records"]
    # the second call, as it is typed, has nothing left to measure
    again = [
        sys.executable,
        "-m",
        "benchmarks",
        "report",
        *map(str, command),
        "--rounds",
        "1",
        "--contenders",
        copy,
        ours,
    ]
    assert not subprocess.run(again, cwd=ROOT, capture_output=True, text=True, check=True).stderr
    assert json.loads(results.read_text())["workloads"]["half"]["records"] == records

    assert records[copy][0]["error"] == 0
    (run,) = records[ours]
    assert 0 < run["error"] < 1e-6
    # 192^3 float32, of which random numbers lose about a tenth when they are compressed
    voxels = 4 * 192**3
    assert 0.8 * voxels < run["written"] < 2 * voxels
    assert 0.8 * voxels < records[copy][0]["read"] < 1.1 * voxels
    assert 0 < run["peak"] <= run["projected_memory"]

    text = page.read_text()
    assert text.startswith("Before.\n<!-- table: half -->\n\n| | seconds |")
    assert "old" not in text
    assert text.endswith("<!-- end of table -->\nAfter.\n")
    cells = [cell.strip() for cell in next(line for line in text.splitlines() if ours in line).split("|")]
    assert cells[3] == f"**{run['wall'] / records[copy][0]['wall']:.2f}**"
    assert ours in (tmp_path / "speed.svg").read_text()


def test_the_gpu_benchmark_compares_a_network_alone_with_a_run_and_looks_at_the_labels(
    tmp_path, capsys, children, monkeypatch
):
    """On the CPU, where the share says nothing, but each step is taken and the labels are right."""

    def forked(task, module, **arguments):
        return children.measure("tests.support.task_child", module, task, arguments)

    monkeypatch.setattr(gpu, "in_fresh_process", forked)
    sizes = ["--side", "24", "--chunk", "8", "--patch-size", "16", "--patch-overlap", "8", "--width", "2"]
    command = [*sizes, "--batch-size", "3", "--variants", "plain", "--rounds", "1", "--max-memory", "256MiB"]
    main(["gpu", "--device", "cpu", "--directory", str(tmp_path), *command, "--json"])
    (variant,) = json.loads(capsys.readouterr().out)["variants"]
    (pair,) = variant["rounds"]
    assert (variant["variant"], variant["batch_size"]) == ("plain", 3)
    assert pair["ours"]["patches"] == 8
    assert pair["ours"]["unlike"] == 0
    assert 0 < pair["ours"]["peak"] <= pair["ours"]["projected_memory"]
    assert pair["share"] == pair["ours"]["throughput"] / pair["bare"]["throughput"]
    assert [path.name for path in tmp_path.iterdir()] == ["volume.zarr"]
    assert len(gpu._cells([pair])) == 11
    assert sum(p.numel() for p in UNet3d().parameters()) // 100_000 == 56


def test_a_contender_that_fails_is_a_figure_too(tmp_path):
    results = tmp_path / "results.json"
    workload = WORKLOADS["half"]
    record = {"failed": "MemoryError: | 64 GiB"}
    contender = workload.contenders[0].name
    measured = {"workloads": {"half": {"edge": 512, "records": {contender: [record]}}}}
    assert "| copy, zarr-python, 4 threads | failed: MemoryError:   64 GiB |" in speed_table(measured, "half")
    assert ratios(measured, "half", contender) == []
    with pytest.raises(TaskFailed, match=r"FileNotFoundError: .*results\.json does not exist"):
        in_fresh_process("zarr_python", "benchmarks.copies", threads=1, source=str(results), target="x", patch=8,
                         overlap=0, chunk=8)  # fmt: skip


def test_a_ratio_is_against_the_fastest_copy_of_the_same_round():
    slow, fast = (contender.name for contender in WORKLOADS["half"].contenders[:2])
    ours = "oocpatch, 1 GiB"
    # the machine was busy in the second round, and the copy that is usually faster failed in the third
    walls = {slow: (2.0, 6.0, 4.0), fast: (1.0, 5.0, None), ours: (1.5, 6.0, 8.0)}
    figures = {"cpu": 1.0, "peak": 1 << 20, "read": None, "written": None, "error": 0.0}
    records = {
        name: [{"failed": "killed"} if wall is None else {"wall": wall, **figures} for wall in times]
        for name, times in walls.items()
    }
    measured = {"workloads": {"half": {"edge": 512, "records": records}}}
    assert ratios(measured, "half", ours) == [1.5, 1.2, 2.0]
    assert f"| half: {ours} | 1.3 times | 1.50 times | no |" in targets_table(measured)
    assert f"| **{ours}** | 6.00 (1.50 to 8.00) | **1.50** |" in speed_table(measured, "half")


def test_the_training_benchmark_draws_the_same_patches_for_the_same_seed(tmp_path, monkeypatch):
    path = str(tmp_path)
    monkeypatch.setattr(training_tasks, "MAX_LENGTH", 2)
    monkeypatch.setattr(training_tasks, "PATCHES_PER_VOLUME", 2)
    assert training_tasks.make_study(path, 0.01) == {"edge": 128}
    runs = [training_tasks.train(path, steps=2, seed=seed, patch=12, workers=0) for seed in (0, 0, 1)]
    first, again, other = (run["digest"] for run in runs)
    assert first == again != other
    assert all(run["seconds"] > 0 for run in runs)
    monkeypatch.setattr(training_tasks, "IN_MEMORY", 16)
    for library, place in (("oocpatch", "from disk"), ("oocpatch", "in memory"), ("TorchIO", "in memory")):
        options = {"library": library, "place": place, "seconds": 0.01, "patch": 12, "workers": 0}
        assert training_tasks.draw(path, **options)["rate"] > 0
