"""Cases of the coalesced forms and of the forms that carry any object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mpidist import collectives
from mpidist._types import MAX, SUM, Array, ReduceOp
from mpidist.arrays.namespaces import BFLOAT16
from mpidist.errors import (
    CollectiveMismatchError,
    SizeMismatchError,
    UnsupportedOperationError,
)
from mpidist.group import ProcessGroup
from mpidist.testing.contract._landings import fortran
from mpidist.testing.contract._memory import Place
from mpidist.testing.contract._values import (
    byte_swapped,
    check_that,
    combined,
    expect,
    expect_error,
    tolerance,
    values,
)

PARTS: tuple[tuple[tuple[int, ...], Any], ...] = (
    ((3, 2), np.float64),
    ((1,), np.int32),
    ((0, 4), np.float64),
    ((5,), BFLOAT16),
    ((2, 1, 3), np.int32),
    ((700,), np.float64),
)
"""Shapes (the first dimension counts per rank where an array is cut) and dtypes of a list."""


def _lists(
    size: int, device: Place, *, rows_times: int = 1, zero_d: bool = False
) -> list[list[Array]]:
    """Return the list of each rank, on the host."""
    shapes = [
        ((rows_times * shape[0], *shape[1:]), dtype)
        for shape, dtype in PARTS
        if np.dtype(dtype) in device.dtypes
    ]
    if zero_d:
        shapes.append(((), np.float64))
    return [
        [values(shape, np.dtype(dtype), part, rank) for part, (shape, dtype) in enumerate(shapes)]
        for rank in range(size)
    ]


class _Wanted(NamedTuple):
    """A result, and how far it may be off; see `expect`."""

    array: Array
    within: Array | None = None


def _sums(
    lists: list[list[Array]], op: ReduceOp, group: ProcessGroup, device: Place
) -> list[_Wanted]:
    """Return the expected result at each index of the lists."""
    once = device.capabilities(group).halves_rounded_once
    columns = [list(column) for column in zip(*lists, strict=True)]
    return [_Wanted(combined(x, op), tolerance(x, op, round_once=once)) for x in columns]


def _expect(results: Sequence[Any], wanted: Sequence[_Wanted], where: str, device: Place) -> None:
    check_that(len(results) == len(wanted), f"{where} gave {len(results)} arrays")
    for number, (actual, (expected, within)) in enumerate(zip(results, wanted, strict=True)):
        expect(device.take(actual), expected, f"{where}, array {number}", within=within)


def _try(
    verb: str,
    group: ProcessGroup,
    device: Place,
    *,
    lists: list[list[Array]],
    wanted: Sequence[_Wanted],
    **options: Any,
) -> None:
    """Compare the blocking and the immediate form, without and with `outs`."""
    now: Callable[..., list[Array]] = getattr(collectives, f"{verb}_coalesced")
    later: Callable[..., Any] = getattr(collectives, f"i{verb}_coalesced")
    own = [device.put(x) for x in lists[group.rank]]
    outs = [fortran(device.put(np.empty_like(x))) for x, _ in wanted]
    if device.on_host:
        outs = [byte_swapped(x) if x.size % 2 else x for x in outs]
    work = later(own, group, **options)
    results = {
        "": now(own, group, **options),
        "into outs": now(own, group, outs=outs, **options),
        "immediate": work.wait(),
    }
    check_that(all(a is b for a, b in zip(results["into outs"], outs, strict=True)), "not outs")
    check_that(device.on_host or work.synchronize(), f"i{verb}_coalesced: no list")
    check_that(work.done(), f"i{verb}_coalesced: not done after synchronize")
    for how, result in results.items():
        _expect(result, wanted, f"{verb}_coalesced on {group}, {how}", device)


def _part(x: Array, group: ProcessGroup) -> Array:
    """Return this rank's rows."""
    return np.split(x, group.size)[group.rank]


def coalesced(group: ProcessGroup, device: Place) -> None:
    """Reduce, send and gather lists of several shapes and dtypes, and the empty list."""
    size = group.size
    lists = _lists(size, device, zero_d=True)
    for op in (SUM, MAX):
        wanted = _sums(lists, op, group, device)
        _try("all_reduce", group, device, lists=lists, wanted=wanted, op=op)
    for root in {0, size - 1}:
        wanted = [_Wanted(x) for x in lists[root]]
        _try("broadcast", group, device, lists=lists, wanted=wanted, root=root)
    columns = zip(*lists, strict=True)
    wanted = [_Wanted(np.concatenate([np.atleast_1d(x) for x in column])) for column in columns]
    _try("all_gather", group, device, lists=lists, wanted=wanted)
    lists = _lists(size, device, rows_times=size)
    wanted = [
        _Wanted(_part(x, group), None if within is None else _part(within, group))
        for x, within in _sums(lists, SUM, group, device)
    ]
    _try("reduce_scatter", group, device, lists=lists, wanted=wanted)
    for verb in ("all_reduce", "broadcast", "all_gather", "reduce_scatter"):
        check_that(
            getattr(collectives, f"{verb}_coalesced")([], group) == [], f"{verb} of no array"
        )


def coalesced_in_place(group: ProcessGroup, device: Place) -> None:
    """`outs=arrays`, and outs of the wrong number or shape."""
    lists = _lists(group.size, device)
    own = [device.put(x.copy()) for x in lists[group.rank]]
    collectives.all_reduce_coalesced(own, group, outs=own)
    _expect(own, _sums(lists, SUM, group, device), "all_reduce_coalesced in place", device)
    for outs in (own[:-1], own[::-1]):
        expect_error(
            SizeMismatchError,
            partial(collectives.all_reduce_coalesced, own, group, outs=outs),
            "all_reduce_coalesced with other outs",
            "all_reduce_coalesced",
        )


def objects(group: ProcessGroup, _device: Place) -> None:
    """Objects of any kind and size, different on each rank."""
    rank, size = group.rank, group.size
    everyone = [{"rank": r, "text": "é" * (r * 3000), "none": None, 3: (r,)} for r in range(size)]
    for root in range(size):
        got = collectives.broadcast_object(everyone[rank], group, root=root)
        check_that(got == everyone[root], f"broadcast_object from {root} on {group}: {got!r:.80}")
        listed = collectives.gather_object(everyone[rank], group, root=root)
        wanted = everyone if rank == root else None
        check_that(listed == wanted, f"gather_object to {root} on {group}: {listed!r:.80}")
        got = collectives.scatter_object(everyone if rank == root else None, group, root=root)
        check_that(got == everyone[rank], f"scatter_object from {root} on {group}: {got!r:.80}")
    listed = collectives.all_gather_object(everyone[rank], group)
    check_that(listed == everyone, f"all_gather_object on {group}: {listed!r:.80}")
    check_that(collectives.broadcast_object(None, group) is None, "broadcast_object of None")
    arrays = collectives.all_gather_object(np.arange(rank), group)
    for other, x in enumerate(arrays):
        expect(x, np.arange(other), "all_gather_object of arrays")


def objects_without_pickle(group: ProcessGroup, _device: Place) -> None:
    """Raise on all ranks for an object that cannot be pickled, with its own error where it is."""
    rank, size = group.rank, group.size

    def local() -> None:
        """Do nothing; functions inside functions have no pickle."""

    for owner in {0, size - 1}:
        obj: Any = local if rank == owner else rank
        calls: dict[str, Callable[[], Any]] = {
            "broadcast_object": partial(collectives.broadcast_object, obj, group, root=owner),
            "all_gather_object": partial(collectives.all_gather_object, obj, group),
            "gather_object": partial(collectives.gather_object, obj, group, root=0),
            "scatter_object": partial(
                collectives.scatter_object, [0] * (size - 1) + [obj], group, root=owner
            ),
        }
        for verb, call in calls.items():
            message = f"rank {owner} gave"
            error = expect_error(UnsupportedOperationError, call, verb, verb, message)
            check_that(
                (error.__cause__ is not None) == (rank == owner), f"{verb}: {error.__cause__!r}"
            )
    listed = collectives.all_gather_object(rank, group)
    check_that(listed == list(range(size)), f"all_gather_object afterwards: {listed}")


class Unrestorable:
    """Something that can be pickled and not be unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what raises."""
        return _not_restored, ()


def _not_restored() -> None:
    raise ValueError("not restored")


def objects_that_cannot_be_restored(group: ProcessGroup, _device: Place) -> None:
    """Name verb, group and giver of an object that cannot be unpickled, and go on."""
    rank, last = group.rank, group.size - 1
    obj: Any = Unrestorable() if rank == last else rank
    everybody, scattered = range(group.size), [0] * last + [Unrestorable()]
    calls: dict[str, tuple[Callable[[], Any], Sequence[int]]] = {
        "all_gather_object": (partial(collectives.all_gather_object, obj, group), everybody),
        "gather_object": (partial(collectives.gather_object, obj, group), [0]),
        "broadcast_object": (
            partial(collectives.broadcast_object, obj, group, root=last),
            everybody[:-1],
        ),
        "scatter_object": (
            partial(collectives.scatter_object, scattered, group, root=last),
            [last],
        ),
    }
    for verb, (call, receivers) in calls.items():
        if rank in receivers:
            message = (
                f"{verb} on {group}: the object that rank {last} gave cannot be unpickled here"
            )
            expect_error(UnsupportedOperationError, call, verb, message, "ValueError: not restored")
        else:
            call()
    listed = collectives.all_gather_object(rank, group)
    check_that(listed == list(everybody), f"all_gather_object afterwards: {listed}")


def objects_and_arrays(group: ProcessGroup, _device: Place) -> None:
    """Unpickle no array of a rank that calls a collective on arrays, whatever its shape."""
    if group.size == 1:
        return
    last, header = group.size - 1, np.full((1, 1, 1, 2), 16, np.int64)
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "broadcast_object": (
            partial(collectives.broadcast, header, group, root=last),
            partial(collectives.broadcast_object, None, group, root=last),
        ),
        "all_gather_object": (
            partial(collectives.all_gather, header, group),
            partial(collectives.all_gather_object, None, group),
        ),
    }
    for verb, (of_array, of_object) in calls.items():
        if group.rank == last:
            of_array()
            continue
        message = f"rank {last} called a collective on arrays instead"
        expect_error(CollectiveMismatchError, of_object, verb, f"{verb} on {group}", message)
    total = collectives.all_reduce(np.array(1), group)
    check_that(total == group.size, f"all_reduce afterwards: {total}")
