"""`load` and `load_full`: into the arrays of any number of ranks, or into fresh ones.

[Note: reading together] Each byte is read from the disk once per node. What only one rank of a node
needs, it reads into its own arrays. What several need they divide, in the order of the files. In
each round a rank reads one batch into its own buffer, which all of them see, and verifies it; after
a barrier each copies what it needs out of all buffers. A rank has two buffers, used in turn: after
the barrier of a round, all ranks have copied what was read in the round before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from operator import is_
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash

import mpidist.errors
from mpidist._threads import fulfil
from mpidist._types import Array
from mpidist.arrays.boxes import Box, round_up
from mpidist.arrays.namespaces import array_namespace, is_host
from mpidist.arrays.shards import ShardedArray
from mpidist.checkpoint.directory import Checkpoint, absolute, check_same, find, manifest_of
from mpidist.checkpoint.format.files import read_regular
from mpidist.checkpoint.format.manifest import JSON, MANIFEST, MOST_BYTES, Manifest, box_of
from mpidist.checkpoint.loading.reading import (
    MAX_READ,
    ArrayTargets,
    BoxRequest,
    Files,
    ReadItem,
    check_files,
    destination_of,
    divided_read_items,
    read_items,
    scatter,
)
from mpidist.checkpoint.saving.save import Saver, saver_of
from mpidist.checkpoint.state import FlatState, State, flatten, restore
from mpidist.collectives import all_gather, all_gather_object, broadcast_object
from mpidist.errors import (
    CheckpointError,
    CheckpointIncompatibleError,
    DistributedError,
    TransportError,
)
from mpidist.group import ProcessGroup
from mpidist.nn.names import former_names
from mpidist.observe.regions import region

T = TypeVar("T")

BUFFER = 2 * MAX_READ
"""Bytes of a rank's buffer."""


def load(
    path: str | os.PathLike[str],
    state: State,
    group: ProcessGroup,
    *,
    step: int | str = "latest",
    verify: bool = True,
) -> Checkpoint:
    """Load a checkpoint into the arrays and objects of a state, on any number of ranks.

    Parameters
    ----------
    path : path
        Directory of checkpoints, which all ranks see.
    state : State
        What to load, under the names of `save`; what the checkpoint has besides is left. Arrays,
        parts of `DTensor` and pieces of `ShardedArray` are filled where they are; objects are given
        what is theirs by ``load_state_dict``, in the order of their names. All arrays of an object
        must be there, and no others; of its values it is given those that are there: a `DDP`
        continues from a module, and a module from a `DDP`. Values are returned.
    group : ProcessGroup
        The ranks that load; as many as there are.
    step : int or "latest", optional
        Which one; the newest complete one when omitted.
    verify : bool, optional
        Whether to compare the digests of what is read.

    Returns
    -------
    Checkpoint
        What was loaded; its `values` are what was saved that is no array.

    Raises
    ------
    CheckpointNotFoundError
        If there is no complete checkpoint of this step.
    CheckpointCorruptError, CheckpointMissingShardError
        If a file is damaged, cut off or missing. Arrays may have been filled in part.
    CheckpointIncompatibleError
        If a name, shape or dtype is another one than was saved, or an object does not take what was
        saved, on any rank, or the format is a later one.
    CheckpointError
        If a file cannot be read.
    CollectiveMismatchError
        If the ranks ask for other directories or steps, as where a relative path is given and their
        working directories differ.
    UnsupportedOperationError
        If the state has something that cannot be kept.

    All of them on every rank, with the same message.

    Notes
    -----
    Arrays of a model that was saved when `Recompute` was a part of names, such as
    ``0.inner.weight``, are found under the name of today, ``0.weight``.

    Collective over `group`; blocks. Rank 0 reads the manifest and broadcasts it. Each node reads
    the chunks that its ranks need once: a rank what only it needs; what several need is shared out
    over them, and they copy from memory that they share, 4 MiB per rank.
    """
    saver = saver_of(group)
    saver.drain(0)
    checkpoint = _find_together(path, step, saver, f"load of {path} on group {group.name!r}")
    manifest = checkpoint.manifest
    what = f"load of {checkpoint.directory} on group {group.name!r}"
    together = saver.group
    targets = _all_or_none(
        lambda: _matched(flatten(state), manifest, checkpoint.directory), together, what
    )
    _check_left_over(targets, checkpoint.directory, together, what)
    node = together.node_group()
    with region("checkpoint read"), Files(checkpoint.directory, manifest, verify=verify) as files:
        _all_or_none(lambda: _fill(files, targets, node), together, what)
    _all_or_none(targets.finish, together, what)
    values = targets.values(manifest)
    _all_or_none(lambda: restore(state, targets.arrays, values), together, what)
    return checkpoint


def load_full(
    path: str | os.PathLike[str],
    *,
    step: int | str = "latest",
    names: Sequence[str] | None = None,
    verify: bool = True,
) -> dict[str, Any]:
    """Load whole arrays and values into this process, without any group.

    Parameters
    ----------
    path : path
        The directory that was given to `save`.
    step : int or "latest", optional
        Which one; the newest complete one when omitted.
    names : sequence of str, optional
        Which arrays and values; all when omitted.
    verify : bool, optional
        Whether to compare the digests of what is read.

    Returns
    -------
    dict of str to (Array or JSON value)
        New arrays and the values, by name.

    Raises
    ------
    CheckpointNotFoundError, CheckpointCorruptError, CheckpointMissingShardError
        For the same reasons as in `load`.
    CheckpointIncompatibleError
        If a name is not in the checkpoint.

    Notes
    -----
    Local. Memory: the arrays, and 2 MiB.
    """
    checkpoint = find(path, step)
    manifest = checkpoint.manifest
    check_files(checkpoint.directory, manifest)
    names = [*manifest.values, *manifest.arrays] if names is None else names
    unknown = [n for n in names if n not in manifest.values and n not in manifest.arrays]
    if unknown:
        raise CheckpointIncompatibleError(
            f"load_full: {checkpoint.directory} has nothing named {unknown[:5]}; it has "
            f"{sorted([*manifest.values, *manifest.arrays])[:10]}..."
        )
    targets = _Targets()
    for name in names:
        if name in manifest.arrays:
            array = manifest.arrays[name]
            targets.add(name, Box.whole(array.shape), np.empty(array.shape, array.dtype))
    with Files(checkpoint.directory, manifest, verify=verify) as files:
        _fill_alone(files, targets, read_items(manifest, targets.requests()))
    arrays = {name: target.parts[0][1] for name, target in targets.by_name.items()}
    return {name: arrays[name] if name in arrays else manifest.values[name] for name in names}


@dataclass
class _Targets:
    """Where what is read goes to.

    Attributes
    ----------
    by_name : dict of str to ArrayTargets
        Host memory, by name of the array.
    arrays : dict of str to (Array or ShardedArray)
        What the objects of the state are given.
    former : dict of str to str
        Names in the checkpoint of what has another name now.
    left_over : dict of str to str
        What was saved of objects, or items of lists, that this rank's have no part for, and the
        name of that object or list.
    parents : set of str
        The objects and lists of this rank's state.
    """

    by_name: dict[str, ArrayTargets] = field(default_factory=dict)
    arrays: dict[str, Any] = field(default_factory=dict)
    former: dict[str, str] = field(default_factory=dict)
    left_over: dict[str, str] = field(default_factory=dict)
    parents: set[str] = field(default_factory=set)
    _copies: list[tuple[Array, Array]] = field(default_factory=list)

    def add(self, name: str, box: Box, memory: Array) -> None:
        """Have a box of an array read into some memory."""
        self.by_name.setdefault(name, ArrayTargets()).add(box, memory)

    def take(self, name: str, box: Box, array: Array, *, inside: bool) -> Array:
        """Have a box read into an array, or into another one if it cannot be written."""
        if not is_host(array):
            memory = np.empty(array.shape, array.dtype)
            self._copies.append((array, memory))
        elif array.flags.writeable:
            memory = array
        elif inside:
            memory = array = np.empty(array.shape, array.dtype)
        else:
            raise CheckpointIncompatibleError(f"{name!r} is a read-only array; give one to fill")
        self.add(name, box, memory)
        return array

    def values(self, manifest: Manifest) -> dict[str, JSON]:
        """Return the values of a checkpoint under the names of today."""
        present = {old: new for new, old in self.former.items()}
        return {present.get(name, name): value for name, value in manifest.values.items()}

    def requests(self) -> list[BoxRequest]:
        """Return what has to be read."""
        return [
            BoxRequest(name, box)
            for name, target in self.by_name.items()
            for box, _ in target.parts
        ]

    def finish(self) -> None:
        """Copy to devices what was read for them."""
        for array, memory in self._copies:
            array[...] = array_namespace(array).asarray(memory)


def _find_together(
    path: str | os.PathLike[str], step: int | str, saver: Saver, what: str
) -> Checkpoint:
    """Let rank 0 find a checkpoint, and give its manifest to all."""
    group = saver.group

    def prepare() -> Path:
        saver.raise_unreported()
        return absolute(path)

    root = _all_or_none(prepare, group, what)
    check_same(f"step {step!r} of {root} to load", group)
    problem: DistributedError | None = None
    read: tuple[Path, bytes] | None = None
    if group.rank == 0:
        try:
            directory = find(root, step).directory
            read = directory, read_regular(directory / MANIFEST, MOST_BYTES + 1)
        except DistributedError as error:
            problem = error
        except Exception as error:  # noqa: BLE001  # whatever it is, the others must not wait
            message = f"rank 0 cannot read {root}: {type(error).__name__}: {error}"
            problem = CheckpointError(message)
    problem, read = broadcast_object((problem, read), group)
    if problem is not None:
        raise problem
    directory, data = read

    def parse() -> Checkpoint:
        checkpoint = Checkpoint(directory, manifest_of(directory, data))
        if group.rank == 0:
            check_files(directory, checkpoint.manifest)
        return checkpoint

    return _all_or_none(parse, group, f"load of {directory} on group {group.name!r}")


def _matched(flat: FlatState, manifest: Manifest, directory: Path) -> _Targets:
    """Return where everything goes; refuse a state that the checkpoint does not have."""
    # An object may go on without one of its values; what it cannot do without, it misses itself.
    # Items of a list have their places: none may be missing.
    needed = flat.values.keys() - (flat.inside - flat.objects)
    needed |= {name for name in flat.values if name.rpartition("/")[0] in flat.lists}
    targets = _Targets()
    names = flat.arrays.keys() | flat.values.keys()
    saved_names = {*manifest.arrays, *manifest.values}
    if not names <= saved_names:  # perhaps the names had other parts when it was saved
        targets.former = former_names([*flat.arrays, *flat.values], saved_names)
    known = manifest.values.keys() | targets.former.keys()
    problems = [f"{name}: not in it" for name in sorted(needed - known)]
    for name, array in flat.arrays.items():
        saved = targets.former.get(name, name)
        stored = manifest.arrays.get(saved)
        if stored is None:
            problems.append(f"{name}: not in it")
        elif (stored.shape, stored.dtype) != (tuple(array.shape), array.dtype.newbyteorder("=")):
            problems.append(
                f"{name}: expected {array.dtype}{list(array.shape)}, saved was "
                f"{stored.dtype}{list(stored.shape)}"
            )
        else:
            full = Box.whole(array.shape)
            held = array.pieces if isinstance(array, ShardedArray) else {full: array}
            inside = name in flat.inside
            pieces = {
                box: targets.take(saved, box, piece, inside=inside) for box, piece in held.items()
            }
            if all(map(is_, pieces.values(), held.values())):
                targets.arrays[name] = array
            elif isinstance(array, ShardedArray):
                targets.arrays[name] = ShardedArray(array.shape, array.dtype, pieces)
            else:
                targets.arrays[name] = pieces[full]
    targets.left_over = dict(_left_over(flat, manifest, set(targets.former.values())))
    targets.parents = {*flat.objects, *flat.lists}
    if problems:
        raise _of_another_state(directory, [*problems, *targets.left_over])
    return targets


def _of_another_state(directory: Path, problems: Sequence[str]) -> CheckpointIncompatibleError:
    more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
    listed = "\n  ".join(problems[:20])
    return CheckpointIncompatibleError(
        f"{directory} is of another state; nothing was changed:\n  {listed}{more}"
    )


def _check_left_over(targets: _Targets, directory: Path, group: ProcessGroup, what: str) -> None:
    """Refuse a checkpoint of which some arrays have no target on any rank with their object.

    Of a model whose layers are spread over the ranks, each has targets for its own.
    """
    if not _any_failed(group, failed=bool(targets.left_over)):
        return
    everyone = all_gather_object((targets.left_over, targets.parents), group)
    parent_of = {problem: parent for left, _ in everyone for problem, parent in left.items()}
    problems = [
        problem
        for problem, parent in parent_of.items()
        if all(problem in left for left, parents in everyone if parent in parents)
    ]
    if problems:
        rank = next(rank for rank, (left, _) in enumerate(everyone) if problems[0] in left)
        error = _of_another_state(directory, problems)
        raise CheckpointIncompatibleError(f"{what}: rank {rank}: {error}")


def _left_over(flat: FlatState, manifest: Manifest, former: set[str]) -> Iterator[tuple[str, str]]:
    """Say what was saved of an object, or of a list, that it has no part for, and name it."""
    for name in manifest.arrays:
        parent = name
        while "/" in parent and parent not in flat.objects and parent not in flat.lists:
            parent = parent.rpartition("/")[0]
        if parent in flat.objects | flat.lists and not (name in flat.arrays or name in former):
            yield f"{name}: saved, but {parent!r} has no such part", parent
    for name in manifest.values:
        parent = name.rpartition("/")[0]
        if parent in flat.lists and name not in flat.values:
            yield f"{name}: saved, but {parent!r} has no such part", parent


def _all_or_none(action: Callable[[], T], group: ProcessGroup, what: str) -> T:
    """Do something on every rank; if one fails, raise on all what the first one raised."""
    done = fulfil(Future(), action)
    error = done.exception()
    if not _any_failed(group, failed=error is not None):
        return done.result()
    problem: tuple[str, str] | None = None
    if isinstance(error, DistributedError):
        problem = (type(error).__name__, str(error))
    elif error is not None:
        problem = (CheckpointError.__name__, f"{type(error).__name__}: {error}")
    problems = all_gather_object(problem, group)
    rank, (name, message) = next((r, p) for r, p in enumerate(problems) if p is not None)
    known = name in mpidist.errors.__all__ and name != TransportError.__name__  # it takes a code
    kind: type[DistributedError] = getattr(mpidist.errors, name) if known else CheckpointError
    raise kind(f"{what}: rank {rank}: {message}")


def _any_failed(group: ProcessGroup, *, failed: bool) -> bool:
    """Return whether any rank has failed; one all_gather of a byte."""
    return bool(all_gather(np.array([failed], np.uint8), group).any())


def _requests_of(node: ProcessGroup, own: Sequence[BoxRequest]) -> Sequence[Sequence[BoxRequest]]:
    """Return the requests of each rank of a node, given this one's; at most two all_gathers."""
    if node.size == 1:
        return [own]
    digest = np.frombuffer(xxhash.xxh3_128_digest(repr(own).encode()), np.uint8)
    if (all_gather(digest, node).reshape(node.size, -1) == digest).all():
        return [own] * node.size  # most often, and shorter than the requests
    plain = [(name, box.offsets, box.sizes) for name, box in own]  # shorter than boxes
    return [
        [BoxRequest(name, box_of(offsets, sizes)) for name, offsets, sizes in requests]
        for requests in all_gather_object(plain, node)
    ]


def batches(items: Sequence[ReadItem], size: int) -> list[list[list[ReadItem]]]:
    """Divide read items, which are in the order of the files, among readers, and into batches.

    Returns for each reader its batches, each of at most `BUFFER` bytes. Readers have equal shares
    of the bytes, as nearly as items allow.
    """
    total = sum(item.nbytes for item in items)
    shares: list[list[ReadItem]] = [[] for _ in range(size)]
    before = 0
    for item in items:
        shares[min(before * size // max(total, 1), size - 1)].append(item)
        before += item.nbytes
    return [list(_batched(share)) for share in shares]


def _batched(items: Sequence[ReadItem]) -> Iterator[list[ReadItem]]:
    batch: list[ReadItem] = []
    filled = 0
    for item in items:
        if batch and filled + aligned_size(item) > BUFFER:
            yield batch
            batch, filled = [], 0
        batch.append(item)
        filled += aligned_size(item)
    if batch:
        yield batch


def aligned_size(item: ReadItem) -> int:
    """Return the bytes that an item takes in a buffer; each begins where any dtype may."""
    return round_up(item.nbytes, 16)


def _views(buffer: Array, batch: Sequence[ReadItem]) -> Iterator[Array]:
    """Yield the part of a buffer for each item of a batch."""
    offset = 0
    for item in batch:
        yield buffer[offset : offset + item.nbytes]
        offset += aligned_size(item)


def _fill(files: Files, targets: _Targets, node: ProcessGroup) -> None:
    """Read what is needed here, and with the other ranks of the node what several of them need."""
    requests = _requests_of(node, targets.requests())
    items = fulfil(Future(), divided_read_items, files.manifest, requests, node.rank)
    if _any_failed(node, failed=items.exception() is not None):
        items.result()  # raises, here or on another rank
        return
    own, shared = items.result()
    buffers = node.shared((2, node.size, BUFFER), np.uint8) if shared else None
    if shared and buffers is None:  # there is no shared memory: each rank reads for itself
        own, shared = read_items(files.manifest, requests[node.rank]), []
    problem = fulfil(Future(), _fill_alone, files, targets, own).exception()
    if buffers is not None:
        problem = _fill_together(files, targets, node, buffers, shared, problem)
    if problem is not None:
        raise problem


def _fill_alone(files: Files, targets: _Targets, items: Sequence[ReadItem]) -> None:
    """Read what only this rank needs, where possible straight to where it is needed."""
    memory = np.empty(BUFFER, np.uint8)
    (own,) = batches(items, 1)
    for batch in own:
        outs = [destination_of(files.manifest, item, targets.by_name) for item in batch]
        memories = [
            view if out is None else out
            for out, view in zip(outs, _views(memory, batch), strict=True)
        ]
        for item, out, data in zip(batch, outs, files.load(batch, memories), strict=True):
            if out is None:
                scatter(files.manifest, item, data, targets.by_name)


def _fill_together(
    files: Files,
    targets: _Targets,
    node: ProcessGroup,
    buffers: Array,
    items: Sequence[ReadItem],
    problem: BaseException | None,
) -> BaseException | None:
    """Read this rank's share of what several need, and copy what it needs of all.

    Returns `problem`, or what has failed here; the others may go on only with this rank. See
    [Note: reading together].
    """
    shares = batches(items, node.size)
    own = shares[node.rank]
    for turn in range(max(map(len, shares))):
        memory = buffers[turn % 2]
        try:
            if turn < len(own) and problem is None:
                files.load(own[turn], list(_views(memory[node.rank], own[turn])))
        except Exception as error:  # noqa: BLE001  # returned: first the others must learn of it
            problem = error
        if _any_failed(node, failed=problem is not None):
            break
        try:
            for rank, share in enumerate(shares):
                batch = share[turn] if turn < len(share) else ()
                for item, view in zip(batch, _views(memory[rank], batch), strict=True):
                    scatter(files.manifest, item, files.shaped(item, view), targets.by_name)
        except Exception as error:  # noqa: BLE001  # as above, at the next barrier
            problem = error
    return problem
