"""The file of one rank: its boxes are laid out, written, synced, and given their name.

The order of a file is known before a byte is written, on any rank (`lay_out`). The bytes come from
memory (`HostBox`), or from a copy (`Stager`), so that the program can continue while a
`WriterThread` writes.
"""

from __future__ import annotations

import os
import queue
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mpidist._threads import fulfil, run_in_thread
from mpidist._types import Array, DType
from mpidist.arrays.boxes import Box, round_up
from mpidist.arrays.namespaces import as_bytes, is_host, pinned_empty, to_host
from mpidist.checkpoint.format import files
from mpidist.checkpoint.format.files import naming, rename_synced, temporary, write_at
from mpidist.checkpoint.format.manifest import (
    ALIGNMENT,
    ID_DATASET,
    StoredBox,
    StoredDataset,
    StoredFile,
    digests_of,
    name_of,
)

_BLOCK = 1 << 22
"""Bytes that are gathered before they are written, where they are not contiguous; in two such
blocks: one for the elements of a box, and one for small boxes."""

T = TypeVar("T")


@dataclass(slots=True)  # not frozen, which takes three times as long to make: there may be many
class BoxSpec:
    """A box of an array, without its elements; the dtype may have any byte order."""

    name: str
    box: Box
    dtype: DType

    @property
    def nbytes(self) -> int:
        """Bytes of the box."""
        return self.box.count * self.dtype.itemsize


class BoxSource(BoxSpec, ABC):
    """A box of an array, wherever its elements are."""

    __slots__ = ()

    @abstractmethod
    def blocks(self) -> Iterator[tuple[int, Array]]:
        """Yield its bytes, little-endian: their offset in C order, and an array of uint8.

        A block is valid until the next one is asked for.
        """

    @abstractmethod
    def digests(self) -> bytes:
        """Return the digests of its chunks; called after all blocks were taken."""


@dataclass(slots=True)
class HostBox(BoxSource):
    """A box of an array in host memory, with elements of the box's sizes, contiguous or not."""

    data: Array

    @classmethod
    def of(cls, name: str, box: Box, data: Array) -> HostBox:
        """Return the box of an array that has these elements."""
        return cls(name, box, data.dtype, data)

    @property
    def nbytes(self) -> int:
        """Bytes of the box."""
        return int(self.data.nbytes)  # cheaper than a product of sizes

    def blocks(self) -> Iterator[tuple[int, Array]]:
        """Yield all at once if it is contiguous, else copies of one block after the other."""
        little = self.dtype.newbyteorder("<")
        if self.data.flags.c_contiguous and self.dtype == little:
            yield 0, as_bytes(self.data)
            return
        memory = np.empty(min(self.nbytes, _BLOCK), np.uint8)
        offset = 0
        for block in _blocks(self.data):
            copied = memory[: block.nbytes]
            np.copyto(copied.view(little).reshape(block.shape), block)
            yield offset, copied
            offset += block.nbytes

    def digests(self) -> bytes:
        """Return the digests of its chunks."""
        return digests_of(self.data)


def _blocks(data: Array) -> Iterator[Array]:
    """Cut an array into parts of at most a block, in C order."""
    if data.nbytes <= _BLOCK:
        yield data
    elif len(data) == 1:
        yield from _blocks(data[0])
    else:
        rows = max(_BLOCK * len(data) // data.nbytes, 1)
        for start in range(0, len(data), rows):
            yield from _blocks(data[start : start + rows])


B = TypeVar("B", bound=BoxSpec)


def lay_out(
    boxes: Iterable[B],
) -> tuple[list[B], dict[str, tuple[tuple[int, ...], DType]], list[tuple[str, int]]]:
    """Decide where in a file boxes go.

    Returns
    -------
    boxes : list of BoxSpec
        In the order of the file.
    datasets : dict of str to (tuple of int, dtype)
        Shapes and dtypes by name.
    positions : list of (str, int)
        For each box its dataset, and the position of its first element there.
    """
    # What is packed comes first, each dtype in one go.
    boxes = sorted(boxes, key=lambda box: (box.nbytes >= ALIGNMENT, name_of(box.dtype)))
    packed: dict[str, int] = {}
    dtypes: dict[str, DType] = {}
    datasets: dict[str, tuple[tuple[int, ...], DType]] = {}
    positions = []
    for box in boxes:
        if box.nbytes >= ALIGNMENT:
            ranges = zip(box.box.offsets, box.box.stops, strict=True)
            index = ", ".join(f"{start}:{stop}" for start, stop in ranges)  # as numpy writes it
            name = f"arrays/{box.name}[{index}]"
            datasets[name] = (box.box.sizes, box.dtype)
            positions.append((name, 0))
        else:
            name = f"packed/{name_of(box.dtype)}"
            positions.append((name, packed.get(name, 0)))
            packed[name] = packed.get(name, 0) + box.nbytes // box.dtype.itemsize
            dtypes[name] = box.dtype
    for name, count in packed.items():
        datasets[name] = ((count,), dtypes[name])
    return boxes, datasets, positions


@dataclass(frozen=True)
class Written:
    """A file that is complete and on disk, and its boxes by name of the array.

    `file` is None if another rank reports it; `StoredBox.file` is set when the manifest is made.
    """

    file: StoredFile | None
    boxes: list[tuple[str, StoredBox]]


def file_name(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"rank-{rank:05d}.h5"


def write_file(
    path: Path,
    boxes: Sequence[BoxSource],
    attributes: Mapping[str, str | int],
    meanwhile: Callable[[], None] = lambda: None,
) -> Written:
    """Write a file with these boxes, perhaps none; its directory must exist.

    Returns when the file is on disk under its name, and its directory is, too. Raises OSError if it
    cannot be written; a part of it may be left under its temporary name. `meanwhile` is called in
    another thread, and the file is not complete if that raises.

    Notes
    -----
    Local. Memory: at most 8 MiB, and one block of a box that is not in memory as it is written.
    Digests are computed while the disk works.
    """
    boxes, datasets, positions = lay_out(boxes)
    identity = np.frombuffer(str(attributes["id"]).encode(), np.uint8)
    datasets[ID_DATASET] = (identity.shape, identity.dtype)
    shapes = [(name, shape, dtype) for name, (shape, dtype) in datasets.items()]
    part = temporary(path)
    with _in_thread(meanwhile), naming(part, sum(box.nbytes for box in boxes)):
        begins = files.create_file(part, shapes, attributes)
        descriptor = os.open(part, os.O_RDWR | os.O_NOFOLLOW)
        try:
            write_at(descriptor, identity, begins[ID_DATASET])
            for data, offset in _stream(boxes, positions, begins):
                write_at(descriptor, data, offset)
            size = os.fstat(descriptor).st_size
            with _in_thread(os.fsync, descriptor):
                digests = [box.digests() for box in boxes]
        finally:
            os.close(descriptor)
    rename_synced(part, path, warn=attributes["rank"] == 0)  # one rank's warning is enough
    stored = StoredFile(
        path.name,
        size,
        {name: StoredDataset(begins[name], shape) for name, (shape, _) in datasets.items()},
    )
    stored_boxes = [
        (box.name, StoredBox(box.box, 0, dataset, first, digest))
        for box, (dataset, first), digest in zip(boxes, positions, digests, strict=True)
    ]
    return Written(stored, stored_boxes)


def _stream(
    boxes: Sequence[BoxSource], positions: Sequence[tuple[str, int]], begins: Mapping[str, int]
) -> Iterator[tuple[Array, int]]:
    """Yield what is written, and its offset; small blocks that follow each other are joined."""
    joined = np.empty(0, np.uint8)
    filled, begin = 0, 0
    for box, (dataset, first) in zip(boxes, positions, strict=True):
        start = begins[dataset] + first * box.dtype.itemsize
        for relative, block in box.blocks():
            offset = start + relative
            if block.nbytes >= ALIGNMENT:
                yield block, offset
                continue
            if filled and (offset != begin + filled or filled + block.nbytes > _BLOCK):
                yield joined[:filled], begin
                filled = 0
            if not filled:
                begin = offset
            if not joined.size:
                joined = np.empty(_BLOCK, np.uint8)
            joined[filled : filled + block.nbytes] = block
            filled += block.nbytes
    if filled:
        yield joined[:filled], begin


class WriterThread:
    """A thread that makes the calls submitted to it, in order; started by the first one.

    Not an executor of the standard library: see `mpidist._threads`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, call: Callable[..., T], *args: Any) -> Future[T]:
        """Have a function called in the thread, after all that were submitted before."""
        future: Future[T] = Future()
        try:
            self._start()
        except RuntimeError as error:  # the user may have no more threads
            future.set_exception(error)
        else:
            self._tasks.put(lambda: fulfil(future, call, *args))
        return future

    def close(self) -> None:
        """Let the thread end after the calls submitted so far."""
        self._tasks.put(None)

    def _start(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            thread.start()
            self._thread = thread

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()


def call_now(call: Callable[..., T], *args: Any) -> Future[T]:
    """Call a function in this thread; the future holds its result, or what it raised."""
    return fulfil(Future(), call, *args)


@contextmanager
def _in_thread(call: Callable[..., None], *args: object) -> Iterator[None]:
    """Call a function in a thread of its own while the block runs; raise what it raises."""
    future = run_in_thread(call, *args, name="mpidist-checkpoint-file")
    try:
        yield
    finally:
        wait([future])  # it uses what the caller is about to close
    future.result()


class Stager:
    """Memory for copies of boxes, used again: fresh pages cost more than the copy into them.

    Arrays of the host are copied to ordinary memory, arrays of a device to pinned memory, which the
    device writes without the help of a processor.
    """

    _ALIGNMENT = 64

    def __init__(self) -> None:
        self._ordinary = _MemoryPool(lambda nbytes: np.empty(nbytes, np.uint8))
        self._pinned = _MemoryPool(pinned_empty)
        self._used: dict[int, list[tuple[_MemoryPool, Array]]] = {}

    def copy(self, boxes: Sequence[HostBox]) -> list[HostBox]:
        """Copy boxes, whose data may be on a device; `release` the copies once they are written."""
        copies: list[HostBox] = []
        used = []
        for pool, on_host in ((self._ordinary, True), (self._pinned, False)):
            originals = [box for box in boxes if is_host(box.data) == on_host]
            if originals:
                memory = pool.take(sum(round_up(box.nbytes, self._ALIGNMENT) for box in originals))
                used.append((pool, memory))
                copies += self._copied(originals, memory)
        self._used[id(copies)] = used
        return copies

    def release(self, copies: Sequence[HostBox]) -> None:
        """Let the memory of copies be used for the next ones."""
        for pool, memory in self._used.pop(id(copies)):
            pool.free.append(memory)

    def _copied(self, boxes: Sequence[HostBox], memory: Array) -> Iterator[HostBox]:
        offset = 0
        for box in boxes:
            out: Array = np.ndarray(box.data.shape, box.dtype, memory, offset)
            yield HostBox.of(box.name, box.box, to_host(box.data, out=out))
            offset += round_up(box.nbytes, self._ALIGNMENT)


class _MemoryPool:
    """Memory of one kind, made by a function of a number of bytes."""

    def __init__(self, make: Callable[[int], Array]) -> None:
        self.free: list[Array] = []
        self._make = make

    def take(self, nbytes: int) -> Array:
        """Return at least so many bytes; memory that is too small is freed."""
        while self.free:
            memory = self.free.pop()
            if memory.size >= nbytes:
                return memory
        return self._make(nbytes)


_lock = threading.Lock()
_writing: Counter[Path] = Counter()
"""Directories of steps, and how many ranks of this process write there: simulated ones share it."""

_last: dict[Path, Path] = {}
"""For each directory of checkpoints, the step that was completed last."""


def begin_write(directory: Path) -> None:
    """Note that a save into the directory of a step has begun."""
    with _lock:
        _writing[directory] += 1


def end_write(directory: Path, *, complete: bool) -> None:
    """Note that a save has ended, and whether there is a checkpoint."""
    with _lock:
        _writing[directory] -= 1
        if not _writing[directory]:
            del _writing[directory]
        if complete:
            _last[directory.parent] = directory


def is_being_written(directory: Path) -> bool:
    """Return whether this process saves into the directory of a step, whatever leads to it."""
    with _lock:
        return _is_among(directory, _writing)


def was_written_last(directory: Path) -> bool:
    """Return whether this process has completed no later step in the same directory."""
    with _lock:
        return _is_among(directory, _last.values())


def _is_among(directory: Path, others: Iterable[Path]) -> bool:
    return any(
        other.name == directory.name and _is_same(directory.parent, other.parent)
        for other in others
    )


def _is_same(one: Path, other: Path) -> bool:
    if one == other:
        return True
    try:
        return one.samefile(other)
    except OSError:  # one of them is gone
        return False
