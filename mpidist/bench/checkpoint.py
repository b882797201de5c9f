"""Checkpoints beside plain files of the same bytes, and beside torch.distributed.checkpoint.

The state is a model of eight large and many small arrays, once held by all ranks, once cut on
dim 0. Before each save what the last one has written is removed; before each load the page cache is
dropped. Everything on the disk was written in this run, and is removed at its end. Sizes are the
bytes of the whole model.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np

from mpidist._types import MAX, SUM, Array
from mpidist.arrays.namespaces import as_bytes
from mpidist.bench.harness import BenchmarkRun, add_number, temporary_directory
from mpidist.bench.peers import Gloo, TorchCheckpoints, open_gloo
from mpidist.bench.report import Comparison, Report, Target
from mpidist.bench.resharding import (
    DIM0,
    REPLICATED,
    Counter,
    SampleModel,
    State,
    drop_cache,
    held,
    memory_of,
    peak_over,
    read_plain,
    reads_of_ranks,
    reads_of_simulated_ranks,
    write_plain,
)
from mpidist.bench.times import Series, Times, measure_rounds
from mpidist.checkpoint import CheckpointFuture, load, save, save_async
from mpidist.collectives import all_reduce, barrier
from mpidist.group import ProcessGroup

_OURS, _PLAIN, _SHARE, _TORCH, _COPY = "mpidist", "plain", "plain, shared out", "torch", "copy"

_LEGEND = {
    _OURS: "mpidist.checkpoint; digests are computed at the save and compared at the load",
    _PLAIN: "each rank writes as many bytes into a file of its own, one fsync; reads all it needs",
    _SHARE: "each rank reads its own file only, and the others' bytes never",
    _TORCH: "torch.distributed.checkpoint over Gloo, files synced; it has no digests",
    _COPY: "numpy.copyto of the bytes that a rank writes into memory that has been written before",
}

_BLOCK_MIB = 8.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_number(parser, "--mib", 256, "about how many MiB the model has")
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path(),
        metavar="D",
        help="a directory that all ranks see, on the disk to measure (default: this one)",
    )
    add_number(parser, "--repeats", 10, "rounds of one call of each series")
    parser.add_argument("--no-torch", action="store_true", help="leave out the peer torch")


def run(world: ProcessGroup, options: argparse.Namespace) -> Report:
    """Measure each layout; collective over `world`."""
    bench, model = BenchmarkRun("checkpoint", world, options), SampleModel(options.mib)
    targets = list[Target]()
    peer = nullcontext("torch was left out") if options.no_torch else open_gloo(world)
    with temporary_directory(world, options.dir) as directory, peer as gloo:
        bench.notes.append(gloo if isinstance(gloo, str) else f"torch {gloo.version}")
        for layout in (REPLICATED, DIM0):
            of_layout = _Bench(bench, model, layout, directory, gloo, options.repeats)
            for measured in (
                of_layout.saves,
                of_layout.loads,
                of_layout.async_saves,
                of_layout.memory,
            ):
                measured()
            targets += of_layout.targets
        targets += reads_of_ranks(world, model.arrays(), directory)
        if world.rank == 0:
            targets += reads_of_simulated_ranks(model.arrays(), directory)
        barrier(world)
    return bench.report(
        legend=_LEGEND,
        comparisons=[
            Comparison(f"over {reference}", _OURS, reference)
            for reference in (_PLAIN, _SHARE, _COPY, _TORCH)
        ],
        targets=targets,
    )


class _Bench:
    """What is measured of one layout."""

    def __init__(
        self,
        bench: BenchmarkRun,
        model: SampleModel,
        layout: str,
        directory: Path,
        gloo: Gloo | str,
        rounds: int,
    ) -> None:
        self.targets: list[Target] = []
        self._bench, self._world = bench, bench.world
        self._model, self._layout, self._rounds = model, layout, rounds
        self._state = self._held()
        self._share = self._bytes_to_write()
        self._ours, self._plain, self._torch = (
            directory / f"{name}-{layout.replace(' ', '')}" for name in (_OURS, _PLAIN, _TORCH)
        )
        self._dcp = None
        if not isinstance(gloo, str):
            sharded = layout == DIM0
            self._dcp = TorchCheckpoints(
                gloo, model.arrays(), sharded=sharded, ranks=self._world.size
            )
        self._future: CheckpointFuture | None = None

    def _held(self) -> State:
        return held(self._model.arrays(), self._layout, self._world.rank, self._world.size)

    def _bytes_to_write(self) -> Array:
        """Return the bytes that this rank writes, side by side."""
        flat = np.concatenate([as_bytes(memory) for memory in memory_of(self._state)])
        if self._layout != REPLICATED:
            return flat
        rank, size = self._world.rank, self._world.size
        return np.array(flat[flat.size * rank // size : flat.size * (rank + 1) // size])

    def saves(self) -> None:
        """Save, beside writing plain files."""
        write = partial(write_plain, self._plain / f"{self._world.rank}", self._share)
        series = [
            Series(_OURS, self._save, before=partial(self._empty, self._ours)),
            Series(_PLAIN, write, before=partial(self._empty, self._plain)),
        ]
        if self._dcp is not None:
            call = partial(self._dcp.save, self._torch)
            series.append(Series(_TORCH, call, before=partial(self._empty, self._torch)))
        times = self._measure("save", series)
        self._compare("save", "speed over plain write and fsync", times, _PLAIN, 0.9)

    def loads(self) -> None:
        """Load what `saves` has left, beside reading plain files."""
        target = self._held()
        for part in memory_of(target):
            part.fill(0)
        files = [self._plain / f"{rank}" for rank in range(self._world.size)]
        own_file = files[self._world.rank]
        memory = {file: np.ones(file.stat().st_size, np.uint8) for file in files}
        everything = files if self._layout == REPLICATED else [own_file]
        read = partial(read_plain, *((file, memory[file]) for file in everything))
        calls: dict[str, tuple[Path, Callable[[], object]]] = {
            _OURS: (self._ours, lambda: load(self._ours, target, self._world)),
            _PLAIN: (self._plain, read),
        }
        if self._layout == REPLICATED:
            calls[_SHARE] = (self._plain, partial(read_plain, (own_file, memory[own_file])))
        if self._dcp is not None:
            calls[_TORCH] = (self._torch, partial(self._dcp.load, self._torch))
        counters = {name: Counter() for name in calls}
        series = [
            Series(name, partial(counters[name].counting, call), before=partial(_drop, path))
            for name, (path, call) in calls.items()
        ]
        times = self._measure("load", series)
        if not all(map(np.array_equal, memory_of(target), memory_of(self._state))):
            raise RuntimeError("bench checkpoint: load did not give what was saved")
        self._compare("load", "speed over plain reading", times, _PLAIN, 0.8)
        for name, counter in counters.items():
            fetched = all_reduce(np.array(counter.fetched / counter.calls), self._world, op=SUM)
            share = float(fetched) / self._model.nbytes
            self._bench.notes.append(
                f"load, {self._layout}, {name}: {share:.1%} of the model's bytes came from the disk"
            )

    def async_saves(self) -> None:
        """Save while the program goes on, beside copying."""
        copy = np.ones_like(self._share)
        before = partial(self._empty, self._ours)
        blocking = [
            Series(_OURS, self._save_async, before=before),
            Series(_COPY, partial(np.copyto, copy, self._share), before=before),
        ]
        times = self._measure("save_async, until it returns", blocking)
        self._compare("save_async", "time over copying", times, _COPY, 1.2, most=True)
        until_written = [Series(_OURS, self._save_async_and_wait, before=before)]
        self._measure("save_async, until it is on disk", until_written)
        self._empty(self._ours)

    def memory(self) -> None:
        """Save once more, and see how large the process becomes."""
        peak = all_reduce(np.array(peak_over(self._save)), self._world, op=MAX)
        self._empty(self._ours)
        what = f"save, {self._layout}: most extra memory of a rank, MiB"
        detail = "what Python and numpy had allocated within the call (tracemalloc)"
        value = float(peak) / 2**20
        target = Target(what=what, value=value, bound=_BLOCK_MIB, most=True, detail=detail)
        self.targets.append(target)

    def _save(self) -> None:
        save(self._ours, self._state, self._world, step=0)

    def _save_async(self) -> None:
        self._future = save_async(self._ours, self._state, self._world, step=0)

    def _save_async_and_wait(self) -> None:
        save_async(self._ours, self._state, self._world, step=0).wait()

    def _empty(self, directory: Path) -> None:
        """Remove what has been written, and leave the disk nothing to do."""
        if self._future is not None:
            self._future.wait()
            self._future = None
        barrier(self._world)
        if self._world.rank == 0:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            os.sync()

    def _measure(self, operation: str, series: Sequence[Series]) -> Mapping[str, Times]:
        times = measure_rounds(series, self._world, rounds=self._rounds)
        operation, nbytes = f"{operation}, {self._layout}", self._model.nbytes
        self._bench.report_progress(operation, nbytes)
        speeds = {name: {"bytes_per_second": nbytes / took.median} for name, took in times.items()}
        self._bench.add(operation, nbytes, times, speeds)
        return times

    def _compare(
        self,
        operation: str,
        comparison: str,
        times: Mapping[str, Times],
        reference: str,
        bound: float,
        *,
        most: bool = False,
    ) -> None:
        ours, theirs = times[_OURS].median, times[reference].median
        value = ours / theirs if most else theirs / ours
        what = f"{operation}, {self._layout}: {comparison}"
        detail = f"{self._speed(ours)}; {reference} {self._speed(theirs)}"
        self.targets.append(Target(what=what, value=value, bound=bound, most=most, detail=detail))

    def _speed(self, seconds: float) -> str:
        return f"{seconds:.4f} s, {self._model.nbytes / seconds / 1e9:.2f} GB/s"


def _drop(directory: Path) -> None:
    """Have the kernel forget the files below a directory."""
    drop_cache([path for path in directory.rglob("*") if path.is_file()])
