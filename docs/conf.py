"""How Sphinx makes a site of these pages. The build asks no network."""

import importlib
import pkgutil
import posixpath

from docutils import nodes
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

copybutton_prompt_text = r">>> |\.\.\. |\$ "  # which are not copied, nor is output
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"microbatch {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_copyright = False

default_role = "py:obj"  # docstrings name things in single backticks
nitpicky = True
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # or the environment of whoever builds the site would be in it
maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes in a list, and their types in the signature
napoleon_attr_annotations = False

logger = logging.getLogger(__name__)


def find_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: nodes.TextElement) -> nodes.Element | None:
    """Link a name to where it is documented, in whichever module; show one of another library, and find typing errors."""
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
    return None  # which is a warning


def link_pages(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Lead links between files, which work where the sources are read too, to the pages of the site.

    What is outside of this folder is included in a page of the same path.
    """
    for node in doctree.findall(nodes.reference):
        path, _, anchor = node.get("refuri", "").partition("#")
        if ":" in path or not path.endswith(".rst"):
            continue
        page = posixpath.normpath(posixpath.join(posixpath.dirname(docname), path)[: -len(".rst")]).removeprefix("../")
        if page not in app.env.found_docs or anchor and anchor not in app.env.get_doctree(page).ids:
            logger.warning("no such page or part: %s", node["refuri"], location=node)
        else:
            node["refuri"] = app.builder.get_relative_uri(docname, page) + (anchor and f"#{anchor}")


def setup(app: Sphinx) -> None:
    for module in ("batcher", "decorator"):  # they import it for type checkers only, and autodoc evaluates annotations
        setattr(importlib.import_module(f"microbatch.{module}"), "Unpack", Unpack)
    ModuleAnalyzer.for_module("microbatch.batcher").analyze()
    ModuleAnalyzer.for_module("microbatch.batcher").overloads.clear()  # which say the same of all arguments but one
    app.connect("missing-reference", find_name)
    app.connect("doctree-resolved", link_pages)
