"""Let `all_reduce` between single backquotes be a link, wherever it is written.

Docstrings name things as their own module sees them. A name that is no full path is looked up by
its last parts among everything documented; where exactly one thing answers, it becomes a link.
In docstrings other words (parameters, builtins) are code; on the pages of this folder they are a
mistake, which a nitpicky build reports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element
) -> nodes.Node | None:
    """Answer a reference of the default role that the Python domain does not know."""
    if node.get("refdomain") != "py" or node["reftype"] != "obj":
        return None
    found = _candidates(env, node)
    if len(found) != 1:
        return contnode if node["refdoc"].startswith("api/") else None
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found.pop(), node, contnode)


def _candidates(env: BuildEnvironment, node: pending_xref) -> set[str]:
    target: str = node["reftarget"].removesuffix("()")
    # Methods count only with their class: `grad` is more often a word than `Parameter.grad`.
    objects: dict[str, Any] = env.get_domain("py").objects
    found = {
        name
        for name, entry in objects.items()
        if not entry.aliased
        and (name == target or name.endswith(f".{target}"))
        and (entry.objtype in ("function", "class", "exception", "data") or "." in target)
    }
    return found if target not in _own_parameters(node) else set()


def _own_parameters(node: pending_xref) -> set[str]:
    """Return the parameters of the function or class in whose docstring the name stands."""
    here = node.parent
    while here is not None and here.tagname != "desc":
        here = here.parent
    if here is None:
        return set()
    parameters = (node for node in here.findall() if node.tagname == "desc_parameter")
    return {parameter.astext().split("=")[0].strip("*") for parameter in parameters}


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the resolver."""
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
