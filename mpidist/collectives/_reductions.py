"""Collectives in which every rank holds one whole array: barrier, broadcast, reductions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpidist._types import SUM, Array, ReduceOp
from mpidist.backends.verbs import (
    AllReduce,
    Barrier,
    Broadcast,
    Planned,
    Reduce,
    ReduceScatter,
)
from mpidist.backends.work import Work
from mpidist.collectives._checks import (
    check_array,
    check_rank,
    check_reduction,
    cut_rows,
    elements_in,
    flat_source,
    is_plain,
    land,
    nothing,
    overlap,
    separate,
)
from mpidist.group.group import ProcessGroup, check_group
from mpidist.group.operations import Timeout


def barrier(group: ProcessGroup, *, timeout: Timeout = None) -> None:
    """Return when all ranks have called it.

    Parameters
    ----------
    group : ProcessGroup
        The ranks taking part.
    timeout : float or datetime.timedelta, optional
        Seconds for this call; the group's when omitted.

    Raises
    ------
    CollectiveTimeoutError
        If a rank does not arrive within the group's timeout.

    Notes
    -----
    Collective over `group`; blocks. ceil(log2 p) messages of 1 byte per rank.
    """
    check_group(group, "barrier")
    group.operations.run(Barrier(), nothing, timeout)


def ibarrier(group: ProcessGroup, *, timeout: Timeout = None) -> Work[None]:
    """Start a `barrier`; the Work is complete when all ranks have called it."""
    check_group(group, "ibarrier")
    return group.operations.start(Barrier(), nothing, timeout)


def plan_all_reduce(
    x: Array, group: ProcessGroup, op: ReduceOp, out: Array | None
) -> Planned[Array]:
    """Check the arguments of `all_reduce` and prepare it."""
    if (out is x or out is None) and is_plain(x):
        check_reduction(x, op, "all_reduce", group)
        flat = x if x.ndim == 1 else x.reshape(-1)
        if out is x:
            return AllReduce(flat, flat, op, shape=x.shape), lambda: x
        fresh = np.empty(x.shape, x.dtype)
        return AllReduce(flat, fresh.reshape(-1), op, shape=x.shape), lambda: fresh
    x = check_array(x, "all_reduce", group)
    check_reduction(x, op, "all_reduce", group)
    flat, finish = land(out, x.shape, x, verb="all_reduce", group=group)
    source = separate(flat_source(x), flat, out)
    return AllReduce(source, flat, op, shape=x.shape), finish


def all_reduce(
    x: Array,
    group: ProcessGroup,
    *,
    op: ReduceOp = SUM,
    out: Array | None = None,
    timeout: Timeout = None,
) -> Array:
    """Combine `x` of all ranks, element by element; all get the result.

    Parameters
    ----------
    x : Array, any shape and dtype
        The same shape and dtype on every rank.
    group : ProcessGroup
        The ranks taking part.
    op : ReduceOp, optional
        How to combine.
    out : Array, shape and dtype of `x`, optional
        Where to write the result; ``out=x`` is in place. Allocated when omitted.
    timeout : float or datetime.timedelta, optional
        Seconds for this call; the group's when omitted.

    Returns
    -------
    Array, shape and dtype of `x`
        The same bits on all ranks; `out` itself when given.

    Raises
    ------
    UnsupportedOperationError
        If the group does not offer `op` for this dtype.
    SizeMismatchError
        If `out` does not fit.
    CollectiveTimeoutError
        If a rank does not arrive within the group's timeout.

    Notes
    -----
    Collective over `group`; blocks. Ranks of one node sum by shared memory, in rank order, in
    registered memory without sending or copying anything (see `ProcessGroup.empty`); else about
    2 (p - 1) / p of the bytes of `x` are sent per rank. float16 and bfloat16 are summed in float32
    and rounded once.
    """
    try:
        if out is x and timeout is None and group.operations.repeat_sum(x, op):
            return x
    except (AttributeError, TypeError):
        check_reduction(check_array(x, "all_reduce", group), op, "all_reduce", group)
        raise
    plan = plan_all_reduce(x, group, op, out)
    return group.operations.run(*plan, timeout)


def iall_reduce(
    x: Array,
    group: ProcessGroup,
    *,
    op: ReduceOp = SUM,
    out: Array | None = None,
    timeout: Timeout = None,
) -> Work[Array]:
    """Start an `all_reduce`; `x` and `out` belong to it until the Work is complete."""
    plan = plan_all_reduce(x, group, op, out)
    return group.operations.start(*plan, timeout)


def plan_broadcast(x: Array, group: ProcessGroup, root: int, out: Array | None) -> Planned[Array]:
    """Check the arguments of `broadcast` and prepare it."""
    root = check_rank(root, "broadcast", group)
    x = check_array(x, "broadcast", group)
    flat, finish = land(out, x.shape, x, verb="broadcast", group=group)
    if group.rank == root:
        source = separate(flat_source(x), flat, out)
        if source is not flat:
            flat[...] = source
    return Broadcast(flat, root, shape=x.shape), finish


def broadcast(
    x: Array,
    group: ProcessGroup,
    *,
    root: int = 0,
    out: Array | None = None,
    timeout: Timeout = None,
) -> Array:
    """Give `x` of one rank to all.

    Parameters
    ----------
    x : Array, any shape and dtype
        The same shape and dtype on every rank; its values count on `root` only.
    group : ProcessGroup
        The ranks taking part.
    root : int, optional
        Whose values.
    out : Array, shape and dtype of `x`, optional
        Where to write them; ``out=x`` is in place. Allocated when omitted.
    timeout : float or datetime.timedelta, optional
        Seconds for this call; the group's when omitted.

    Returns
    -------
    Array, shape and dtype of `x`
        The root's values; `out` itself when given.

    Raises
    ------
    InvalidRankError
        If `root` is not a rank of the group.
    SizeMismatchError
        If `out` does not fit.
    CollectiveTimeoutError
        If a rank does not arrive within the group's timeout.

    Notes
    -----
    Collective over `group`; blocks. A binomial tree: at most ceil(log2 p) times `x` per rank.
    """
    plan = plan_broadcast(x, group, root, out)
    return group.operations.run(*plan, timeout)


def ibroadcast(
    x: Array,
    group: ProcessGroup,
    *,
    root: int = 0,
    out: Array | None = None,
    timeout: Timeout = None,
) -> Work[Array]:
    """Start a `broadcast`; `x` and `out` belong to it until the Work is complete."""
    plan = plan_broadcast(x, group, root, out)
    return group.operations.start(*plan, timeout)


def plan_reduce(
    x: Array, group: ProcessGroup, root: int, op: ReduceOp, out: Array | None
) -> Planned[Array | None]:
    """Check the arguments of `reduce` and prepare it."""
    root = check_rank(root, "reduce", group)
    x = check_array(x, "reduce", group)
    check_reduction(x, op, "reduce", group)
    source = flat_source(x)
    if group.rank != root:
        return Reduce(source, None, op, root, shape=x.shape), nothing
    flat, finish = land(out, x.shape, x, verb="reduce", group=group)
    source = separate(source, flat, out)
    return Reduce(source, flat, op, root, shape=x.shape), finish


def reduce(
    x: Array,
    group: ProcessGroup,
    *,
    root: int = 0,
    op: ReduceOp = SUM,
    out: Array | None = None,
    timeout: Timeout = None,
) -> Array | None:
    """Combine `x` of all ranks, element by element; one rank gets the result.

    Parameters
    ----------
    x : Array, any shape and dtype
        The same shape and dtype on every rank.
    group : ProcessGroup
        The ranks taking part.
    root : int, optional
        Who gets the result.
    op : ReduceOp, optional
        How to combine.
    out : Array, shape and dtype of `x`, optional
        Where `root` writes the result; ``out=x`` is in place. Ignored elsewhere.
    timeout : float or datetime.timedelta, optional
        Seconds for this call; the group's when omitted.

    Returns
    -------
    Array or None
        On `root` the result, `out` itself when given; elsewhere None.

    Raises
    ------
    InvalidRankError, UnsupportedOperationError, SizeMismatchError, CollectiveTimeoutError
        As `broadcast` and `all_reduce`.

    Notes
    -----
    Collective over `group`; blocks. At most about the bytes of `x` sent per rank.
    """
    plan = plan_reduce(x, group, root, op, out)
    return group.operations.run(*plan, timeout)


def ireduce(
    x: Array,
    group: ProcessGroup,
    *,
    root: int = 0,
    op: ReduceOp = SUM,
    out: Array | None = None,
    timeout: Timeout = None,
) -> Work[Array | None]:
    """Start a `reduce`; `x` and `out` belong to it until the Work is complete."""
    plan = plan_reduce(x, group, root, op, out)
    return group.operations.start(*plan, timeout)


def plan_reduce_scatter(
    x: Array,
    group: ProcessGroup,
    op: ReduceOp,
    out: Array | None,
    counts: Sequence[int] | None,
) -> Planned[Array]:
    """Check the arguments of `reduce_scatter` and prepare it."""
    x = check_array(x, "reduce_scatter", group)
    check_reduction(x, op, "reduce_scatter", group)
    rows = cut_rows(x.shape, group, counts, "reduce_scatter")
    shape = (rows[group.rank], *x.shape[1:])
    flat, finish = land(out, shape, x, verb="reduce_scatter", group=group)
    source = flat_source(x)
    if out is not None and overlap(source, flat):
        source = source.copy()
    counts = elements_in(rows, x.shape)
    return ReduceScatter(source, flat, counts, op, shape=x.shape[1:], rows=rows), finish


def reduce_scatter(
    x: Array,
    group: ProcessGroup,
    *,
    op: ReduceOp = SUM,
    out: Array | None = None,
    counts: Sequence[int] | None = None,
    timeout: Timeout = None,
) -> Array:
    """Combine `x` of all ranks, element by element; each keeps its rows of the result.

    Parameters
    ----------
    x : Array, shape (size * n, ...) or (sum(counts), ...), any dtype
        The same shape and dtype on every rank: one block of rows for each.
    group : ProcessGroup
        The ranks taking part.
    op : ReduceOp, optional
        How to combine.
    out : Array, shape (n, ...) or (counts[rank], ...), dtype of `x`, optional
        Where to write the result. Allocated when omitted.
    counts : sequence of int, optional
        Rows for each rank, the same list on all, where they differ.
    timeout : float or datetime.timedelta, optional
        Seconds for this call; the group's when omitted.

    Returns
    -------
    Array, shape (n, ...) or (counts[rank], ...)
        This rank's rows; `out` itself when given.

    Raises
    ------
    UnsupportedOperationError
        If the group does not offer `op` for this dtype.
    SizeMismatchError
        If the rows of `x` cannot be shared out so, or `out` does not fit.
    CollectiveTimeoutError
        If a rank does not arrive within the group's timeout.

    Notes
    -----
    Collective over `group`; blocks. p - 1 messages, (p - 1) / p of the bytes of `x`.
    """
    plan = plan_reduce_scatter(x, group, op, out, counts)
    return group.operations.run(*plan, timeout)


def ireduce_scatter(
    x: Array,
    group: ProcessGroup,
    *,
    op: ReduceOp = SUM,
    out: Array | None = None,
    counts: Sequence[int] | None = None,
    timeout: Timeout = None,
) -> Work[Array]:
    """Start a `reduce_scatter`; `x` and `out` belong to it until the Work is complete."""
    plan = plan_reduce_scatter(x, group, op, out, counts)
    return group.operations.start(*plan, timeout)
