"""What the ranks agree on before a save: what there is, who writes what, and where."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from mpidist.checkpoint.directory import make_room, step_of
from mpidist.checkpoint.manifest import JSON, Manifest
from mpidist.checkpoint.plan import Assignment, Declaration, Plan, make_plan
from mpidist.checkpoint.saver import LastSave, Saver
from mpidist.checkpoint.single_file import SINGLE_FILE, check_single_file
from mpidist.checkpoint.state import FlatState, State, as_json, flatten
from mpidist.checkpoint.versions import versions
from mpidist.collectives import all_gather, broadcast_object, gather_object, scatter_object
from mpidist.errors import CheckpointError, CollectiveMismatchError, DistributedError

__all__ = ["Agreement", "agree"]


@dataclass(frozen=True)
class Agreement:
    """What a rank knows of a save that is about to begin.

    Attributes
    ----------
    id : str
        Of the save.
    flat : FlatState
        What this rank holds.
    assignment : Assignment
        What of it this rank writes.
    lead : (Manifest, Plan) or None
        On rank 0, all of the manifest but files and arrays, and who writes what.
    """

    id: str
    flat: FlatState
    assignment: Assignment
    lead: tuple[Manifest, Plan] | None


class _Order(NamedTuple):
    """What rank 0 tells a rank."""

    problem: DistributedError | None
    id: str
    assignment: Assignment


def agree(
    state: State, metadata: JSON, saver: Saver, directory: Path, *, single_file: bool
) -> Agreement:
    """Plan a save with all ranks.

    Parameters
    ----------
    state, metadata
        As for `save`.
    saver : Saver
        Of the group.
    directory : Path
        Of the step; rank 0 makes it.
    single_file : bool
        Whether all ranks write one file.

    Returns
    -------
    Agreement
        This rank's.

    Raises
    ------
    DistributedError
        On every rank, with the same words, if there is something wrong on any of them.

    Notes
    -----
    Collective over the saver's group; blocks. One all_gather of 65 bytes where names, shapes and
    boxes are those of the save before; else a gather of what is held, and a scatter of orders.
    """
    group = saver.group
    flat, declared, key, problem = _looked_at(state, metadata, saver, single_file=single_file)
    where = str(directory / SINGLE_FILE if single_file else directory)
    last = saver.last if saver.last is not None and saver.last.key == key else None
    identity = _as_before(None if problem else last, declared, where, saver, directory)
    if identity is not None and last is not None:
        order, plan = _Order(None, identity.hex(), last.assignment), last.plan
        plan = plan and replace(plan, values=declared.values)
    else:
        order, plan = _anew(declared, problem, where, saver, directory)
        saver.last = LastSave(key, order.id, order.assignment, plan)
    if plan is None:
        return Agreement(order.id, flat, order.assignment, None)
    header = Manifest(
        id=order.id,
        step=step_of(directory),
        created="",
        world_size=group.size,
        versions=versions(),
        crossovers=asdict(group.crossovers),
        metadata=as_json("metadata", metadata),
        values=plan.values,
    )
    return Agreement(order.id, flat, order.assignment, (header, plan))


def _looked_at(
    state: State, metadata: JSON, saver: Saver, *, single_file: bool
) -> tuple[FlatState, Declaration, bytes, DistributedError | None]:
    """Return what this rank holds, and what is wrong with it or with an earlier save."""
    rank = saver.group.rank
    nothing = FlatState(), Declaration(), b""
    try:
        saver.raise_untold()
        flat = flatten(state)
        as_json("metadata", metadata)
        if single_file:
            check_single_file(saver.group)
        declared = Declaration.of(flat)
        key = _key(declared)
        _text(declared)
    except DistributedError as error:
        return *nothing, type(error)(f"rank {rank}: {error}")
    except Exception as error:  # noqa: BLE001  # an object's own, which all ranks must learn
        return *nothing, CheckpointError(f"rank {rank}: {type(error).__name__}: {error}")
    return flat, declared, key, None


def _key(declared: Declaration) -> bytes:
    """Return a digest of all that a plan depends on."""
    held = (sorted(declared.whole.items()), sorted(declared.sharded.items(), key=_first))
    return xxhash.xxh3_128_digest(repr((held, sorted(declared.values))).encode())


def _as_before(
    last: LastSave | None, declared: Declaration, where: str, saver: Saver, directory: Path
) -> bytes | None:
    """Return the id of a save for which all ranks can do as for the last one, or None on all.

    It is so if none has a problem, what each holds is what it held, and all values are the same on
    all ranks. Rank 0 has made the directory then.
    """
    group = saver.group
    ready = last is not None
    if ready and group.rank == 0:
        try:
            _make_room(saver, directory)
        except DistributedError:  # told to all in the other way
            ready = False
    kept = last.id if last is not None else ""
    texts = [text.encode() for text in (_text_of(declared.values), where, kept)]
    mine = b"".join([bytes([ready]), *map(xxhash.xxh3_128_digest, texts), uuid.uuid4().bytes])
    table = all_gather(np.frombuffer(mine, np.uint8), group).reshape(group.size, -1)
    if table[:, 0].all() and (table[:, :49] == table[0, :49]).all():
        return bytes(table[0, 49:])
    if ready and group.rank == 0:
        with suppress(OSError):  # it will be emptied, or said to be there
            directory.rmdir()
    return None


def _anew(
    declared: Declaration,
    problem: DistributedError | None,
    where: str,
    saver: Saver,
    directory: Path,
) -> tuple[_Order, Plan | None]:
    """Gather what all ranks hold, let rank 0 plan, and tell each what to write."""
    declarations, problems = _gathered(declared, problem, where, saver)
    plan, orders = None, None
    if declarations:
        plan, orders = _decide(declarations, problems, saver, directory)
    order: _Order = scatter_object(orders, saver.group)
    if order.problem is not None:
        raise order.problem
    return order, plan


def _gathered(
    declared: Declaration, problem: DistributedError | None, where: str, saver: Saver
) -> tuple[list[Declaration], list[DistributedError]]:
    """Return, on rank 0, what each rank holds, and what is wrong; elsewhere nothing."""
    group = saver.group
    common = xxhash.xxh3_128_digest(_text(declared).encode())
    told = gather_object((problem, where, common, declared.sharded), group)
    # Most often all ranks hold the same names whole, and one list of them is enough.
    others = None if told is None else [r for r, (*_, key, _) in enumerate(told) if key != common]
    others = broadcast_object(others, group)
    lists = gather_object(declared if group.rank in others else None, group) if others else None
    if told is None:
        return [], []
    declarations = [
        lists[rank]
        if lists is not None and rank in others
        else Declaration(declared.whole, sharded, declared.values)
        for rank, (*_, sharded) in enumerate(told)
    ]
    problems = [error for error, *_ in told if error is not None]
    problems += _elsewhere([where for _, where, *_ in told])
    return declarations, problems


def _elsewhere(directories: Sequence[str]) -> Iterator[DistributedError]:
    """Say which ranks would write elsewhere than rank 0, perhaps into a complete checkpoint."""
    for rank, directory in enumerate(directories):
        if directory != directories[0]:
            yield CollectiveMismatchError(
                f"rank {rank} saves to {directory}, and rank 0 to {directories[0]}; give the same "
                "path, step and single_file on all ranks"
            )


def _text(declared: Declaration) -> str:
    """Return a text that is the same exactly where whole arrays and values are."""
    return repr(sorted(declared.whole.items())) + _text_of(declared.values)


def _text_of(values: Mapping[str, JSON]) -> str:
    return json.dumps(values, sort_keys=True)


def _first(item: tuple[str, object]) -> str:
    return item[0]


def _decide(
    declarations: list[Declaration],
    problems: list[DistributedError],
    saver: Saver,
    directory: Path,
) -> tuple[Plan | None, list[_Order]]:
    """Make the plan and the directory, on rank 0."""
    identity = uuid.uuid4().hex
    plan = None
    try:
        plan = _planned(declarations, problems)
        _make_room(saver, directory)
    except DistributedError as error:
        words = f"save of {directory} on {saver.group}: {error}"
        return None, [_Order(type(error)(words), "", [])] * len(declarations)
    except Exception as error:  # noqa: BLE001  # such as no memory; the others must not wait
        words = f"save of {directory} on {saver.group}: rank 0: {type(error).__name__}: {error}"
        return None, [_Order(CheckpointError(words), "", [])] * len(declarations)
    return plan, [_Order(None, identity, assignment) for assignment in plan.assignments]


def _planned(declarations: list[Declaration], problems: list[DistributedError]) -> Plan:
    if problems:
        raise problems[0]
    return make_plan(declarations)


def _make_room(saver: Saver, directory: Path) -> None:
    """Make the directory of a step, or empty one that a killed save has left."""
    if any(future.directory == directory for future in saver.pending):
        raise CheckpointError("an earlier save of this step is still under way; wait for it")
    try:
        make_room(directory)
    except CheckpointError as error:
        raise CheckpointError(f"rank 0: {error}") from error
    except (OSError, ValueError) as error:  # a ValueError of a name that no file can have
        raise CheckpointError(f"rank 0 cannot make it: {type(error).__name__}: {error}") from error
