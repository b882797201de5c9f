"""Objects of dataclasses from plain values, such as those that JSON holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from enum import Enum
from typing import Any, TypeVar, get_args, get_type_hints

T = TypeVar("T")


def from_fields(kind: type[T], fields: Mapping[str, Any]) -> T:
    """Return an object of a dataclass from what `dataclasses.asdict` gave, also by way of JSON.

    Fields of its fields are restored, too. Lists become tuples; names that the class does not have
    are left out.

    Raises
    ------
    TypeError, ValueError
        If the fields are not those of the class.
    """
    if not isinstance(fields, Mapping):
        raise TypeError(f"expected the fields of {kind.__name__}, got {type(fields).__name__}")
    hints = get_type_hints(kind)
    known = {name: _restored(hints[name], fields[name]) for name in hints if name in fields}
    return kind(**known)


def _restored(hint: Any, value: Any) -> Any:
    if isinstance(value, list):
        item = (*get_args(hint), Any)[0]
        return tuple(_restored(item, part) for part in value)
    if value is None:
        return None
    for kind in get_args(hint) or (hint,):
        if isinstance(kind, type) and is_dataclass(kind):
            return from_fields(kind, value)
        if isinstance(kind, type) and issubclass(kind, Enum):
            return kind(value)
    return value
