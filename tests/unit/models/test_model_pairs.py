"""Models that differ in one thing are told apart, and models that do not are taken for the same."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch

from oocpatch.models import source_code
from oocpatch.models.fingerprint import model_fingerprint, read_fingerprint
from tests.support import model_pairs
from tests.support.model_pairs import DIFFERENT, SAME, loaded, text_of, write


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    model_pairs.forget()


@pytest.mark.parametrize("name", DIFFERENT)
def test_models_that_differ_in_one_thing_are_told_apart(name: str, folder: Path) -> None:
    digests = []
    for number in (0, 1, 0):
        write(folder, text_of(name, number))
        digests.append(read_fingerprint(loaded(folder)))
    assert digests[0] == digests[2]
    assert digests[0] != digests[1]
    assert not digests[0].unread


def _again(model: Any, what: str, folder: Path) -> Any:
    if what == "called":
        for _ in range(2):
            model(torch.ones(2, 4))
        return model
    if what == "pickled":
        try:
            return pickle.loads(pickle.dumps(model))  # noqa: S301 - ours
        except Exception:  # noqa: BLE001 - a lambda, a local function: as processes of a run get it
            return cloudpickle.loads(cloudpickle.dumps(model))
    write(folder, what)
    return loaded(folder)


def test_a_comment_that_is_added_while_the_code_is_in_memory_does_not_count(folder: Path) -> None:
    write(folder, "def model(x):\n    return x * 2")
    model = loaded(folder)
    source_code._DEFINITIONS.clear()
    write(folder, "# twice\n\ndef model(x):\n    # of it\n    return x * 2")
    before = model_fingerprint(model)
    source_code._DEFINITIONS.clear()
    assert before == model_fingerprint(loaded(folder))


@pytest.mark.parametrize("name", SAME)
def test_models_that_do_not_differ_are_taken_for_the_same(name: str, folder: Path) -> None:
    text, what = SAME[name]
    write(folder, text)
    model = loaded(folder)
    before = read_fingerprint(model)
    assert read_fingerprint(_again(model, what, folder)) == before
    assert not before.unread


def test_another_process_in_another_folder_agrees(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text_of(name, 0) for name in DIFFERENT] + [text for text, _ in SAME.values()]
    digests = []
    for number, text in enumerate(texts):
        for side in ("here", "there"):
            write(folder / side / str(number), text)
        monkeypatch.syspath_prepend(folder / "here" / str(number))
        digests.append(model_fingerprint(loaded(folder / "here" / str(number))))
    (folder / "places.json").write_text(json.dumps([str(folder / "there" / str(n)) for n in range(len(texts))]))
    command = [sys.executable, "-m", model_pairs.__name__, str(folder / "places.json")]
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(root)}
    printed = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout
    wrong = [text for text, *both in zip(texts, digests, printed.split(), strict=True) if both[0] != both[1]]
    assert not wrong


_USAGES = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("source_code", sys.argv[1])
source_code = importlib.util.module_from_spec(spec)
sys.modules["source_code"] = source_code
spec.loader.exec_module(source_code)
usages = []
for file in sys.argv[2:]:
    try:
        code = compile(open(file).read(), file, "exec")
    except SyntaxError:
        continue
    for part in source_code._nested(code):
        if part.co_flags & 2:  # of a function, and not of a class or module
            usage = source_code.code_usage(part)
            texts = {
                name: value if name == "source" else sorted(map(repr, value))
                for name, value in usage._asdict().items()
                if name not in ("texts", "variables")  # with texts and names that Python adds
            }
            usages.append((part.co_name, part.co_firstlineno, texts))
usages.sort(key=repr)
print(json.dumps([usage for usage in usages if usage[0][0] != "<"]))
"""


def _pythons() -> list[str]:
    folders = Path.home() / ".pyenv" / "versions"
    return [str(python) for python in sorted(folders.glob("3.1[1-9].*/bin/python"))]


@pytest.mark.skipif(len(_pythons()) < 2, reason="there is one version of Python only")
def test_versions_of_python_read_the_same_in_sources(folder: Path) -> None:
    """No bytecode, and nothing else that depends on the version, where the source is at hand."""
    texts = [text_of(name, 0) for name in DIFFERENT] + [text for text, _ in SAME.values()]
    for number, text in enumerate(texts):
        write(folder / str(number), text)
    files = [str(file) for file in sorted(folder.glob("*/*.py"))]
    files += [str(file) for file in sorted(Path(source_code.__file__).parents[1].glob("models/*.py"))]
    script = folder / "usages.py"
    script.write_text(_USAGES)
    printed = {
        python: subprocess.run(
            [python, str(script), source_code.__file__, *files],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": "0"},  # which texts of sets depend on
        ).stdout
        for python in _pythons()
    }
    one, *others = (json.loads(text) for text in printed.values())
    assert len(one) > 400
    for other in others:
        assert [pair for pair in zip(one, other, strict=True) if pair[0] != pair[1]] == []
