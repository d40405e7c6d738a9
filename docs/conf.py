"""Sphinx configuration. Build strictly with: sphinx-build -W -b html docs docs/_build/html"""

import re
from importlib.metadata import version as _version

project = "fmeta"
author = "the fmeta authors"
copyright = "the fmeta authors"
release = version = _version("fmeta")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "jupyter_execute"]

html_theme = "furo"
html_title = "fmeta"
html_static_path = ["_static"]

# The blocks are plain python fences, run by tests/docs/test_code_blocks.py, not by the build.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
default_role = "code"


def _escape_stars(app, what, name, obj, options, lines):
    """Several arguments on one line of `Args:`, such as "seed, *ints:", are no emphasis."""
    lines[:] = [re.sub(r"(, )(\*{1,2})(?=\w+:)", r"\1\\\2", line) for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", _escape_stars, priority=400)  # before napoleon
