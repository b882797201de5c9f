"""Collectives that share out the rows of an array: scatter and all-to-all."""

from __future__ import annotations

from collections.abc import Sequence

from mpidist._types import Array
from mpidist.backends.verbs import AllToAll, Planned, Scatter
from mpidist.backends.work import Work
from mpidist.collectives._checks import (
    check_array,
    check_counts,
    check_rank,
    cut_rows,
    elements_in,
    flat_source,
    land,
    overlap,
)
from mpidist.errors import SizeMismatchError
from mpidist.group import ProcessGroup
from mpidist.group.operations import Timeout


def plan_scatter(
    x: Array | None,
    group: ProcessGroup,
    root: int,
    out: Array | None,
    counts: Sequence[int] | None,
) -> Planned[Array]:
    """Check the arguments of `scatter` and prepare it."""
    root = check_rank(root, "scatter", group)
    if x is None and (out is None or group.rank == root):
        raise SizeMismatchError(
            f"scatter on {group}: the root needs x, and the others need out, or an x of the "
            "root's shape and dtype, to know what they will receive; got neither"
        )
    if x is None:
        assert out is not None, "checked above"
        return _receive_scatter(out, group, root, counts)
    x = check_array(x, "scatter", group)
    rows = cut_rows(x.shape, group, counts, "scatter")
    shape = (rows[group.rank], *x.shape[1:])
    flat, finish = land(out, shape, x, verb="scatter", group=group)
    elements = elements_in(rows, x.shape)
    if group.rank != root:
        return Scatter(None, flat, elements, root, shape=x.shape[1:], rows=rows), finish
    source = flat_source(x)
    if out is not None and overlap(source, flat):
        source = source.copy()
    return Scatter(source, flat, elements, root, shape=x.shape[1:], rows=rows), finish


def _receive_scatter(
    out: Array, group: ProcessGroup, root: int, counts: Sequence[int] | None
) -> Planned[Array]:
    """Plan for a rank that knows only its own rows."""
    check_array(out, "scatter", group, name="out")
    rows = (out.shape[:1] or (1,)) * group.size
    if counts is not None:
        rows = check_counts(counts, "scatter", group)
    if out.shape[:1] != rows[group.rank : group.rank + 1]:
        raise SizeMismatchError(
            f"scatter on {group}: out must have {rows[group.rank]} rows, got shape {out.shape}"
        )
    flat, finish = land(out, out.shape, out, verb="scatter", group=group)
    elements = elements_in(rows, out.shape)
    call = Scatter(None, flat, elements, root, shape=out.shape[1:], rows=tuple(rows))
    return call, finish


def scatter(
    x: Array | None,
    group: ProcessGroup,
    *,
    root: int = 0,
    out: Array | None = None,
    counts: Sequence[int] | None = None,
    timeout: Timeout = None,
) -> Array:
    """Cut `x` of one rank into rows for all.

    Parameters
    ----------
    x : Array, shape (size * n, ...) or (sum(counts), ...), any dtype
        What is cut, on `root`. Elsewhere only its shape and dtype count, and it may be None where
        `out` is given.
    group : ProcessGroup
        The ranks taking part.
    root : int, optional
        Whose array.
    out : Array, shape (n, ...) or (counts[rank], ...), dtype of `x`, optional
        Where to write this rank's rows. Allocated when omitted.
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
    InvalidRankError
        If `root` is not a rank of the group.
    SizeMismatchError
        If the rows cannot be shared out so, or `out` does not fit.
    CollectiveTimeoutError
        If a rank does not arrive within the group's timeout.

    Notes
    -----
    Collective over `group`; blocks. The root sends p - 1 messages, the others none.
    """
    plan = plan_scatter(x, group, root, out, counts)
    return group.operations.run(*plan, timeout)


def iscatter(
    x: Array | None,
    group: ProcessGroup,
    *,
    root: int = 0,
    out: Array | None = None,
    counts: Sequence[int] | None = None,
    timeout: Timeout = None,
) -> Work[Array]:
    """Start a `scatter`; `x` and `out` belong to it until the Work is complete."""
    plan = plan_scatter(x, group, root, out, counts)
    return group.operations.start(*plan, timeout)


def plan_all_to_all(
    x: Array,
    group: ProcessGroup,
    out: Array | None,
    counts: Sequence[int] | None,
    recv_counts: Sequence[int] | None,
) -> Planned[Array]:
    """Check the arguments of `all_to_all` and prepare it."""
    x = check_array(x, "all_to_all", group)
    if (counts is None) != (recv_counts is None):
        raise SizeMismatchError(
            f"all_to_all on {group}: give both counts and recv_counts, or neither; a rank cannot "
            "know what the others send it"
        )
    sent = cut_rows(x.shape, group, counts, "all_to_all")
    received = sent if recv_counts is None else check_counts(recv_counts, "all_to_all", group)
    if sent[group.rank] != received[group.rank]:
        raise SizeMismatchError(
            f"all_to_all on {group}: counts sends {sent[group.rank]} rows to this rank itself, "
            f"recv_counts expects {received[group.rank]}"
        )
    shape = (sum(received), *x.shape[1:])
    flat, finish = land(out, shape, x, verb="all_to_all", group=group)
    source = flat_source(x)
    if out is not None and overlap(source, flat):
        source = source.copy()
    elements = elements_in(sent, x.shape), elements_in(received, x.shape)
    return AllToAll(source, flat, *elements, shape=x.shape[1:], rows=()), finish


def all_to_all(
    x: Array,
    group: ProcessGroup,
    *,
    out: Array | None = None,
    counts: Sequence[int] | None = None,
    recv_counts: Sequence[int] | None = None,
    timeout: Timeout = None,
) -> Array:
    """Send block `i` of the rows of `x` to rank `i`, and concatenate the received blocks.

    Parameters
    ----------
    x : Array, shape (size * n, ...) or (sum(counts), ...), any dtype
        One block of rows for each rank.
    group : ProcessGroup
        The ranks taking part.
    out : Array, shape (size * n, ...) or (sum(recv_counts), ...), dtype of `x`, optional
        Where to write the result; ``out=x`` is allowed and costs a copy. Allocated when omitted.
    counts, recv_counts : sequence of int, optional
        Rows for, and from, each rank, where they differ; give both or neither.
    timeout : float or datetime.timedelta, optional
        Seconds for this call; the group's when omitted.

    Returns
    -------
    Array, shape (size * n, ...) or (sum(recv_counts), ...)
        The blocks of all ranks for this one, in their order; `out` itself when given.

    Raises
    ------
    SizeMismatchError
        If the rows cannot be shared out so, or `out` does not fit.
    CollectiveTimeoutError
        If a rank does not arrive within the group's timeout.

    Notes
    -----
    Collective over `group`; blocks. p - 1 messages, the bytes of all blocks but one.
    """
    plan = plan_all_to_all(x, group, out, counts, recv_counts)
    return group.operations.run(*plan, timeout)


def iall_to_all(
    x: Array,
    group: ProcessGroup,
    *,
    out: Array | None = None,
    counts: Sequence[int] | None = None,
    recv_counts: Sequence[int] | None = None,
    timeout: Timeout = None,
) -> Work[Array]:
    """Start an `all_to_all`; `x` and `out` belong to it until the Work is complete."""
    plan = plan_all_to_all(x, group, out, counts, recv_counts)
    return group.operations.start(*plan, timeout)
