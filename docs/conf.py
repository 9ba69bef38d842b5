"""Sphinx: ``make docs`` builds the pages in this folder, without a network."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import lightning_landscape

project = "lightning_landscape"
copyright = "the lightning_landscape authors"
version = release = lightning_landscape.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"{project} {version}"
html_show_sourcelink = False
html_copy_source = False

# Formulas: MathJax as one script from an installed package, copied among the pages.
# It draws them as SVG, so that no font is asked for; its menu would load more.
_package = importlib.util.find_spec("sphinx-mathjax-offline")
if _package is None or _package.origin is None:
    raise ImportError("sphinx-mathjax-offline is missing: pip install '.[docs]'")
_mathjax = Path(_package.origin).parent / "static" / "mathjax" / "tex-svg.js"
html_static_path = ["site.css", "notebooks/output.css", str(_mathjax)]
html_css_files = ["site.css", "output.css"]
mathjax_path = _mathjax.name
mathjax3_config = {"options": {"enableMenu": False}}

autodoc_member_order = "bysource"
maximum_signature_line_length = 80
add_module_names = False
napoleon_custom_sections = ["Logged Metrics", "Logged images"]
napoleon_use_ivar = True


def setup(app: Any) -> None:
    """Notebooks are pages too, with the outputs stored in them."""
    sys.path.insert(0, str(Path(__file__).parent / "notebooks"))
    from notebook_parser import NotebookParser

    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
