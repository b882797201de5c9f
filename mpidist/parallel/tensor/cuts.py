"""`Split`: how one layer is cut over the ranks, as a value; and what comes of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from mpidist.arrays.boxes import even_part
from mpidist.arrays.shards import Part
from mpidist.group.group import ProcessGroup
from mpidist.nn.module import Module
from mpidist.nn.parameter import Parameter

__all__ = ["Features", "LayerCut", "Split", "ranges_of"]

M = TypeVar("M", bound=Module)

Features: TypeAlias = Part | None
"""Which features, elements of its last axis, a rank has of an activation: a `Part` of an array of
shape (width,), or None: all, the same on all ranks."""


@dataclass(frozen=True, slots=True)
class LayerCut:
    """What becomes of a layer.

    Parameters
    ----------
    parts : mapping of Parameter to Part
        What this rank keeps of those that are cut. The others stay whole.
    layers : mapping of int to Module
        What comes in the places of modules, by the identity of what goes.
    warning : str, optional
        What the user may not have meant.
    """

    parts: Mapping[Parameter, Part]
    layers: Mapping[int, Module]
    warning: str = ""


class Split(ABC):
    """How a layer is cut over the ranks; a value of the plan of `parallelize`."""

    @abstractmethod
    def cut(self, module: Module, group: ProcessGroup) -> LayerCut:
        """Return what becomes of a layer; nothing is changed or sent.

        Raises
        ------
        ValueError
            If it cannot be cut so.
        """


def ranges_of(
    width: int, group: ProcessGroup, *, blocks: int = 1, unit: int = 1
) -> list[tuple[int, int]]:
    """Return offset and size of what this rank has of each block of an axis.

    Parameters
    ----------
    width : int
        Length of the axis.
    group : ProcessGroup
        Its ranks have parts that differ by one unit at most, the larger ones first.
    blocks : int, optional
        How many equal blocks the axis is made of, each of which is cut.
    unit : int, optional
        Elements of a block that stay together.

    Raises
    ------
    ValueError
        If the axis is not made of so many equal blocks.
    """
    if blocks < 1 or width % blocks:
        raise ValueError(f"its {width} outputs are not made of {blocks} equal blocks")
    block = width // blocks
    offset, size = even_part(block // unit, group.size, group.rank)
    return [(i * block + offset * unit, size * unit) for i in range(blocks)]


def with_attributes_of(module: Module, cls: type[M]) -> M:
    """Return a module of another class that has what a module has, under the same names.

    Without a constructor, which would name its parameters as those of an outermost module.
    """
    made = cls.__new__(cls)
    vars(made).update(vars(module))
    return made
