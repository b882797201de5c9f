"""Verbs and kernels on device arrays, beside the binding of NCCL and copies on the device."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mpidist import env
from mpidist._types import SUM, Array
from mpidist.arrays.flat import FlatBuffer
from mpidist.arrays.namespaces import address_of, device_empty, device_module
from mpidist.backends.device.hybrid import carry_devices
from mpidist.backends.device.nccl import NcclBackend
from mpidist.backends.device.nccl.communicator import version
from mpidist.backends.device.nccl.dtypes import CODES, OPS
from mpidist.bench.report import Row
from mpidist.bench.times import Effort, Series, measure
from mpidist.bench.verbs import (
    COALESCED,
    DTYPE,
    Arrays,
    checked,
    neighbours,
    our_call,
    parts,
    prepare,
)
from mpidist.collectives import all_reduce
from mpidist.group import ProcessGroup
from mpidist.job.start import init
from mpidist.optim.fused import apply_rule
from mpidist.optim.rules import AdamRule, SGDRule, UpdateRule
from mpidist.parallel import gradient_kernels

OURS, RAW, STAGED = "mpidist", "NCCL", "host staging"

KERNEL, COPY = "kernel", "copy"

_CODE, _SUM = CODES[DTYPE], OPS[SUM]

_PARTS = 64
"""Arrays that are packed."""

_DRIVER = Path("/proc/driver/nvidia/version")


class DeviceClock:
    """Times what a call puts on the current stream, by events before and behind it.

    Calling it blocks until the device is done, so that the next call finds the stream empty.
    """

    def __init__(self) -> None:
        cuda = device_module().cuda
        self._begin, self._end = cuda.Event(), cuda.Event()
        self._milliseconds = cuda.get_elapsed_time

    def __call__(self, call: Callable[[], object]) -> float:
        """Make the call, and return the seconds between the two events."""
        self._begin.record()
        call()
        self._end.record()
        self._end.synchronize()
        return float(self._milliseconds(self._begin, self._end)) * 1e-3


def in_a_row(series: Series, number: int) -> Series:
    """Return a series whose calls are so many of the given one's; the time is that of one."""

    def call(one: Callable[[], object] = series.call) -> None:
        for _ in range(number):
            one()

    return replace(series, call=call, operations=number)


def enqueued(series: Series) -> Series:
    """Return the series in the host's time, from an empty stream on."""
    stream = device_module().cuda.get_current_stream()
    return replace(series, before=stream.synchronize, clock=None)


def describe_device() -> str:
    """Return the name of the current device, and the versions of what drives it."""
    xp = device_module()
    runtime, number = xp.cuda.runtime, xp.cuda.Device().id
    name = _properties()["name"]
    name = name.decode() if isinstance(name, bytes) else str(name)
    nccl = version()
    versions = (
        f"driver {_driver()} for CUDA {_cuda(runtime.driverGetVersion())}",
        f"CUDA {_cuda(runtime.runtimeGetVersion())}",
        f"CuPy {xp.__version__}",
        f"NCCL {nccl // 10000}.{nccl // 100 % 100}.{nccl % 100}",
    )
    return f"GPU {number} {name}; {', '.join(versions)}"


def cache_bytes() -> int:
    """Return the size of the current device's last cache; 0 if CuPy does not say."""
    return int(_properties().get("l2CacheSize", 0))


def _properties() -> dict[str, Any]:
    cuda = device_module().cuda
    properties: dict[str, Any] = cuda.runtime.getDeviceProperties(cuda.Device().id)
    return properties


def _cuda(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _driver() -> str:
    """Return the version of the kernel's driver; of no version where it does not say."""
    try:
        match = re.search(r"\s(\d+\.[\d.]+)\s", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        match = None
    return match[1] if match else "of unknown version"


class Binding:
    """CuPy's binding of NCCL, called with addresses, on the stream that is current now.

    Its communicator is the group's own, so that nothing differs but what is around the calls.
    Collective over `world`; blocks until the ranks are connected.
    """

    def __init__(self, world: ProcessGroup) -> None:
        all_reduce(device_module().zeros(1, DTYPE), world)
        device = world.transport.device
        assert isinstance(device, NcclBackend), "the group carries device arrays"
        assert device.communicator is not None, "it has just been used"
        self.comm: Any = device.communicator._handle
        cuda = device_module().cuda
        self.stream: int = cuda.get_current_stream().ptr
        self._begin, self._end = cuda.nccl.groupStart, cuda.nccl.groupEnd

    def _together(self, several: Sequence[Callable[[], Any]]) -> Callable[[], None]:
        """Return a function that makes these calls as one group."""

        def call() -> None:
            self._begin()
            for call_one in several:
                call_one()
            self._end()

        return call

    def call(self, verb: str, arrays: Arrays, world: ProcessGroup) -> Callable[[], Any]:
        """Return the call of a verb on the arrays that `our_call` has, by their addresses."""
        x, out, comm = arrays.x, arrays.out, self.comm
        if verb == "sendrecv":
            dst, src = neighbours(world)
            return self._messages([(x, dst)], [(out, src)])
        if verb == "all_to_all":
            sends, receives = (
                [(part, rank) for rank, part in enumerate(parts(a, world.size))] for a in (x, out)
            )
            return self._messages(sends, receives)
        if verb == "all_reduce_coalesced":
            return self._together([*map(self._all_reduce, parts(x, COALESCED))])
        ends = address_of(x), address_of(out)
        calls_of: dict[str, Callable[[], Any]] = {
            "all_gather": partial(comm.allGather, *ends, x.size, _CODE, self.stream),
            "broadcast": partial(comm.broadcast, *ends, x.size, _CODE, 0, self.stream),
            "reduce_scatter": partial(
                comm.reduceScatter, *ends, out.size, _CODE, _SUM, self.stream
            ),
        }
        return calls_of.get(verb) or self._all_reduce(x)

    def _all_reduce(self, x: Array) -> Callable[[], Any]:
        at = address_of(x)
        return partial(self.comm.allReduce, at, at, x.size, _CODE, _SUM, self.stream)

    def _messages(
        self, sends: Sequence[tuple[Array, int]], receives: Sequence[tuple[Array, int]]
    ) -> Callable[[], None]:
        """Return the call that sends arrays to ranks, and receives arrays from ranks."""
        return self._together(
            [
                partial(verb, address_of(x), x.size, _CODE, peer, self.stream)
                for verb, messages in ((self.comm.send, sends), (self.comm.recv, receives))
                for x, peer in messages
            ]
        )


def verb_series(verb: str, world: ProcessGroup, nccl: Binding, nbytes: int) -> list[Series]:
    """Return the series of mpidist and of the binding, by the device's time.

    Each has given the right result once; the arrays hold zeros then. Collective; blocks.
    """
    arrays = prepare(verb, world, _empty, nbytes // DTYPE.itemsize)
    # The binding knows addresses only: the call of the other series holds its arrays.
    return [
        checked(OURS, our_call(verb, arrays, world), arrays, world, clock=DeviceClock()),
        checked(RAW, nccl.call(verb, arrays, world), arrays, world, clock=DeviceClock()),
    ]


def staged_series(staged: ProcessGroup, nbytes: int) -> Series:
    """Return all_reduce by way of the host, as `verb_series` does."""
    arrays = prepare("all_reduce", staged, _empty, nbytes // DTYPE.itemsize)
    call = our_call("all_reduce", arrays, staged)
    return checked(STAGED, call, arrays, staged, clock=DeviceClock())


def _empty(count: int) -> Array:
    return device_empty(count, DTYPE)


@contextmanager
def staged_group(world: ProcessGroup) -> Iterator[ProcessGroup | None]:
    """Give a group of the same ranks without NCCL, if device arrays may go by way of the host."""
    if not env.gpu_fallback():
        yield None
        return
    on_mpi = world.transport.name == "mpi"
    with init(world.transport.name, comm=world.mpi_comm if on_mpi else None) as staged:
        carry_devices(staged.transport, "it is measured beside NCCL", fallback=True)
        yield staged


_Work = tuple[str, int, Callable[[], Any]]
"""What it is, the bytes that it has to read and write, and the call."""


def kernel_rows(
    world: ProcessGroup,
    nbytes: int,
    *,
    number: int,
    effort: Effort,
    on_measured: Callable[[str, int], None],
) -> list[Row]:
    """Measure each kernel on arrays of `nbytes`, in turn with the copy; collective, blocks.

    So many calls are made in a row that the device does not wait for the host between them.
    Sizes of the rows are the bytes that have to be read and written; bandwidths are these over the
    time. `on_measured` is called with the name and the bytes of each kernel.
    """
    clock, rows = DeviceClock(), list[Row]()
    for what, moved, call in _works(nbytes // DTYPE.itemsize):
        series = [Series(KERNEL, call, clock=clock), Series(COPY, _copy(moved), clock=clock)]
        times = measure(
            [in_a_row(one_series, number) for one_series in series], world, effort=effort
        )
        rows += [
            Row(operation=what, series=name, nbytes=moved, times=measured, bus_factor=1.0)
            for name, measured in times.items()
        ]
        on_measured(what, moved)
    return rows


def _works(count: int) -> Iterator[_Work]:
    """Make each work when the one before has been measured, so that its memory is free again."""
    yield _update("AdamW step", AdamRule(decay=0.01), count)
    yield _update("SGD step with momentum", SGDRule(momentum=0.9), count)
    yield _update("SGD step", SGDRule(), count)
    x = _zeros(count)
    half = _zeros(count, np.float16)
    both = x.nbytes + half.nbytes
    yield "cast to float16", both, partial(gradient_kernels.cast, x, half)
    yield "cast from float16", both, partial(gradient_kernels.cast, half, x)
    yield "scale", 2 * x.nbytes, partial(gradient_kernels.scaled, x, 0.5)
    yield (
        "finite check and unscale",
        2 * x.nbytes,
        partial(gradient_kernels.all_finite_divided, [x], 0.5),
    )
    yield "sum of squares", x.nbytes, partial(gradient_kernels.sum_of_squares, [x])
    yield _packing(count)


def _update(what: str, rule: UpdateRule, count: int) -> _Work:
    """Return an update: the gradient is read, values and state are read and written."""
    w, g = _zeros(count), _zeros(count)
    state = {slot: _zeros(count) for slot in rule.slots}
    call = partial(apply_rule, rule, w, g, state, lr=1e-3, t=1)
    return what, (1 + 2 * (1 + len(state))) * w.nbytes, call


def _packing(count: int) -> _Work:
    shapes = {str(i): (count // _PARTS,) for i in range(_PARTS)}
    flat = FlatBuffer(shapes, DTYPE, storage=_zeros(FlatBuffer.length_of(shapes)))
    arrays = flat.zeros_like().views
    return f"packing {_PARTS} arrays", 2 * flat.data.nbytes, partial(flat.pack, arrays)


def _copy(moved: int) -> Callable[[], Any]:
    x, out = _zeros(moved // 2, np.uint8), _zeros(moved // 2, np.uint8)
    return partial(device_module().copyto, out, x)


def _zeros(count: int, dtype: Any = DTYPE) -> Array:
    zeros: Array = device_module().zeros(count, dtype)
    return zeros
