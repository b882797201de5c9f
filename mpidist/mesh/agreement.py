"""What ranks have to agree on before an array is spread over them, and errors on all alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from mpidist._formatting import format_ranges
from mpidist._types import Array, DType, ReduceOp
from mpidist.arrays.namespaces import REDUCTIONS, is_device
from mpidist.collectives import all_gather_object
from mpidist.errors import CollectiveMismatchError, DistributedError, UnsupportedOperationError
from mpidist.group import ProcessGroup
from mpidist.group.operations import Timeout
from mpidist.mesh.mesh import DeviceMesh
from mpidist.mesh.placements import Partial, Placement, Shard

__all__ = [
    "Checked",
    "agree",
    "check_mesh",
    "check_partial",
    "check_same_ranks",
    "memory_of",
    "sum_shapes",
]

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Checked(Generic[T, U]):
    """What one rank was given.

    Attributes
    ----------
    own : T
        What it keeps.
    facts : mapping of str to str
        What has to be the same on all ranks.
    shared : U
        What the others have to know of it.
    """

    own: T
    facts: Mapping[str, str]
    shared: U


def agree(
    group: ProcessGroup, verb: str, check: Callable[[], Checked[T, U]], timeout: Timeout = None
) -> tuple[T, list[U]]:
    """Check arguments on each rank, and raise on all of them if they are wrong on one, or differ.

    Returns
    -------
    own : T
        What this rank keeps.
    shared : list of U
        What each rank says of what it has.
    """
    checked: Checked[T, U] | DistributedError
    try:
        checked = check()
        sent: Any = (checked.facts, checked.shared)
    except DistributedError as error:
        checked = sent = error
    everyone = all_gather_object(sent, group, timeout=timeout)
    if isinstance(checked, DistributedError):
        raise checked
    for theirs in everyone:
        if isinstance(theirs, DistributedError):
            raise theirs
    for name in checked.facts:
        ranks: dict[str, list[int]] = {}
        for rank, (facts, _) in enumerate(everyone):
            ranks.setdefault(facts[name], []).append(rank)
        if len(ranks) > 1:
            # The fewest first: they are the likeliest to be wrong.
            odd = sorted(ranks.items(), key=lambda item: len(item[1]))
            given = "; ".join(f"rank {format_ranges(who)}: {value}" for value, who in odd)
            raise CollectiveMismatchError(
                f"{verb} on {group}: the ranks gave different {name}: {given}. Nothing has been "
                "changed, and the group can still be used; give the same on all ranks"
            )
    return checked.own, [shared for _, shared in everyone]


def check_mesh(mesh: DeviceMesh, what: str) -> None:
    """Raise unless something is a mesh."""
    if not isinstance(mesh, DeviceMesh):
        raise UnsupportedOperationError(
            f"{what}: mesh must be a DeviceMesh, such as DeviceMesh(world, all=-1); got {mesh!r}"
        )


def check_same_ranks(mesh: DeviceMesh, other: DeviceMesh, what: str) -> None:
    """Raise unless two meshes have the same ranks."""
    check_mesh(other, what)
    if other.base is not mesh.base or sorted(other.ranks) != sorted(mesh.ranks):
        raise UnsupportedOperationError(
            f"{what}: an array moves to a mesh of the same ranks, made of the same group; it is on "
            f"{mesh}, ranks {format_ranges(mesh.ranks)}, and is to move to {other}, ranks "
            f"{format_ranges(other.ranks)}"
        )


def check_partial(placements: Sequence[Placement], dtype: DType, what: str) -> None:
    """Raise unless arrays of this dtype can be combined as placements say."""
    for placement in placements:
        if isinstance(placement, Partial) and (placement.op, dtype) not in REDUCTIONS:
            offered = [op.name for op in ReduceOp if (op, dtype) in REDUCTIONS]
            raise UnsupportedOperationError(
                f"{what}: {placement} of {dtype} has no meaning; {dtype} is reduced by "
                f"{', '.join(offered) or 'nothing'}"
            )


def sum_shapes(
    shapes: Sequence[tuple[int, ...]], mesh: DeviceMesh, placements: Sequence[Placement]
) -> tuple[int, ...]:
    """Return the shape of the whole array from those of all ranks' parts."""
    sizes = np.array(shapes, np.int64).reshape(*mesh.sizes, -1 if shapes[0] else 0)
    shape = []
    for d in range(len(shapes[0])):
        along = tuple(slice(None) if one == Shard(d) else 0 for one in placements)
        shape.append(int(sizes[..., d][along].sum()))
    return tuple(shape)


def memory_of(x: Array) -> str:
    """Return where an array lies, in words."""
    return "on a device" if is_device(x) else "on the host"
