"""A small report whose numbers are easy to check."""

from __future__ import annotations

from mpidist.bench.report import LIBRARY, REGISTERED, Comparison, Machine, Measure, Report, Row
from mpidist.bench.times import Times

MACHINE = Machine(
    processor="Abacus 9",
    cores=8,
    usable_cores=4,
    caches=("L1 32K per core", "L2 1M per 2 cores"),
    memory_bytes=64 * 2**30,
    kernel="Linux 6.1",
    python="3.11.7",
    numpy="2.0.0",
    mpi4py="4.1.0",
    mpi="MPICH 4.3.0",
    ranks=4,
    nodes=1,
    omp_num_threads="1",
    load=0.5,
    date="2026-01-02 03:04 UTC",
)


def row(series: str, nbytes: int, median: float, *, operation: str = "all_reduce") -> Row:
    times = Times(9, median, median, median, median, median, median, 2 * median, median, median)
    factor = None if operation == "step" else 1.5
    return Row(
        operation=operation,
        series=series,
        nbytes=nbytes,
        times=times,
        bus_factor=factor,
        values={"parameters": 7.0},
    )


REPORT = Report(
    benchmark="all_reduce",
    machine=MACHINE,
    rows=(
        row(REGISTERED, 4, 4e-6),
        row(LIBRARY, 4, 2e-6),
        row(REGISTERED, 1 << 20, 100e-6),
        row(LIBRARY, 1 << 20, 250e-6),
    ),
    comparisons=(
        Comparison("reg/library", REGISTERED, LIBRARY),
        Comparison("added", REGISTERED, LIBRARY, Measure.ADDED),
        Comparison("reg/Gloo", REGISTERED, "Gloo"),
    ),
    legend={REGISTERED: "ours", LIBRARY: "theirs"},
    notes=("Gloo is missing",),
    failures=("too slow",),
    command=("mpirun", "-n", "4", "python", "-m", "mpidist", "bench", "all_reduce"),
)
