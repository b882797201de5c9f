"""What a module holds: modules and parameters in its attributes, by name; and its tree as text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from mpidist.nn.parameter import Parameter

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

_PLAIN = frozenset({int, float, bool, str, bytes, type(None)})
_SEQUENCES = (list, tuple, deque)
_MAPPINGS = (dict, MappingProxyType)
_CONTAINERS = (*_SEQUENCES, *_MAPPINGS)
_HOLDERS = (*_CONTAINERS, set, frozenset, np.ndarray)


def members(
    name: str, value: object, kinds: tuple[type, ...], inside: tuple[int, ...] = ()
) -> Iterable[tuple[str, Any]]:
    """Return the members in the value of an attribute, each with its name.

    Parameters
    ----------
    name : str
        Name of the attribute, with which names begin.
    value : object
        A member, or a list, tuple, deque or dict, which may hold others.
    kinds : tuple of type
        What is a member.
    inside : tuple of int, optional
        The identities of the containers around it.

    Returns
    -------
    iterable of (str, member)
        The name is such as ``blocks.0`` in a list, and ``heads.left`` in a dict.

    Raises
    ------
    TypeError, ValueError
        If the key of a member in a dict is no str or int, is empty, holds a dot or a slash, or
        makes the same name as another.
    """
    if type(value) in _PLAIN:
        return ()
    if isinstance(value, kinds):
        return ((name, value),)
    if isinstance(value, _CONTAINERS) and id(value) not in inside:
        return _inside(name, value, kinds, (*inside, id(value)))
    return ()


def _inside(
    name: str, value: Any, kinds: tuple[type, ...], inside: tuple[int, ...]
) -> Iterator[tuple[str, Any]]:
    if isinstance(value, _SEQUENCES):
        for index, item in enumerate(value):
            yield from members(f"{name}.{index}", item, kinds, inside)
        return
    names: dict[str, object] = {}
    for key, item in value.items():
        for named in members(f"{name}.{key}", item, kinds, inside):
            _check_key(name, key, names)
            yield named


def _check_key(name: str, key: object, names: dict[str, object]) -> None:
    if not isinstance(key, (str, int)):
        raise TypeError(
            f"{name}: a dict of modules or parameters has the key {key!r}, of "
            f"{type(key).__name__}; keys become parts of names: use str or int"
        )
    text = str(key)
    if not text or "." in text or "/" in text or names.setdefault(text, key) is not key:
        raise ValueError(
            f"{name}: a dict of modules or parameters has the key {key!r}; keys become parts of "
            "names: they must not be empty, hold a dot or a slash, or be written as another one is"
        )


def replace_members(module: object, exchange: Mapping[int, object]) -> None:
    """Put other objects into the places of some members of a module.

    Parameters
    ----------
    module : Module
        Its attributes are looked into as `members` does: lists, deques and dicts are changed in
        place, what cannot be changed is built anew.
    exchange : mapping of int to object
        What comes, by the identity of what goes.
    """
    for attribute, value in tuple(vars(module).items()):
        new = _replaced(value, exchange, ())
        if new is not value:
            object.__setattr__(module, attribute, new)  # a frozen dataclass may be a layer


def _replaced(value: Any, exchange: Mapping[int, object], inside: tuple[int, ...]) -> Any:
    if id(value) in exchange:
        return exchange[id(value)]
    if not isinstance(value, _CONTAINERS) or id(value) in inside:
        return value
    inside = (*inside, id(value))
    keys = value if isinstance(value, _MAPPINGS) else range(len(value))
    new = {key: _replaced(value[key], exchange, inside) for key in keys}
    changed = {key: item for key, item in new.items() if item is not value[key]}
    if isinstance(value, tuple):
        made = getattr(value, "_make", tuple)  # a NamedTuple takes its items one by one
        return made(new.values()) if changed else value
    if isinstance(value, MappingProxyType):
        return MappingProxyType(new) if changed else value
    for key, item in changed.items():
        value[key] = item
    return value


def nameless(value: object, kinds: tuple[type, ...]) -> Iterable[tuple[str, Any]]:
    """Return the members of an attribute that have no name: where, as ``a set``, and what."""
    if type(value) in _PLAIN or not isinstance(value, _HOLDERS):
        return ()
    return _without_name(value, kinds, ())


def _without_name(
    value: Any, kinds: tuple[type, ...], inside: tuple[int, ...]
) -> Iterator[tuple[str, Any]]:
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            yield from (("an array", item) for item in value.flat if isinstance(item, kinds))
    elif isinstance(value, (set, frozenset)):
        yield from (("a set", item) for item in value if isinstance(item, kinds))
    elif id(value) not in inside:
        mapped = isinstance(value, _MAPPINGS)
        if mapped:
            yield from (("the keys of a dict", key) for key in value if isinstance(key, kinds))
        for item in value.values() if mapped else value:
            if isinstance(item, _HOLDERS):
                yield from _without_name(item, kinds, (*inside, id(value)))


class TreeNode(Protocol):
    """What `render_tree` needs of a `Module`."""

    @property
    def buffer_names(self) -> tuple[str, ...]:
        """Attributes that are buffers."""

    def named_children(self) -> Iterator[tuple[str, TreeNode]]:
        """Yield the modules held directly."""

    def named_modules(self) -> Iterator[tuple[str, TreeNode]]:
        """Yield this module and all below it."""


def render_tree(module: TreeNode) -> str:
    """Return one line per module: name, class, number of elements, parameters and buffers.

    The root may be half built. What is held twice is described at its first place, and named
    afterwards.
    """
    names: dict[int, str] = {}
    parameters = _below(module)
    dtypes = "".join(
        f", {dtype}" for dtype in sorted({str(parameter.dtype) for parameter in parameters})
    )
    count = len(parameters)
    total = f"{sum(p.size for p in parameters):,} elements in {count:,} parameter"
    head = f"{type(module).__name__}: {total}{'s' * (count != 1)}{dtypes}"
    own = _own(module, "", names)
    return "\n".join([f"{head}; {own}" if own else head, *_children(module, "", names)])


def _children(module: TreeNode, path: str, names: dict[int, str], depth: int = 1) -> Iterator[str]:
    names[id(module)] = path or "the root"
    indent = "  " * depth
    for name, child in module.named_children():
        kind = type(child).__name__
        if id(child) in names:
            yield f"{indent}{name}: {kind}, the same as {names[id(child)].replace('/', '.')}"
            continue
        below = f"{path}/{name}" if path and name else path or name
        size = sum(parameter.size for parameter in _below(child))
        own = _own(child, below, names)
        shown = f"{name}: {kind}" if name else kind
        yield f"{indent}{shown}" + (f", {size:,}" * bool(size)) + (f"; {own}" * bool(own))
        yield from _children(child, below, names, depth + 1)


def _own(module: TreeNode, path: str, names: dict[int, str]) -> str:
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


def _below(module: TreeNode) -> list[Parameter]:
    """Return the parameters of a module and of those below it, each once."""
    below: dict[int, Parameter] = {}
    for _, held in module.named_modules():
        for attribute, value in vars(held).items():
            for _, parameter in members(attribute, value, (Parameter,)):
                below[id(parameter)] = parameter
    return list(below.values())
