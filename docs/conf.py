"""Sphinx configuration; build with `sphinx-build -W -n -b html docs docs/_build/html`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # A checkout needs no installation.
sys.path.insert(0, str(Path(__file__).resolve().parent / "_extensions"))

import soap_optax

project = "soap_optax"
author = "The soap_optax authors"
copyright = author
version = release = soap_optax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_design",
    "mathml",  # _extensions/mathml.py
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
pygments_dark_style = "github-dark"  # The theme's own underlines names as if they were links.
# Browsers draw formulas on their own: pages load no script for them, and nothing from elsewhere.
html_math_renderer = "mathml"

# Docstrings follow Optax's style: Google sections, single backticks around names.
default_role = "py:obj"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Annotations spell out to half a page (`ArrayLike`) or to private names; the docstrings say it.
autodoc_typehints = "none"
napoleon_attr_annotations = False

# Under -n: single backticks become links where there is something to link to, else plain code.
nitpick_ignore_regex = [("py:obj", ".*")]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
