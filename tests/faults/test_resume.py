"""Promises on calling again: complete returns, incomplete continues, anything different is refused and named."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import oocpatch
from tests.support import crash_child
from tests.support.children import calls, file_digests, unchanged
from tests.support.crash_child import Job, scripted_model
from tests.support.small_run import MIDDLE, SHAPE, block_of, patch_calls, prediction, small_run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """The small run for this process: no delay, no failure, its calls logged."""
    job = small_run(tmp_path)
    monkeypatch.setattr(crash_child, "JOB", job)
    return job


def predict(job: Job, model: Any = scripted_model, volume: Any = None, **changes: Any) -> Any:
    """The job's call of `predict` in this process."""
    options = {**job.options, "progress": False, **changes}
    return oocpatch.predict(job.volume if volume is None else volume, model, job.output, **options)


def other_model(patches: Any) -> Any:
    return scripted_model(patches) + 1


CHANGES: dict[str, Any] = {
    "patch_size": 7,
    "patch_overlap": 3,
    "overlap_mode": "gaussian",
    "padding_mode": "edge",
    "batch_size": 2,
    "block_shape": 16,
    "output_dtype": "float64",
    "output_chunks": 8,
    "output_shards": 8,
    "output_fill": 3,
    "postprocess": "sigmoid",
    "axes": "xy",
    "model": other_model,
    "volume": np.zeros(SHAPE, np.float32),
}


@pytest.mark.parametrize("stopped", ["incomplete", "complete"])
def test_another_run_on_the_same_output_is_refused_and_the_parameter_named(
    stopped: str, here: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stopped == "incomplete":
        monkeypatch.setattr(crash_child, "JOB", dataclasses.replace(here, fail_on=(MIDDLE,)))
        with pytest.raises(oocpatch.BlockFailed):
            predict(here)
        monkeypatch.setattr(crash_child, "JOB", here)
    else:
        predict(here)
    for name, value in CHANGES.items():
        with unchanged(Path(here.watch)), pytest.raises(oocpatch.RunMismatch, match=rf"\b{name}\b") as refusal:
            predict(here, **{name: value})
        assert name in refusal.value.fields
        assert not set(refusal.value.fields) & (set(CHANGES) - {name})
    predict(here)


@pytest.mark.parametrize("stopped", ["incomplete", "complete"])
def test_axes_that_change_the_number_of_spatial_axes_are_another_run(
    stopped: str, here: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stopped == "incomplete":
        monkeypatch.setattr(crash_child, "JOB", dataclasses.replace(here, fail_on=(MIDDLE,)))
        with pytest.raises(oocpatch.BlockFailed):
            predict(here)
    else:
        predict(here)
    with unchanged(Path(here.watch)), pytest.raises(oocpatch.RunMismatch, match="axes"):
        predict(here, axes="tx")


def test_all_parameters_that_differ_are_named_with_both_values(here: Job) -> None:
    predict(here)
    with pytest.raises(oocpatch.RunMismatch) as refusal:
        predict(here, patch_size=6, overlap_mode="average")
    message = str(refusal.value)
    for word in ("patch_size", "overlap_mode", "average", "hann", "8", "6"):
        assert word in message


def test_changed_data_under_the_same_path_is_another_run(here: Job) -> None:
    """Metadata tells shapes and types apart; a volume of another type under the same path must not be continued."""
    predict(here)
    shutil.rmtree(here.volume)
    zarr.create_array(here.volume, data=np.zeros(SHAPE, np.int16), chunks=(8, 8))
    with unchanged(Path(here.watch)), pytest.raises(oocpatch.RunMismatch, match="volume"):
        predict(here)


@pytest.mark.parametrize("options", [{"workers": 2}, {"progress": True}, {"max_disk": "1GiB"}], ids=str)
def test_what_does_not_change_the_bytes_may_change_between_runs(
    options: dict[str, Any], here: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict(here)
    expected = prediction(here)
    shutil.rmtree(here.output)
    monkeypatch.setattr(crash_child, "JOB", dataclasses.replace(here, fail_on=(17.0,)))
    with pytest.raises(oocpatch.BlockFailed):
        predict(here)
    monkeypatch.setattr(crash_child, "JOB", here)
    predict(here, **options)
    assert prediction(here) == expected


def test_a_complete_run_returns_at_once_without_calling_the_model(here: Job) -> None:
    first = predict(here).values
    done = len(calls(here))
    assert done >= 49
    with unchanged(Path(here.watch)):
        again = predict(here)
    assert len(calls(here)) == done
    np.testing.assert_array_equal(again.values, first)


def test_overwrite_computes_everything_again(here: Job) -> None:
    predict(here)
    expected, done = prediction(here), len(patch_calls(here))
    predict(here, overwrite=True)
    assert len(patch_calls(here)) == 2 * done
    assert prediction(here) == expected


def test_overwrite_replaces_a_run_with_other_parameters(here: Job) -> None:
    predict(here, overlap_mode="average", output_chunks=8)
    predict(here, overwrite=True)
    replaced = prediction(here)
    shutil.rmtree(here.output)
    predict(here)
    assert prediction(here) == replaced


def test_overwrite_discards_what_an_interrupted_run_left(here: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crash_child, "JOB", dataclasses.replace(here, fail_on=(17.0,)))
    with pytest.raises(oocpatch.BlockFailed):
        predict(here, overlap_mode="average")
    monkeypatch.setattr(crash_child, "JOB", here)
    predict(here, overwrite=True)
    assert not list(Path(here.watch).glob("out?*"))
    Path(here.log).unlink()
    predict(here)
    assert not calls(here)


def test_without_resume_an_interrupted_run_is_not_continued(here: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crash_child, "JOB", dataclasses.replace(here, fail_on=(17.0,)))
    with pytest.raises(oocpatch.BlockFailed):
        predict(here)
    monkeypatch.setattr(crash_child, "JOB", here)
    with unchanged(Path(here.watch)), pytest.raises(oocpatch.OocpatchError, match=r"resume|overwrite"):
        predict(here, resume=False)


@pytest.mark.filterwarnings("ignore:Object at notes.txt")  # Zarr says so of any file that it does not know
def test_foreign_files_inside_an_output_survive_overwrite(here: Job) -> None:
    predict(here)
    notes, labels = Path(here.output) / "notes.txt", Path(here.output) / "labels"
    notes.write_text("mine")
    zarr.create_array(labels, data=np.arange(10), chunks=(5,))
    kept = file_digests(labels)
    try:
        predict(here, overwrite=True)
    except oocpatch.OutputExists as refusal:
        assert here.output in str(refusal)  # noqa: PT017 - refusing and keeping are both allowed
    assert notes.read_text() == "mine"
    assert file_digests(labels) == kept


def test_foreign_files_at_the_place_of_the_workspace_survive(here: Job) -> None:
    workspace = Path(here.output + ".oocpatch")
    workspace.mkdir()
    (workspace / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        try:
            predict(here, overwrite=overwrite)
        except oocpatch.OutputExists as refusal:
            assert str(workspace) in str(refusal)  # noqa: PT017 - refusing and keeping are both allowed
        assert (workspace / "thesis.tex").read_text() == "mine"


def test_a_failed_block_does_not_stop_the_others_and_is_the_only_one_retried(
    here: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crash_child, "JOB", dataclasses.replace(here, fail_on=(MIDDLE,)))
    with pytest.raises(oocpatch.BlockFailed) as failure:
        predict(here)
    ((block, message),) = failure.value.failures.items()
    assert "the model fails on the patch" in message
    assert str(block) in str(failure.value)
    computed = {block_of(value) for _, value in patch_calls(here)}
    assert len(computed) == 16
    monkeypatch.setattr(crash_child, "JOB", here)
    Path(here.log).unlink()
    predict(here)
    assert {block_of(value) for _, value in patch_calls(here)} == {block_of(MIDDLE)}


def test_a_workspace_elsewhere_holds_everything_and_is_gone_after_success(
    here: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "scratch" / "here"
    elsewhere.parent.mkdir()
    monkeypatch.setattr(crash_child, "JOB", dataclasses.replace(here, fail_on=(17.0,)))
    with pytest.raises(oocpatch.BlockFailed):
        predict(here, workspace=elsewhere)
    assert file_digests(elsewhere)
    assert not Path(here.output + ".oocpatch").exists()
    monkeypatch.setattr(crash_child, "JOB", here)
    predict(here, workspace=elsewhere)
    assert not elsewhere.exists()
    done = prediction(here)
    predict(here, overwrite=True)
    assert prediction(here) == done
