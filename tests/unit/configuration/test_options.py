"""An option is described in one place: a field. Signature, command line, fingerprint and docs follow from it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import oocpatch
from oocpatch.cli.main import main
from oocpatch.configuration.checks import CHECKS, IDENTITIES
from oocpatch.configuration.options import DERIVED_IDENTITY, GROUPS, OPTIONS, OutputOptions, options_table
from oocpatch.configuration.run_config import RunConfig
from oocpatch.models.options import ModelOptions
from oocpatch.planning.plan import Plan
from oocpatch.progress import TaskDone
from oocpatch.visualization.html_report import command_of

POSITIONAL = ("volume", "model", "output")
SAMPLE = np.arange(32 * 40, dtype=np.float32).reshape(32, 40)


def test_the_parameters_of_predict_are_the_fields_with_their_defaults() -> None:
    parameters = inspect.signature(oocpatch.predict).parameters
    keywords = {name: p.default for name, p in parameters.items() if name not in POSITIONAL}
    fields = {
        name: inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        for name, field in OPTIONS.items()
        if name not in POSITIONAL
    }
    assert keywords == fields
    assert tuple(parameters)[:3] == POSITIONAL


def test_predict_passes_every_parameter_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):
        pass

    def of(*positional: object, **keywords: object) -> None:
        assert positional == POSITIONAL
        assert keywords == {name: name for name in OPTIONS if name not in POSITIONAL}
        raise Seen

    monkeypatch.setattr(RunConfig, "of", of)
    with pytest.raises(Seen):
        oocpatch.predict(*POSITIONAL, **{name: name for name in OPTIONS if name not in POSITIONAL})


def test_every_parameter_is_described_in_the_docstring_of_predict() -> None:
    text = inspect.getdoc(oocpatch.predict) or ""
    assert [name for name in OPTIONS if f"\n    {name}: " not in text] == []


@pytest.mark.parametrize("command", ["predict", "plan"])
def test_the_options_of_a_command_are_the_fields(command: str) -> None:
    options = {p.name for p in main.commands[command].params}
    typed = {name for name, field in OPTIONS.items() if field.metadata["kind"] != "none"}
    without = {"progress"} if command == "plan" else set()
    assert typed - without <= options
    assert options - typed == {"volume", "output", "config", "scheduler", "as_json"} | (
        {"draw"} if command == "plan" else set()
    )


def test_every_check_and_identity_that_a_field_names_is_there_and_used() -> None:
    names = {field.metadata["check"] for field in OPTIONS.values()} - {None}
    identities = {field.metadata["identity"] for field in OPTIONS.values()} - {True, False}
    assert names == set(CHECKS)
    assert identities == set(IDENTITIES)


def test_every_help_text_is_one_sentence_without_the_old_words() -> None:
    for name, field in OPTIONS.items():
        text = field.metadata["help"]
        assert text[0].isupper(), name
        assert text.endswith("."), name


def test_the_table_in_the_docs_has_every_option_once() -> None:
    rows = [line for line in options_table().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(OPTIONS)


def test_groups_are_frozen_and_hold_checked_values(tmp_path: Path) -> None:
    config = RunConfig.of(SAMPLE, "identity", tmp_path / "out", patch_size=(8, 4), patch_overlap={"y": 2, "x": 0})
    assert config.patches.patch_size == (8, 4)
    assert config.patches.patch_overlap == (2, 0)
    assert config.limits.max_memory > 0
    for name in GROUPS:
        group = getattr(config, name)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(group, dataclasses.fields(group)[0].name, None)


def test_unknown_and_missing_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no argument patch_sice"):
        oocpatch.plan(SAMPLE, "identity", tmp_path / "out", patch_sice=8)
    with pytest.raises(TypeError, match="need patch_size"):
        oocpatch.plan(SAMPLE, "identity", tmp_path / "out")


def test_fields_that_identify_a_run_are_in_its_fingerprint_and_no_others(tmp_path: Path) -> None:
    config = RunConfig.of(SAMPLE, "identity", tmp_path / "out", patch_size=8, channels_last=False)
    identifying = {name for name, field in OPTIONS.items() if field.metadata["identity"]}
    derived = {*DERIVED_IDENTITY, "volume", "torch"}
    without = {
        "channels_last",
        "compile",
        "eval_mode",
        "match",
        "patch_starts",
        "spacing",
        "orientation",
        "output_grid",
        "context_level",
    }
    assert set(config.parameters) == (identifying | derived) - without
    json.dumps(config.parameters)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"fill": 1.0, "padding_mode": "constant"}, "padding_mode"),
        ({"overlap_mode": "crop"}, "overlap_mode"),
        ({"patch_starts": "even"}, "patch_starts"),
        ({"augment": "flips"}, "augment"),
        ({"preprocess": "zscore"}, "preprocess"),
        ({"postprocess": "sigmoid"}, "postprocess"),
        ({"output_fill": 3}, "output_fill"),
        ({"skip_empty": True}, "skip_empty"),
        ({"box": [(0, 8), (0, 8)]}, "box"),
        ({"mask": np.ones((4, 4), bool)}, "mask"),
        ({"allow_nonfinite": True}, "allow_nonfinite"),
        ({"output_chunks": 8}, "output_chunks"),
        ({"batch_size": 2}, "batch_size"),
    ],
)
def test_another_value_of_an_identifying_field_is_another_run(
    tmp_path: Path, change: dict[str, Any], name: str
) -> None:
    base: dict[str, Any] = {"patch_size": 8, "progress": False}
    oocpatch.predict(SAMPLE, "identity", tmp_path / "out", **base)
    with pytest.raises(oocpatch.RunMismatch) as raised:
        oocpatch.predict(SAMPLE, "identity", tmp_path / "out", **{**base, **change})
    assert name in str(raised.value)


def test_model_id_identifies_the_model_instead_of_its_fingerprint(tmp_path: Path) -> None:
    options: dict[str, Any] = {"patch_size": 8, "progress": False}
    oocpatch.predict(SAMPLE, nn.Identity(), tmp_path / "out", model_id="net-1", **options)
    again = oocpatch.predict(SAMPLE, lambda x: 2 * x, tmp_path / "out", model_id="net-1", **options)
    np.testing.assert_allclose(again, SAMPLE, rtol=1e-6)  # complete: it is opened, not computed
    with pytest.raises(oocpatch.RunMismatch, match="model: 'net-1' before, 'net-2' now"):
        oocpatch.predict(SAMPLE, nn.Identity(), tmp_path / "out", model_id="net-2", **options)
    with pytest.raises(oocpatch.RunMismatch, match="model"):
        oocpatch.predict(SAMPLE, nn.Identity(), tmp_path / "out", **options)


def test_the_hand_over_to_other_processes_is_plain(tmp_path: Path) -> None:
    planned = oocpatch.plan(SAMPLE, "identity", tmp_path / "out", patch_size=8, box=[(0, 9), (0, 9)], output_fill=2)
    assert Plan.from_json(planned.to_json()).to_json() == planned.to_json()
    assert not any(callable(getattr(planned.plan, f.name)) for f in dataclasses.fields(Plan))
    options = planned.config.model
    assert isinstance(options, ModelOptions)
    assert pickle.loads(pickle.dumps(options)) == options  # noqa: S301 - of our own making


def test_single_blocks_are_computed_to_look_at_them(tmp_path: Path) -> None:
    calls = []

    def model(patches: torch.Tensor) -> torch.Tensor:
        calls.append(len(patches))
        return patches + 1

    options: dict[str, Any] = {"patch_size": 8, "patch_overlap": 4, "block_shape": 8, "output_chunks": 4}
    planned = oocpatch.plan(SAMPLE, model, tmp_path / "out", model_id="plus", progress=False, **options)
    assert planned.blocks == 4 * 5
    calls.clear()
    block = planned.block_grid[7].core
    result = planned.run(blocks=[7])
    assert result.attrs["complete"] is False
    inside = tuple(slice(a, b) for a, b in zip(block.start, block.stop, strict=True))
    np.testing.assert_allclose(np.asarray(result)[inside], SAMPLE[inside] + 1, rtol=1e-6)
    assert len(calls) < planned.patches / 2
    with pytest.raises(ValueError, match="blocks must be indices from 0 to 19"):
        planned.run(blocks=[20])
    done = len(calls)
    np.testing.assert_allclose(planned.run(), SAMPLE + 1, rtol=1e-6)
    assert len(calls) == planned.patches, done  # what was computed for the look is not computed again


@pytest.mark.parametrize("blocks", [[4], [-1], [0, 9], []])
def test_a_block_that_the_plan_does_not_have_is_refused_before_anything_is_written(
    blocks: list[int], tmp_path: Path
) -> None:
    data = np.zeros((16, 16), np.float32)
    options: dict[str, Any] = {"patch_size": 8, "block_shape": 8, "output_chunks": 8, "progress": False}
    planned = oocpatch.plan(data, torch.nn.Identity(), tmp_path / "deep" / "out", **options)
    assert planned.blocks == 4
    with pytest.raises(ValueError, match="blocks must be indices from 0 to 3"):
        planned.run(blocks=blocks)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("output_format", "ome"), [("zarr", False), ("ome-zarr", True), ("auto", False)])
def test_only_an_ome_zarr_counts_as_one(output_format: str, ome: bool) -> None:
    assert OutputOptions(output_format=output_format).ome is ome


def test_the_command_that_repeats_a_run_is_made_of_the_fields() -> None:
    settings = {
        "volume": "/in.zarr",
        "output": "/out.zarr",
        "model": ["a.py:net", "b.py:net"],
        "patch_size": [8, 16],
        "box": [[0, 8], [None, 4]],
        "part": [1, 3],
        "model_args": {"depth": 3},
        "preprocess": {"name": "scale", "divide": 2},
        "compile": True,
        "resume": False,
        "overlap_mode": "hann",
        "level": "0",
    }
    assert command_of(settings) == (
        "oocpatch predict /in.zarr /out.zarr --model a.py:net --model b.py:net --model-args depth=3 "
        """--preprocess '{"name": "scale", "divide": 2}' --compile default --patch-size 8,16 --box 0:8,:4 """
        "--part 1/3 --no-resume"
    )


def test_a_function_receives_the_progress_as_events(tmp_path: Path) -> None:
    events: list[TaskDone] = []
    options: dict[str, Any] = {"patch_size": 8, "block_shape": 16, "output_chunks": 8, "progress": events.append}
    planned = oocpatch.plan(SAMPLE, "identity", tmp_path / "out", **options)
    planned.run()
    assert sum(event.patches for event in events) == planned.patches
    assert {event.block for event in events} == set(range(planned.blocks))
    assert sum(event.bytes for event in events) == pytest.approx(SAMPLE.nbytes)
