"""How `make book` turns the repository into a site. The sources are where they always are: the root of the checkout
is Sphinx's source folder, so a link between files means the same here, on GitHub and in an editor."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "extensions"))

project = "Weakly-supervised referring image segmentation"
html_title = "Referring image segmentation"
copyright = "the authors; MIT licence"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docstrings", "mathml", "cells"]
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "docs/api/*.md",
    "notebooks/*.ipynb",
    "results/*.md",
    "README.md",
    "CONTRIBUTING.md",
    "wris_lib/weights/*.md",
    "wris_lib/data/toyworld/sprites/README.md",
]
exclude_patterns = [".*", "build", "runs", "tests", "scripts"]  # not even searched

# Notebooks are shown as they were committed.
nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # tables that cells print
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3  # as GitHub names them: notebook.ipynb#5--the-search

# The library's docstrings.
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False  # "one, two: three" after Returns is a sentence, not a type
default_role = "py:obj"  # `name` in a docstring: a link where the name is known, code everywhere else
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!wris_lib\.).*"),  # names that are not the library's, and code that is no name
    ("py:class", r"wris_lib\..*\.[A-Z]"),  # type variables
]

html_math_renderer = "mathml"
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["book.css"]
templates_path = ["templates"]
html_additional_pages = {"index": "forward.html"}  # the front page is docs/index.html, but people look here
html_copy_source = False
