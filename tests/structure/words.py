"""Words that the package's names do not use: the field has one for each (docs/glossary)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tests.structure.source import names, parts


def _these(text: str) -> frozenset[str]:
    return frozenset(text.split())


ANYWHERE = _these(
    """
    accuse attend beside board card companion declaration departure departures lead lift meetings
    near place places quiet room rooms settle slab slabs spend strangers stretches suspects team
    tell tile tiles told turns words
    """
)
"""These are no part of a name."""

ALONE = _these(
    """
    attend bind bring card cross door each enter follow forget found give here meet mine publish
    room some until way
    """
)
"""These are no name, but may be part of one: `cross_entropy` says what it is."""

TERMS = ("in_place",)
"""Terms of the field that have one of the words in them."""


def banned(given: Iterable[str] | None = None) -> Counter[str]:
    """Return how often each of these words stands in a name that the package gives."""
    return Counter(word for name in given or names() for word in _banned_in(name))


def where(word: str) -> list[str]:
    """Return the names of the package that have a word which they should not have."""
    return sorted({name for name in names() if word in _banned_in(name)})


def _banned_in(name: str) -> list[str]:
    words = parts(name, without=TERMS)
    return [word for word in words if word in ANYWHERE or (word in ALONE and len(words) == 1)]
