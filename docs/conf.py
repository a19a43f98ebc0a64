"""The site: scripts/docs builds it. Pages are Markdown, which reads as well without a build."""

import re

import mpisyncbn

project = "mpisyncbn"
author = "The mpisyncbn developers"
copyright = author
release = version = mpisyncbn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3  # links to headings, by the names that repository viewers give them
highlight_language = "text"  # of blocks that name none

autodoc_member_order = "bysource"
autodoc_type_aliases = {name: name for name in ("AnyActivation", "AnyGroup", "Array", "Forward")}
python_maximum_signature_line_length = 88
napoleon_use_rtype = False

nitpicky = True
# Without a network there is no list of the names of other projects.
nitpick_ignore_regex = [("py:.*", r"(?!mpisyncbn\.).*")]

pygments_style, pygments_dark_style = "default", "monokai"
html_theme = "furo"  # brings its own fonts and scripts
html_title = f"mpisyncbn {release}"
html_show_sphinx = html_copy_source = False


def link_pages(app, what, name, obj, options, lines):
    """Turn ``docs/guides/masks.md`` in a docstring into a link."""
    lines[:] = [re.sub(r"\bdocs/([\w/]+)\.md\b", r":doc:`/\1`", line) for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", link_pages)
