"""Write one self-contained HTML file about a run."""

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

from oocpatch.configuration.options import OPTIONS
from oocpatch.outputs.record import OutputRecord
from oocpatch.planning.html_parts import table_of
from oocpatch.planning.plan import Plan, human
from oocpatch.run.driver import plan_of, workspace_root
from oocpatch.run.status import RunStatus, status
from oocpatch.storage.paths import local_path
from oocpatch.visualization.display_source import local_name, open_display_source, record_of
from oocpatch.visualization.object_table import histogram, measured_areas, read_table
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


def report(
    output: str | os.PathLike[str],
    page: str | os.PathLike[str] | None = None,
    *,
    table: str | os.PathLike[str] | None = None,
) -> Path:
    """Write one self-contained HTML file about the run that wrote an output.

    Pictures of every head, a histogram of the areas of objects, the plan and its drawing, time, memory, coverage,
    checksums if the output keeps any, the settings, versions, and the command that repeats it. A run that is not
    finished has a report as well.

    Args:
        output: output of `predict` or `label`.
        page: the file; default: beside the output.
        table: of the output's objects, `.parquet` or `.csv`, with the areas to draw; default: they are measured, if the
            labels take at most 1 GiB.

    Returns:
        The path of the file.

    Raises:
        ValueError: when there is no such output or table, or without Pillow.
    """
    record = record_of(output)
    if record is None:
        raise ValueError(f"a report needs the output of a run, got {os.fspath(output)}")
    place = Path(f"{local_name(output)}.report.html") if page is None else local_path("page", page)
    text = _page(os.fspath(output), record, _plan_of(record), status(output), _areas(output, record, table))
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text, encoding="utf-8")
    return place


def _plan_of(record: OutputRecord) -> Plan | None:
    """Return the plan: from the output of a complete run, before that from the workspace."""
    if (plan := plan_of(record)) is not None:
        return plan
    workspace = Workspace.find(workspace_root(record))
    return None if workspace is None else workspace.plan


def _areas(output: Any, record: OutputRecord, table: Any) -> dict[str, str]:
    """Return a histogram of the areas of objects: of a table, or of each head that has objects."""
    if table is not None:
        frame = read_table(table)
        if "area" not in frame.columns or frame["area"].dtype.kind not in "iuf":
            raise ValueError(f"table must have numbers in a column `area`, got {', '.join(frame.columns)}")
        drawn = {"": histogram(frame["area"].to_numpy(), "")}
    else:
        heads = record.details["heads"]
        frames = {head: measured_areas(open_display_source(output, 1, head=head)) for head in heads}
        drawn = {
            head: histogram(frame["area"].to_numpy(), frame.attrs.get("units", {}).get("area", "voxels"))
            for head, frame in frames.items()
            if frame is not None
        }
    return {head: drawing for head, drawing in drawn.items() if drawing}


def _page(output: str, record: OutputRecord, plan: Plan | None, state: RunStatus, areas: Mapping[str, str]) -> str:
    pictures = [figure_of(output, head=head).png() for head in record.details["heads"]]
    named = zip(record.details["heads"], pictures, strict=True)
    images = "".join(
        f'<img alt="{_text(head)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">' for head, png in named
    )
    figures, name = _figures(record, plan).items(), Path(output).name
    tiles = "".join(f"<div><b>{_text(value)}</b><span>{_text(label)}</span></div>" for label, value in figures)
    settings = record.details.get("settings", {})
    count = "" if state.state == "complete" else f", {state.predict_done} of {state.predict_total} blocks computed"
    parts = [
        f"<h1>{_text(name)}</h1><p class='state'>{_text(f'{state.state}{count}: {state.output}')}</p>",
        f"<div class='facts'>{tiles}</div>",
        f"<h2>Result</h2><section class='card'>{images}</section>" if images else "",
    ]
    for head, drawing in areas.items():
        of_head = f" of {_text(head)}" if len(areas) > 1 else ""
        parts.append(f"<h2>Areas of the objects{of_head}</h2><section class='card'>{drawing}</section>")
    if plan is not None:
        parts.append(f"<h2>Plan</h2><section class='card'><pre>{_text(plan)}</pre>{plan.draw()}</section>")
    if state.failed:
        parts.append(f"<h2>Failed blocks</h2>{_table({str(b): m for b, m in state.failed.items()})}")
    if settings:
        parts.append(f"<h2>Repeat it</h2><section class='card'><pre>{_text(command_of(settings))}</pre></section>")
        parts.append(f"<h2>Settings</h2>{_table(settings)}")
    about = {"run": record.run_id, "output": state.output, **record.details.get("versions", {})}
    if "metadata_crc" in record.details:
        about["checksums"] = (
            f"kept for every file; metadata {record.details['metadata_crc']}; `oocpatch check {state.output}` reads all"
        )
    parts.append(f"<h2>Made by</h2>{_table(about)}")
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{_text(name)}</title>"
    body = f"<body><main>{''.join(parts)}</main></body>"
    return f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head>{body}</html>\n'


def _figures(record: OutputRecord, plan: Plan | None) -> dict[str, str]:
    """Return the main numbers of a run."""
    details, figures = record.details, {}
    if "seconds" in details:
        seconds = float(details["seconds"])
        figures["time"] = f"{seconds:,.1f} s" if seconds < 600 else f"{seconds / 60:,.1f} min"
    if plan is not None:
        unit = "patches" if plan.labelling is None else "voxels"
        figures[unit] = f"{plan.patches:,}"
        figures["blocks"] = f"{plan.blocks:,}"
        if "seconds" in details and details["seconds"] > 0:
            size = math.prod(plan.shape) * plan.in_channels * np.dtype(plan.in_dtype).itemsize
            figures[f"{unit} per second"] = f"{plan.patches / details['seconds']:,.1f}"
            figures["of the volume per second"] = human(size / details["seconds"])
        if counts := details.get("objects"):
            of_heads = counts if isinstance(counts, dict) else {"": counts}
            texts = (f"{', '.join(f'{n:,}' for n in found)} {head}".strip() for head, found in of_heads.items())
            figures["objects"] = "; ".join(texts)
        elif "uncovered_voxels" in details:
            figures["voxels that no patch covers"] = f"{details['uncovered_voxels']:,}"
        figures["memory, projected"] = human(plan.projected_memory)
    if "process_peak_memory" in details:
        figures["memory, whole process at its peak"] = human(details["process_peak_memory"])
    return figures


def command_of(settings: Mapping[str, Any]) -> str:
    """Return the command line that repeats a run; a call in Python where the model has no name.

    >>> command_of({"volume": "/a.zarr", "output": "/o.zarr", "model": "net.py:net", "patch_size": [8, 16]})
    'oocpatch predict /a.zarr /o.zarr --model net.py:net --patch-size 8,16'
    >>> command_of({"volume": {"t1": "/a", "t2": "/b"}, "output": "/o.zarr", "model": "net.py:net", "patch_size": 8})
    'oocpatch predict t1=/a,t2=/b /o.zarr --model net.py:net --patch-size 8'
    >>> command_of({"volume": "/a.zarr", "output": "/o.zarr", "connectivity": 1, "threshold": 0.5})
    'oocpatch label /a.zarr /o.zarr --connectivity 1 --threshold 0.5'
    """
    changed = {n: v for n, v in settings.items() if n not in OPTIONS or str(v) != str(OPTIONS[n].default)}
    # An object is recorded by its description, which has no name on a command line.
    verb = "label" if "connectivity" in settings else "predict"
    objects = [name for name, value in changed.items() if any(str(v).startswith("<") for v in _listed(value))]
    if objects:
        lines = "".join(f"    {n}={n if n in objects else repr(v)},\n" for n, v in changed.items())
        return "".join(f"# {n}: {changed[n]}\n" for n in objects) + f"oocpatch.{verb}(\n{lines})"
    volume = changed.pop("volume", None)
    if isinstance(volume, Mapping):
        volume = [f"{name}={each}" for name, each in volume.items()]
    words = ["oocpatch", verb, *([] if volume is None else [",".join(map(str, _listed(volume)))])]
    words += [str(changed.pop("output"))] if "output" in changed else []
    for name in sorted(changed.keys() - OPTIONS.keys()) if verb == "label" else ():
        words += _typed(f"--{name.replace('_', '-')}", "flag" if changed[name] is True else "text", changed[name])
    for name, field in OPTIONS.items():
        if name in changed:
            words += _typed(f"--{name.replace('_', '-')}", field.metadata["kind"], changed[name])
    return shlex.join(words)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _typed(option: str, kind: str, value: Any) -> list[str]:
    """Return the words of an option with its value as it is typed."""
    if kind in ("flag", "switch"):
        return [option if value else f"--no-{option[2:]}"]
    if kind == "many":
        return [word for item in _listed(value) for word in (option, str(item))]
    if kind == "pairs":
        return [word for key, item in value.items() for word in (option, f"{key}={json.dumps(item)}")]
    return [option, _text_of(kind, value)]


def _text_of(kind: str, value: Any) -> str:
    if kind == "json" and isinstance(value, Mapping | list):
        return json.dumps(value)
    if kind == "choice" and value is True:
        return "default"  # compile=True
    if kind == "box":
        return ",".join(f"{'' if a is None else a}:{'' if b is None else b}" for a, b in value)
    if isinstance(value, Mapping):
        return ",".join(f"{k}={v}" for k, v in value.items())
    return ("/" if kind == "part" else ",").join(map(str, _listed(value)))


def _table(rows: Mapping[str, Any]) -> str:
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in rows.items()}
    return f"<section class='card'>{table_of(texts)}</section>"


def _text(value: object) -> str:
    return html.escape(str(value))
