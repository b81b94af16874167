"""Displays of progress: which one is chosen, and where a bar is drawn."""

from __future__ import annotations

import io
import sys

import pytest

from oocpatch.progress import display_of, show_progress


def test_a_bar_is_chosen_for_a_terminal_and_for_the_front_end_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    of_kernel = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
    terminal = type("Terminal", (io.StringIO,), {"isatty": lambda _: True})
    for stream, display in ((io.StringIO, "auto"), (of_kernel, "bar"), (terminal, "bar")):
        monkeypatch.setattr(sys, "stderr", stream())
        assert display_of("auto") == display
    assert display_of(False) == "none"


def test_a_bar_outside_of_notebooks_is_text_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress("bar", "predict", "patches", 4, resumed=1) as on_patches:
        on_patches(3)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "predict: 100%" in printed.err.split("\r")[-1]
    assert "4/4" in printed.err
