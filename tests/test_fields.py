"""Dataclasses that are made of plain values."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import pytest

from mpidist._fields import from_fields


class Colour(Enum):
    RED = "red"


@dataclasses.dataclass(frozen=True)
class Leaf:
    colour: Colour
    sizes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tree:
    leaves: Sequence[Leaf]
    first: Leaf | None
    second: Leaf | None
    weights: Mapping[str, float]
    words: Sequence[str] = ("default",)


TREE = Tree((Leaf(Colour.RED, (1, 2)),), Leaf(Colour.RED), None, {"a": 0.5})


def fields_of(tree: Tree) -> dict[str, Any]:
    text = json.dumps(dataclasses.asdict(tree), default=lambda colour: colour.value)
    fields: dict[str, Any] = json.loads(text)
    return fields


def test_nested_fields_are_restored() -> None:
    assert from_fields(Tree, fields_of(TREE)) == TREE


def test_unknown_names_are_left_out_and_defaults_stand_for_missing_ones() -> None:
    fields = fields_of(TREE) | {"another": 1}
    del fields["words"]
    assert from_fields(Tree, fields) == TREE


@pytest.mark.parametrize(
    ("fields", "error"),
    [([], TypeError), ({"leaves": []}, TypeError), ({"first": "a leaf"}, TypeError)],
)
def test_other_fields_are_refused(fields: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        from_fields(Tree, fields)


def test_another_value_than_those_of_an_enum_is_refused() -> None:
    with pytest.raises(ValueError, match="blue"):
        from_fields(Leaf, {"colour": "blue"})
