"""Collectives on lists of arrays: many small ones cost one operation.

The lists hold arrays of any shapes and dtypes, the same on every rank. Arrays of the host are
packed: there is one collective per dtype, and one copy of every array before and after it. Arrays
of a device are not copied: NCCL takes all of them in one group of calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Literal
from zlib import crc32

import numpy as np

from mpidist._types import SUM, Array, DType, ReduceOp
from mpidist.arrays.flat import FlatBuffer
from mpidist.arrays.namespaces import array_namespace, is_device, is_host
from mpidist.backends.verbs import Barrier, Planned, Together
from mpidist.backends.work import Work
from mpidist.collectives._checks import (
    check_array,
    check_out,
    cut_rows,
    native_dtype,
    nothing,
    rows_of,
)
from mpidist.collectives._gathers import plan_all_gather
from mpidist.collectives._reductions import plan_all_reduce, plan_broadcast, plan_reduce_scatter
from mpidist.errors import SizeMismatchError
from mpidist.group import ProcessGroup
from mpidist.group.operations import Timeout

_NAMED = 4
"""Arrays of a list that are described one by one."""


def _start(
    verb: str,
    arrays: Sequence[Array],
    group: ProcessGroup,
    outs: Sequence[Array] | None,
    plan: Callable[[Array, Array | None], Planned[Array]],
    timeout: Timeout,
    *,
    shape: Callable[[Array], tuple[int, ...]] = lambda x: x.shape,
    joined: Literal["neither", "inputs", "results"] = "neither",
) -> Work[list[Array]]:
    """Start the collectives of a list.

    `plan` plans the collective on an array, or on a packed one with a row for each part. A result
    has the shape ``shape(x)``. Either the inputs or the results may be `joined`: they consist of
    the parts of all ranks.
    """
    arrays = [check_array(x, verb, group, name=f"arrays[{i}]") for i, x in enumerate(arrays)]
    results, targets = _results([shape(x) for x in arrays], arrays, outs, verb, group)
    parts = [group.size if joined == which else 1 for which in ("inputs", "results")]
    plans: list[Planned[Any]] = []
    listed = _describe_list(arrays)
    for dtype, indices in _by_dtype(arrays).items():
        rows = _rows(arrays, indices, parts[0])
        packed = np.empty((parts[0], FlatBuffer.length_of(_shapes(rows[0]))), dtype)
        for row, inputs in zip(packed, rows, strict=True):
            FlatBuffer(_shapes(inputs), dtype, storage=row).pack(inputs)
        call, finish = plan(packed, packed if joined == "neither" else None)
        unpack = partial(_unpack, finish, _rows(targets, indices, parts[1]))
        plans.append((call, unpack))
    devices = [plan(x, out) for x, out in zip(arrays, targets, strict=True) if is_device(x)]
    if devices:
        plans.append(_together(devices))
    if not plans:
        # Nothing moves, but the others may have called with a longer list.
        plans.append((Barrier(), nothing))
    breaks = len(plans) > 1
    # None is started before all are known to be good.
    calls = [(replace(call, listed=listed, breaks=breaks), finish) for call, finish in plans]
    works = [group.operations.start(*planned, timeout) for planned in calls]
    return Work.all(works).then(lambda _: results)


def _together(plans: Sequence[Planned[Array]]) -> Planned[list[Array]]:
    """Make one operation of several on device arrays."""
    return Together(tuple(call for call, _ in plans)), lambda: [finish() for _, finish in plans]


def _describe_list(arrays: Sequence[Array]) -> str:
    """Describe the arrays of a list that differ if any dtype, shape or the order does."""
    return _describe_kinds(tuple((native_dtype(x), x.shape) for x in arrays))


@lru_cache(128)
def _describe_kinds(arrays: tuple[tuple[DType, tuple[int, ...]], ...]) -> str:
    kinds = [f"{dtype}{list(shape)}" for dtype, shape in arrays]
    if len(kinds) <= _NAMED:
        return f"{len(kinds)} arrays: {', '.join(kinds)}" if kinds else "0 arrays"
    checksum = crc32(" ".join(kinds).encode())
    return f"{len(kinds)} arrays: {', '.join(kinds[:_NAMED])}, ... (checksum {checksum:08x})"


def _rows(arrays: Sequence[Array], indices: Sequence[int], parts: int) -> list[dict[str, Array]]:
    """Return each rank's part of the arrays at these places: views of their rows."""
    if parts == 1:
        return [{str(index): arrays[index] for index in indices}]
    counts = {index: len(arrays[index]) // parts for index in indices}
    return [
        {
            str(index): arrays[index][part * count : (part + 1) * count]
            for index, count in counts.items()
        }
        for part in range(parts)
    ]


def _shapes(arrays: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    return {name: x.shape for name, x in arrays.items()}


def _unpack(finish: Callable[[], Array], rows: Sequence[dict[str, Array]]) -> None:
    """Copy a packed result to the arrays; called when it has arrived, also if no thread waits."""
    packed = finish().reshape(len(rows), -1)
    for row, outs in zip(packed, rows, strict=True):
        FlatBuffer(_shapes(outs), packed.dtype, storage=row).unpack(outs)


def _by_dtype(arrays: Sequence[Array]) -> dict[DType, list[int]]:
    by_dtype: dict[DType, list[int]] = {}
    for index, x in enumerate(arrays):
        if is_host(x):
            by_dtype.setdefault(native_dtype(x), []).append(index)
    return by_dtype


def _results(
    shapes: Sequence[tuple[int, ...]],
    arrays: Sequence[Array],
    outs: Sequence[Array] | None,
    verb: str,
    group: ProcessGroup,
) -> tuple[list[Array], list[Array]]:
    """Return the arrays of the results, the caller's or fresh ones, and plain views to write to."""
    wanted = list(zip(shapes, arrays, strict=True))
    if outs is None:
        fresh = [array_namespace(x).empty(shape, native_dtype(x)) for shape, x in wanted]
        return fresh, fresh
    if len(outs) != len(wanted):
        raise SizeMismatchError(
            f"{verb} on {group}: outs must hold one array per result, {len(wanted)} in all; "
            f"got {len(outs)}"
        )
    targets = [
        check_out(out, shape, x, verb=verb, group=group, name=f"outs[{index}]")
        for index, (out, (shape, x)) in enumerate(zip(outs, wanted, strict=True))
    ]
    return list(outs), targets


def all_reduce_coalesced(
    arrays: Sequence[Array],
    group: ProcessGroup,
    *,
    op: ReduceOp = SUM,
    outs: Sequence[Array] | None = None,
    timeout: Timeout = None,
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
    timeout : float or datetime.timedelta, optional
        Seconds for this call; the group's when omitted.

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
    Collective over `group`; blocks. One all_reduce per dtype of the host's arrays, and one
    group of NCCL's calls for those of a device.
    """
    return iall_reduce_coalesced(arrays, group, op=op, outs=outs, timeout=timeout).wait()


def iall_reduce_coalesced(
    arrays: Sequence[Array],
    group: ProcessGroup,
    *,
    op: ReduceOp = SUM,
    outs: Sequence[Array] | None = None,
    timeout: Timeout = None,
) -> Work[list[Array]]:
    """Start an `all_reduce_coalesced`; host inputs are packed, and may be changed."""
    return _start(
        "all_reduce_coalesced",
        arrays,
        group,
        outs,
        lambda x, out: plan_all_reduce(x, group, op, out),
        timeout,
    )


def broadcast_coalesced(
    arrays: Sequence[Array],
    group: ProcessGroup,
    *,
    root: int = 0,
    outs: Sequence[Array] | None = None,
    timeout: Timeout = None,
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
    timeout : float or datetime.timedelta, optional
        Seconds for this call; the group's when omitted.

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
    Collective over `group`; blocks. One broadcast per dtype of the host's arrays, and one
    group of NCCL's calls for those of a device.
    """
    return ibroadcast_coalesced(arrays, group, root=root, outs=outs, timeout=timeout).wait()


def ibroadcast_coalesced(
    arrays: Sequence[Array],
    group: ProcessGroup,
    *,
    root: int = 0,
    outs: Sequence[Array] | None = None,
    timeout: Timeout = None,
) -> Work[list[Array]]:
    """Start a `broadcast_coalesced`; host inputs are packed, and may be changed."""
    return _start(
        "broadcast_coalesced",
        arrays,
        group,
        outs,
        lambda x, out: plan_broadcast(x, group, root, out),
        timeout,
    )


def all_gather_coalesced(
    arrays: Sequence[Array],
    group: ProcessGroup,
    *,
    outs: Sequence[Array] | None = None,
    timeout: Timeout = None,
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
    timeout : float or datetime.timedelta, optional
        Seconds for this call; the group's when omitted.

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
    Collective over `group`; blocks. One all_gather per dtype of the host's arrays, and one
    group of NCCL's calls for those of a device.
    """
    return iall_gather_coalesced(arrays, group, outs=outs, timeout=timeout).wait()


def iall_gather_coalesced(
    arrays: Sequence[Array],
    group: ProcessGroup,
    *,
    outs: Sequence[Array] | None = None,
    timeout: Timeout = None,
) -> Work[list[Array]]:
    """Start an `all_gather_coalesced`; host inputs are packed, and may be changed."""
    return _start(
        "all_gather_coalesced",
        arrays,
        group,
        outs,
        lambda x, out: plan_all_gather(x, group, out, None),
        timeout,
        shape=lambda x: (rows_of(x)[0] * group.size, *rows_of(x)[1:]),
        joined="results",
    )


def reduce_scatter_coalesced(
    arrays: Sequence[Array],
    group: ProcessGroup,
    *,
    op: ReduceOp = SUM,
    outs: Sequence[Array] | None = None,
    timeout: Timeout = None,
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
    timeout : float or datetime.timedelta, optional
        Seconds for this call; the group's when omitted.

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
    Collective over `group`; blocks. One reduce_scatter per dtype of the host's arrays, and one
    group of NCCL's calls for those of a device.
    """
    return ireduce_scatter_coalesced(arrays, group, op=op, outs=outs, timeout=timeout).wait()


def ireduce_scatter_coalesced(
    arrays: Sequence[Array],
    group: ProcessGroup,
    *,
    op: ReduceOp = SUM,
    outs: Sequence[Array] | None = None,
    timeout: Timeout = None,
) -> Work[list[Array]]:
    """Start a `reduce_scatter_coalesced`; host inputs are packed, and may be changed."""
    verb = "reduce_scatter_coalesced"
    return _start(
        verb,
        arrays,
        group,
        outs,
        lambda x, out: plan_reduce_scatter(x, group, op, out, None),
        timeout,
        shape=lambda x: (cut_rows(x.shape, group, None, verb)[0], *x.shape[1:]),
        joined="inputs",
    )
