"""Configures Sphinx, which builds the site from these pages without using the network."""

import importlib
import pkgutil
import posixpath
from collections.abc import Iterator

from docutils import nodes
from pygments.lexers import BashSessionLexer
from pygments.token import Name, Text
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging
from sphinx.util.nodes import make_refnode
from typing_extensions import Unpack

import microbatch

project = "microbatch"
release = microbatch.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

copybutton_prompt_text = r">>> |\.\.\. |\$ "  # the button copies neither prompts nor output
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"microbatch {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css", "narrow.css"]
html_copy_source = False
html_show_copyright = False

default_role = "py:obj"  # single backticks in a docstring are a Python name
nitpicky = True
nitpick_ignore = [("py:class", "_Lookup")]  # exists only for type checkers
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # otherwise the site would show the environment of the machine that builds it
maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # show attributes in a list, and their types in the signature
napoleon_attr_annotations = False

LONGEST_FIGURE = 25
"""The longest text of a figure in a table. Tables of figures keep their columns, even if readers have to scroll."""

logger = logging.getLogger(__name__)


class ConsoleLexer(BashSessionLexer):  # type: ignore[misc]
    """Marks the options of a command, so that ``wide.css`` can keep each of them in one line."""

    def get_tokens_unprocessed(self, text: str) -> Iterator[tuple[int, object, str]]:
        for index, token, value in super().get_tokens_unprocessed(text):
            yield index, Name.Attribute if token is Text and value.startswith("-") else token, value


def find_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: nodes.TextElement) -> nodes.Element | None:
    """Link a name to its documentation in any module. Leave names of other libraries as they are. Warn about others."""
    target = node["reftarget"]
    python = env.domains.python_domain
    found = [(name, entry) for name, entry in python.find_obj(env, "", "", target, None, 1) if not entry.aliased]
    if len(found) == 1:
        name, entry = found[0]
        return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, [shown], name)
    for module in ("", "builtins.", "concurrent.futures.", f"{node.get('py:module')}."):
        try:
            pkgutil.resolve_name(module + target)
        except (AttributeError, ImportError, ValueError):
            continue
        return shown
    return None  # Sphinx warns about it


def link_pages(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Turn links to files, which also work in the source tree, into links to pages of the site.

    A file outside ``docs/`` is on the page with the same path inside ``docs/``.
    """
    for node in doctree.findall(nodes.reference):
        path, _, anchor = node.get("refuri", "").partition("#")
        if ":" in path or not path.endswith(".rst"):
            continue
        page = posixpath.normpath(posixpath.join(posixpath.dirname(docname), path)[: -len(".rst")]).removeprefix("../")
        if page not in app.env.found_docs or anchor and anchor not in app.env.get_doctree(page).ids:
            logger.warning("no such page or section: %s", node["refuri"], location=node)
        else:
            node["refuri"] = app.builder.get_relative_uri(docname, page) + (anchor and f"#{anchor}")


def mark_tables(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Prepare tables of text for a narrow screen, where ``narrow.css`` shows the cells of a row below each other.

    A narrow screen does not show the headings of the columns, so each cell repeats the heading of its column. A wide
    screen hides these copies.
    """
    for table in doctree.findall(nodes.table):
        body = [list(row.findall(nodes.entry)) for part in table.findall(nodes.tbody) for row in part]
        if max(len(cell.astext()) for row in body for cell in row[1:]) <= LONGEST_FIGURE:
            continue
        table["classes"].append("sentences")
        headings = [cell.astext() for part in table.findall(nodes.thead) for cell in part.findall(nodes.entry)]
        for row in body if len(headings) > 2 else []:
            for heading, cell in zip(headings[1:], row[1:]):
                for paragraph in list(cell.findall(nodes.paragraph))[:1]:
                    paragraph.insert(0, nodes.inline("", f"{heading}: ", classes=["heading"]))


def mark_options(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Mark options such as ``--help`` in the text, so that ``wide.css`` can keep each of them in one line."""
    for literal in doctree.findall(nodes.literal):
        if literal.astext().startswith("-"):
            literal["classes"].append("option")


def setup(app: Sphinx) -> None:
    for module in ("batcher", "decorator"):  # import it only for type checkers, but autodoc needs it
        setattr(importlib.import_module(f"microbatch.{module}"), "Unpack", Unpack)
    ModuleAnalyzer.for_module("microbatch.batcher").analyze()
    ModuleAnalyzer.for_module("microbatch.batcher").overloads.clear()  # they differ in only one argument
    app.add_lexer("console", ConsoleLexer)
    app.connect("missing-reference", find_name)
    app.connect("doctree-resolved", link_pages)
    app.connect("doctree-resolved", mark_tables)
    app.connect("doctree-resolved", mark_options)
