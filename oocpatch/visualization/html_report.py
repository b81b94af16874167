"""One HTML file about a run, with everything in it: it can be mailed, and opened in ten years."""

from __future__ import annotations

import base64
import html
import json
import math
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from oocpatch.outputs.record import OutputRecord
from oocpatch.planning.plan import Plan, human
from oocpatch.run.status import RunStatus, root_of, status
from oocpatch.storage.paths import local_path
from oocpatch.visualization.display_source import local_name, record_of
from oocpatch.visualization.picture import figure_of
from oocpatch.workspace.workspace import Workspace

STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;color:#1f2328;background:#f6f8fa;margin:0}
main{max-width:1180px;margin:0 auto;padding:24px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:17px;margin:32px 0 8px}
p.state{color:#59636e;margin:0}
section.card{background:#fff;border:1px solid #d1d9e0;border-radius:8px;padding:16px;overflow-x:auto}
table{border-collapse:collapse;width:100%}td{padding:4px 12px 4px 0;vertical-align:top}
tr+tr td{border-top:1px solid #eaeef2}td:first-child{color:#59636e;white-space:nowrap;width:1%;padding-right:28px}
td:last-child{overflow-wrap:anywhere}
pre{margin:0;white-space:pre-wrap;font:13px/1.5 ui-monospace,monospace}
img{max-width:100%;height:auto;border-radius:4px;display:block}img+img{margin-top:16px}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px;margin-top:16px}
.facts div{background:#fff;border:1px solid #d1d9e0;border-radius:8px;padding:12px 16px}
.facts b{display:block;font-size:20px}.facts span{color:#59636e;font-size:13px}
svg{max-width:100%;height:auto}
""".strip()


def report(output: str | os.PathLike[str], page: str | os.PathLike[str] | None = None) -> Path:
    """Write one self-contained HTML file about the run that wrote an output.

    Pictures of every head, the plan and its drawing, time, memory, coverage, checksums if the output keeps any, the
    settings, versions, and the command that repeats it. A run that is not finished has a report as well.

    Args:
        output: what `predict` wrote.
        page: the file; default: beside the output.

    Returns:
        The path of the file.

    Raises:
        ValueError: when there is no such output, or without Pillow.
    """
    record = record_of(output)
    if record is None:
        raise ValueError(f"a report needs the output of a run, got {os.fspath(output)}")
    place = Path(f"{local_name(output)}.report.html") if page is None else local_path("page", page)
    text = _page(os.fspath(output), record, _plan_of(record), status(output))
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text, encoding="utf-8")
    return place


def _plan_of(record: OutputRecord) -> Plan | None:
    """The plan: noted in the output when the run is done, before that in the workspace."""
    noted = record.details.get("plan")
    if noted is not None:
        return Plan.from_json(json.dumps(noted))
    workspace = Workspace.find(root_of(record))
    return None if workspace is None else workspace.plan


def _page(output: str, record: OutputRecord, plan: Plan | None, found: RunStatus) -> str:
    pictures = [figure_of(output, head=head).png() for head in record.details["heads"]]
    named = zip(record.details["heads"], pictures, strict=True)
    images = "".join(f'<img alt="{_text(head)}" src="{_uri(png)}">' for head, png in named)
    settings = record.details.get("settings", {})
    parts = [
        f"<h1>{_text(Path(output).name)}</h1><p class='state'>{_text(_state(found))}</p>",
        _tiles(_figures(record, plan)),
        f"<h2>Result</h2><section class='card'>{images}</section>",
    ]
    if plan is not None:
        parts.append(f"<h2>Plan</h2><section class='card'><pre>{_text(plan)}</pre>{plan.draw()}</section>")
    if found.failed:
        parts.append(f"<h2>Failed blocks</h2>{_table({str(b): m for b, m in found.failed.items()})}")
    if settings:
        parts.append(f"<h2>Repeat it</h2><section class='card'><pre>{_text(command_of(settings))}</pre></section>")
        parts.append(f"<h2>Settings</h2>{_table(settings)}")
    about = {"run": record.run_id, "output": found.output, **record.details.get("versions", {})}
    if "metadata_crc" in record.details:
        about["checksums"] = (
            f"kept for every file; metadata {record.details['metadata_crc']}; `oocpatch check {found.output}` reads all"
        )
    parts.append(f"<h2>Made by</h2>{_table(about)}")
    title = f"<title>{_text(Path(output).name)}</title>"
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'>{title}"
    body = f"<body><main>{''.join(parts)}</main></body>"
    return f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head>{body}</html>\n'


def _state(found: RunStatus) -> str:
    if found.state == "complete":
        return f"complete: {found.output}"
    return f"{found.state}, {found.predict_done} of {found.predict_total} blocks computed: {found.output}"


def _figures(record: OutputRecord, plan: Plan | None) -> dict[str, str]:
    """The numbers that a reader looks for first."""
    details, found = record.details, {}
    if "seconds" in details:
        seconds = float(details["seconds"])
        found["time"] = f"{seconds:,.1f} s" if seconds < 600 else f"{seconds / 60:,.1f} min"
    if plan is not None:
        found["patches"] = f"{plan.patches:,}"
        found["blocks"] = f"{plan.blocks:,}"
        if "seconds" in details and details["seconds"] > 0:
            size = math.prod(plan.shape) * plan.in_channels * np.dtype(plan.in_dtype).itemsize
            found["patches per second"] = f"{plan.patches / details['seconds']:,.1f}"
            found["of the volume per second"] = human(size / details["seconds"])
        if "uncovered_voxels" in details:
            found["voxels that no patch covers"] = f"{details['uncovered_voxels']:,}"
        found["memory, projected"] = human(plan.projected_memory)
    if "process_peak_memory" in details:
        found["memory, whole process at its peak"] = human(details["process_peak_memory"])
    return found


def command_of(settings: Mapping[str, Any]) -> str:
    """The command line that repeats a run; a call in Python where the model has no name.

    >>> command_of({"volume": "/a.zarr", "output": "/o.zarr", "model": "net.py:net", "patch_size": [8, 16]})
    'oocpatch predict /a.zarr /o.zarr --model net.py:net --patch-size 8,16'
    """
    positional = ("volume", "output")
    models = settings.get("model")
    models = models if isinstance(models, list) else [models]
    nameless = [settings.get(n) for n in ("volume", "mask", "preprocess")] + models
    if any(isinstance(v, str) and v.startswith("<") for v in nameless):
        asked = {n: v for n, v in settings.items() if v != _DEFAULTS.get(n, _NONE)}
        objects = {n: v for n, v in asked.items() if isinstance(v, str) and v.startswith("<")}
        told = "".join(f"    {n}={n if n in objects else repr(v)},\n" for n, v in asked.items())
        return "".join(f"# {n}: {v}\n" for n, v in objects.items()) + f"oocpatch.predict(\n{told})"
    words = ["oocpatch", "predict", *(str(settings[n]) for n in positional if n in settings)]
    first = ("model", "weights", "model_args", "patch_size")
    for name in [*(n for n in first if n in settings), *(n for n in settings if n not in (*first, *positional))]:
        if settings[name] != _DEFAULTS.get(name, _NONE) and (name, settings[name]) != ("level", "0"):
            words += _option(name, settings[name])
    return shlex.join(words)


_NONE = object()
_DEFAULTS: Mapping[str, Any] = {
    "patch_overlap": 0, "overlap_mode": "hann", "fill": 0.0, "trust_pickle": False, "batch_size": 1, "device": "auto",
    "autocast": False, "channels_last": False, "compile": False, "output_fill": 0, "max_memory": "auto",
    "skip_empty": False, "output_format": "auto", "allow_nonfinite": False, "level": 0,
}  # fmt: skip
"""Of `predict`, as far as they are not None: what has its default needs no option."""


def _option(name: str, value: Any) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    if value is True:
        return [option] if name != "compile" else [option, "default"]
    if name in ("model", "weights") and isinstance(value, list):
        return [word for item in value for word in (option, str(item))]
    if name == "model_args":
        return [word for key, item in value.items() for word in (option, f"{key}={json.dumps(item)}")]
    if isinstance(value, Mapping):
        plain = name not in ("preprocess", "augment")
        return [option, ",".join(f"{k}={v}" for k, v in value.items()) if plain else json.dumps(value)]
    if isinstance(value, list):
        return [option, ",".join(map(str, value)) if name not in ("augment", "axes") else json.dumps(value)]
    return [option, str(value)]


def _tiles(figures: Mapping[str, str]) -> str:
    tiles = "".join(f"<div><b>{_text(value)}</b><span>{_text(name)}</span></div>" for name, value in figures.items())
    return f"<div class='facts'>{tiles}</div>"


def _table(rows: Mapping[str, Any]) -> str:
    def told(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    body = "".join(f"<tr><td>{_text(name)}</td><td>{_text(told(value))}</td></tr>" for name, value in rows.items())
    return f"<section class='card'><table>{body}</table></section>"


def _text(value: object) -> str:
    return html.escape(str(value))


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
