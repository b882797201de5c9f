"""`load` and `load_full`: into the arrays of any number of ranks, or into fresh ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import is_
from pathlib import Path
from typing import Any

import numpy as np

import mpidist.errors
from mpidist._types import MAX, Array
from mpidist.arrays.boxes import Box
from mpidist.arrays.namespaces import array_namespace, is_host
from mpidist.arrays.shards import ShardedArray
from mpidist.checkpoint.directory import Checkpoint, find, manifest_of
from mpidist.checkpoint.format.files import read_regular
from mpidist.checkpoint.format.manifest import JSON, MANIFEST, MOST_BYTES, Manifest
from mpidist.checkpoint.loading.reading import Files, check_files
from mpidist.checkpoint.loading.sharing import SLOT, Alone, Readers, batches, readers_of, room
from mpidist.checkpoint.loading.units import (
    Pieces,
    Unit,
    Wanted,
    divided_units,
    give,
    place_of,
    units_of,
)
from mpidist.checkpoint.paths import absolute, check_same
from mpidist.checkpoint.saving.saver import Saver, saver_of
from mpidist.checkpoint.state import FlatState, State, flatten, restore
from mpidist.collectives import all_gather_object, all_reduce, broadcast_object
from mpidist.errors import (
    CheckpointError,
    CheckpointIncompatibleError,
    DistributedError,
    TransportError,
)
from mpidist.group import ProcessGroup
from mpidist.nn.names import former_names
from mpidist.observe.regions import region

__all__ = ["load", "load_full"]


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
        What to load, under the names of `save`; what the checkpoint has besides is left. Arrays and
        pieces of `ShardedArray` are filled where they are; objects are given what is theirs by
        ``load_state_dict``, in the order of their names. All arrays of an object must be there, and
        no others; of its values it is given those that are there: a `DDP` goes on from a module,
        and a module from a `DDP`. Values are returned.
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
        If there is none.
    CheckpointCorruptError, CheckpointMissingShardError
        If a file is damaged, cut off or missing. Arrays may have been filled in part.
    CheckpointIncompatibleError
        If a name, shape or dtype is another one than was saved, or an object does not take what was
        saved, or the format is a later one.
    CheckpointError
        If a file cannot be read.
    CollectiveMismatchError
        If the ranks ask for other directories or steps, as where a relative path is given and their
        working directories differ.
    UnsupportedOperationError
        If the state has something that cannot be kept.

    All of them on every rank, with the same words.

    Notes
    -----
    Arrays of a model that was saved when `Recompute` was a part of names, such as
    ``0.inner.weight``, are found under the name of today, ``0.weight``.

    Collective over `group`; blocks. Rank 0 reads the manifest and broadcasts it. Each node reads
    the tiles that its ranks need once: a rank what only it needs; what several need is shared out
    over them, and they copy from memory that they share, 4 MiB per rank.
    """
    saver = saver_of(group)
    saver.settle(0)
    checkpoint = _found(path, step, saver, f"load of {path} on group {group.name!r}")
    manifest = checkpoint.manifest
    what = f"load of {checkpoint.directory} on group {group.name!r}"
    flat = FlatState()
    targets = _Targets()

    def match() -> None:
        nonlocal flat, targets
        flat = flatten(state)
        targets = _matched(flat, manifest, checkpoint.directory)

    together = saver.group
    _all_or_none(match, together, what)
    readers = readers_of(together)
    with region("checkpoint read"), Files(checkpoint.directory, manifest, verify=verify) as files:
        _all_or_none(lambda: _fill(files, manifest, targets, readers), together, what)
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
        Directory of checkpoints.
    step : int or "latest", optional
        Which one.
    names : sequence of str, optional
        Which arrays and values; all when omitted.
    verify : bool, optional
        Whether to compare the digests of what is read.

    Returns
    -------
    dict of str to (Array or JSON value)
        By name.

    Raises
    ------
    CheckpointNotFoundError, CheckpointCorruptError, CheckpointMissingShardError
        As `load`.
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
        _fill(files, manifest, targets, Alone())
    whole = {name: pieces.parts[0][1] for name, pieces in targets.pieces.items()}
    return {name: whole[name] if name in whole else manifest.values[name] for name in names}


@dataclass
class _Targets:
    """Where what is read goes to.

    Attributes
    ----------
    pieces : dict of str to Pieces
        Host memory, by name of the array.
    arrays : dict of str to (Array or ShardedArray)
        What the objects of the state are given.
    former : dict of str to str
        Names in the checkpoint of what has another name now.
    """

    pieces: dict[str, Pieces] = field(default_factory=dict)
    arrays: dict[str, Any] = field(default_factory=dict)
    former: dict[str, str] = field(default_factory=dict)
    _copies: list[tuple[Array, Array]] = field(default_factory=list)

    def add(self, name: str, box: Box, memory: Array) -> None:
        """Have a part of an array read into some memory."""
        self.pieces.setdefault(name, Pieces()).add(box, memory)

    def take(self, name: str, box: Box, array: Array, *, inside: bool) -> Array:
        """Have a part read into an array, or into another one if it cannot be written."""
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

    def wanted(self) -> list[Wanted]:
        """Return what has to be read."""
        return [Wanted(name, box) for name, each in self.pieces.items() for box, _ in each.parts]

    def finish(self) -> None:
        """Copy to devices what was read for them."""
        for array, memory in self._copies:
            array[...] = array_namespace(array).asarray(memory)


def _found(path: str | os.PathLike[str], step: int | str, saver: Saver, what: str) -> Checkpoint:
    """Let rank 0 find a checkpoint, and give its manifest to all."""
    group, where = saver.group, Path()

    def prepare() -> None:
        nonlocal where
        saver.raise_untold()
        where = absolute(path)

    _all_or_none(prepare, group, what)
    check_same(f"step {step!r} of {where} to load", group)
    problem: DistributedError | None = None
    found: tuple[Path, bytes] | None = None
    if group.rank == 0:
        try:
            directory = find(where, step).directory
            found = directory, read_regular(directory / MANIFEST, MOST_BYTES + 1)
        except DistributedError as error:
            problem = error
        except Exception as error:  # noqa: BLE001  # whatever it is, the others must not wait
            words = f"rank 0 cannot read {where}: {type(error).__name__}: {error}"
            problem = CheckpointError(words)
    problem, found = broadcast_object((problem, found), group)
    if problem is not None:
        raise problem
    directory, data = found
    checkpoint: Checkpoint | None = None

    def believe() -> None:
        nonlocal checkpoint
        checkpoint = Checkpoint(directory, manifest_of(directory, data))
        if group.rank == 0:
            check_files(directory, checkpoint.manifest)

    _all_or_none(believe, group, f"load of {directory} on group {group.name!r}")
    assert checkpoint is not None, "nobody has failed"
    return checkpoint


def _matched(flat: FlatState, manifest: Manifest, directory: Path) -> _Targets:
    """Return where everything goes; refuse a state that the checkpoint does not have."""
    # An object may go on without one of its values; what it cannot do without, it misses itself.
    # Items of a list have their places: none may be missing.
    needed = flat.values.keys() - (flat.inside - flat.objects)
    needed |= {name for name in flat.values if name.rpartition("/")[0] in flat.lists}
    targets = _Targets()
    targets.former = former_names(
        [*flat.arrays, *flat.values], {*manifest.arrays, *manifest.values}
    )
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
        elif isinstance(array, ShardedArray):
            inside = name in flat.inside
            pieces = {
                box: targets.take(saved, box, piece, inside=inside)
                for box, piece in array.pieces.items()
            }
            same = all(map(is_, pieces.values(), array.pieces.values()))
            targets.arrays[name] = array if same else ShardedArray(array.shape, array.dtype, pieces)
        else:
            whole = Box.whole(array.shape)
            inside = name in flat.inside
            targets.arrays[name] = targets.take(saved, whole, array, inside=inside)
    problems += _left_over(flat, manifest, set(targets.former.values()))
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointIncompatibleError(
            f"{directory} is of another state; nothing was changed:\n  "
            + "\n  ".join(problems[:20])
            + more
        )
    return targets


def _left_over(flat: FlatState, manifest: Manifest, former: set[str]) -> Iterator[str]:
    """Say which arrays were saved of an object, or items of a list, that it does not have."""
    for name in manifest.arrays:
        parent = name
        while "/" in parent and parent not in flat.objects and parent not in flat.lists:
            parent = parent.rpartition("/")[0]
        if parent in flat.objects | flat.lists and not (name in flat.arrays or name in former):
            yield f"{name}: saved, but {parent!r} has no such part"
    for name in manifest.values:
        parent = name.rpartition("/")[0]
        if parent in flat.lists and name not in flat.values:
            yield f"{name}: saved, but {parent!r} has no such part"


def _fill(files: Files, manifest: Manifest, targets: _Targets, readers: Readers) -> None:
    """Read what is wanted here, and with others what several of them want."""
    wanted = readers.wants(targets.wanted())
    problem: Exception | None = None
    own: list[Unit] = []
    shared: list[Unit] = []
    try:
        own, shared = divided_units(manifest, wanted, readers.rank)
    except Exception as error:  # noqa: BLE001  # raised below: first the others must learn of it
        problem = error
    if readers.meet(failed=problem is not None):
        if problem is not None:
            raise problem
        return  # another rank raises
    slots = readers.slots() if shared else None
    if shared and slots is None:  # nobody to share with, or no memory: each for itself
        own, shared = units_of(manifest, wanted[readers.rank]), []
    try:
        _fill_alone(files, manifest, targets, own)
    except Exception as error:  # noqa: BLE001  # raised below: first the others must learn of it
        problem = error
    if slots is not None:
        problem = _fill_together(files, manifest, targets, readers, slots, shared, problem)
    if problem is not None:
        raise problem


def _fill_alone(files: Files, manifest: Manifest, targets: _Targets, units: Sequence[Unit]) -> None:
    """Read what only this rank needs, where possible straight to where it is wanted."""
    memory = np.empty(SLOT, np.uint8)
    (mine,) = batches(units, 1)
    for batch in mine:
        places = [place_of(manifest, unit, targets.pieces) for unit in batch]
        read = [
            spare if place is None else place
            for place, spare in zip(places, _laid(memory, batch), strict=True)
        ]
        for unit, place, data in zip(batch, places, files.load(batch, read), strict=True):
            if place is None:
                give(manifest, unit, data, targets.pieces)


def _fill_together(
    files: Files,
    manifest: Manifest,
    targets: _Targets,
    readers: Readers,
    slots: Array,
    units: Sequence[Unit],
    problem: Exception | None,
) -> Exception | None:
    """Read this rank's share of what several need, and copy what it needs of all; see `sharing`.

    Returns
    -------
    Exception or None
        `problem`, or what has failed here; the others may go on only with this rank.
    """
    shares = batches(units, readers.size)
    mine = shares[readers.rank]
    for turn in range(max(map(len, shares))):
        memory = slots[turn % 2]
        try:
            if turn < len(mine) and problem is None:
                files.load(mine[turn], list(_laid(memory[readers.rank], mine[turn])))
        except Exception as error:  # noqa: BLE001  # returned: first the others must learn of it
            problem = error
        if readers.meet(failed=problem is not None):
            break
        try:
            for rank, share in enumerate(shares):
                batch = share[turn] if turn < len(share) else ()
                for unit, part in zip(batch, _laid(memory[rank], batch), strict=True):
                    give(manifest, unit, files.shaped(unit, part), targets.pieces)
        except Exception as error:  # noqa: BLE001  # as above, when they meet again
            problem = error
    return problem


def _laid(slot: Array, batch: Sequence[Unit]) -> Iterator[Array]:
    """Yield where in a slot each unit is."""
    place = 0
    for unit in batch:
        yield slot[place : place + unit.nbytes]
        place += room(unit)


def _all_or_none(action: Callable[[], None], group: ProcessGroup, what: str) -> None:
    """Do something on every rank; if one fails, raise on all what the first one raised."""
    problem: tuple[str, str] | None = None
    try:
        action()
    except DistributedError as error:
        problem = (type(error).__name__, str(error))
    except Exception as error:  # noqa: BLE001  # told to all ranks, which would wait else
        problem = (CheckpointError.__name__, f"{type(error).__name__}: {error}")
    if not all_reduce(np.array(problem is not None, np.int32), group, op=MAX):
        return
    problems = all_gather_object(problem, group)
    rank, (name, words) = next((r, p) for r, p in enumerate(problems) if p is not None)
    known = name in mpidist.errors.__all__ and name != TransportError.__name__  # it takes a code
    kind: type[DistributedError] = getattr(mpidist.errors, name) if known else CheckpointError
    raise kind(f"{what}: rank {rank}: {words}")
