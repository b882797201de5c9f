"""The ranks of the fuzzer of mismatches: make the calls, and write down what became of them."""

from __future__ import annotations

import json
import os
import sys
import time
from functools import reduce
from pathlib import Path
from typing import IO, Any

import numpy as np

import mpidist
from mpidist._types import Array
from mpidist.arrays.namespaces import ufunc_of
from mpidist.errors import CollectiveTimeoutError, DistributedError, PeerLostError
from mpidist.group import ProcessGroup
from tests.soaks.mismatch_cases import BLOCK, Call, Case, array_of, draw, plain_call

TIMEOUT = 8.0
_ROOM = 16  # bytes of what a rank tells the others
_LATE = (CollectiveTimeoutError, PeerLostError)


class Ranks:
    """This rank, and a group of all that is made anew when a case has broken it."""

    def __init__(self, world: ProcessGroup) -> None:
        from mpi4py import MPI

        self._world = world
        self.comm = MPI.COMM_WORLD.Dup()  # for what the ranks tell each other of a case
        self._made = 0
        self.renew()

    def renew(self) -> None:
        """Make a new group; collective."""
        self._made += 1
        self.group = self._world.duplicate(f"group {self._made}")
        self._blocks = [self.group.empty(BLOCK, np.uint8) for _ in range(5)]

    def arrays(self, case: Case) -> list[Array]:
        """Return this rank's arrays of a case."""
        call = case.calls[self.group.rank]
        arrays = []
        for member in range(len(call.shapes)):
            x = array_of(case, self.group.rank, member)
            if call.registered:
                place = self._blocks[member][: x.nbytes].view(x.dtype).reshape(x.shape)
                place[...] = x
                x = place
            arrays.append(x)
        return arrays

    def call(self, case: Case) -> Any:
        """Make this rank's call, wait for it, and return its result."""
        call = case.calls[self.group.rank]
        function = getattr(mpidist, call.name)
        arguments = _arguments(call)
        if call.form == "object":
            given = {"scatter_object": [f"{case.number}-{i}" for i in range(call.objects)]}
            own = given.get(call.verb, f"{case.number} of {self.group.rank}")
            return function(own, self.group, **arguments)
        arrays = self.arrays(case)
        if call.verb == "barrier":
            result = function(self.group)
        elif call.in_list:
            if call.registered and call.verb in ("all_reduce", "broadcast"):
                arguments["outs"] = arrays
            result = function(arrays, self.group, **arguments)
        else:
            if call.registered and call.verb in ("all_reduce", "broadcast"):
                arguments["out"] = arrays[0]
            result = function(arrays[0], self.group, **arguments)
        return result.wait() if call.immediate else result


def _arguments(call: Call) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if call.verb in ("all_reduce", "reduce", "reduce_scatter"):
        arguments["op"] = call.op
    if call.verb in ("broadcast", "reduce", "gather", "scatter") or (
        call.form == "object" and call.verb != "all_gather_object"
    ):
        arguments["root"] = call.root
    if call.counts is not None:
        arguments["counts"] = call.counts
    if call.recv_counts is not None:
        arguments["recv_counts"] = call.recv_counts
    return arguments


def expected(case: Case, rank: int) -> Any:
    """Return what numpy makes of a case without a deviation, for a rank."""
    call, size = case.calls[rank], len(case.calls)
    if call.form == "object":
        return _expected_object(case, rank)
    if call.verb == "barrier":
        return None
    results = []
    for member in range(len(call.shapes)):
        parts = [array_of(case, source, member) for source in range(size)]
        results.append(_expected_array(call, parts, rank, case))
    return results if call.in_list else results[0]


def _expected_object(case: Case, rank: int) -> Any:
    call, size = case.calls[rank], len(case.calls)
    everybodys = [f"{case.number} of {source}" for source in range(size)]
    if call.verb == "broadcast_object":
        return everybodys[call.root]
    if call.verb == "scatter_object":
        return f"{case.number}-{rank}"
    return everybodys if call.verb == "all_gather_object" or rank == call.root else None


def _expected_array(call: Call, parts: list[Array], rank: int, case: Case) -> Array | None:
    if call.verb in ("reduce", "gather") and rank != call.root:
        return None
    if call.verb == "broadcast":
        return parts[call.root]
    if call.verb in ("all_gather", "gather"):
        return np.concatenate(parts)
    if call.verb == "scatter":
        return _block(parts[call.root], call.counts, rank, len(parts))
    if call.verb == "all_to_all":
        blocks = [
            _block(x, case.calls[source].counts, rank, len(parts)) for source, x in enumerate(parts)
        ]
        return np.concatenate(blocks)
    total: Array = reduce(ufunc_of(call.op), parts)
    if call.verb == "reduce_scatter":
        return _block(total, call.counts, rank, len(parts))
    return total


def _block(x: Array, counts: tuple[int, ...] | None, rank: int, size: int) -> Array:
    counts = counts or (len(x) // size,) * size
    start = sum(counts[:rank])
    return x[start : start + counts[rank]]


def _equal(result: Any, wanted: Any) -> bool:
    if isinstance(wanted, np.ndarray):
        return (
            isinstance(result, np.ndarray)
            and result.dtype == wanted.dtype
            and np.array_equal(result, wanted)
        )
    if isinstance(wanted, list) and wanted and isinstance(wanted[0], np.ndarray):
        return len(result) == len(wanted) and all(map(_equal, result, wanted))
    return bool(result == wanted)


def outcome(ranks: Ranks, case: Case) -> tuple[str, str, bool]:
    """Return how a case ended on this rank, in words, and whether the group can be used."""
    try:
        result = ranks.call(case)
    except DistributedError as error:
        ended = "late" if isinstance(error, _LATE) else "caught"
        return ended, f"{type(error).__name__}: {error}"[:300], getattr(error, "usable", True)
    except Exception as error:
        return "foreign", f"{type(error).__name__}: {error}"[:300], False
    if case.kind not in ("none", "form"):
        return "returned", "", True
    right = _equal(result, expected(case, ranks.group.rank))
    return ("right", "", True) if right else ("wrong", f"got {result!r}"[:300], True)


def exchange(ranks: Ranks, mine: Any) -> list[Any]:
    """Return what each rank says of the case; end this rank if one does not come any more."""
    data = np.zeros(_ROOM, np.uint8)
    text = json.dumps(mine).encode()
    data[: len(text)] = np.frombuffer(text, np.uint8)
    everybodys = np.zeros((ranks.group.size, _ROOM), np.uint8)
    request = ranks.comm.Iallgather(data, everybodys)
    deadline = time.monotonic() + 2 * TIMEOUT
    while not request.Test():
        if time.monotonic() > deadline:
            os._exit(3)
        time.sleep(0.0005)
    return [json.loads(row.tobytes().rstrip(b"\0")) for row in everybodys]


def works_afterwards(ranks: Ranks, seed: int, number: int, *, usable: bool) -> str:
    """Return what is wrong with the next plain collective, or nothing."""
    if not usable:
        ranks.renew()
    plain = Case(number, "none", "small", 0, tuple(plain_call(seed, number, ranks.group.size)))
    ended, words, _ = outcome(ranks, plain)
    return "" if ended == "right" else f"afterwards: {ended} {words}"


def main() -> None:
    """Run the cases that the command line says; each rank writes a line for each of them."""
    seed, first, count = map(int, sys.argv[1:4])
    with mpidist.init(timeout=TIMEOUT) as world, rank_file(sys.argv[4], world.rank) as lines:
        ranks = Ranks(world)
        for number in range(first, first + count):
            case = draw(seed, number, world.size)
            ended, words, usable = outcome(ranks, case)
            write(lines, number=number, ended=ended, words=words)
            usable = all(exchange(ranks, usable))
            after = works_afterwards(ranks, seed, number, usable=usable)
            write(lines, number=number, after=after)
            if not all(exchange(ranks, not after)):
                ranks.renew()


def rank_file(directory: str, rank: int) -> IO[str]:
    return Path(directory, f"rank-{rank}").open("a", buffering=1)


def write(lines: IO[str], **fields: object) -> None:
    lines.write(json.dumps(fields) + "\n")


if __name__ == "__main__":
    main()
