"""Messages between ranks: latency, bandwidth, and exchange with the neighbours.

ping-pong: ranks 0 and 1 send an array to and fro; the time is that of one way. window: rank 0
starts 16 messages to rank 1 before it waits for them, and waits for a short answer; the time is
that of one message. sendrecv: every rank sends to the next and receives from the one before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from mpidist._types import Array
from mpidist.bench.harness import BenchmarkRun, add_effort, sweep
from mpidist.bench.peers import LibraryPeer, find_library
from mpidist.bench.report import LIBRARY, ORDINARY, Comparison, Report
from mpidist.bench.times import Series
from mpidist.bench.verbs import neighbours
from mpidist.group import ProcessGroup
from mpidist.point_to_point import irecv, isend, recv, send, sendrecv

_WINDOW = 16

_LEGEND = {
    ORDINARY: "mpidist, into arrays that are given",
    LIBRARY: "the buffer calls of mpi4py on the same arrays",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_effort(parser, sizes=sweep("4", "16MiB", 16), seconds=1.0)


def run(world: ProcessGroup, options: argparse.Namespace) -> Report:
    """Measure messages over the sizes; collective over `world`."""
    bench = BenchmarkRun("p2p", world, options)
    peer = find_library(world, bench.notes)
    for operation in _OPERATIONS:
        make = partial(_series, operation, world, peer)
        bench.measure_sizes(operation, options.sizes, make)
    comparison = Comparison("mpidist/library", ORDINARY, LIBRARY)
    return bench.report(legend=_LEGEND, comparisons=[comparison])


def _series(
    operation: str, world: ProcessGroup, peer: LibraryPeer | None, nbytes: int
) -> list[Series]:
    make, messages, members = _OPERATIONS[operation]
    calls = make(world, peer, nbytes)
    if members is not None and world.rank >= members:
        calls = [_idle] * len(calls)
    return [
        Series(name, call, operations=messages)
        for name, call in zip((ORDINARY, LIBRARY), calls, strict=False)
    ]


def _idle() -> None:
    """Do what ranks do that have no part in an operation."""


_Calls: TypeAlias = list[Callable[[], Any]]
"""That of mpidist and, where there is one, that of the MPI library."""


def _ping_pong(world: ProcessGroup, peer: LibraryPeer | None, nbytes: int) -> _Calls:
    x, y, other = _written(nbytes), _written(nbytes), 1 - world.rank
    pairs = [(partial(send, x, world, dst=other), partial(recv, world, src=other, out=y))]
    if peer is not None:
        pairs.append((partial(peer.comm.Send, x, other), partial(peer.comm.Recv, y, other)))
    return [partial(_in_turn, *(pair if world.rank == 0 else pair[::-1])) for pair in pairs]


def _in_turn(first: Callable[[], Any], second: Callable[[], Any]) -> None:
    first()
    second()


def _window(world: ProcessGroup, peer: LibraryPeer | None, nbytes: int) -> _Calls:
    arrays, answer = [_written(nbytes) for _ in range(_WINDOW)], _written(1)

    def with_mpidist() -> None:
        if world.rank == 0:
            for work in [isend(x, world, dst=1) for x in arrays]:
                work.wait()
            recv(world, src=1, out=answer)
        else:
            for receive in [irecv(world, src=0, out=x) for x in arrays]:
                receive.wait()
            send(answer, world, dst=0)

    if peer is None:
        return [with_mpidist]
    comm, wait_all = peer.comm, peer.mpi.Request.Waitall

    def with_library() -> None:
        if comm.rank == 0:
            wait_all([comm.Isend(x, 1) for x in arrays])
            comm.Recv(answer, 1)
        else:
            wait_all([comm.Irecv(x, 0) for x in arrays])
            comm.Send(answer, 0)

    return [with_mpidist, with_library]


def _sendrecv(world: ProcessGroup, peer: LibraryPeer | None, nbytes: int) -> _Calls:
    x, y = _written(nbytes), _written(nbytes)
    dst, src = neighbours(world)
    calls: _Calls = [partial(sendrecv, x, world, dst=dst, src=src, out=y)]
    if peer is not None:
        calls.append(partial(peer.comm.Sendrecv, x, dst, recvbuf=y, source=src))
    return calls


_OPERATIONS: Mapping[
    str, tuple[Callable[[ProcessGroup, LibraryPeer | None, int], _Calls], int, int | None]
] = {
    "ping-pong": (_ping_pong, 2, 2),
    "window": (_window, _WINDOW, 2),
    "sendrecv": (_sendrecv, 1, None),
}
"""What makes the calls of an operation, its messages, and its ranks: None for all."""


def _written(nbytes: int) -> Array:
    """Return bytes that have been written: memory never touched would be one page of zeros."""
    x = np.empty(nbytes, np.uint8)
    x.fill(1)
    return x
