"""Names in states that were saved when wrappers still were a part of names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

_WRAPPER = re.compile(r"(?<![^./])inner\.")
_PART = re.compile(r"[./]")


def former_names(present: Collection[str], saved: Collection[str]) -> dict[str, str]:
    """Find what was saved under names that contain a wrapper, such as ``0.inner.weight``.

    Returns, for each present name that was not saved, the saved one that has one or more ``inner``
    in addition and differs in nothing else, if there is exactly one.
    """
    missing = [name for name in present if name not in saved]
    if not missing:
        return {}
    known = set(present)
    old = _by_short_name(name for name in saved if name not in known)
    new = _by_short_name(missing)
    return {
        names[0]: old[short][0]
        for short, names in new.items()
        if len(names) == 1 and len(old.get(short, ())) == 1 and _is_within(names[0], old[short][0])
    }


def with_present_names(state: Mapping[str, Any], present: Collection[str]) -> Mapping[str, Any]:
    """Return a state with former names exchanged for present ones; see `former_names`."""
    former = former_names(present, state)
    if not former:
        return state
    present_of = {old: new for new, old in former.items()}
    return {present_of.get(name, name): value for name, value in state.items()}


def _is_within(name: str, saved: str) -> bool:
    """Return whether the parts of a name are among those of a saved one, in their order.

    A wrapper that is part of names today, as of `Residual`, was part of them before: without it
    another model was saved.
    """
    parts = iter(_PART.split(saved))
    return all(part in parts for part in _PART.split(name))


def _by_short_name(names: Iterable[str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name in names:
        grouped.setdefault(_WRAPPER.sub("", name), []).append(name)
    return grouped
