"""What the ranks of a node have to agree on before a collective touches anything."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from mpidist._types import SUM, Array, DType, ReduceOp
from mpidist.arrays import DTYPES
from mpidist.backends.meetings import Record
from mpidist.backends.registered import Place, Registry

__all__ = ["DIRECT_VERBS", "Call", "Way", "tell_difference"]

DIRECT_VERBS = ("all_reduce", "all_gather", "broadcast", "reduce_scatter")
"""The collectives that can be performed where the arrays lie."""

_OPS = tuple(ReduceOp)
_OP_NUMBERS = {op: number for number, op in enumerate(_OPS)}
_VERB_NUMBERS = {verb: number for number, verb in enumerate(DIRECT_VERBS)}
_DTYPES: tuple[DType, ...] = tuple(sorted(DTYPES, key=lambda dtype: dtype.name))
_DTYPE_NUMBERS = {dtype: number for number, dtype in enumerate(_DTYPES)}


class Way(IntEnum):
    """How a call goes on after the meeting, where the arrays are not worked on where they lie.

    Ranks that go different ways would take what lies in shared memory for something else.
    """

    MESSAGES = 1
    LIBRARY = 2
    ARRIVAL = 3
    SCRATCH = 4


_WAY_WORDS = {
    Way.MESSAGES: "by messages",
    Way.LIBRARY: "by the MPI library's blocking call",
    Way.ARRIVAL: "blocking and small enough to come with the arrival",
    Way.SCRATCH: "blocking, by way of shared memory",
}


class Call(NamedTuple):
    """What a rank comes with.

    Attributes
    ----------
    verb : str
        One that has a direct path.
    whole : Array
        The argument that has the same size on all ranks.
    place : Place or None
        Where it lies; None unless it is registered and the call one that has a direct path.
    op : ReduceOp
        SUM where nothing is reduced.
    root : int
        0 where there is none.
    counts : sequence of int
        Elements of each rank's part; none where there are no parts.
    way : Way
        Counts only where `place` is None.
    """

    verb: str
    whole: Array
    place: Place | None
    op: ReduceOp = SUM
    root: int = 0
    counts: Sequence[int] = ()
    way: Way = Way.MESSAGES

    @classmethod
    def of(cls, verb: str, args: tuple[Any, ...], registered: Registry, least: int) -> Call | None:
        """Return a call that the ranks have to agree on, or None: all ranks alike.

        So it depends on what is the same on all ranks only: on verb and size, not on where the
        arrays of this rank lie.

        Parameters
        ----------
        verb, args : str, tuple
            As a transport gets them.
        registered : Registry
            Knows the arrays that lie in shared memory.
        least : int
            Bytes below which being registered makes no difference.
        """
        if verb not in _VERB_NUMBERS:
            return None
        whole = args[1] if verb == "all_gather" else args[0]
        if whole.nbytes < least:
            return None
        place = registered.place(whole)
        if verb == "all_reduce":
            x, out, op = args
            return cls(verb, x, place if x is out else None, op)
        if verb == "reduce_scatter":
            x, _, counts, op = args
            return cls(verb, x, place, op, counts=counts)
        if verb == "all_gather":
            x, out, counts = args
            return cls(verb, out, place if x is None else None, counts=counts)
        return cls(verb, whole, place, root=args[1])

    def record(self) -> Record:
        """Return the numbers that must be the same on all ranks."""
        place = self.place
        return Record.of(
            (
                _VERB_NUMBERS[self.verb] << 32 | _OP_NUMBERS[self.op] << 16 | self.root,
                (self.way << 16 if place is None else 0) | _DTYPE_NUMBERS[self.whole.dtype],
                self.whole.size,
                0 if place is None else place.block.number,
                0 if place is None else place.offset,
                crc32(np.array(self.counts, np.int64).tobytes()) if self.counts else 0,
            )
        )


def tell_difference(
    records: Sequence[Array], ranks: Sequence[int], place: int, counts: Sequence[int] = ()
) -> str:
    """Return words for calls that differ.

    Parameters
    ----------
    records : sequence of Array, shape (6,), uint64
        What each rank of a node came with.
    ranks : sequence of int
        Who they are.
    place : int
        Which of them is this one.
    counts : sequence of int, optional
        Elements of each rank's part as this one has them, where there are parts.
    """
    rank, verb = ranks[place], _verb(records[place])
    told = "; ".join(
        f"rank {other}: {_tell(record)}" for other, record in zip(ranks, records, strict=True)
    )
    if all((record == records[0]).all() for record in records):
        told += "; on another node a rank called something else"
    parts = f" Here, on rank {rank}, the counts are {list(counts)}." if counts else ""
    return (
        f"{verb} on rank {rank}: the ranks called different things; nothing "
        "has been changed. All must make the same call with the same counts, all blocking or all "
        "immediate, with the same crossovers, on the same place of the same registered block or "
        f"all on other memory.{parts} {told}"
    )


def _verb(record: Array) -> str:
    return DIRECT_VERBS[int(record[0]) >> 32]


def _tell(record: Array) -> str:
    what, dtype, count, block, offset, checksum = record.tolist()
    verb, op, root = _verb(record), _OPS[what >> 16 & 0xFFFF], what & 0xFFFF
    where = f"at byte {offset} of registered block {block}" if block else "not registered"
    if not block and verb in ("all_reduce", "all_gather"):
        where = "not in place in registered memory"
    counts = f", counts with checksum {checksum:08x}" if checksum else ""
    way = f", {_WAY_WORDS[Way(dtype >> 16)]}" if dtype >> 16 else ""
    kind = _DTYPES[dtype & 0xFFFF]
    return f"{verb} (op {op.name}, root {root}) of {count} {kind}{counts}, {where}{way}"
