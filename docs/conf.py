"""Sphinx: the API reference from the docstrings. ``make docs`` builds it; a warning is an error."""

from sep_attn import __version__

project = "sep_attn"
version = release = __version__
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns: list[str] = []
html_theme = "furo"
html_title = f"sep_attn {__version__}"
html_copy_source = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|collections|typing)\..*")]  # documented elsewhere
