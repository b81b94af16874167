"""The notebook of the documentation runs in a kernel, and keeps what its cells show; the stop button ends a run."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.test_docs import assert_prints, assert_same_picture
from tests.support.notebooks import NO_WIDGETS, ROOT, Kernel, Output, running_kernel, source_of, text_of

pytest.importorskip("ipykernel")

WIDGET = "application/vnd.jupyter.widget-view+json"
NOTEBOOK = ROOT / "docs/howto/notebook.ipynb"

BEGIN = """
import sys, threading, time, warnings
for name in ("ipywidgets", "tqdm.autonotebook", "tqdm.notebook"):  # which an earlier test hides
    sys.modules.pop(name, None)
import numpy as np, torch, ipywidgets, oocpatch.progress
oocpatch.progress._bar_class.cache_clear()
calls = 0

def model(patches):
    global calls
    calls += 1
    if calls == 20:
        print("working", flush=True)
    time.sleep(0.01)
    return 2 * patches

scan = np.random.default_rng(0).random((96, 128), dtype=np.float32)
settings = {"patch_size": 32, "patch_overlap": 16, "block_shape": 32, "output_chunks": 32, "workers": 2}
"""
RUN = "result = oocpatch.predict(scan, model, 'out.zarr', **settings)"
BARS = """
warnings.simplefilter("ignore")  # there is no other public list of widgets
bars = [w for w in ipywidgets.Widget.widgets.values() if isinstance(w, ipywidgets.FloatProgress)]
print(*[f"{bar.bar_style} {bar.value == bar.max}" for bar in bars], sep=", ", end="")
"""
THREADS = "print(*[t.name for t in threading.enumerate() if t.name.startswith('oocpatch')], end='')"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    with running_kernel(tmp_path_factory.mktemp("notebook").resolve()) as kernel:
        yield kernel


def test_the_notebook_runs_and_shows_what_it_keeps(kernel: Kernel, tmp_path: Path) -> None:
    def picture(outputs: list[Output], name: str) -> Path:
        (tmp_path / name).write_bytes(base64.b64decode(outputs[0]["data"]["image/png"]))
        return tmp_path / name

    kernel.run(NO_WIDGETS)
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        shown, kept = kernel.shown(source_of(cell)), cell["outputs"]
        assert [o for o in shown if o["output_type"] == "error"] == [], source_of(cell)
        if "varies" in cell["metadata"].get("tags", ()):
            continue
        texts = ["".join(map(text_of, outputs)) for outputs in (kept, shown)]
        assert_prints(*texts, source_of(cell))
        assert [sorted(o.get("data", ())) for o in shown] == [sorted(o.get("data", ())) for o in kept]
        if kept and "image/png" in kept[0].get("data", ()):
            assert_same_picture(picture(kept, "kept.png"), picture(shown, "shown.png"))


def test_the_stop_button_ends_a_run_that_the_same_cell_continues_with_a_widget_each(kernel: Kernel) -> None:
    assert kernel.text(BEGIN) == ""
    interrupted = kernel.run(RUN, interrupt_at="working")
    assert text_of(interrupted[-1]) == "KeyboardInterrupt: \n"
    assert kernel.text(THREADS) == ""
    assert kernel.text(BARS) == "danger False"
    assert "incomplete\n" in kernel.text("print(oocpatch.status('out.zarr'))")
    resumed = kernel.run(RUN)
    assert [sum(WIDGET in o.get("data", ()) for o in outputs) for outputs in (interrupted, resumed)] == [1, 1]
    assert kernel.text(BARS).endswith("success True")
    assert kernel.text("print(np.allclose(result, 2 * scan), calls < 20 + 35, end='')") == "True True"
    # The same function in a cell that is run again is the same model, another one is named.
    assert kernel.text(f"{BEGIN}\n{RUN}\nprint(calls, end='')") == "0"
    assert "other parameters (model: " in kernel.text(f"{BEGIN}\n{RUN}".replace("2 * patches", "3 * patches"))
