"""What the benchmark of checkpoints compares: the same bytes, counted and cut as they should be."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from math import prod
from pathlib import Path

import numpy as np
import pytest

from mpidist.bench import Report, Target, Times, checkpoint, render_table, resharding
from mpidist.bench.harness import BenchmarkRun
from mpidist.bench.peers import TorchCheckpoints, open_gloo
from mpidist.bench.resharding import (
    DIM0,
    FLAT,
    LAYOUTS,
    REPLICATED,
    Counter,
    Resharding,
    SampleModel,
    drop_cache,
    held,
    memory_of,
    peak_over,
    read_plain,
    reads_of_ranks,
    reads_of_simulated_ranks,
    write_plain,
)
from mpidist.collectives import barrier, broadcast_object
from mpidist.group import ProcessGroup
from mpidist.testing import run_ranks
from tests.bench.reports import MACHINE

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/io").is_file(), reason="the kernel does not count what a process reads"
)

TIMES = {name: Times.of([seconds] * 3) for name, seconds in [("mpidist", 0.5), ("plain", 0.4)]}


def bench_of(world: ProcessGroup, directory: Path, layout: str = REPLICATED) -> checkpoint._Bench:
    run = BenchmarkRun("checkpoint", world, argparse.Namespace(), least=1)
    return checkpoint._Bench(run, SampleModel(1), layout, directory, "no torch", 1)


@pytest.mark.parametrize(("most", "value", "reached"), [(False, 0.8, True), (True, 1.25, False)])
def test_a_ratio_is_of_speeds_or_of_times(
    tmp_path: Path, most: bool, value: float, reached: bool
) -> None:
    bench = run_ranks(1, lambda world: bench_of(world, tmp_path))[0]
    bench._compare("save", "words", TIMES, "plain", 0.7 if not most else 1.2, most=most)
    (target,) = bench.targets
    assert target.value == pytest.approx(value)
    assert target.reached == reached
    speed = SampleModel(1).nbytes / 0.4 / 1e9
    assert target.detail.endswith(f"plain 0.4000 s, {speed:.2f} GB/s")


def test_targets_stand_in_the_table_and_come_back_from_json() -> None:
    targets = (
        Target(what="fast enough", value=0.91, bound=0.9, detail="1 s"),
        Target(what="small enough", value=9.5, bound=8, most=True),
    )
    report = Report(benchmark="checkpoint", machine=MACHINE, rows=(), targets=targets)
    assert Report.from_json(report.to_json()) == report
    lines = [line.split() for line in render_table(report).splitlines()]
    assert ["fast", "enough", "0.910", "at", "least", "0.9", "yes", "1", "s"] in lines
    assert ["small", "enough", "9.50", "at", "most", "8", "no"] in lines


def test_a_model_is_as_large_as_asked_for_and_most_of_it_is_in_large_arrays() -> None:
    model = SampleModel(64)
    assert model.nbytes == pytest.approx(64 << 20, rel=0.01)
    assert model.nbytes == sum(array.nbytes for array in model.arrays().values())
    small = [4 * prod(shape) for shape in model.shapes.values() if len(shape) == 1]
    assert len(small) == 128
    assert sum(small) < model.nbytes / 100


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_parts_of_all_ranks_are_the_model(layout: str) -> None:
    model = SampleModel(1)
    whole = model.arrays()
    ranks = [memory_of(held(whole, layout, rank, 3)) for rank in range(3)]
    total = sum(memory.nbytes for parts in ranks for memory in parts)
    assert total == model.nbytes * (3 if layout == REPLICATED else 1)
    for parts in ranks:
        assert not any(np.shares_memory(part, array) for part in parts for array in whole.values())


@pytest.mark.parametrize("layout", [REPLICATED, DIM0])
def test_the_peer_writes_and_reads_as_many_bytes_as_the_state_has(
    tmp_path: Path, layout: str
) -> None:
    def shares(world: ProcessGroup) -> bytes:
        return bench_of(world, tmp_path, layout)._share.tobytes()

    parts = run_ranks(3, shares)
    assert sum(map(len, parts)) == SampleModel(1).nbytes
    if layout == REPLICATED:
        assert b"".join(parts) == b"".join(a.tobytes() for a in SampleModel(1).arrays().values())


def test_plain_files_hold_what_was_written(tmp_path: Path) -> None:
    data = np.arange(100_000, dtype=np.uint8)
    write_plain(tmp_path / "a", data)
    with pytest.raises(FileExistsError):
        write_plain(tmp_path / "a", data)
    memory, other = np.zeros_like(data), np.zeros(5, np.uint8)
    write_plain(tmp_path / "b", data[:5])
    read_plain((tmp_path / "a", memory), (tmp_path / "b", other))
    assert memory.tobytes() + other.tobytes() == data.tobytes() + data[:5].tobytes()
    with pytest.raises(RuntimeError, match="1 of 6 bytes are missing"):
        read_plain((tmp_path / "b", np.zeros(6, np.uint8)))


def test_what_is_read_is_counted_and_a_dropped_file_comes_from_the_disk(tmp_path: Path) -> None:
    path, memory = tmp_path / "a", np.ones(1 << 20, np.uint8)
    write_plain(path, memory)
    cached, dropped = Counter(), Counter()
    cached.counting(lambda: read_plain((path, memory)))
    drop_cache([path])
    dropped.counting(lambda: read_plain((path, memory)))
    for counter in (cached, dropped):
        assert counter.calls == 1
        assert memory.nbytes <= counter.asked < memory.nbytes + 10_000
    assert cached.fetched < memory.nbytes / 10
    if path.stat().st_dev not in _without_disk():
        assert dropped.fetched >= memory.nbytes


def _without_disk() -> set[int]:
    """Return the file systems that are in memory, or may be: nothing can be dropped there."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    kinds = ("tmpfs", "ramfs", "overlay")
    return {Path(place).stat().st_dev for _, place, kind, *_ in mounts if kind in kinds}


def test_the_peak_is_the_most_that_was_held_at_once() -> None:
    def call() -> None:
        for _ in range(3):
            np.zeros(1 << 20, np.uint8)

    assert 1 << 20 <= peak_over(call) < 1.2 * (1 << 20)


@pytest.mark.parametrize(
    ("case", "nodes"),
    [(Resharding(4, 3, DIM0, DIM0), 1), (Resharding(2, 3, FLAT, REPLICATED), 3)],
    ids=str,
)
def test_simulated_ranks_need_each_byte_once_for_each_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Resharding, nodes: int
) -> None:
    monkeypatch.setattr(resharding, "CASES", (case,))
    (target,) = reads_of_simulated_ranks(SampleModel(1).arrays(), tmp_path)
    needed = nodes * SampleModel(1).nbytes
    assert target.detail.endswith(f"{needed / 2**20:.2f} MiB needed")
    assert 1 <= target.value < 3
    assert target.bound == 1.05


def test_arrays_that_were_not_loaded_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    monkeypatch.setattr(resharding, "load", nothing)
    with pytest.raises(RuntimeError, match="did not give what was saved"):
        run_ranks(1, lambda world: reads_of_ranks(world, SampleModel(1).arrays(), tmp_path))


@pytest.mark.any_mpi
@pytest.mark.ranks(2)
@pytest.mark.timeout(120)
def test_the_whole_benchmark_on_ranks(
    world: ProcessGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resharding, "CASES", resharding.CASES[:1])
    parser = argparse.ArgumentParser()
    checkpoint.configure(parser)
    words = ["--mib", "1", "--repeats", "1", "--dir", str(tmp_path), "--no-torch"]
    report = checkpoint.run(world, parser.parse_args(words))
    text = render_table(report)
    for layout in (REPLICATED, DIM0):
        rows = [row for row in report.rows if row.operation == f"save, {layout}"]
        assert [row.series for row in rows] == ["mpidist", "plain"]
        assert all(row.nbytes == SampleModel(1).nbytes for row in rows)
        assert f"load, {layout}: speed over plain reading" in text
    if world.rank == 0:
        assert len(report.targets) == 8 + len(LAYOUTS) + len(resharding.CASES)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.any_mpi
@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.ranks(2)
@pytest.mark.timeout(120)
def test_torch_saves_and_loads_as_many_bytes(world: ProcessGroup, tmp_path: Path) -> None:
    directory = broadcast_object(tmp_path, world)
    arrays = {"a": np.arange(200_000, dtype=np.float32).reshape(500, 400)}
    with open_gloo(world) as gloo:
        assert not isinstance(gloo, str)
        peer = TorchCheckpoints(gloo, arrays, sharded=True, ranks=world.size)
        peer.save(directory)
        sizes = [path.stat().st_size for path in directory.glob("*.distcp")]
        assert len(sizes) == 2
        assert 0 <= sum(sizes) - arrays["a"].nbytes < 10_000
        local = peer._state["a"].to_local()
        expected = local.clone()
        local.zero_()
        peer.load(directory)
        assert local.equal(expected)
        assert len(local) == 250
    barrier(world)
