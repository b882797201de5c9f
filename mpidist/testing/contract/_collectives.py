"""Cases of the collectives on arrays: dtypes, shapes, layouts, results, shares, sums."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np

from mpidist import collectives
from mpidist._types import MAX, MEAN, MIN, PROD, SUM, Array, DType, ReduceOp
from mpidist.arrays.namespaces import BFLOAT16, HALVES
from mpidist.errors import UnsupportedOperationError
from mpidist.group import ProcessGroup
from mpidist.testing.contract._landings import fortran, fresh, given, in_place
from mpidist.testing.contract._memory import Place
from mpidist.testing.contract._values import (
    byte_swapped,
    check_that,
    expect,
    expect_error,
    same_bits,
    tolerance,
    values,
)
from mpidist.testing.contract._verbs import (
    REDUCTIONS,
    VERBS,
    Shares,
    Trial,
    Verb,
    attempt,
    attempt_later,
)

MOVERS = tuple(verb for verb in VERBS.values() if not verb.reduces)
IN_PLACE = ("broadcast", "reduce", "all_reduce", "all_to_all")
FLOAT64: DType = np.dtype(np.float64)


def barriers(group: ProcessGroup, _device: Place) -> None:
    """Nobody leaves a barrier before the last has arrived."""
    for _ in range(3):
        collectives.barrier(group)
    collectives.ibarrier(group).wait()


def every_dtype_moves(group: ProcessGroup, device: Place) -> None:
    """Every verb that moves data, with every dtype."""
    for number, dtype in enumerate(device.dtypes):
        for verb in MOVERS:
            attempt(Trial(verb, dtype=dtype, root=number % group.size, seed=number), group, device)


def every_reduction(verb: Verb, group: ProcessGroup, device: Place) -> None:
    """One verb with every operation and dtype: equal to numpy, or refused on all ranks."""
    offered = device.capabilities(group).reductions
    for number, (op, dtype) in enumerate((op, dtype) for op in ReduceOp for dtype in device.dtypes):
        trial = Trial(verb, dtype=dtype, op=op, root=number % group.size, seed=number)
        if (op, dtype) in offered:
            attempt(trial, group, device)
            if dtype.kind == "b":
                attempt_later(trial, group, device)
            continue
        x = device.put(values((2 * group.size, 3), dtype, number))
        expect_error(
            UnsupportedOperationError,
            partial(verb.now, x, group, op=op),
            str(trial),
            op.name,
            str(dtype),
        )


def long_reductions(group: ProcessGroup, device: Place) -> None:
    """Arrays beyond the length at which algorithms change, odd in every respect."""
    for dtype in (np.float64, np.float32, np.int64, np.complex64, np.float16, BFLOAT16):
        for verb in REDUCTIONS:
            for op in (SUM, MAX):
                if (op, np.dtype(dtype)) in device.capabilities(group).reductions:
                    attempt(
                        Trial(verb, rows=131, tail=(11,), dtype=np.dtype(dtype), op=op),
                        group,
                        device,
                    )
    for verb in REDUCTIONS:
        attempt(Trial(verb, rows=9001, tail=(), op=MEAN, root=group.size - 1), group, device)


def error_state(group: ProcessGroup, device: Place) -> None:
    """No rank raises alone for numbers that overflow, underflow or are none: whatever its state."""
    if not device.on_host:
        return
    extremes = [3e38, -3e38, 1e-45, np.inf, np.nan, 6e4, 1e-7]
    for dtype in (np.float32, np.float16):
        with np.errstate(all="ignore"):
            numbers = np.roll(np.array(extremes).astype(dtype), group.rank)
        for rows in (1, 1500):
            x = np.resize(numbers, (rows * group.size, 3))
            with np.errstate(all="raise"):
                for verb, op in product(REDUCTIONS, (SUM, MEAN, PROD, MAX)):
                    verb.now(x, group, op=op)
                    verb.later(x, group, op=op).wait()
    registered = group.empty(300_000, np.float32)
    registered[...] = np.float32(1e-45)
    with np.errstate(all="raise"):
        collectives.all_reduce(registered, group, op=MEAN, out=registered)
        collectives.iall_reduce(registered, group, op=PROD, out=registered).wait()


def shapes(group: ProcessGroup, device: Place) -> None:
    """0-d, empty and odd shapes, with every verb, blocking and immediate."""
    for verb in VERBS.values():
        for rows, tail in (
            (None, ()),
            (0, ()),
            (0, (3,)),
            (3, (0,)),
            (1, ()),
            (7, ()),
            (5, (3, 2)),
        ):
            if rows is None and verb.shares is Shares.CUT:
                continue
            trial = Trial(verb, rows=rows, tail=tail)
            attempt(trial, group, device)
            attempt_later(trial, group, device)


def layouts(group: ProcessGroup, device: Place) -> None:
    """Pass inputs that are not contiguous, of the other byte order, or read-only."""
    swapped = [(byte_swapped, np.dtype(dtype)) for dtype in (np.int16, np.float16, BFLOAT16)]
    for verb in VERBS.values():
        plain = ((layout, FLOAT64) for layout in device.layouts)
        for layout, dtype in [*plain, *(swapped if device.on_host else ())]:
            attempt(Trial(verb, rows=3, tail=(2, 4), dtype=dtype, layout=layout), group, device)


def landings(group: ProcessGroup, device: Place) -> None:
    """Results into arrays of the caller: plain, not contiguous, swapped, overlapping the input."""
    for verb in VERBS.values():
        for landing in device.landings:
            trial = Trial(verb, rows=5, tail=(4,), landing=landing)
            attempt(trial, group, device)
            attempt_later(replace(trial, dtype=np.dtype(np.float16)), group, device)


def results_in_place(group: ProcessGroup, device: Place) -> None:
    """`out=x`, also where x is not contiguous or of the other byte order."""
    base = Trial(VERBS["all_reduce"], root=group.size - 1, rows=4, landing=in_place)
    for name in IN_PLACE:
        for trial in (
            replace(base, rows=600),
            replace(base, dtype=np.dtype(np.float16)),
            replace(base, layout=fortran),
            *([replace(base, layout=byte_swapped)] if device.on_host else ()),
        ):
            attempt_later(replace(trial, verb=VERBS[name]), group, device)
            attempt(replace(trial, verb=VERBS[name]), group, device)


def parts_in_place(group: ProcessGroup, device: Place) -> None:
    """Pass inputs and results that are parts of each other."""
    rank, size = group.rank, group.size
    arrays = np.arange(3.0 * size).reshape(size, 3)
    gathered = np.full((size, 3), -1.0)
    gathered[rank] = arrays[rank]
    out = device.put(gathered.copy())
    collectives.all_gather(out[rank : rank + 1], group, out=out)
    expect(device.take(out), arrays, "all_gather in place")
    for root in range(size):
        out = device.put(gathered.copy())
        at_root = out if rank == root else None
        got = collectives.gather(out[rank : rank + 1], group, root=root, out=at_root)
        expect(device.take(got), arrays if rank == root else None, "gather in place")
        x = device.put(arrays.copy())
        got = collectives.scatter(x, group, root=root, out=x[rank : rank + 1])
        expect(device.take(got), arrays[rank : rank + 1], "scatter in place")
    counts = [0, 2] * (size // 2) + [1] * (size % 2)
    start, stop = sum(counts[:rank]), sum(counts[: rank + 1])
    x = device.put(arrays.copy())
    got = collectives.reduce_scatter(x, group, out=x[:1])
    expect(device.take(got), size * arrays[rank : rank + 1], "reduce_scatter in place")
    arrays = np.arange(3.0 * sum(counts)).reshape(-1, 3)
    own = np.isin(np.arange(len(arrays)), range(start, stop))[:, None]
    out = device.put(np.where(own, arrays, -1.0))
    collectives.all_gather(out[start:stop], group, out=out, counts=counts)
    expect(device.take(out), arrays, "uneven all_gather in place")
    x = device.put(arrays.copy())
    got = collectives.reduce_scatter(x, group, out=x[: stop - start], counts=counts)
    expect(device.take(got), size * arrays[start:stop], "uneven reduce_scatter in place")


def all_rows_on_one_rank(group: ProcessGroup, device: Place) -> None:
    """Gather from one rank into its own part of `out`, which is all of it; the others have none.

    In registered memory, too, and with an `out` on one rank only.
    """
    rows = 20_000  # enough for the direct path
    device.ready(group)
    for owner in {0, group.size - 1}:
        counts = [rows if rank == owner else 0 for rank in range(group.size)]
        own = slice(0, counts[group.rank])
        wanted = np.full((rows, 1), owner + 1.0)
        contribution = np.full((rows, 1), group.rank + 1.0)
        registered = group.empty((rows, 1), np.float64, device="cpu" if device.on_host else "gpu")
        for out in (device.put(contribution.copy()), registered):
            for form in ("blocking", "immediate"):
                out[...] = group.rank + 1
                if form == "blocking":
                    collectives.all_gather(out[own], group, out=out, counts=counts)
                else:
                    collectives.iall_gather(out[own], group, out=out, counts=counts).wait()
                expect(device.take(out), wanted, f"{form} all_gather of all rows from rank {owner}")
        out = device.put(contribution.copy())
        at_owner = out if group.rank == owner else None
        got = collectives.all_gather(out[own], group, out=at_owner, counts=counts)
        expect(device.take(got), wanted, f"all_gather with out on rank {owner} only")
        collectives.gather(out[own], group, root=owner, out=at_owner, counts=counts)
        collectives.igather(out[own], group, root=owner, out=at_owner, counts=counts).wait()
        expect(device.take(out), contribution, f"gather in place to rank {owner}")


def subclasses(group: ProcessGroup, _device: Place) -> None:
    """Take arrays of a subclass, here one that stays two-dimensional, for what they hold."""
    plain = np.arange(6.0).reshape(2, 3)
    x = plain.view(np.matrix)
    for verb in (VERBS["all_reduce"], VERBS["broadcast"], VERBS["all_gather"]):
        wanted = {
            "all_reduce": group.size * plain,
            "broadcast": plain,
            "all_gather": np.concatenate([plain] * group.size),
        }[verb.name]
        got = verb.now(x, group)
        expect(got, wanted, f"{verb.name} of a subclass")
        check_that(type(got) is np.ndarray, f"{verb.name} of a subclass gave {type(got)}")
        for memory in (np.zeros(wanted.shape), np.zeros(wanted.shape, order="F")):
            out = memory.view(np.matrix)
            check_that(verb.now(x, group, out=out) is out, f"{verb.name}: the result is not `out`")
            expect(memory, wanted, f"{verb.name} into a subclass")
    out = np.zeros((2, 3)).view(np.matrix)
    (got,) = collectives.all_reduce_coalesced([x], group, outs=[out])
    check_that(got is out, "all_reduce_coalesced: the result is not from `outs`")
    expect(np.asarray(out), group.size * plain, "all_reduce_coalesced into a subclass")


def roots(group: ProcessGroup, device: Place) -> None:
    """Every rank as the root; scatter also where the others know only their own rows."""
    for verb in VERBS.values():
        for root in range(group.size if verb.rooted else 0):
            for landing in (fresh, given):
                attempt(Trial(verb, rows=3, root=root, landing=landing), group, device)
    arrays = np.arange(2.0 * group.size)
    counts = [1] * (group.size - 1) + [group.size + 1]
    for root in range(group.size):
        x = device.put(arrays) if group.rank == root else None
        out = device.put(np.empty(2))
        collectives.scatter(x, group, root=root, out=out)
        expect(device.take(out), arrays[2 * group.rank : 2 * group.rank + 2], "scatter without x")
        out = device.put(np.empty(counts[group.rank]))
        collectives.scatter(x, group, root=root, out=out, counts=counts)
        expect(device.take(out), arrays[group.rank :][: len(out)], "scatter without x, uneven")


def uneven(group: ProcessGroup, device: Place) -> None:
    """Rows that differ between the ranks, some of them none."""
    for verb in VERBS.values():
        if verb.shares is Shares.SAME:
            continue
        trial = Trial(verb, root=group.size - 1)
        for rows in ((2, 0, 1, 3, 1), (0, 700, 1), (0, 0, 5, 0, 0, 0, 0, 0), (0,)):
            attempt(replace(trial, rows=rows), group, device)
            attempt_later(replace(trial, rows=rows, dtype=np.dtype(np.float16)), group, device)
        for landing in device.landings:
            attempt(replace(trial, rows=(2, 0, 1), landing=landing), group, device)


def not_a_number(group: ProcessGroup, device: Place) -> None:
    """NaN on one rank wins in MIN and MAX, as in numpy, and infinities are kept."""
    offered = device.capabilities(group).reductions
    for dtype in (np.float16, BFLOAT16, np.float32, np.float64):
        for op in (MIN, MAX, SUM):
            if (op, np.dtype(dtype)) not in offered:
                continue
            for where in {0, group.size - 1}:
                inputs = [_special(rank, where, dtype) for rank in range(group.size)]
                expected = inputs[0]
                for x in inputs[1:]:
                    with np.errstate(invalid="ignore"):
                        expected = {MIN: np.minimum, MAX: np.maximum, SUM: np.add}[op](expected, x)
                got = collectives.all_reduce(device.put(inputs[group.rank]), group, op=op)
                what = f"all_reduce {op.name} {np.dtype(dtype)}, NaN of rank {where}"
                expect(device.take(got), expected, what)


def _special(rank: int, where: int, dtype: object) -> Array:
    x = np.array([1.0, rank, np.inf, -np.inf, -rank], dtype=dtype)  # type: ignore[call-overload]
    if rank == where:
        x[:2] = np.nan
    result: Array = x
    return result


def halves_round_once(group: ProcessGroup, device: Place) -> None:
    """Halves are summed in float32 in rank order and rounded once, whatever the length.

    Where the transport says that it rounds at each addition, the sum may be off by that.
    """
    exact = device.capabilities(group).halves_rounded_once
    for dtype in sorted(HALVES & set(device.dtypes), key=str):
        for count in (1, 5, 5000):
            # Beside 1 in this dtype, one of the small numbers is lost, and two of them are not.
            tiny = float(np.finfo(np.float16).eps if dtype.kind == "f" else 2.0**-7) / 2
            owners = np.arange(count) % group.size
            inputs = [
                np.where(owners == rank, 1.0, tiny).astype(dtype) for rank in range(group.size)
            ]
            total = np.zeros(count, np.float32)
            for x in inputs:
                total += x.astype(np.float32)
            for op, expected in ((SUM, total), (MEAN, total / np.float32(group.size))):
                got = collectives.all_reduce(device.put(inputs[group.rank]), group, op=op)
                within = tolerance(inputs, op, round_once=exact)
                what = f"all_reduce {op.name} of {count} {dtype}"
                expect(device.take(got), expected.astype(dtype), what, within=within)


def bits(group: ProcessGroup, device: Place) -> None:
    """All ranks hold the same bits, and a second run gives them again."""
    for op in (MEAN, PROD):
        for dtype in (np.float16, np.float32, np.complex128):
            if (op, np.dtype(dtype)) not in device.capabilities(group).reductions:
                continue
            for rows in (5, 1501):
                trial = Trial(
                    VERBS["all_reduce"], rows=rows, tail=(), op=op, dtype=np.dtype(dtype), seed=rows
                )
                first = device.take(attempt(trial, group, device))
                same_bits(first, group, str(trial))
                if device.take(attempt(trial, group, device)).tobytes() != first.tobytes():
                    raise AssertionError(f"{trial} on {group}: a second run gave other bits")
