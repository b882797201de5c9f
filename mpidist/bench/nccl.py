"""Device arrays over NCCL, beside NCCL alone and beside copies on the device.

calls: what mpidist adds to a call of the binding on small arrays, in the host's time until the call
is on its way, and in the device's from an empty stream to the end.
kernels: packing, and what is one kernel per bucket, beside a copy that moves as many bytes.
sweep: verbs over sizes; the size is that of the whole array, as nccl-tests counts it.
overlap: a training step with DDP, the same step alone, and its reduction alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from math import ceil

from mpidist._formatting import format_bytes
from mpidist.backends.device.nccl import NcclBackend
from mpidist.bench.ddp import ALONE, DDP_STEP, REDUCTION, Shape, our_series
from mpidist.bench.harness import (
    BenchmarkError,
    add_effort,
    effort,
    positive,
    read_size,
    report_progress,
    rows_over,
    sweep,
)
from mpidist.bench.nccl_device import (
    COPY,
    KERNEL,
    OURS,
    RAW,
    STAGED,
    Binding,
    DeviceClock,
    cache_bytes,
    describe_device,
    enqueued,
    in_a_row,
    kernel_rows,
    staged_group,
    staged_series,
    verb_series,
)
from mpidist.bench.report import Comparison, Machine, Measure, Report, Row, Target
from mpidist.bench.times import Series, measure
from mpidist.bench.verbs import COALESCED, divisible
from mpidist.group import ProcessGroup

PARTS = ("calls", "kernels", "sweep", "overlap")

CALLS = ("all_reduce", "iall_reduce and wait", "broadcast", "all_reduce_coalesced", "sendrecv")
SWEPT = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "sendrecv")

CLOCKS = ("host", "device")

_SMALL = (1 << 10, 16 << 10)
"""Bytes of small arrays."""

_LARGE = 16 << 20
"""Bytes from which on the sweep has a quarter of the calls in a row."""

_MOST_ADDED = 5.0
"""Microseconds over the call of the binding."""

_LEAST_SHARE = 0.9
"""Of the bandwidth of a copy."""

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
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="which ones (default: all)"
    )
    parser.add_argument(
        "--in-a-row",
        type=positive(int),
        default=20,
        metavar="N",
        help="calls that are timed together, as by nccl-tests (default: %(default)s)",
    )
    parser.add_argument(
        "--kernel-size",
        type=read_size,
        default=read_size("256MiB"),
        metavar="SIZE",
        help="bytes of each array of the kernels, beyond the device's cache (default: 256MiB)",
    )
    parser.add_argument(
        "--millions",
        type=positive(float),
        default=50.0,
        metavar="N",
        help="about how many million parameters DDP's model has (default: %(default)s)",
    )
    parser.add_argument(
        "--batch",
        type=positive(int),
        default=1024,
        help="samples of each rank in DDP's step (default: %(default)s)",
    )


def run(world: ProcessGroup, options: argparse.Namespace) -> Report:
    """Measure on the device of each rank; collective over `world`."""
    device = world.transport.device
    if not isinstance(device, NcclBackend):
        why = world.transport.no_device if device is None else "they go by way of the host"
        raise BenchmarkError(f"bench nccl: NCCL carries no device arrays here: {why}")
    machine = replace(Machine.of(world), gpu=describe_device())
    nccl, notes = Binding(world), list[str]()
    parts: dict[str, Callable[[], list[Row]]] = {
        "calls": partial(_calls, world, nccl, options, notes),
        "kernels": partial(_kernels, world, options, notes),
        "sweep": partial(_sweep, world, nccl, options, notes),
        "overlap": partial(_overlap, world, options, notes),
    }
    measured = {part: make() for part, make in parts.items() if part in options.parts}
    rows = [row for part_rows in measured.values() for row in part_rows]
    return Report(
        benchmark="nccl",
        machine=machine,
        rows=rows,
        comparisons=_COMPARISONS,
        targets=[*_added(measured.get("calls", ())), *_shares(measured.get("kernels", ()))],
        legend={name: _LEGEND[name] for name in dict.fromkeys(row.series for row in rows)},
        notes=tuple(dict.fromkeys(notes)),
    )


def _possible(verbs: Sequence[str], world: ProcessGroup, notes: list[str]) -> list[str]:
    if world.size > 1:
        return list(verbs)
    notes.append("sendrecv and the overlap need two ranks")
    return [verb for verb in verbs if verb != "sendrecv"]


def _calls(
    world: ProcessGroup, nccl: Binding, options: argparse.Namespace, notes: list[str]
) -> list[Row]:
    def make(verb: str, clock: str, nbytes: int) -> list[Series]:
        series = verb_series(verb, world, nccl, nbytes)
        series = [in_a_row(one_series, options.in_a_row) for one_series in series]
        return [*map(enqueued, series)] if clock == "host" else series

    notes.append(f"all_reduce_coalesced has {COALESCED} arrays, which are the size together")
    sizes = [divisible(nbytes, COALESCED * world.size) for nbytes in _SMALL]
    rows = []
    for verb, clock in product(_possible(CALLS, world, notes), CLOCKS):
        what = f"{verb}, {clock} time"
        rows += rows_over(sizes, partial(make, verb, clock), world, operation=what, options=options)
    return rows


def _sweep(
    world: ProcessGroup, nccl: Binding, options: argparse.Namespace, notes: list[str]
) -> list[Row]:
    def make(verb: str, staged: ProcessGroup | None, nbytes: int) -> list[Series]:
        number = ceil(options.in_a_row / (4 if nbytes >= _LARGE else 1))
        series = verb_series(verb, world, nccl, nbytes)
        if verb == "all_reduce" and staged is not None:
            series.append(staged_series(staged, nbytes))
        return [in_a_row(one_series, number) for one_series in series]

    sizes = list(
        dict.fromkeys(divisible(nbytes, COALESCED * world.size) for nbytes in options.sizes)
    )
    rows = []
    with staged_group(world) as staged:
        for verb in _possible(SWEPT, world, notes):
            series_of = partial(make, verb, staged)
            rows += rows_over(sizes, series_of, world, operation=verb, options=options)
    return rows


def _kernels(world: ProcessGroup, options: argparse.Namespace, notes: list[str]) -> list[Row]:
    if options.kernel_size < 4 * cache_bytes():
        cache = format_bytes(cache_bytes())
        notes.append(f"the kernels' arrays are not far beyond the device's cache of {cache}")
    notes.append("the finite check and the sum of squares make the host wait for their answer")
    on_measured = partial(report_progress, world)
    number = options.in_a_row
    return kernel_rows(
        world, options.kernel_size, number=number, effort=effort(options), on_measured=on_measured
    )


def _overlap(world: ProcessGroup, options: argparse.Namespace, notes: list[str]) -> list[Row]:
    """Measure a step with its reduction, without it, and the reduction alone; collective, blocks.

    The row of DDP has the value `overlap`: 1 if the reduction costs nothing, 0 if it costs as much
    as it does alone, below 0 if it costs more.
    """
    if not _possible(["sendrecv"], world, notes):
        return []
    shape = Shape.of(options.millions * 1e6)
    with our_series(world, shape, options.batch, device=True) as series:
        timed = [replace(one_series, clock=DeviceClock()) for one_series in series]
        times = measure(timed, world, effort=effort(options))
    report_progress(world, "DDP step", shape.nbytes)
    added = times[DDP_STEP].median - times[ALONE].median
    overlap = 1 - added / times[REDUCTION].median
    notes.append(
        f"{shape.parameters / 1e6:.2f} million parameters: "
        f"{overlap:.0%} of the reduction's time is hidden behind backward"
    )
    values = {"parameters": float(shape.parameters), "layers": float(shape.layers)}
    return [
        Row(
            operation="DDP step",
            series=name,
            nbytes=shape.nbytes,
            times=measured,
            values=values | {"overlap": overlap} if name == DDP_STEP else values,
        )
        for name, measured in times.items()
    ]


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
