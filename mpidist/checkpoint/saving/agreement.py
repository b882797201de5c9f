"""What the ranks agree on before a save: what there is, who writes what, and where."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from mpidist.checkpoint.directory import clear, make_room, step_directory, step_of
from mpidist.checkpoint.format.manifest import JSON, Manifest
from mpidist.checkpoint.format.versions import versions
from mpidist.checkpoint.saving.plan import Assignment, Declaration, Plan, make_plan
from mpidist.checkpoint.saving.running import is_being_written
from mpidist.checkpoint.saving.saver import LastSave, Saver
from mpidist.checkpoint.saving.single_file import SINGLE_FILE, check_single_file
from mpidist.checkpoint.state import FlatState, State, as_json, flatten
from mpidist.collectives import all_gather, broadcast_object, gather_object, scatter_object
from mpidist.errors import (
    CheckpointError,
    CollectiveMismatchError,
    DistributedError,
    UnsupportedOperationError,
)

__all__ = ["Agreement", "agree"]


@dataclass(frozen=True)
class Agreement:
    """What a rank knows of a save that is about to begin.

    Attributes
    ----------
    id : str
        Of the save.
    directory : Path
        Of the step.
    flat : FlatState
        What this rank holds.
    assignment : Assignment
        What of it this rank writes.
    lead : (Manifest, Plan) or None
        On rank 0, all of the manifest but files and arrays, and who writes what.
    """

    id: str
    directory: Path
    flat: FlatState
    assignment: Assignment
    lead: tuple[Manifest, Plan] | None


class _Held(NamedTuple):
    """What this rank holds.

    Attributes
    ----------
    flat, metadata, declared
        The state, what the user says of it, and what is told of it to rank 0.
    values : bytes
        Digest of the values.
    """

    flat: FlatState
    metadata: JSON
    declared: Declaration
    values: bytes

    @property
    def names(self) -> Declaration:
        """All that a plan depends on: what is told, without the values themselves."""
        return replace(self.declared, values=dict.fromkeys(self.declared.values))

    @property
    def common(self) -> bytes:
        """Digest of the values and the arrays that are held whole."""
        return _digest(f"{sorted(self.declared.whole.items())}{self.values.hex()}")


class _Order(NamedTuple):
    """What rank 0 tells a rank."""

    problem: DistributedError | None
    id: str
    assignment: Assignment


def agree(
    state: State,
    metadata: JSON,
    saver: Saver,
    path: str | os.PathLike[str],
    step: int,
    *,
    single_file: bool,
) -> Agreement:
    """Plan a save with all ranks.

    Parameters
    ----------
    state, metadata
        As for `save`.
    saver : Saver
        Of the group.
    path, step
        As for `save`; rank 0 makes the directory.
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
    held, problem = _looked_at(state, metadata, saver, single_file=single_file)
    directory = Path(str(path))  # for messages, if it cannot be
    try:
        directory = step_directory(path, step)
    except DistributedError as error:
        problem = problem or type(error)(f"rank {group.rank}: {error}")
    except (TypeError, ValueError) as error:
        problem = problem or UnsupportedOperationError(f"rank {group.rank}: {error}")
    where = str(directory / SINGLE_FILE if single_file else directory)
    names = held.names
    last = saver.last if saver.last is not None and saver.last.names == names else None
    identity = _as_before(None if problem else last, held, where, saver, directory)
    if identity is not None and last is not None:
        order, plan = _Order(None, identity.hex(), last.assignment), last.plan
        plan = plan and replace(plan, values=held.declared.values)
    else:
        order, plan = _anew(held, problem, where, saver, directory)
        saver.last = LastSave(names, order.id, order.assignment, plan)
    if plan is None:
        return Agreement(order.id, directory, held.flat, order.assignment, None)
    header = Manifest(
        id=order.id,
        step=step_of(directory),
        created="",
        world_size=group.size,
        versions=versions(),
        crossovers=asdict(group.crossovers),
        metadata=held.metadata,
        values=plan.values,
    )
    return Agreement(order.id, directory, held.flat, order.assignment, (header, plan))


def _looked_at(
    state: State, metadata: JSON, saver: Saver, *, single_file: bool
) -> tuple[_Held, DistributedError | None]:
    """Return what this rank holds, and what is wrong with it or with an earlier save."""
    rank = saver.group.rank
    try:
        saver.raise_untold()
        if single_file:
            check_single_file(saver.group)
        return _held(flatten(state), as_json("metadata", metadata)), None
    except DistributedError as error:
        return _held(FlatState(), None), type(error)(f"rank {rank}: {error}")
    except Exception as error:  # noqa: BLE001  # an object's own, which all ranks must learn
        words = f"rank {rank}: {type(error).__name__}: {error}"
        return _held(FlatState(), None), CheckpointError(words)


def _held(flat: FlatState, metadata: JSON) -> _Held:
    declared = Declaration.of(flat)
    return _Held(flat, metadata, declared, _digest(json.dumps(declared.values, sort_keys=True)))


def _digest(text: str) -> bytes:
    return xxhash.xxh3_128_digest(text.encode(errors="surrogatepass"))  # names of files have them


def _as_before(
    last: LastSave | None, held: _Held, where: str, saver: Saver, directory: Path
) -> bytes | None:
    """Return the id of a save for which all ranks can do as for the last one, or None on all.

    It is so if none has a problem, what each holds is what it held, and all values are the same on
    all ranks. Rank 0 has made the directory then.
    """
    group = saver.group
    ready = last is not None
    identity = uuid.uuid4()
    if ready and group.rank == 0:
        try:
            _make_room(directory, identity.hex)
        except DistributedError:  # told to all in the other way
            ready = False
    kept = last.id if last is not None else ""
    told = [held.values, _digest(where), _digest(kept)]
    mine = b"".join([bytes([ready]), *told, identity.bytes])
    table = all_gather(np.frombuffer(mine, np.uint8), group).reshape(group.size, -1)
    if table[:, 0].all() and (table[:, :49] == table[0, :49]).all():
        return bytes(table[0, 49:])
    if ready and group.rank == 0:
        clear(directory, identity.hex)
    return None


def _anew(
    held: _Held,
    problem: DistributedError | None,
    where: str,
    saver: Saver,
    directory: Path,
) -> tuple[_Order, Plan | None]:
    """Gather what all ranks hold, let rank 0 plan, and tell each what to write."""
    declarations, problems = _gathered(held, problem, where, saver)
    plan, orders = None, None
    if declarations:
        plan, orders = _decide(declarations, problems, saver, directory)
    order: _Order = scatter_object(orders, saver.group)
    if order.problem is not None:
        raise order.problem
    return order, plan


def _gathered(
    held: _Held, problem: DistributedError | None, where: str, saver: Saver
) -> tuple[list[Declaration], list[DistributedError]]:
    """Return, on rank 0, what each rank holds, and what is wrong; elsewhere nothing."""
    group, declared, common = saver.group, held.declared, held.common
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
                "path, step and single_file on all ranks, and an absolute path where their working "
                "directories differ"
            )


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
        _make_room(directory, identity)
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


def _make_room(directory: Path, identity: str) -> None:
    """Make the directory of a step, or empty one that a killed save has left."""
    if is_being_written(directory):
        raise CheckpointError("an earlier save of this step is still under way; wait for it")
    try:
        make_room(directory, identity)
    except CheckpointError as error:
        raise CheckpointError(f"rank 0: {error}") from error
    except (OSError, ValueError) as error:  # a ValueError of a name that no file can have
        raise CheckpointError(f"rank 0 cannot make it: {type(error).__name__}: {error}") from error
