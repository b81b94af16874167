"""Promises on Slurm: real job scripts, really started and really cancelled, by commands that stand in for Slurm's."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import dask
import pytest

import oocpatch
from oocpatch.execution.dask_clients import connected
from tests.support.children import ROOT, file_digests
from tests.support.cluster_child import MODEL
from tests.support.clusters import until
from tests.support.crash_child import make_volume
from tests.support.fake_slurm import FakeSlurm

JOB = "slurm:cores=1,memory=1GB,nanny=false,walltime=00:10:00,job-extra-directives=--gres=gpu:1"


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSlurm]:
    """Slurm's commands on PATH."""
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setattr("dask.config.PATH", str(tmp_path))  # dask-jobqueue writes an example of its configuration
    importlib.import_module("dask_jobqueue.slurm")  # before a test sets its configuration, which its import completes
    monkeypatch.setenv("PATH", fake.path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    make_volume(tmp_path / "volume.zarr", (32, 32), (8, 8))
    (tmp_path / "control").write_text("{}")
    yield fake
    for job in fake.log("sbatch"):
        fake.kill(job)


def predict(output: str, **options: object) -> None:
    sizes = {"patch_size": 8, "patch_overlap": 4, "block_shape": 8, "output_chunks": 4, "progress": False}
    control = str(Path("control").absolute())
    oocpatch.predict("volume.zarr", MODEL, output, model_args={"control": control}, **sizes, **options)


def patches() -> list[str]:
    """Process ids of those who computed patches, as told by the model."""
    log = Path("control.log")
    return [line.strip("[]").split(",")[0] for line in log.read_text().splitlines()] if log.exists() else []


def test_jobs_give_the_bytes_of_one_process_also_when_one_is_lost_and_submitted_again(jobs: FakeSlurm) -> None:
    predict("embedded")
    Path("control.log").unlink()
    Path("control").write_text('{"delay": 0.02}')
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "100ms"}), connected(JOB, 1) as client:
        killer = threading.Thread(target=lambda: (until(lambda: len(patches()) > 8), jobs.kill("100")))
        killer.start()
        predict("out", client=client)
        killer.join()
        lost, *others = sorted(jobs.log("sbatch"))
    assert (lost, len(others)) == ("100", 1)
    assert len(set(patches()) - {str(os.getpid())}) == 2
    assert set(jobs.log("scancel")) >= set(others)
    assert jobs.running() == []
    assert file_digests(Path("out/prediction")) == file_digests(Path("embedded/prediction"))
    script = jobs.script(others[0])
    for line in ("#SBATCH -n 1", "#SBATCH --cpus-per-task=1", "#SBATCH -t 00:10:00", "#SBATCH --gres=gpu:1"):
        assert line in script
    assert "--memory-limit 0" in script


def test_jobs_ask_for_what_dask_is_configured_with_and_what_the_command_says_goes_before(jobs: FakeSlurm) -> None:
    jobs.set("hold")
    configured = {"cores": 6, "memory": "3GiB", "queue": "long", "walltime": "01:00:00"}
    with (
        dask.config.set({f"jobqueue.slurm.{name}": value for name, value in configured.items()}),
        connected("slurm:walltime=00:20:00", 2),
    ):
        until(lambda: len(jobs.log("sbatch")) == 2)
        assert jobs.log("scancel") == []
    assert sorted(jobs.log("sbatch")) == sorted(jobs.log("scancel")) == ["100", "101"]
    lines = [line for line in jobs.script("100").splitlines() if line.startswith("#SBATCH")]
    wanted = ["-p long", "-n 1", "--cpus-per-task=6", "--mem=3G", "-t 00:20:00"]
    assert [line.removeprefix("#SBATCH ") for line in lines][1:] == wanted


def test_without_dask_jobqueue_the_extra_is_named(jobs: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_jobqueue.slurm", None)
    with pytest.raises(ValueError, match=r"pip install 'oocpatch\[slurm\]'"), connected(JOB, 1):
        pass


def test_ctrl_c_cancels_jobs_that_wait_in_the_queue(jobs: FakeSlurm) -> None:
    jobs.set("hold")
    command = [sys.executable, "-m", "oocpatch", "predict", "volume.zarr", "out", "--model", "identity"]
    command += ["--patch-size", "8", "--scheduler", JOB, "--workers", "3"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "DASK_CONFIG": "dask"})
    until(lambda: (len(jobs.log("sbatch")) == 3 and Path("out").exists()) or child.poll() is not None)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert sorted(jobs.log("scancel")) == sorted(jobs.log("sbatch"))
    assert oocpatch.status("out").state == "incomplete"


def test_a_run_whose_jobs_end_without_a_worker_ends_and_says_so(jobs: FakeSlurm) -> None:
    with (
        dask.config.set({"oocpatch.wait-for-workers": "1s"}),
        connected(f"{JOB},python=/bin/false", 2) as client,
    ):
        until(lambda: len(jobs.log("sbatch")) == 2)
        with pytest.raises(oocpatch.ClusterLost, match=r"no worker is left, and no job in the queue \(10., 10. have"):
            predict("out", client=client)
    assert jobs.running() == []


def test_a_run_waits_as_long_as_its_jobs_are_in_the_queue(jobs: FakeSlurm) -> None:
    jobs.set("hold")
    with dask.config.set({"oocpatch.wait-for-workers": "0.1s"}), connected(JOB, 1) as client:
        until(lambda: len(jobs.log("sbatch")) == 1)
        starter = threading.Thread(target=lambda: (until(lambda: len(jobs.log("squeue")) > 2), jobs.start("100")))
        starter.start()
        predict("out", client=client)
        starter.join()


def test_the_error_shows_why_slurm_takes_no_job(jobs: FakeSlurm) -> None:
    jobs.set("refuse")
    with pytest.raises(ValueError, match=r"Slurm takes no job: sbatch: error: .* Invalid account$"), connected(JOB, 2):
        pass
    assert jobs.log("sbatch") == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slurm:cores=1", r"how much cores and memory per job.*memory=.24GB"),
        ("slurm", r"SLURMCluster, such as slurm:cores=4,memory=16GB; got .*how much cores"),
        ("slurm:cores", "takes NAME=VALUE.* got 'cores'"),
        ("slurm:core=1,memory=1GB", "unexpected keyword argument .core."),
    ],
)
def test_wrong_options_of_jobs_are_refused(text: str, words: str, jobs: FakeSlurm) -> None:
    with pytest.raises(ValueError, match=words), connected(text, 1):
        pass
    assert jobs.log("sbatch") == []


def test_without_slurm_the_error_says_where_to_start(jobs: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="sbatch, which is not found here"), connected(JOB, 1):
        pass
