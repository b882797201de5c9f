"""How the documentation is built: python -m sphinx -W --keep-going -b html docs docs/_build/html"""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent)]

import mpidist  # noqa: E402  # of this checkout

project = "mpidist"
author = "The mpidist authors"
copyright = "2026, The mpidist authors"
version = release = mpidist.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "myst_parser",
    "sphinx_copybutton",
    "numpydoc",
    "members",
    "names",
    "notes",
    "readme",
]
myst_enable_extensions = ["deflist"]  # a term, and below it a colon with what is said of it
templates_path = ["_templates"]
exclude_patterns = ["_build"]
nitpicky = True

# Names between single backquotes: a link where they name something public, else plain code.
default_role = "py:obj"

autosummary_generate = True
autosummary_ignore_module_all = False
autosummary_imported_members = True
autosummary_filename_map = {"mpidist.Send": "mpidist.Send-class"}  # beside mpidist.send
autodoc_typehints = "none"  # the Parameters say more than the annotations
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
add_module_names = False
toc_object_entries_show_parents = "hide"

numpydoc_show_class_members = False
numpydoc_attributes_as_param_list = True
# What the build refuses in a docstring that is documented here. Left out are the checks for
# sections that a one-line docstring may lack: "EX01" examples, "SA01" see also, "ES01" more prose,
# and those that contradict our form: "GL01" (text begins on the first line), "PR01" and "RT01"
# (what the first line says need not be said again), "YD01" (the same), "PR06" (takes the dtype
# "integer" for the Python type), "SS05" and "SS06" (checked by ruff).
numpydoc_validation_checks = {
    "GL03", "GL05", "GL06", "GL07", "GL08", "GL09", "GL10",
    "SS01", "SS02", "SS03", "SS04",
    "PR02", "PR03", "PR04", "PR05", "PR07", "PR08", "PR09", "PR10",
    "RT03", "RT04", "RT05",
}  # fmt: skip
# A documented attribute whose value is None: the check looks at the value's docstring.
numpydoc_validation_exclude = {
    r"\.layer_index$",
    r"\.Dropout\.part$",
    r"\.Sequential\.tied$",
    r"\.Backend\.(device|node_memory)$",
}

html_theme = "pydata_sphinx_theme"
html_title = "mpidist"
html_static_path = ["_static"]
html_css_files = ["mpidist.css"]
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "header_links_before_dropdown": 7,
    "navbar_align": "left",
    "show_prev_next": True,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": {"**": ["page-toc"], "names": []},
}
# A page that is no section's has no neighbours to show.
html_sidebars = {page.stem: [] for page in DOCS.iterdir() if page.suffix in (".rst", ".md")}
html_show_sourcelink = False
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True
