"""The bytes that a load reads beyond those that it needs, where other ranks load than saved.

The state is a model, split over the ranks in several ways; plain files are the peers.
"""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mpidist._types import SUM, Array
from mpidist.arrays.boxes import Box, split_evenly
from mpidist.arrays.shards import ShardedArray
from mpidist.backends.simulated.backend import SimulatedBackend
from mpidist.backends.simulated.network import Network
from mpidist.bench.report import Target
from mpidist.checkpoint import load, save
from mpidist.collectives import all_reduce, barrier
from mpidist.group import ProcessGroup
from mpidist.mesh import Shard, box_at

REPLICATED, DIM0, DIM1, FLAT = "replicated", "dim 0", "dim 1", "flat ranges"

LAYOUTS = (REPLICATED, DIM0, DIM1, FLAT)
"""Held whole by all ranks; cut along a dimension; a range of the flattened elements each."""

_LARGE, _WIDTH, _SMALL = 8, 4096, 1024


@dataclass(frozen=True, slots=True)
class SampleModel:
    """About `mib` MiB of float32: eight matrices of 4,096 columns, two vectors of 1,024 per MiB."""

    mib: int

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes by name."""
        rows = max((self.mib << 20) * 127 // 128 // (4 * _LARGE * _WIDTH), 1)
        large = {f"layers/{i}/weight": (rows, _WIDTH) for i in range(_LARGE)}
        return large | {f"norms/{i}/bias": (_SMALL,) for i in range(2 * self.mib)}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return 4 * sum(Box.whole(shape).count for shape in self.shapes.values())

    def arrays(self) -> dict[str, Array]:
        """Return fresh arrays, with the same numbers in each process."""
        rng = np.random.default_rng(5)
        return {name: rng.random(shape, np.float32) for name, shape in self.shapes.items()}


State: TypeAlias = dict[str, "Array | ShardedArray"]


def held(arrays: Mapping[str, Array], layout: str, rank: int, size: int) -> State:
    """Return what a rank of so many holds in a layout: copies."""
    return {name: _part(array, layout, rank, size) for name, array in arrays.items()}


def _part(array: Array, layout: str, rank: int, size: int) -> Array | ShardedArray:
    if layout == REPLICATED:
        return np.array(array)
    if layout == FLAT:
        start, length = split_evenly(array.size, size)[rank]
        piece = array.reshape(-1)[start : start + length].copy()
        return ShardedArray.of_range(array.shape, start, piece)
    dimension = min(LAYOUTS.index(layout) - 1, array.ndim - 1)
    box = box_at(array.shape, (size,), [Shard(dimension)], (rank,))
    return ShardedArray(array.shape, array.dtype, {box: array[box.slices].copy()})


def memory_of(state: Mapping[str, Array | ShardedArray]) -> list[Array]:
    """Return the arrays that a state consists of."""
    pieces = (
        array.pieces.values() if isinstance(array, ShardedArray) else (array,)
        for array in state.values()
    )
    return [piece for part in pieces for piece in part]


def write_plain(path: Path, data: Array) -> None:
    """Write bytes, shape (n,) uint8, into a fresh file and wait until they are on disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        left = data.data
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_plain(*files: tuple[Path, Array]) -> None:
    """Read whole files, each into memory of its length, shape (n,) uint8."""
    for path, memory in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            left = memory.data
            while left and (count := os.readv(descriptor, [left])):
                left = left[count:]
            if left:
                raise RuntimeError(f"{path}: {len(left)} of {memory.nbytes} bytes are missing")
        finally:
            os.close(descriptor)


def drop_cache(paths: Sequence[Path]) -> None:
    """Ask the kernel to forget what it holds of files that have been synced."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


class Counter:
    """How many bytes this process has read in so many calls, as /proc/self/io says.

    `asked` counts what system calls read (``rchar``), also where the kernel had it; `fetched` what
    came from disks (``read_bytes``).
    """

    def __init__(self) -> None:
        self.asked = self.fetched = self.calls = 0

    def counting(self, call: Callable[[], object]) -> Counter:
        """Call a function, add what this process has read meanwhile, and return the counter."""
        asked, fetched = _read()
        call()
        asked_then, fetched_then = _read()
        self.asked += asked_then - asked
        self.fetched += fetched_then - fetched
        self.calls += 1
        return self


def _read() -> tuple[int, int]:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    values = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    return values["rchar"], values["read_bytes"]


def peak_over(call: Callable[[], object]) -> int:
    """Return how many bytes Python and numpy held at most within a call, beyond those before.

    Counted by tracemalloc: resident memory would not show what an earlier call has returned to the
    C library and this one takes again. What HDF5 and MPI allocate themselves is not seen.
    """
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


_MOST = 1.05


@dataclass(frozen=True, slots=True)
class Resharding:
    """A save by some ranks, and a load by others, which hold the arrays in one of `LAYOUTS`."""

    saved: int
    loaded: int
    before: str
    after: str

    @property
    def title(self) -> str:
        """What it is, for a table."""
        if self.before == self.after:
            return f"{self.before}, {self.saved} ranks -> {self.loaded}"
        return f"{self.before} of {self.saved} ranks -> {self.after} of {self.loaded}"


CASES = (
    Resharding(4, 3, DIM0, DIM0),
    Resharding(4, 8, DIM0, DIM0),
    Resharding(4, 6, DIM0, DIM0),
    Resharding(4, 4, DIM0, DIM1),
    Resharding(4, 3, DIM1, DIM0),
    Resharding(4, 3, FLAT, FLAT),
    Resharding(4, 3, REPLICATED, DIM0),
    Resharding(4, 3, DIM0, REPLICATED),
)
"""For simulated ranks, each on a node of its own."""


def reads_of_ranks(
    world: ProcessGroup, arrays: Mapping[str, Array], directory: Path
) -> list[Target]:
    """Save on all ranks, load in other layouts, and count; collective."""
    targets = []
    for number, after in enumerate(LAYOUTS):
        case, path = Resharding(world.size, world.size, DIM0, after), directory / f"ranks-{number}"
        _save(world, arrays, case, path)
        counter = Counter().counting(partial(_load, world, arrays, case, path))
        asked = int(all_reduce(np.array(counter.asked), world, op=SUM))
        targets.append(_target(case, arrays, asked, nodes=world.num_nodes))
    return targets


def reads_of_simulated_ranks(arrays: Mapping[str, Array], directory: Path) -> list[Target]:
    """Do the same with threads that take themselves for nodes; in this process alone."""
    targets = []
    for number, case in enumerate(CASES):
        path = directory / f"simulated-{number}"
        _simulated(case.saved, partial(_save, arrays=arrays, case=case, path=path))
        loads = partial(_load, arrays=arrays, case=case, path=path)
        counter = Counter().counting(partial(_simulated, case.loaded, loads))
        note = ", simulated, a node each"
        targets.append(_target(case, arrays, counter.asked, nodes=case.loaded, note=note))
    return targets


def _target(
    case: Resharding, arrays: Mapping[str, Array], asked: int, *, nodes: int, note: str = ""
) -> Target:
    """Compare what was read with what is needed: all once, or once for each node."""
    needed = sum(array.nbytes for array in arrays.values())
    needed *= nodes if case.after == REPLICATED else 1
    detail = f"{asked / 2**20:.2f} MiB read, {needed / 2**20:.2f} MiB needed"
    what = f"read, {case.title}{note}"
    return Target(what=what, value=asked / needed, bound=_MOST, most=True, detail=detail)


def _save(group: ProcessGroup, arrays: Mapping[str, Array], case: Resharding, path: Path) -> None:
    save(path, held(arrays, case.before, group.rank, group.size), group, step=0)


def _load(group: ProcessGroup, arrays: Mapping[str, Array], case: Resharding, path: Path) -> None:
    right, state = (held(arrays, case.after, group.rank, group.size) for _ in range(2))
    for memory in memory_of(state):
        memory.fill(0)
    barrier(group)
    load(path, state, group)
    if not all(map(np.array_equal, memory_of(state), memory_of(right))):
        raise RuntimeError(f"bench checkpoint: {case.title}: load did not give what was saved")


def _simulated(size: int, call: Callable[[ProcessGroup], Any]) -> None:
    """Call a function on so many ranks, which are threads and take themselves for nodes."""
    network = Network(size, ranks_per_node=1)

    def body(rank: int) -> None:
        backend = SimulatedBackend(network, rank)
        with ProcessGroup.over(backend, timeout=60.0, warn_after=60.0) as group:
            call(group)

    with ThreadPoolExecutor(size) as pool:
        list(pool.map(body, range(size)))
