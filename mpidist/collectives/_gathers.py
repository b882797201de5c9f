"""Collectives that concatenate the rows of all ranks: gathers."""

from __future__ import annotations

from collections.abc import Sequence

from mpidist._types import Array
from mpidist.backends.verbs import AllGather, Gather, Planned
from mpidist.backends.work import Work
from mpidist.collectives._checks import (
    check_array,
    check_rank,
    contributed_rows,
    elements_in,
    flat_source,
    land,
    nothing,
    rows_of,
    separate,
)
from mpidist.group import ProcessGroup
from mpidist.group.operations import Timeout


def plan_all_gather(
    x: Array, group: ProcessGroup, out: Array | None, counts: Sequence[int] | None
) -> Planned[Array]:
    """Check the arguments of `all_gather` and prepare it."""
    x = check_array(x, "all_gather", group)
    rows = contributed_rows(x, group, counts, "all_gather")
    shape = (sum(rows), *rows_of(x)[1:])
    flat, finish = land(out, shape, x, verb="all_gather", group=group)
    elements = elements_in(rows, shape)
    own = _own_part(flat, elements, group)
    source = separate(flat_source(x), own, out)
    if source is not own:
        own[...] = source
    # Always in place: MPI wants either all ranks to be, or none, and a rank cannot know whether
    # the `x` of the others are parts of their `out`, nor tell it of an empty x of its own.
    return AllGather(None, flat, elements, shape=shape[1:], rows=rows), finish


def _own_part(flat: Array, elements: Sequence[int], group: ProcessGroup) -> Array:
    """Return this rank's part of a gathered array."""
    start = sum(elements[: group.rank])
    return flat[start : start + elements[group.rank]]


def all_gather(
    x: Array,
    group: ProcessGroup,
    *,
    out: Array | None = None,
    counts: Sequence[int] | None = None,
    timeout: Timeout = None,
) -> Array:
    """Concatenate `x` of all ranks along the first dimension; all get the result.

    Parameters
    ----------
    x : Array, shape (n, ...), any dtype
        The same shape on every rank; with `counts`, the same but for the first dimension.
    group : ProcessGroup
        The ranks taking part.
    out : Array, shape (size * n, ...) or (sum(counts), ...), dtype of `x`, optional
        Where to write the result. If `x` is this rank's part of `out`, it stays where it is.
    counts : sequence of int, optional
        Rows of each rank, the same list on all, where they differ.
    timeout : float or datetime.timedelta, optional
        Seconds for this call; the group's when omitted.

    Returns
    -------
    Array, shape (size * n, ...) or (sum(counts), ...)
        `out` itself when given. Of 0-d arrays the result has shape (size,).

    Raises
    ------
    SizeMismatchError
        If `counts` or `out` do not fit.
    CollectiveTimeoutError
        If a rank does not arrive within the group's timeout.

    Notes
    -----
    Collective over `group`; blocks. A ring: p - 1 messages, the bytes of all parts but one.
    """
    plan = plan_all_gather(x, group, out, counts)
    return group.operations.run(*plan, timeout)


def iall_gather(
    x: Array,
    group: ProcessGroup,
    *,
    out: Array | None = None,
    counts: Sequence[int] | None = None,
    timeout: Timeout = None,
) -> Work[Array]:
    """Start an `all_gather`; `x` and `out` belong to it until the Work is complete."""
    plan = plan_all_gather(x, group, out, counts)
    return group.operations.start(*plan, timeout)


def plan_gather(
    x: Array, group: ProcessGroup, root: int, out: Array | None, counts: Sequence[int] | None
) -> Planned[Array | None]:
    """Check the arguments of `gather` and prepare it."""
    root = check_rank(root, "gather", group)
    x = check_array(x, "gather", group)
    rows = contributed_rows(x, group, counts, "gather")
    shape = (sum(rows), *rows_of(x)[1:])
    elements = elements_in(rows, shape)
    source = flat_source(x)
    if group.rank != root:
        return Gather(source, None, elements, root, shape=shape[1:], rows=rows), nothing
    flat, finish = land(out, shape, x, verb="gather", group=group)
    own = _own_part(flat, elements, group)
    source = separate(source, own, out)
    if source is not own:
        source = separate(source, flat, out)
    return Gather(source, flat, elements, root, shape=shape[1:], rows=rows), finish


def gather(
    x: Array,
    group: ProcessGroup,
    *,
    root: int = 0,
    out: Array | None = None,
    counts: Sequence[int] | None = None,
    timeout: Timeout = None,
) -> Array | None:
    """Concatenate `x` of all ranks along the first dimension; one rank gets the result.

    Parameters
    ----------
    x : Array, shape (n, ...), any dtype
        The same shape on every rank; with `counts`, the same but for the first dimension.
    group : ProcessGroup
        The ranks taking part.
    root : int, optional
        Who gets the result.
    out : Array, shape (size * n, ...) or (sum(counts), ...), dtype of `x`, optional
        Where `root` writes the result. If its `x` is its part of `out`, it stays where it is.
        Ignored elsewhere.
    counts : sequence of int, optional
        Rows of each rank, the same list on all, where they differ.
    timeout : float or datetime.timedelta, optional
        Seconds for this call; the group's when omitted.

    Returns
    -------
    Array or None
        On `root` the result, `out` itself when given; elsewhere None.

    Raises
    ------
    InvalidRankError, SizeMismatchError, CollectiveTimeoutError
        As `broadcast` and `all_gather`.

    Notes
    -----
    Collective over `group`; blocks. 1 message of the bytes of `x` per rank; the root receives all.
    """
    plan = plan_gather(x, group, root, out, counts)
    return group.operations.run(*plan, timeout)


def igather(
    x: Array,
    group: ProcessGroup,
    *,
    root: int = 0,
    out: Array | None = None,
    counts: Sequence[int] | None = None,
    timeout: Timeout = None,
) -> Work[Array | None]:
    """Start a `gather`; `x` and `out` belong to it until the Work is complete."""
    plan = plan_gather(x, group, root, out, counts)
    return group.operations.start(*plan, timeout)
