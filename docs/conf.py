"""The documentation site: `python -m sphinx -W --keep-going -b html docs docs/_build/html`.

The pages are Markdown that reads well by itself; what Sphinx adds is navigation, search and the reference.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.domains.python import PyObject

import oocpatch
from oocpatch.configuration.options import options_table

project = "oocpatch"
author = "the oocpatch authors"
version = release = oocpatch.__version__
project_copyright = "the oocpatch authors, Apache-2.0"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_click",
    "sphinx_copybutton",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext", ".ipynb": "markdown"}
exclude_patterns = ["_build"]
templates_path = ["_templates"]

# Sphinx's own directives are fenced with `:::`, since the tests run the blocks between three backticks.
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
smartquotes_action = "D"  # dashes only: quotation marks of options and values are to be copied as they stand

default_role = "py:obj"  # docstrings say `predict`, as Markdown does: a link where there is such a name, else code
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say types and shapes
autosummary_generate = True
napoleon_use_ivar = True  # attributes are described once, in the text of their class

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_line_continuation_character = "\\"

html_theme = "pydata_sphinx_theme"
html_title = "oocpatch"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": "oocpatch"},
    "header_links_before_dropdown": 6,
    "navbar_end": ["theme-switcher"],
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars = {"index": [], "tutorial": [], "concepts": []}  # these pages are in no group

RETURNED = {f"oocpatch.{name}" for name in ("CheckReport", "Damage", "Plan", "PlannedRun", "RunStatus", "Verification")}
"""Classes that callers get and never create: their arguments are left out, as those of errors are."""

for field in PyObject.doc_field_types:
    if field.name == "variable":
        field.label = "Attributes"  # Sphinx says "Variables"


def without_arguments(
    _app: Sphinx, what: str, name: str, _of: Any, _options: Any, arguments: str | None, _returns: Any
) -> tuple[str, str] | None:
    """Leave out the arguments of classes that callers do not create."""
    return ("", "") if arguments and (what == "exception" or name in RETURNED) else None


def as_text(_app: Sphinx, what: str, _name: str, _of: Any, _options: Any, lines: list[str]) -> None:
    """Turn names of pages into links, and keep napoleon from reading the text before a colon as a property's type."""
    lines[:] = [re.sub(r"`docs/([\w/-]+)\.md`", r":doc:`\1 </\1>`", line) for line in lines]
    if what in ("attribute", "property"):
        lines[:0] = ["..", ""]  # an empty comment
    if what == "class":
        lines[:] = one_attribute_each(lines)


def one_attribute_each(lines: list[str]) -> list[str]:
    """Give each of several attributes that are described together an entry: Sphinx takes all but the last for types."""
    result: list[str] = []
    i = 0
    while i < len(lines):
        entry = re.match(r"(    )(\w+(?:, \w+)+)(: .*)", lines[i])
        stop = i + 1
        while entry and stop < len(lines) and lines[stop].startswith("     "):
            stop += 1
        if entry:
            for name in entry[2].split(", "):
                result += [f"{entry[1]}{name}{entry[3]}", *lines[i + 1 : stop]]
        else:
            result.append(lines[i])
        i = stop
    return result


def without_unset(_app: Sphinx, _context: Any, lines: list[str]) -> None:
    """Leave out the defaults of options without one: click has an object for them, which sphinx-click prints."""
    lines[:] = [line for line in lines if "Sentinel.UNSET" not in line]


def notebook_as_markdown(app: Sphinx, name: str, text: list[str]) -> None:
    """Turn a notebook into Markdown, with the outputs that it keeps."""
    if str(app.env.doc2path(name)).endswith(".ipynb"):
        text[0] = "\n\n".join(part for cell in json.loads(text[0])["cells"] for part in cell_parts(cell))


def cell_parts(cell: dict[str, Any]) -> Iterator[str]:
    """Yield the parts of a cell in Markdown: its text; or its code, and each output."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield f"```python\n{source}\n```"
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "text/html" in data:
            yield f"```{{raw}} html\n<div class='output'>{data['text/html']}</div>\n```"
        elif "image/png" in data:
            yield f"```{{raw}} html\n<img alt='output' src='data:image/png;base64,{data['image/png'].strip()}'>\n```"
        else:
            yield f"```text\n{(output.get('text') or data['text/plain']).rstrip()}\n```"


def write_options(app: Sphinx) -> None:
    """Write the table of options, which is made of the fields of the configuration."""
    page = Path(app.srcdir, "reference", "generated", "options.md")
    page.parent.mkdir(exist_ok=True)
    intro = "# Options of a run\n\nEach is a parameter of `predict` and an option of the command line.\n\n"
    page.write_text(intro + options_table())


def setup(app: Sphinx) -> None:
    """Register the above."""
    app.connect("builder-inited", write_options)
    app.connect("source-read", notebook_as_markdown)
    app.connect("autodoc-process-signature", without_arguments)
    app.connect("autodoc-process-docstring", as_text, priority=400)  # napoleon has 500
    app.connect("sphinx-click-process-options", without_unset)
