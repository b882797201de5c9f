"""Messages between ranks: latency, bandwidth, and exchange with the neighbours.

ping-pong: ranks 0 and 1 send an array to and fro; the time is that of one way. window: rank 0
starts 16 messages to rank 1 before it waits for them, and waits for a short answer; the time is
that of one message. sendrecv: every rank sends to the next and receives from the one before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from mpidist._types import Array
from mpidist.bench.harness import add_effort, require_ranks, rows_over, sweep
from mpidist.bench.peers import LibraryPeer, find_library
from mpidist.bench.report import LIBRARY, ORDINARY, Comparison, Machine, Report, Row
from mpidist.bench.times import Series
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
    require_ranks(world, "p2p")
    machine = Machine.of(world)
    notes: list[str] = []
    rows: list[Row] = []
    peer = find_library(world, notes)
    for operation, prepare in _OPERATIONS.items():
        make = partial(prepare, world, peer)
        rows += rows_over(options.sizes, make, world, operation=operation, options=options)
    return Report(
        benchmark="p2p",
        machine=machine,
        rows=rows,
        comparisons=(Comparison("mpidist/library", ORDINARY, LIBRARY),),
        legend={name: _LEGEND[name] for name in dict.fromkeys(row.series for row in rows)},
        notes=notes,
    )


def _ping_pong(world: ProcessGroup, peer: LibraryPeer | None, nbytes: int) -> list[Series]:
    x, y = _written(nbytes), _written(nbytes)
    series = [_between(ORDINARY, world, _mpidist_ping(world, x, y), 2)]
    if peer is not None:
        series.append(_between(LIBRARY, world, _library_ping(peer, x, y), 2))
    return series


def _mpidist_ping(world: ProcessGroup, x: Array, y: Array) -> Callable[[], Any]:
    def call() -> None:
        if world.rank == 0:
            send(x, world, dst=1)
            recv(world, src=1, out=y)
        else:
            recv(world, src=0, out=y)
            send(x, world, dst=0)

    return call


def _library_ping(peer: LibraryPeer, x: Array, y: Array) -> Callable[[], Any]:
    comm = peer.comm

    def call() -> None:
        if comm.rank == 0:
            comm.Send(x, 1)
            comm.Recv(y, 1)
        else:
            comm.Recv(y, 0)
            comm.Send(x, 0)

    return call


def _window(world: ProcessGroup, peer: LibraryPeer | None, nbytes: int) -> list[Series]:
    arrays, answer = [_written(nbytes) for _ in range(_WINDOW)], _written(1)
    series = [_between(ORDINARY, world, _mpidist_window(world, arrays, answer), _WINDOW)]
    if peer is not None:
        series.append(_between(LIBRARY, world, _library_window(peer, arrays, answer), _WINDOW))
    return series


def _mpidist_window(world: ProcessGroup, arrays: list[Array], answer: Array) -> Callable[[], Any]:
    def call() -> None:
        if world.rank == 0:
            for work in [isend(x, world, dst=1) for x in arrays]:
                work.wait()
            recv(world, src=1, out=answer)
        else:
            for receive in [irecv(world, src=0, out=x) for x in arrays]:
                receive.wait()
            send(answer, world, dst=0)

    return call


def _library_window(peer: LibraryPeer, arrays: list[Array], answer: Array) -> Callable[[], Any]:
    comm, wait_all = peer.comm, peer.mpi.Request.Waitall

    def call() -> None:
        if comm.rank == 0:
            wait_all([comm.Isend(x, 1) for x in arrays])
            comm.Recv(answer, 1)
        else:
            wait_all([comm.Irecv(x, 0) for x in arrays])
            comm.Send(answer, 0)

    return call


def _neighbours(world: ProcessGroup, peer: LibraryPeer | None, nbytes: int) -> list[Series]:
    x, y = _written(nbytes), _written(nbytes)
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    series = [Series(ORDINARY, partial(sendrecv, x, world, dst=to, src=source, out=y))]
    if peer is not None:
        call = partial(peer.comm.Sendrecv, x, to, recvbuf=y, source=source)
        series.append(Series(LIBRARY, call))
    return series


_OPERATIONS: Mapping[str, Callable[[ProcessGroup, LibraryPeer | None, int], list[Series]]] = {
    "ping-pong": _ping_pong,
    "window": _window,
    "sendrecv": _neighbours,
}


def _between(name: str, world: ProcessGroup, call: Callable[[], Any], messages: int) -> Series:
    """Return the series of ranks 0 and 1; the others have nothing to do."""
    return Series(name, call if world.rank < 2 else _nothing, operations=messages)


def _nothing() -> None:
    pass


def _written(nbytes: int) -> Array:
    """Return bytes that have been written: memory never touched would be one page of zeros."""
    x = np.empty(nbytes, np.uint8)
    x.fill(1)
    return x
