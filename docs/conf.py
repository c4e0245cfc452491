"""Configuration of the documentation site, read by Sphinx; `make docs` builds it."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

from generate import python_api, write_pages  # noqa: E402

project = "ssl3d"
author = "the ssl3d authors"
release = version = installed_version("ssl3d")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "generate", "Thumbs.db"]

html_theme = "furo"
html_title = "ssl3d"
html_static_path = ["_static"]
html_css_files = ["ssl3d.css"]
html_extra_path = ["_extra"]
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False

# Flags begin with two dashes, which are not to become one long one.
smartquotes = False
default_role = "literal"
highlight_language = "none"
# The prompt is shown and not copied, nor is what a command printed.
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
# The notebooks are kept with their outputs, and tests run them.
nb_execution_mode = "off"
nb_merge_streams = True

nitpicky = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False


def setup(app):
    """Writes the generated pages before Sphinx looks for sources, and links types in signatures."""
    write_pages(DOCS, DOCS.parent)
    app.connect("missing-reference", python_api.link_type)
    app.connect("autodoc-process-docstring", python_api.as_rst)
    app.connect("doctree-read", python_api.dashes)
