"""What a module holds: the modules and parameters in its attributes, by name."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from types import MappingProxyType
from typing import Any

import numpy as np

__all__ = ["members", "nameless"]

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
        Of the attribute.
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
    TypeError
        If a member stands in a dict under a key that is no str or int.
    ValueError
        If the key is empty, holds a dot or a slash, or makes the same name as another.
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
        for found in members(f"{name}.{key}", item, kinds, inside):
            _check_key(name, key, names)
            yield found


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


def nameless(value: object, kinds: tuple[type, ...]) -> Iterable[tuple[str, Any]]:
    """Return the members in the value of an attribute that have no name.

    Parameters
    ----------
    value, kinds
        As for `members`.

    Returns
    -------
    iterable of (str, member)
        Where it is, such as ``a set``, and what.
    """
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
