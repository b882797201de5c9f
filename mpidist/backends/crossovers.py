"""From which sizes on which path is taken: measured, kept per machine, the same on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

__all__ = ["NEVER", "SMALL", "Crossovers", "choose", "parse"]

SMALL = 128 << 10
"""Bytes of the largest array that ranks can give each other together with their arrival."""

NEVER = 2**62
"""A size for a path that is not taken."""


@dataclass(frozen=True, slots=True)
class Crossovers:
    """Bytes at which one way becomes faster than another, for the ranks of a node.

    What stands here was measured with 2 ranks on a virtual machine with 2 cores of an AMD EPYC,
    MPICH 5.0.2 and Open MPI 5.0.11, by ``python -m mpidist bench crossovers``.

    Attributes
    ----------
    small : int
        A blocking all_reduce of at most so many bytes goes with the ranks' arrival, and each rank
        combines all for itself. At most 128 KiB.
    registered : int
        Arrays in registered memory, of at least so many bytes, are worked on where they lie.
    scratch : int
        A blocking all_reduce of other memory, of at least so many bytes, goes by way of memory that
        the ranks share; what is shorter and not small goes by the library.

    Raises
    ------
    ValueError
        If one is no integer, negative or above 2**62, or `small` is larger than it can be.
    """

    small: int = 128 << 10
    registered: int = 32 << 10
    scratch: int = 128 << 10

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        sizes = {field.name: getattr(self, field.name) for field in fields(self)}
        valid = all(isinstance(size, int) and 0 <= size <= NEVER for size in sizes.values())
        if not valid or self.small > SMALL:
            raise ValueError(
                f"crossovers must be sizes in bytes, small at most {SMALL}; got {sizes}"
            )


def choose(table: Mapping[int, Crossovers], ranks: int) -> Crossovers:
    """Return what was measured with as many ranks on a node, or with the next smaller number.

    Parameters
    ----------
    table : mapping of int to Crossovers
        By the number of ranks on a node.
    ranks : int
        The largest number of ranks on any node of a group.

    Returns
    -------
    Crossovers
        The default where nothing was measured.
    """
    if not table:
        return Crossovers()
    fewer = [number for number in table if number <= ranks]
    return table[max(fewer) if fewer else min(table)]


def parse(text: str) -> Crossovers:
    """Return crossovers given as text.

    Parameters
    ----------
    text : str
        Such as ``small=4096,registered=65536,scratch=never``; what is left out has its default.

    Raises
    ------
    ValueError
        If it is something else.
    """
    known = [field.name for field in fields(Crossovers)]
    sizes = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        if name not in known or not (value.isdecimal() or value == "never"):
            raise ValueError(
                f"expected sizes in bytes such as 'small=4096,registered=65536,scratch=never', got "
                f"{text!r}"
            )
        sizes[name] = NEVER if value == "never" else int(value)
    return Crossovers(**sizes)
