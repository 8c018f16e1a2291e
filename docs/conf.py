"""Settings of the documentation site, which CONTRIBUTING.md says how to build."""

import os
import re
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras_dp

project = "keras_dp"
author = "The keras_dp authors"
copyright = "2026, the keras_dp authors. Apache-2.0"
version = release = keras_dp.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
ROOT_FILES = {"changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md"}

# Markdown. Anchors are those that code hosts make of headings, so that links work there too.
myst_enable_extensions = ["colon_fence", "attrs_inline"]
myst_heading_anchors = 4
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Docstrings: Google's sections, and single backticks for code, which link where they can.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

highlight_language = "text"  # of blocks that name none
html_theme = "furo"
html_title = f"keras_dp {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "navigation_with_keys": True,
    "light_css_variables": {
        "color-brand-primary": "#9a2a2a",
        "color-brand-content": "#9a2a2a",
    },
    "dark_css_variables": {
        "color-brand-primary": "#f0938a",
        "color-brand-content": "#f0938a",
    },
}
pygments_style = "friendly"
pygments_dark_style = "monokai"


def _from_the_root(app, name, source):
    """Fills the pages that are files of the root, and leads links to these to the pages."""
    if name in ROOT_FILES:
        text = (Path(__file__).parents[1] / ROOT_FILES[name]).read_text(encoding="utf-8")
        for page, file in ROOT_FILES.items():
            text = text.replace(f"]({file})", f"]({page}.md)")
        source[0] = text.replace("](docs/", "](")
    source[0] = source[0].replace("](../README.md)", "](index.md)")


def _markdown_in_docstring(app, what, name, obj, options, lines):
    """Turns fenced blocks of a docstring into indented ones, and lets `name`s have an s."""
    text = "\n".join(lines)

    def indented(block):
        code = "\n".join(f"    {line}" for line in block[2].splitlines())
        return f".. code-block:: {block[1] or 'text'}\n\n{code}\n"

    text = re.sub(r"^```(\w*)\n(.*?)^```$", indented, text, flags=re.M | re.S)
    text = re.sub(r"(?<!`)(`[^`\n]+`)(?=\w)", r"\1\\ ", text)
    lines[:] = text.split("\n")


def setup(app):
    app.connect("source-read", _from_the_root)
    app.connect("autodoc-process-docstring", _markdown_in_docstring, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
