"""What a module says of itself: its tree, with shapes and counts, and what it has no name for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mpidist.nn.members import members
from mpidist.nn.parameter import Parameter

if TYPE_CHECKING:
    from mpidist.nn.module import Module

__all__ = ["SUBSTITUTES", "render_tree"]

SUBSTITUTES = {
    "apply": "a loop over named_modules()",
    "buffers": "named_buffers()",
    "children": "named_children()",
    "cpu": 'to("cpu")',
    "cuda": 'to("gpu")',
    "eval": "forward(x, EVAL): each call is told its mode",
    "modules": "named_modules()",
    "register_buffer": "an attribute whose name stands in the class attribute buffer_names",
    "register_parameter": "an attribute that is a Parameter",
    "train": "forward(x, Mode(training=True, ...)): each call is told its mode",
}
"""Methods of a module of PyTorch, and what does the same."""


def render_tree(module: Module) -> str:
    """Return one line per module: name, class, number of elements, parameters and buffers.

    Parameters
    ----------
    module : Module
        The root; it may be half built.

    Returns
    -------
    str
        Lines. What is held twice is described where it comes first, and named afterwards.
    """
    names: dict[int, str] = {}
    parameters = _below(module)
    dtypes = "".join(f", {dtype}" for dtype in sorted({str(each.dtype) for each in parameters}))
    count = len(parameters)
    total = f"{sum(each.size for each in parameters):,} elements in {count:,} parameter"
    head = f"{type(module).__name__}: {total}{'s' * (count != 1)}{dtypes}"
    own = _own(module, "", names)
    return "\n".join([f"{head}; {own}" if own else head, *_children(module, "", names)])


def _children(module: Module, path: str, names: dict[int, str], depth: int = 1) -> Iterator[str]:
    names[id(module)] = path or "the root"
    indent = "  " * depth
    for name, child in module.named_children():
        kind = type(child).__name__
        if id(child) in names:
            yield f"{indent}{name}: {kind}, the same as {names[id(child)].replace('/', '.')}"
            continue
        below = f"{path}/{name}" if path and name else path or name
        size = sum(each.size for each in _below(child))
        own = _own(child, below, names)
        shown = f"{name}: {kind}" if name else kind
        yield f"{indent}{shown}" + (f", {size:,}" * bool(size)) + (f"; {own}" * bool(own))
        yield from _children(child, below, names, depth + 1)


def _own(module: Module, path: str, names: dict[int, str]) -> str:
    """Describe the parameters and buffers that a module holds itself."""
    shown = []
    for attribute, value in vars(module).items():
        for name, parameter in members(attribute, value, (Parameter,)):
            if id(parameter) in names:
                shown.append(f"{name} = {names[id(parameter)].replace('/', '.')}")
            else:
                names[id(parameter)] = f"{path}/{name}" if path else name
                shown.append(f"{name} {parameter.shape}")
    shown += [
        f"buffer {name} {getattr(module, name).shape}"
        for name in module.buffer_names
        if hasattr(module, name)
    ]
    return ", ".join(shown)


def _below(module: Module) -> list[Parameter]:
    """Return the parameters of a module and of those below it, each once."""
    found: dict[int, Parameter] = {}
    for _, each in module.named_modules():
        for attribute, value in vars(each).items():
            for _, parameter in members(attribute, value, (Parameter,)):
                found[id(parameter)] = parameter
    return list(found.values())
