"""Every benchmark, small, on real ranks; each checks by itself that what it times is right."""

from __future__ import annotations

import argparse
import socket
import threading
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from mpidist.bench import (
    all_reduce,
    collectives,
    guard,
    importing,
    overhead,
    p2p,
    peers,
    tracing,
    verbs,
)
from mpidist.bench.all_reduce import bound_series
from mpidist.bench.command import BENCHMARKS
from mpidist.bench.harness import BenchmarkError
from mpidist.bench.link import TcpRing
from mpidist.bench.report import BOUND, GLOO, LIBRARY, LINK, ORDINARY, REGISTERED, Report
from mpidist.errors import BackendUnavailableError
from mpidist.group import ProcessGroup
from mpidist.testing import run_ranks

SMALL = ["--sizes", "4", "1MiB", "--repeats", "2"]


def report_of(benchmark: Any, world: ProcessGroup, *words: str) -> Report:
    parser = argparse.ArgumentParser()
    benchmark.configure(parser)
    report: Report = benchmark.run(world, parser.parse_args(words))
    return report


def series_of(report: Report) -> set[str]:
    return {row.series for row in report.rows}


@pytest.mark.any_mpi
@pytest.mark.ranks(2, 3)
def test_all_reduce_without_gloo(world: ProcessGroup) -> None:
    report = report_of(all_reduce, world, *SMALL, "--no-gloo")
    assert series_of(report) - {BOUND} == {REGISTERED, ORDINARY, LIBRARY}
    # Where there are fewer cores than ranks, the bound would say nothing.
    enough = report.machine.usable_cores >= world.size
    assert (BOUND in series_of(report)) == enough
    assert [row.nbytes for row in report.rows if row.series == LIBRARY] == [4, 1 << 20]
    factor = pytest.approx(2 * (world.size - 1) / world.size)
    assert all(row.bus_factor == factor for row in report.rows)
    assert report.machine.ranks == world.size
    assert report.machine.mpi
    assert "Gloo was left out" in report.notes


@pytest.mark.any_mpi
@pytest.mark.hosts(2)
def test_all_reduce_over_hosts_has_the_link(world: ProcessGroup) -> None:
    report = report_of(all_reduce, world, *SMALL, "--no-gloo")
    assert series_of(report) - {BOUND} == {REGISTERED, ORDINARY, LIBRARY, LINK}


@pytest.mark.parametrize("nbytes", [4, 1 << 20])
def test_the_link_sends_and_receives_the_least_bytes_of_four_nodes(nbytes: int) -> None:
    after, next_node = socket.socketpair()
    node_before, before = socket.socketpair()
    share = 6 * nbytes // 4
    heard = bytearray()

    def neighbours() -> None:
        node_before.sendall(bytes(share))
        while len(heard) < share:
            heard.extend(next_node.recv(share))

    thread = threading.Thread(target=neighbours)
    thread.start()
    with after, next_node, node_before, before:
        TcpRing(after, before, 4).transfer(nbytes)()
        thread.join(20)
        assert len(heard) == share
        for connection in (next_node, before):
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):
                connection.recv(1)


@pytest.mark.any_mpi
@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.ranks(2)
def test_all_reduce_with_gloo(world: ProcessGroup) -> None:
    report = report_of(all_reduce, world, *SMALL)
    assert GLOO in series_of(report)
    assert any("torch" in note for note in report.notes)


def no_torch(module: str, **_: str) -> Any:
    raise BackendUnavailableError(f"no {module} here")


@pytest.mark.any_mpi
@pytest.mark.ranks(2)
def test_a_peer_that_one_rank_lacks_is_a_note_on_all(
    world: ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    if world.rank == 1:
        monkeypatch.setattr(peers, "require", no_torch)
    report = report_of(all_reduce, world, "--sizes", "4", "--repeats", "2")
    assert GLOO not in series_of(report)
    assert any("Gloo is missing" in note for note in report.notes)


def test_a_group_without_mpi_has_no_library() -> None:
    for report in run_ranks(2, lambda world: report_of(all_reduce, world, *SMALL, "--no-gloo")):
        assert LIBRARY not in series_of(report)
        assert any("the MPI library is missing" in note for note in report.notes)


def wrong(*args: Any, **options: Any) -> None:
    """Stand for an all_reduce that does nothing."""


def test_a_wrong_sum_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verbs._CALLS, "all_reduce", wrong)
    with pytest.raises(RuntimeError, match=r"by registered expected 3\.0"):
        run_ranks(2, lambda world: all_reduce.mpidist_and_library(world, 8, []) and None)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_bound_covers_the_whole_array(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks together add and copy as many elements as the arrays have."""
    calls = run_ranks(ranks, lambda world: bound_series(world, 4_000_000).call)
    added, copied = [], []
    monkeypatch.setattr(np, "add", lambda a, b, out: added.append(a.size))
    monkeypatch.setattr(np, "copyto", lambda to, source: copied.append(to.size))
    for call in calls:
        call()
    assert sum(added) == sum(copied) == (ranks - 1) * 1_000_000


@pytest.mark.any_mpi
@pytest.mark.ranks(2, 3)
def test_collectives(world: ProcessGroup) -> None:
    report = report_of(collectives, world, *SMALL)
    for verb in collectives.VERBS:
        rows = [row for row in report.rows if row.operation == verb]
        assert {row.series for row in rows} == {REGISTERED, ORDINARY, LIBRARY}
        assert all(row.nbytes % (4 * world.size) == 0 for row in rows)
    barriers = [row for row in report.rows if row.operation == "barrier"]
    assert [(row.series, row.nbytes) for row in barriers] == [(ORDINARY, 0), (LIBRARY, 0)]


@pytest.mark.any_mpi
@pytest.mark.ranks(2, 3)
def test_p2p(world: ProcessGroup) -> None:
    report = report_of(p2p, world, *SMALL)
    found = {(row.operation, row.series) for row in report.rows}
    operations = ("ping-pong", "window", "sendrecv")
    assert found == {(name, who) for name in operations for who in (ORDINARY, LIBRARY)}


@pytest.mark.any_mpi
@pytest.mark.ranks(2)
def test_overhead(world: ProcessGroup) -> None:
    report = report_of(overhead, world, "--sizes", "4", "1K", "--repeats", "2")
    assert series_of(report) == {ORDINARY, LIBRARY, overhead.UNWATCHED}
    medians = {row.series: row.times.median for row in report.rows if row.nbytes == 4}
    for comparison, reference in zip(
        report.comparisons, (LIBRARY, overhead.UNWATCHED), strict=True
    ):
        added = report.compare(comparison, "all_reduce", 4)
        assert added == medians[ORDINARY] - medians[reference]


def test_import_needs_one_rank() -> None:
    (report,) = run_ranks(1, lambda world: report_of(importing, world, "--repeats", "2"))
    assert [row.series for row in report.rows] == ["mpidist", "all names", "numpy"]
    assert all(row.times.minimum > 0.001 for row in report.rows)
    with pytest.raises(BenchmarkError, match="without mpirun"):
        run_ranks(2, lambda world: report_of(importing, world))


# One rank is what `import` needs, and enough for `nccl`, which asks for a GPU.
@pytest.mark.parametrize("name", sorted(BENCHMARKS.keys() - {"import", "nccl"}))
def test_one_rank_is_refused(name: str) -> None:
    with pytest.raises(BenchmarkError, match=f"mpirun -n 2 python -m mpidist bench {name}"):
        run_ranks(1, lambda world: report_of(BENCHMARKS[name], world))


@pytest.mark.one_python
@pytest.mark.parametrize("attempts", [1, 3])
def test_the_guard_fails_without_a_library_after_all_attempts(attempts: int) -> None:
    words = ["--repeats", "1", "--attempts", str(attempts)]
    report, _ = run_ranks(2, lambda world: report_of(guard, world, *words))
    assert len(report.failures) == len(guard.FLOORS)
    assert {row.operation for row in report.rows} == {
        f"all_reduce, attempt {number}" for number in range(1, attempts + 1)
    }


@pytest.mark.any_mpi
@pytest.mark.ranks(2)
def test_what_a_trace_adds(world: ProcessGroup) -> None:
    words = ["--millions", "0.1", "--block", "0.05", "--rounds", "2"]
    report = report_of(tracing, world, *words)
    assert series_of(report) == {"traced", "plain"}
    assert all(row.times.median > 0 for row in report.rows)
    assert world.transport.recorder.sink is None
    assert "to the median step" in report.notes[1]
