"""What a transport can do, of host arrays or of device arrays."""

from __future__ import annotations

from dataclasses import dataclass

from mpidist._types import DType, ReduceOp
from mpidist.arrays.namespaces import REDUCTIONS

__all__ = ["Capabilities"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a transport can do; anything else is refused before the first byte moves.

    Attributes
    ----------
    reductions : frozenset of (ReduceOp, dtype)
        The pairs that its reductions take.
    max_tag : int
        Largest tag of a message; -1 where messages have none.
    any_source : bool
        Whether a receive may take a message from any rank.
    unknown_shapes : bool
        Whether a receive may learn shape and dtype from the message.
    halves_rounded_once : bool
        Whether float16 and bfloat16 are summed in float32 and rounded at the end only.
    """

    reductions: frozenset[tuple[ReduceOp, DType]] = REDUCTIONS
    max_tag: int = 2**15 - 1
    any_source: bool = True
    unknown_shapes: bool = True
    halves_rounded_once: bool = True
