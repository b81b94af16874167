"""The documentation site: `python -m sphinx -W --keep-going -b html docs docs/_build/html`.

The pages are Markdown that reads well by itself; what Sphinx adds is navigation, search and the reference.
"""

import oocpatch

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
exclude_patterns = ["_build"]

# `:::` for Sphinx's own directives: a fence of three backticks is a block that the tests run.
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

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
html_sidebars = {"index": [], "tutorial": [], "concepts": []}  # pages without others beside them
