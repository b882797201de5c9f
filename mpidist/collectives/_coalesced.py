"""Collectives on lists of arrays: packed by dtype, so that many small ones cost one operation.

The lists hold arrays of any shapes and dtypes, the same on every rank. There is one collective per
dtype, and one copy of every array before and after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np

from mpidist._types import SUM, Array, DType, ReduceOp
from mpidist.backends.work import Work
from mpidist.collectives._checks import check_array
from mpidist.collectives._gathers import plan_all_gather
from mpidist.collectives._reductions import plan_all_reduce, plan_broadcast, plan_reduce_scatter
from mpidist.collectives._rows import cut_rows, rows_of
from mpidist.errors import SizeMismatchError
from mpidist.flat import FlatBuffer
from mpidist.group import ProcessGroup
from mpidist.pending import Plan

__all__ = [
    "all_gather_coalesced",
    "all_reduce_coalesced",
    "broadcast_coalesced",
    "iall_gather_coalesced",
    "iall_reduce_coalesced",
    "ibroadcast_coalesced",
    "ireduce_scatter_coalesced",
    "reduce_scatter_coalesced",
]

_Shapes: TypeAlias = dict[str, tuple[int, ...]]


class _Together(Work[list[Array]]):
    """Several operations whose results lie in one list."""

    def __init__(self, works: Sequence[Work[None]], outs: list[Array]) -> None:
        self._works = works
        self._outs = outs

    def done(self) -> bool:
        """Return whether all are complete."""
        return all(work.done() for work in self._works)

    def wait(self, timeout: float | None = None) -> list[Array]:
        """Wait for all."""
        for work in self._works:
            work.wait(timeout)
        return self._outs


def _start(
    arrays: Sequence[Array],
    outs: list[Array],
    plan: Callable[[Array], Plan[Array]],
    group: ProcessGroup,
    *,
    parts: tuple[int, int],
) -> Work[list[Array]]:
    """Start one collective per dtype, each on the arrays of that dtype side by side.

    Parameters
    ----------
    arrays, outs : sequence of Array
        Inputs, and where the results go.
    plan : callable
        Plans the collective on a packed array of shape (parts[0], length).
    group : ProcessGroup
        The ranks taking part.
    parts : tuple of int
        How many ranks' parts each input, and each result, consists of.
    """
    works = []
    for dtype, places in _by_dtype(arrays).items():
        flats = {str(place): arrays[place].reshape(parts[0], -1) for place in places}
        shapes: _Shapes = {name: flat.shape[1:] for name, flat in flats.items()}
        packed = np.empty((parts[0], FlatBuffer.length_of(shapes)), dtype)
        for part, row in enumerate(packed):
            buffer = FlatBuffer(shapes, dtype, storage=row)
            buffer.pack({name: flat[part] for name, flat in flats.items()})
        checked = plan(packed)
        unpack = partial(_unpack, checked.finish, shapes, outs, parts[1])
        works.append(group.start(Plan(checked.verb, checked.args, unpack)))
    return _Together(works, outs)


def _unpack(finish: Callable[[], Array], shapes: _Shapes, outs: list[Array], parts: int) -> None:
    """Copy a packed result to the arrays; called when it has come, also if nobody waits."""
    packed = finish().reshape(parts, -1)
    flats = {name: np.empty((parts, *shape), packed.dtype) for name, shape in shapes.items()}
    for part, row in enumerate(packed):
        buffer = FlatBuffer(shapes, packed.dtype, storage=row)
        buffer.unpack({name: flat[part] for name, flat in flats.items()})
    for name, flat in flats.items():
        out = outs[int(name)]
        out[...] = flat.reshape(out.shape)


def _by_dtype(arrays: Sequence[Array]) -> dict[DType, list[int]]:
    places: dict[DType, list[int]] = {}
    for place, x in enumerate(arrays):
        places.setdefault(x.dtype.newbyteorder("="), []).append(place)
    return places


def _results(
    shapes: Sequence[tuple[int, ...]],
    arrays: Sequence[Array],
    outs: Sequence[Array] | None,
    verb: str,
    group: ProcessGroup,
) -> list[Array]:
    """Return an array for each result: the caller's, or fresh ones."""
    wanted = [(shape, x.dtype.newbyteorder("=")) for shape, x in zip(shapes, arrays, strict=True)]
    if outs is None:
        return [np.empty(shape, dtype) for shape, dtype in wanted]
    given = [(out.shape, out.dtype.newbyteorder("=")) for out in outs]
    if wanted != given:
        raise SizeMismatchError(
            f"{verb} on {group}: outs must have the shapes and dtypes {wanted}, got {given}"
        )
    return list(outs)


def _checked(arrays: Sequence[Array], verb: str, group: ProcessGroup) -> list[Array]:
    return [check_array(x, verb, group, name=f"arrays[{place}]") for place, x in enumerate(arrays)]


def all_reduce_coalesced(
    arrays: Sequence[Array],
    group: ProcessGroup,
    *,
    op: ReduceOp = SUM,
    outs: Sequence[Array] | None = None,
) -> list[Array]:
    """`all_reduce` each array of a list.

    Parameters
    ----------
    arrays : sequence of Array
        The same shapes and dtypes on every rank.
    group : ProcessGroup
        The ranks taking part.
    op : ReduceOp, optional
        How to combine.
    outs : sequence of Array, optional
        Where to write the results; ``outs=arrays`` is in place. Allocated when omitted.

    Returns
    -------
    list of Array
        One result per array.

    Raises
    ------
    UnsupportedOperationError, SizeMismatchError, CollectiveTimeoutError
        As `all_reduce`.

    Notes
    -----
    Collective over `group`; blocks. One all_reduce per dtype.
    """
    return iall_reduce_coalesced(arrays, group, op=op, outs=outs).wait()


def iall_reduce_coalesced(
    arrays: Sequence[Array],
    group: ProcessGroup,
    *,
    op: ReduceOp = SUM,
    outs: Sequence[Array] | None = None,
) -> Work[list[Array]]:
    """Start an `all_reduce_coalesced`; the inputs may be changed at once, they are packed."""
    arrays = _checked(arrays, "all_reduce_coalesced", group)
    results = _results([x.shape for x in arrays], arrays, outs, "all_reduce_coalesced", group)
    return _start(
        arrays,
        results,
        lambda packed: plan_all_reduce(packed, group, op, packed),
        group,
        parts=(1, 1),
    )


def broadcast_coalesced(
    arrays: Sequence[Array],
    group: ProcessGroup,
    *,
    root: int = 0,
    outs: Sequence[Array] | None = None,
) -> list[Array]:
    """`broadcast` each array of a list.

    Parameters
    ----------
    arrays : sequence of Array
        The same shapes and dtypes on every rank; the values count on `root` only.
    group : ProcessGroup
        The ranks taking part.
    root : int, optional
        Whose values.
    outs : sequence of Array, optional
        Where to write the results; ``outs=arrays`` is in place. Allocated when omitted.

    Returns
    -------
    list of Array
        The root's values.

    Raises
    ------
    InvalidRankError, SizeMismatchError, CollectiveTimeoutError
        As `broadcast`.

    Notes
    -----
    Collective over `group`; blocks. One broadcast per dtype.
    """
    return ibroadcast_coalesced(arrays, group, root=root, outs=outs).wait()


def ibroadcast_coalesced(
    arrays: Sequence[Array],
    group: ProcessGroup,
    *,
    root: int = 0,
    outs: Sequence[Array] | None = None,
) -> Work[list[Array]]:
    """Start a `broadcast_coalesced`; the inputs may be changed at once, they are packed."""
    arrays = _checked(arrays, "broadcast_coalesced", group)
    results = _results([x.shape for x in arrays], arrays, outs, "broadcast_coalesced", group)
    return _start(
        arrays,
        results,
        lambda packed: plan_broadcast(packed, group, root, packed),
        group,
        parts=(1, 1),
    )


def all_gather_coalesced(
    arrays: Sequence[Array], group: ProcessGroup, *, outs: Sequence[Array] | None = None
) -> list[Array]:
    """`all_gather` each array of a list.

    Parameters
    ----------
    arrays : sequence of Array, shapes (n_i, ...)
        The same shapes and dtypes on every rank.
    group : ProcessGroup
        The ranks taking part.
    outs : sequence of Array, shapes (size * n_i, ...), optional
        Where to write the results. Allocated when omitted.

    Returns
    -------
    list of Array, shapes (size * n_i, ...)
        One result per array.

    Raises
    ------
    SizeMismatchError, CollectiveTimeoutError
        As `all_gather`.

    Notes
    -----
    Collective over `group`; blocks. One all_gather per dtype.
    """
    return iall_gather_coalesced(arrays, group, outs=outs).wait()


def iall_gather_coalesced(
    arrays: Sequence[Array], group: ProcessGroup, *, outs: Sequence[Array] | None = None
) -> Work[list[Array]]:
    """Start an `all_gather_coalesced`; the inputs may be changed at once, they are packed."""
    arrays = _checked(arrays, "all_gather_coalesced", group)
    shapes = [(rows_of(x)[0] * group.size, *rows_of(x)[1:]) for x in arrays]
    results = _results(shapes, arrays, outs, "all_gather_coalesced", group)
    return _start(
        arrays,
        results,
        lambda packed: plan_all_gather(packed, group, None, None),
        group,
        parts=(1, group.size),
    )


def reduce_scatter_coalesced(
    arrays: Sequence[Array],
    group: ProcessGroup,
    *,
    op: ReduceOp = SUM,
    outs: Sequence[Array] | None = None,
) -> list[Array]:
    """`reduce_scatter` each array of a list.

    Parameters
    ----------
    arrays : sequence of Array, shapes (size * n_i, ...)
        The same shapes and dtypes on every rank.
    group : ProcessGroup
        The ranks taking part.
    op : ReduceOp, optional
        How to combine.
    outs : sequence of Array, shapes (n_i, ...), optional
        Where to write the results. Allocated when omitted.

    Returns
    -------
    list of Array, shapes (n_i, ...)
        This rank's rows of each.

    Raises
    ------
    UnsupportedOperationError, SizeMismatchError, CollectiveTimeoutError
        As `reduce_scatter`.

    Notes
    -----
    Collective over `group`; blocks. One reduce_scatter per dtype.
    """
    return ireduce_scatter_coalesced(arrays, group, op=op, outs=outs).wait()


def ireduce_scatter_coalesced(
    arrays: Sequence[Array],
    group: ProcessGroup,
    *,
    op: ReduceOp = SUM,
    outs: Sequence[Array] | None = None,
) -> Work[list[Array]]:
    """Start a `reduce_scatter_coalesced`; the inputs may be changed at once, they are packed."""
    arrays = _checked(arrays, "reduce_scatter_coalesced", group)
    shapes = [
        (cut_rows(x.shape, group, None, "reduce_scatter_coalesced")[0], *x.shape[1:])
        for x in arrays
    ]
    results = _results(shapes, arrays, outs, "reduce_scatter_coalesced", group)
    return _start(
        arrays,
        results,
        lambda packed: plan_reduce_scatter(packed, group, op, None, None),
        group,
        parts=(group.size, 1),
    )
