"""Verbs on device arrays, each by mpidist and by the binding of NCCL alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mpidist import env
from mpidist._types import SUM, Array
from mpidist.arrays.namespaces import address_of, device_empty, device_module, to_host
from mpidist.backends.device.hybrid import carry_devices
from mpidist.backends.device.nccl import NcclBackend, calls
from mpidist.bench.nccl_device import DeviceClock
from mpidist.bench.times import Series
from mpidist.collectives import (
    all_gather,
    all_reduce,
    all_reduce_coalesced,
    all_to_all,
    broadcast,
    iall_reduce,
    reduce_scatter,
)
from mpidist.group import ProcessGroup
from mpidist.job.start import init
from mpidist.point_to_point import sendrecv

__all__ = [
    "COALESCED",
    "OURS",
    "RAW",
    "STAGED",
    "VERBS",
    "Binding",
    "divisible",
    "staged_group",
    "staged_series",
    "verb_series",
]

OURS, RAW, STAGED = "mpidist", "NCCL", "host staging"

COALESCED = 8
"""Arrays of an all_reduce_coalesced."""

_DTYPE = np.dtype(np.float32)
_CODE, _SUM = calls.CODES[_DTYPE], calls.OPS[SUM]


class Binding:
    """CuPy's binding of NCCL, called with addresses, on the stream that is current now.

    Its communicator is the group's own, so that nothing differs but what is around the calls.
    Collective over `world`; blocks until the ranks are connected.
    """

    def __init__(self, world: ProcessGroup) -> None:
        all_reduce(device_module().zeros(1, _DTYPE), world)
        device = world._backend.device
        assert isinstance(device, NcclBackend), "the group carries device arrays"
        assert device.communicator is not None, "it has just been used"
        self.comm: Any = device.communicator._handle
        cuda = device_module().cuda
        self.stream: int = cuda.get_current_stream().ptr
        self._begin, self._end = cuda.nccl.groupStart, cuda.nccl.groupEnd

    def together(self, several: Sequence[Callable[[], Any]]) -> Callable[[], None]:
        """Return a function that makes these calls as one group."""

        def call() -> None:
            self._begin()
            for each in several:
                each()
            self._end()

        return call

    def all_reduce(self, x: Array) -> Callable[[], Any]:
        """Return the call that sums `x` in place."""
        at = address_of(x)
        return partial(self.comm.allReduce, at, at, x.size, _CODE, _SUM, self.stream)

    def messages(
        self, sends: Sequence[tuple[Array, int]], receives: Sequence[tuple[Array, int]]
    ) -> Callable[[], None]:
        """Return the call that sends arrays to ranks, and receives arrays from ranks."""
        return self.together(
            [
                partial(verb, address_of(x), x.size, _CODE, peer, self.stream)
                for verb, messages in ((self.comm.send, sends), (self.comm.recv, receives))
                for x, peer in messages
            ]
        )


@dataclass(frozen=True, slots=True)
class _Pair:
    """A verb on the same arrays by both, and how one sees that it does what it should.

    `expected` is what `out` holds if every rank contributes its number plus one in `x`.
    """

    ours: Callable[[], Any]
    raw: Callable[[], Any]
    x: Array
    out: Array
    expected: Array | float


def _all_reduce(world: ProcessGroup, nccl: Binding, count: int) -> _Pair:
    x = device_empty(count, _DTYPE)
    return _Pair(partial(all_reduce, x, world, out=x), nccl.all_reduce(x), x, x, _sum(world))


def _iall_reduce(world: ProcessGroup, nccl: Binding, count: int) -> _Pair:
    x = device_empty(count, _DTYPE)

    def ours() -> None:
        iall_reduce(x, world, out=x).wait()

    return _Pair(ours, nccl.all_reduce(x), x, x, _sum(world))


def _coalesced(world: ProcessGroup, nccl: Binding, count: int) -> _Pair:
    x = device_empty(count, _DTYPE)
    parts = [x[i * count // COALESCED : (i + 1) * count // COALESCED] for i in range(COALESCED)]
    ours = partial(all_reduce_coalesced, parts, world, outs=parts)
    return _Pair(ours, nccl.together([*map(nccl.all_reduce, parts)]), x, x, _sum(world))


def _broadcast(world: ProcessGroup, nccl: Binding, count: int) -> _Pair:
    x = device_empty(count, _DTYPE)
    at = address_of(x)
    raw = partial(nccl.comm.broadcast, at, at, count, _CODE, 0, nccl.stream)
    return _Pair(partial(broadcast, x, world, out=x), raw, x, x, 1.0)


def _all_gather(world: ProcessGroup, nccl: Binding, count: int) -> _Pair:
    out = device_empty(count, _DTYPE)
    x = _parts(out, world)[world.rank]
    raw = partial(nccl.comm.allGather, address_of(x), address_of(out), x.size, _CODE, nccl.stream)
    return _Pair(partial(all_gather, x, world, out=out), raw, x, out, _one_each(world, x.size))


def _reduce_scatter(world: ProcessGroup, nccl: Binding, count: int) -> _Pair:
    x, out = device_empty(count, _DTYPE), device_empty(count // world.size, _DTYPE)
    places = address_of(x), address_of(out)
    raw = partial(nccl.comm.reduceScatter, *places, out.size, _CODE, _SUM, nccl.stream)
    return _Pair(partial(reduce_scatter, x, world, out=out), raw, x, out, _sum(world))


def _all_to_all(world: ProcessGroup, nccl: Binding, count: int) -> _Pair:
    x, out = device_empty(count, _DTYPE), device_empty(count, _DTYPE)
    sends, receives = ([(p, i) for i, p in enumerate(_parts(a, world))] for a in (x, out))
    expected = _one_each(world, count // world.size)
    ours = partial(all_to_all, x, world, out=out)
    return _Pair(ours, nccl.messages(sends, receives), x, out, expected)


def _sendrecv(world: ProcessGroup, nccl: Binding, count: int) -> _Pair:
    x, out = device_empty(count, _DTYPE), device_empty(count, _DTYPE)
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    ours = partial(sendrecv, x, world, dst=to, src=source, out=out)
    return _Pair(ours, nccl.messages([(x, to)], [(out, source)]), x, out, source + 1.0)


VERBS: Mapping[str, Callable[[ProcessGroup, Binding, int], _Pair]] = {
    "all_reduce": _all_reduce,
    "iall_reduce and wait": _iall_reduce,
    "all_reduce_coalesced": _coalesced,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "broadcast": _broadcast,
    "all_to_all": _all_to_all,
    "sendrecv": _sendrecv,
}
"""Each verb, and how its calls on so many elements are prepared."""


def divisible(nbytes: int, ranks: int) -> int:
    """Return a size near this one that both ranks and `COALESCED` arrays share evenly."""
    unit = _DTYPE.itemsize * COALESCED * ranks
    return max(nbytes // unit, 1) * unit


def verb_series(verb: str, world: ProcessGroup, nccl: Binding, nbytes: int) -> list[Series]:
    """Return the series of mpidist and of the binding, by the device's time.

    Each has given the right result once; the arrays hold zeros then. Collective; blocks.
    """
    pair = VERBS[verb](world, nccl, nbytes // _DTYPE.itemsize)
    # The binding knows addresses only: the call of the other series holds its arrays.
    return [_checked(OURS, pair.ours, pair, world), _checked(RAW, pair.raw, pair, world)]


def staged_series(staged: ProcessGroup, nbytes: int) -> Series:
    """Return all_reduce by way of the host, as `verb_series` does."""
    x = device_empty(nbytes // _DTYPE.itemsize, _DTYPE)
    call = partial(all_reduce, x, staged, out=x)
    return _checked(STAGED, call, _Pair(call, call, x, x, _sum(staged)), staged)


def _checked(name: str, call: Callable[[], Any], pair: _Pair, world: ProcessGroup) -> Series:
    pair.out.fill(0)
    pair.x.fill(world.rank + 1)
    call()
    found = to_host(pair.out)
    if not (found == pair.expected).all():
        raise RuntimeError(f"bench nccl: by {name} expected {pair.expected}, got {found}")
    for array in (pair.x, pair.out):
        array.fill(0)
    return Series(name, call, clock=DeviceClock())


@contextmanager
def staged_group(world: ProcessGroup) -> Iterator[ProcessGroup | None]:
    """Give a group of the same ranks without NCCL, if device arrays may go by way of the host."""
    if not env.gpu_fallback():
        yield None
        return
    on_mpi = world._backend.name == "mpi"
    with init(world._backend.name, comm=world.mpi_comm if on_mpi else None) as staged:
        carry_devices(staged._backend, "it is measured beside NCCL", fallback=True)
        yield staged


def _parts(x: Array, world: ProcessGroup) -> list[Array]:
    part = x.size // world.size
    return [x[rank * part : (rank + 1) * part] for rank in range(world.size)]


def _one_each(world: ProcessGroup, part: int) -> Array:
    return np.repeat(np.arange(1, world.size + 1, dtype=_DTYPE), part)


def _sum(world: ProcessGroup) -> float:
    return world.size * (world.size + 1) / 2
