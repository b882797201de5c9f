"""From which sizes on which path is taken: one table, the same on all ranks."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NEVER", "Crossovers"]

NEVER = 2**63 - 1
"""Of a path that is not taken."""


@dataclass(frozen=True, slots=True)
class Crossovers:
    """Bytes at which one way becomes faster than another, for ranks that share a node.

    The values here were measured with 2 ranks on 2 cores of an AMD EPYC, MPICH 5.0.2 and Open MPI
    5.0.11; ``python -m mpidist bench crossovers`` measures a machine's own.

    Attributes
    ----------
    small : int
        A blocking all_reduce of at most so many bytes goes with the ranks' arrival, and each rank
        combines all for itself.
    registered : int
        Arrays in registered memory, of at least so many bytes, are worked on where they lie.
    scratch : int
        A blocking all_reduce of other memory, of at least so many bytes, goes by way of memory that
        the ranks share; what is shorter and not small goes by the library.
    """

    small: int = 8 << 10
    registered: int = 16 << 10
    scratch: int = 8 << 10
