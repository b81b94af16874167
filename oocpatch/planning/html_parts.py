"""Parts of HTML that notebooks and reports show: tables of rows, and drawings."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping


def table_of(rows: Mapping[str, str]) -> str:
    """Return names and texts as the rows of a table.

    >>> table_of({"disk": "1 < 2"}).count("&lt;")
    1
    """
    left = 'style="text-align:left;padding-right:1em"'  # notebooks align to the right
    texts = ((html.escape(name), html.escape(text)) for name, text in rows.items())
    return f"<table>{''.join(f'<tr><td {left}>{name}</td><td {left}>{text}</td></tr>' for name, text in texts)}</table>"


def image_of(svg: str, description: str) -> str:
    """Return an SVG as an image: its style would apply to the whole page if it were part of it."""
    data = base64.b64encode(svg.encode()).decode()
    return f'<img alt="{html.escape(description)}" style="max-width:100%" src="data:image/svg+xml;base64,{data}">'
