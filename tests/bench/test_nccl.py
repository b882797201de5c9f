"""``bench nccl``: complete on the stand-in for CuPy, whose times mean nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from mpidist.bench import Report, Row, Series, Times, nccl, verbs
from mpidist.bench.nccl import (
    COPY,
    KERNEL,
    OURS,
    RAW,
    STAGED,
    Binding,
    DeviceClock,
    enqueued,
    verb_series,
)
from mpidist.bench.times import in_a_row
from mpidist.bench.verbs import COALESCED, divisible
from mpidist.job.start import init
from tests._ranks.launcher import clean_environment
from tests.nccl_stub.fixtures import stand_in

__all__ = ["stand_in"]

ROOT = Path(__file__).parents[2]

ON_STAND_IN = (
    "import sys; from tests.nccl_stub import stand_in; stand_in.install(); "
    "from mpidist import cli; sys.exit(cli.main(sys.argv[1:]))"
)

SMALL = ["--sizes", "64", "--repeats", "1", "--kernel-size", "16K"]
SMALL += ["--in-a-row", "2", "--millions", "0.01", "--batch", "4"]

KERNELS = {
    "AdamW step": 7 * 16384,
    "SGD step with momentum": 5 * 16384,
    "SGD step": 3 * 16384,
    "cast to float16": 16384 + 8192,
    "cast from float16": 16384 + 8192,
    "scale": 2 * 16384,
    "finite check and unscale": 2 * 16384,
    "sum of squares": 16384,
    "packing 64 arrays": 2 * 16384,
}
"""The bytes that each reads and writes, of float32 arrays of 16 KiB."""

BUS_FACTORS = {
    "all_reduce": 1.0,
    "all_gather": 0.5,
    "reduce_scatter": 0.5,
    "broadcast": 1.0,
    "all_to_all": 0.5,
    "sendrecv": 1.0,
}
"""Of two ranks, from the formulas of nccl-tests."""


def measured(start: list[str], directory: Path, **variables: str) -> tuple[Report, str]:
    """Return the report of small measurements, and what was printed."""
    command = [*start, "bench", "nccl", *SMALL, "--json", str(directory / "report.json")]
    environment = clean_environment() | {"PYTHONPATH": str(ROOT)} | variables
    job = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False
    )
    assert job.returncode == 0, job.stderr
    return Report.load(directory / "report.json"), job.stdout


def series_of(report: Report) -> dict[str, set[str]]:
    return {
        operation: {row.series for row in report.rows if row.operation == operation}
        for operation in dict.fromkeys(row.operation for row in report.rows)
    }


def expected_series(ranks: int) -> dict[str, set[str]]:
    def possible(names: tuple[str, ...]) -> list[str]:
        return [verb for verb in names if ranks > 1 or verb != "sendrecv"]

    timed = [f"{verb}, {clock} time" for verb in possible(nccl.CALLS) for clock in nccl.CLOCKS]
    expected = {verb: {OURS, RAW} for verb in (*timed, *possible(nccl.SWEPT))}
    expected |= {kernel: {KERNEL, COPY} for kernel in KERNELS}
    return expected | ({"DDP step": {"DDP", "alone", "reduction"}} if ranks > 1 else {})


@pytest.mark.usefixtures("stand_in")
@pytest.mark.timeout(100)
def test_one_rank_measures_what_needs_no_other(tmp_path: Path) -> None:
    report, printed = measured([sys.executable, "-c", ON_STAND_IN], tmp_path)
    assert series_of(report) == expected_series(1)
    assert "sendrecv and the overlap need two ranks" in report.notes
    assert "stand-in" in report.machine.gpu
    assert report.machine.gpu in printed
    assert {row.operation: row.nbytes for row in report.rows if row.series == COPY} == KERNELS
    shares = [target for target in report.targets if not target.most]
    assert [target.what for target in shares] == [
        f"{name}, of the copy's bandwidth" for name in KERNELS
    ]
    for target, kernel in zip(shares, KERNELS, strict=True):
        ours, copy = (report.find(kernel, name, KERNELS[kernel]) for name in (KERNEL, COPY))
        assert ours is not None
        assert copy is not None
        assert target.value == pytest.approx(copy.times.median / ours.times.median)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.mpirun
@pytest.mark.timeout(100)
def test_two_ranks_measure_everything(mpirun: list[str], tmp_path: Path) -> None:
    start = [*mpirun, "-n", "2", sys.executable, "-c", ON_STAND_IN]
    report, printed = measured(start, tmp_path, MPIDIST_ENABLE_GPU_FALLBACK="1")
    expected = expected_series(2)
    expected["all_reduce"].add(STAGED)
    assert series_of(report) == expected
    assert report.machine.mpi
    factors = {row.operation: row.bus_factor for row in report.rows if row.series == RAW}
    assert {verb: factors[verb] for verb in BUS_FACTORS} == BUS_FACTORS
    times = {row.series: row.times.median for row in report.rows if row.operation == "DDP step"}
    (overlap,) = [row.values["overlap"] for row in report.rows if "overlap" in row.values]
    left = (times["DDP"] - times["alone"]) / times["reduction"]
    assert overlap == pytest.approx(1 - left)
    assert f"{overlap:.0%} of the reduction's time is hidden" in printed


@pytest.mark.gpu
@pytest.mark.timeout(100)
def test_a_gpu_is_measured(tmp_path: Path) -> None:
    if not Path("/dev/nvidia0").exists():
        pytest.skip("no GPU here")
    report, _ = measured([sys.executable, "-m", "mpidist"], tmp_path)
    assert series_of(report) == expected_series(1)


@pytest.mark.timeout(70)
def test_without_a_gpu_it_says_why() -> None:
    variables = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    job = subprocess.run(
        [sys.executable, "-m", "mpidist", "bench", "nccl"],
        env=clean_environment() | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert job.returncode == 2
    assert "bench nccl: NCCL carries no device arrays here: " in job.stderr
    assert "pip install" in job.stderr or "CUDA_VISIBLE_DEVICES=''" in job.stderr


def test_a_device_has_its_own_time(stand_in: ModuleType) -> None:
    """What a call puts on the stream counts on the device, and not on the host."""
    stream = sys.modules["cupy"].cuda.get_current_stream()
    series = Series(
        "s", lambda: stand_in.delay(stream, lambda: time.sleep(0.01)), clock=DeviceClock()
    )
    row = in_a_row(series, 3)
    assert row.operations == 3
    assert row.clock is not None
    assert 0.03 <= row.clock(row.call) < 1
    assert enqueued(row).clock is None
    row.call()
    before = enqueued(row).before
    assert before is not None
    assert stream.queue.ran != stream.queue.pushed
    before()
    assert stream.queue.ran == stream.queue.pushed


@pytest.mark.usefixtures("stand_in")
def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    with init("hybrid") as world:
        binding = Binding(world)
        names = [each.name for each in verb_series("reduce_scatter", world, binding, 64)]
        assert names == [OURS, RAW]
        monkeypatch.setitem(verbs._CALLS, "reduce_scatter", lambda *args, **options: None)
        with pytest.raises(RuntimeError, match=r"by mpidist expected 1\.0, got \[0\."):
            verb_series("reduce_scatter", world, binding, 64)


def row(operation: str, series: str, nbytes: int, microseconds: float) -> Row:
    times = Times.of([microseconds * 1e-6])
    return Row(operation=operation, series=series, nbytes=nbytes, times=times)


def test_what_is_added_is_that_of_the_worst_size() -> None:
    rows = [
        row("all_reduce, host time", OURS, 1024, 9.0),
        row("all_reduce, host time", RAW, 1024, 5),
    ]
    rows += [
        row("all_reduce, host time", OURS, 4096, 20),
        row("all_reduce, host time", RAW, 4096, 13),
    ]
    (target,) = nccl._added(rows)
    assert target.value == pytest.approx(7)
    assert not target.reached
    assert target.detail == "20.00 us, and 13.00 us; 4 KiB"
    (target,) = nccl._added(rows[:2])
    assert target.reached


def test_a_share_is_of_the_bandwidth_of_a_copy_of_as_many_bytes() -> None:
    (target,) = nccl._shares([row("scale", KERNEL, 10**9, 500), row("scale", COPY, 10**9, 400)])
    assert target.value == pytest.approx(0.8)
    assert not target.reached
    assert target.detail == "2000.0 of 2500.0 GB/s"


@pytest.mark.parametrize(("nbytes", "ranks"), [(1, 3), (1000, 1), (1 << 20, 6)])
def test_sizes_are_shared_evenly(nbytes: int, ranks: int) -> None:
    count = divisible(nbytes, COALESCED * ranks) // 4
    assert count % ranks == 0
    assert count % 8 == 0
    assert count * 4 <= max(nbytes, 32 * ranks)
