"""Device arrays over NCCL, beside NCCL alone and beside copies on the device.

calls: what mpidist adds to a call of the binding on small arrays, in the host's time until the call
is on its way, and in the device's from an empty stream to the end.
kernels: packing, and what is one kernel per bucket, beside a copy that moves as many bytes.
sweep: verbs over sizes; the size is that of the whole array, as nccl-tests counts it.
overlap: a training step with DDP, the same step alone, and its reduction alone.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from mpidist import env
from mpidist._formatting import format_bytes, format_cuda_version, format_nccl_version
from mpidist._types import SUM, Array
from mpidist.arrays.flat import FlatBuffer
from mpidist.arrays.namespaces import address_of, device_empty, device_module
from mpidist.backends.device.hybrid import carry_devices
from mpidist.backends.device.nccl import NcclBackend
from mpidist.backends.device.nccl.communicator import version
from mpidist.backends.device.nccl.dtypes import CODES, OPS
from mpidist.bench.ddp import ALONE, DDP_STEP, REDUCTION, Shape, add_model, our_series
from mpidist.bench.harness import (
    BenchmarkError,
    BenchmarkRun,
    add_effort,
    add_number,
    read_size,
    sweep,
)
from mpidist.bench.report import Comparison, Measure, Report, Row, Target
from mpidist.bench.times import Series, in_a_row
from mpidist.bench.verbs import (
    COALESCED,
    DTYPE,
    Arrays,
    checked,
    divisible,
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

CALLS = ("all_reduce", "iall_reduce and wait", "broadcast", "all_reduce_coalesced", "sendrecv")
SWEPT = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "sendrecv")
CLOCKS = ("host", "device")

_SMALL = (1 << 10, 16 << 10)
"""Bytes of small arrays."""

_LARGE = 16 << 20
"""Bytes from which on the sweep has a quarter of the calls in a row."""

_PACKED = 64
"""Arrays that are packed."""

_MOST_ADDED = 5.0
"""Microseconds over the call of the binding."""

_LEAST_SHARE = 0.9
"""Of the bandwidth of a copy."""

_CODE, _SUM = CODES[DTYPE], OPS[SUM]

_ADDED = Comparison("added", OURS, RAW, Measure.ADDED)
_SHARE = Comparison("of copy", KERNEL, COPY)
_COMPARISONS = (
    _ADDED,
    Comparison("of NCCL", OURS, RAW),
    Comparison("staging of NCCL", STAGED, RAW),
    _SHARE,
    Comparison("added", DDP_STEP, ALONE, Measure.ADDED),
)

_LEGEND = {
    OURS: "the verb of mpidist; in place where it can be",
    RAW: "the call of cupy.cuda.nccl with addresses, on the current stream and the same arrays",
    STAGED: "mpidist.all_reduce in a group without NCCL, with MPIDIST_ENABLE_GPU_FALLBACK=1",
    KERNEL: "what is named, on float32 arrays; GB/s of what has to be read and written",
    COPY: "cupy.copyto, which reads and writes as many bytes",
    DDP_STEP: "a step with mpidist.parallel.DDP on the device, no optimizer",
    ALONE: "the same step without communication, by all ranks at once",
    REDUCTION: "the same buckets through mpidist.parallel.GradientReducer, with no step around",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_effort(parser, sizes=sweep("4KiB", "256MiB", 16), seconds=1.0)
    parser.add_argument(
        "--parts", nargs="+", choices=_PARTS, default=list(_PARTS), help="which (default: all)"
    )
    text = "calls that are timed together, as by nccl-tests"
    add_number(parser, "--in-a-row", 20, text)
    parser.add_argument(
        "--kernel-size",
        type=read_size,
        default=read_size("256MiB"),
        metavar="SIZE",
        help="bytes of each array of the kernels, beyond the device's cache (default: 256MiB)",
    )
    add_model(parser, millions=50.0, batch=1024)


def run(world: ProcessGroup, options: argparse.Namespace) -> Report:
    """Measure on the device of each rank; collective over `world`."""
    device = world.transport.device
    if not isinstance(device, NcclBackend):
        why = world.transport.no_device if device is None else "they go by way of the host"
        raise BenchmarkError(f"bench nccl: NCCL carries no device arrays here: {why}")
    bench = BenchmarkRun("nccl", world, options, least=1)
    bench.machine = replace(bench.machine, gpu=describe_device())
    targets = [
        target
        for part, measure in _PARTS.items()
        if part in options.parts
        for target in measure(bench, options)
    ]
    return bench.report(legend=_LEGEND, comparisons=_COMPARISONS, targets=targets)


def _possible(verbs: Sequence[str], bench: BenchmarkRun) -> list[str]:
    if bench.world.size > 1:
        return list(verbs)
    bench.notes.append("sendrecv and the overlap need two ranks")
    return [verb for verb in verbs if verb != "sendrecv"]


def _calls(bench: BenchmarkRun, options: argparse.Namespace) -> list[Target]:
    world, nccl = bench.world, Binding(bench.world)

    def make(verb: str, clock: str, nbytes: int) -> list[Series]:
        series = verb_series(verb, world, nccl, nbytes)
        series = [in_a_row(one_series, options.in_a_row) for one_series in series]
        return [*map(enqueued, series)] if clock == "host" else series

    bench.notes.append(f"all_reduce_coalesced has {COALESCED} arrays, the size is of all of them")
    sizes = [divisible(nbytes, COALESCED * world.size) for nbytes in _SMALL]
    before = len(bench.rows)
    for verb, clock in product(_possible(CALLS, bench), CLOCKS):
        bench.measure_sizes(f"{verb}, {clock} time", sizes, partial(make, verb, clock))
    return _added(bench.rows[before:])


def _sweep(bench: BenchmarkRun, options: argparse.Namespace) -> list[Target]:
    world, nccl = bench.world, Binding(bench.world)

    def make(verb: str, staged: ProcessGroup | None, nbytes: int) -> list[Series]:
        series = verb_series(verb, world, nccl, nbytes)
        if verb == "all_reduce" and staged is not None:
            series.append(_our_series(STAGED, verb, _arrays(verb, staged, nbytes), staged))
        number = ceil(options.in_a_row / (4 if nbytes >= _LARGE else 1))
        return [in_a_row(one_series, number) for one_series in series]

    sizes = dict.fromkeys(divisible(nbytes, COALESCED * world.size) for nbytes in options.sizes)
    with _staged_group(world) as staged:
        for verb in _possible(SWEPT, bench):
            bench.measure_sizes(verb, list(sizes), partial(make, verb, staged))
    return []


def _kernels(bench: BenchmarkRun, options: argparse.Namespace) -> list[Target]:
    """Measure each kernel in turn with a copy that reads and writes as many bytes.

    So many calls are made in a row that the device does not wait for the host between them. Sizes
    of the rows are the bytes that have to be read and written; bandwidths are these over the time.
    """
    cache = int(_properties().get("l2CacheSize", 0))
    if options.kernel_size < 4 * cache:
        text = f"the kernels' arrays are not far beyond the device's cache of {format_bytes(cache)}"
        bench.notes.append(text)
    bench.notes.append(
        "the finite check and the sum of squares make the host wait for their answer"
    )
    clock, before = DeviceClock(), len(bench.rows)
    for what, moved, call in _kernel_calls(options.kernel_size // DTYPE.itemsize):
        series = [Series(KERNEL, call, clock=clock), Series(COPY, _copy(moved), clock=clock)]
        series = [in_a_row(one_series, options.in_a_row) for one_series in series]
        bench.add(what, moved, bench.measure(what, moved, series), factor=1.0)
    return _shares(bench.rows[before:])


def _overlap(bench: BenchmarkRun, options: argparse.Namespace) -> list[Target]:
    """Measure a step with its reduction, without it, and the reduction alone; collective, blocks.

    The row of DDP has the value `overlap`: 1 if the reduction costs nothing, 0 if it costs as much
    as it does alone, below 0 if it costs more.
    """
    if not _possible(["sendrecv"], bench):
        return []
    shape = Shape.of(options.millions * 1e6)
    with our_series(bench.world, shape, options.batch, device=True) as series:
        timed = [replace(one_series, clock=DeviceClock()) for one_series in series]
        times = bench.measure("DDP step", shape.nbytes, timed)
    added = times[DDP_STEP].median - times[ALONE].median
    overlap = 1 - added / times[REDUCTION].median
    bench.notes.append(
        f"{shape.parameters / 1e6:.2f} million parameters: "
        f"{overlap:.0%} of the reduction's time is hidden behind backward"
    )
    model = {"parameters": float(shape.parameters), "layers": float(shape.layers)}
    values = dict.fromkeys(times, model) | {DDP_STEP: {**model, "overlap": overlap}}
    bench.add("DDP step", shape.nbytes, times, values)
    return []


_PARTS: dict[str, Callable[[BenchmarkRun, argparse.Namespace], list[Target]]] = {
    "calls": _calls,
    "kernels": _kernels,
    "sweep": _sweep,
    "overlap": _overlap,
}


def _added(rows: Sequence[Row]) -> list[Target]:
    """Return what each verb adds in each time, at the size at which it adds most."""
    targets = []
    for operation in dict.fromkeys(row.operation for row in rows):
        ours, raw = (
            {row.nbytes: row for row in rows if (row.operation, row.series) == (operation, name)}
            for name in (OURS, RAW)
        )
        added, nbytes = max((_ADDED.of(ours[n].times, raw[n].times), n) for n in ours)
        microseconds = [f"{1e6 * by_nbytes[nbytes].times.median:.2f}" for by_nbytes in (ours, raw)]
        targets.append(
            Target(
                what=f"{operation}, us over the binding",
                value=1e6 * added,
                bound=_MOST_ADDED,
                most=True,
                detail=f"{microseconds[0]} us, and {microseconds[1]} us; {format_bytes(nbytes)}",
            )
        )
    return targets


def _shares(rows: Sequence[Row]) -> list[Target]:
    """Return each kernel's share of the copy's bandwidth."""
    targets = []
    for kernel, copy in zip(rows[::2], rows[1::2], strict=True):
        speeds = [f"{row.nbytes / row.times.median / 1e9:.1f}" for row in (kernel, copy)]
        targets.append(
            Target(
                what=f"{kernel.operation}, of the copy's bandwidth",
                value=_SHARE.of(kernel.times, copy.times),
                bound=_LEAST_SHARE,
                detail=f"{speeds[0]} of {speeds[1]} GB/s",
            )
        )
    return targets


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


def enqueued(series: Series) -> Series:
    """Return the series in the host's time, from an empty stream on."""
    stream = device_module().cuda.get_current_stream()
    return replace(series, before=stream.synchronize, clock=None)


def describe_device() -> str:
    """Return the name of the current device, and the versions of what drives it."""
    xp = device_module()
    runtime, number, name = xp.cuda.runtime, xp.cuda.Device().id, _properties()["name"]
    name = name.decode() if isinstance(name, bytes) else str(name)
    try:
        driver = re.search(r"\s(\d+\.[\d.]+)\s", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        driver = None
    return (
        f"GPU {number} {name}; driver {driver[1] if driver else 'of unknown version'} for CUDA "
        f"{format_cuda_version(runtime.driverGetVersion())}, CUDA "
        f"{format_cuda_version(runtime.runtimeGetVersion())}, CuPy {xp.__version__}, "
        f"NCCL {format_nccl_version(version())}"
    )


_DRIVER = Path("/proc/driver/nvidia/version")


def _properties() -> dict[str, Any]:
    cuda = device_module().cuda
    properties: dict[str, Any] = cuda.runtime.getDeviceProperties(cuda.Device().id)
    return properties


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
    arrays = _arrays(verb, world, nbytes)
    # The binding knows addresses only: the call of the other series holds its arrays.
    return [
        _our_series(OURS, verb, arrays, world),
        checked(RAW, nccl.call(verb, arrays, world), arrays, world, clock=DeviceClock()),
    ]


def _arrays(verb: str, group: ProcessGroup, nbytes: int) -> Arrays:
    return prepare(verb, group, partial(device_empty, dtype=DTYPE), nbytes // DTYPE.itemsize)


def _our_series(name: str, verb: str, arrays: Arrays, group: ProcessGroup) -> Series:
    return checked(name, our_call(verb, arrays, group), arrays, group, clock=DeviceClock())


@contextmanager
def _staged_group(world: ProcessGroup) -> Iterator[ProcessGroup | None]:
    """Give a group of the same ranks without NCCL, if device arrays may go by way of the host."""
    if not env.gpu_fallback():
        yield None
        return
    on_mpi = world.transport.name == "mpi"
    with init(world.transport.name, comm=world.mpi_comm if on_mpi else None) as staged:
        carry_devices(staged.transport, "it is measured beside NCCL", fallback=True)
        yield staged


_Kernel = tuple[str, int, Callable[[], Any]]
"""What it is, the bytes that it has to read and write, and the call."""


def _kernel_calls(count: int) -> Iterator[_Kernel]:
    """Make each call when the one before has been measured, so that its memory is free again."""
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


def _update(what: str, rule: UpdateRule, count: int) -> _Kernel:
    """Return an update: the gradient is read, values and state are read and written."""
    w, g = _zeros(count), _zeros(count)
    state = {slot: _zeros(count) for slot in rule.slots}
    call = partial(apply_rule, rule, w, g, state, lr=1e-3, t=1)
    return what, (1 + 2 * (1 + len(state))) * w.nbytes, call


def _packing(count: int) -> _Kernel:
    shapes = {str(i): (count // _PACKED,) for i in range(_PACKED)}
    flat = FlatBuffer(shapes, DTYPE, storage=_zeros(FlatBuffer.length_of(shapes)))
    arrays = flat.zeros_like().views
    return f"packing {_PACKED} arrays", 2 * flat.data.nbytes, partial(flat.pack, arrays)


def _copy(moved: int) -> Callable[[], Any]:
    x, out = _zeros(moved // 2, np.uint8), _zeros(moved // 2, np.uint8)
    return partial(device_module().copyto, out, x)


def _zeros(count: int, dtype: Any = DTYPE) -> Array:
    zeros: Array = device_module().zeros(count, dtype)
    return zeros
