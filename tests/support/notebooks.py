"""Notebooks: run in a kernel of their own, and the outputs that they keep.

python -m tests.support.notebooks docs/howto/notebook.ipynb

runs a notebook in an empty directory, and writes its outputs into it, without what differs from run to run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0
KEPT = ("text/html", "image/png", "text/plain")

Output = dict[str, Any]


class Kernel:
    """A kernel in a directory, and the client that a front end has."""

    def __init__(self, manager: Any, client: Any, folder: Path) -> None:
        self.manager, self.client, self.folder = manager, client, folder

    def run(self, code: str, *, interrupt_at: str | None = None) -> list[Output]:
        """Run a cell, and return its outputs as a notebook stores them; press the stop button when it prints a text."""
        outputs: list[Output] = []

        def take(message: Any) -> None:
            kind, content = message["msg_type"], message["content"]
            begun = [output for output in outputs if kind == "stream" and output.get("name") == content["name"]]
            if begun:
                begun[0]["text"] += content["text"]
            elif kind in ("stream", "display_data", "execute_result", "error"):
                outputs.append({"output_type": kind, **{k: v for k, v in content.items() if k != "transient"}})
            if interrupt_at is not None and kind == "stream" and interrupt_at in content["text"]:
                self.manager.interrupt_kernel()

        self.client.execute_interactive(code, timeout=PATIENCE, output_hook=take)
        return outputs

    def text(self, code: str, *, interrupt_at: str | None = None) -> str:
        """Run a cell, and return all text that it shows."""
        return "".join(text_of(output) for output in self.run(code, interrupt_at=interrupt_at))

    def shown(self, code: str) -> list[Output]:
        """Run a cell, and return its outputs without what differs from run to run."""
        return [self._stable(output) for output in self.run(code)]

    def _stable(self, output: Output) -> Output:
        """Shorten paths and times; keep the last state of a bar, as text."""
        text = json.dumps(output).replace(json.dumps(str(self.folder))[1:-1], "...")
        output = json.loads(re.sub(r"\[[0-9:]+<[^]]*\]", "[...]", text))
        if output["output_type"] == "stream":
            lines = output["text"].split("\n")
            return output | {"text": "\n".join(line.rstrip("\r").split("\r")[-1] for line in lines)}
        if "data" in output:
            output["data"] = {kind: output["data"][kind] for kind in KEPT if kind in output["data"]}
        return output


def text_of(output: Output) -> str:
    """The text that a front end without HTML shows for an output."""
    if output["output_type"] == "error":
        return f"{output['ename']}: {output['evalue']}\n"
    return str(output["text"] if output["output_type"] == "stream" else output["data"].get("text/plain", ""))


@contextlib.contextmanager
def running_kernel(folder: Path) -> Iterator[Kernel]:
    """Start a kernel that ends with the `with` block."""
    from jupyter_client.manager import start_new_kernel  # noqa: PLC0415 - not in every environment

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    manager, client = start_new_kernel(cwd=str(folder), env=environment, startup_timeout=PATIENCE)
    client.allow_stdin = False
    try:
        yield Kernel(manager, client, folder)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


NO_WIDGETS = "import sys; sys.modules['ipywidgets'] = None"
"""A cell after which bars are text, whose last state a notebook keeps."""


def source_of(cell: dict[str, Any]) -> str:
    """The text of a cell, which notebooks store as lines."""
    return "".join(cell["source"])


def write_outputs(path: Path) -> None:
    """Run the cells of a notebook, and write their outputs into it."""
    notebook = json.loads(path.read_text())
    with tempfile.TemporaryDirectory() as folder, running_kernel(Path(folder).resolve()) as kernel:
        kernel.run(NO_WIDGETS)
        for number, cell in enumerate((c for c in notebook["cells"] if c["cell_type"] == "code"), 1):
            cell["outputs"] = kernel.shown(source_of(cell))
            cell["execution_count"] = number
            for output in (o for o in cell["outputs"] if o["output_type"] == "execute_result"):
                output["execution_count"] = number
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write_outputs(Path(sys.argv[1]))
