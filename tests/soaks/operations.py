"""Random operations on a real job until the time is over, each compared with plain numpy.

    mpirun -n 4 python -m tests.soaks.operations --seconds 600

Every rank draws the same operations from one seed, so that any of them can be repeated: a failure
names seed and round. Blocking, immediate, in place, uneven, on the world and on sub-groups, with
several operations outstanding that each rank polls and waits for in an order of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import mpidist
from mpidist._types import Array, DType, ReduceOp
from mpidist.arrays.namespaces import BFLOAT16, HALVES, ufunc_of
from mpidist.backends.work import Work
from mpidist.group import ProcessGroup
from mpidist.usage import RankArgumentParser

__all__ = ["main", "soak"]

_MOST_ELEMENTS = 200_000
_OUTSTANDING = 8


@dataclass(frozen=True, slots=True)
class _Draw:
    """One operation, drawn alike on all ranks.

    Attributes
    ----------
    verb : str
        One of `_VERBS`.
    seed : int
        Of the ranks' arrays.
    shape : tuple of int
        Rows and columns of a share.
    dtype, op, root
        As the verb takes them.
    in_place : bool
        Where the verb knows it.
    """

    verb: str
    seed: int
    shape: tuple[int, int]
    dtype: DType
    op: ReduceOp
    root: int
    in_place: bool


def _draw(rng: np.random.Generator, group: ProcessGroup) -> _Draw:
    reductions = sorted(
        group.capabilities.reductions, key=lambda pair: (pair[0].name, str(pair[1]))
    )
    op, dtype = reductions[rng.integers(len(reductions))]
    elements = int(np.exp(rng.uniform(0, np.log(_MOST_ELEMENTS)))) - 1
    columns = int(rng.integers(1, 4))
    return _Draw(
        verb=sorted(_VERBS)[rng.integers(len(_VERBS))],
        seed=int(rng.integers(2**31)),
        shape=(elements // columns, columns),
        dtype=dtype,
        op=op,
        root=int(rng.integers(group.size)),
        in_place=bool(rng.integers(2)),
    )


def _array(draw: _Draw, rank: int, rows: int) -> Array:
    """Return the array of a rank, which every rank can make.

    Small integers keep sums and products of every dtype exact but those of halves, so that the
    order of a sum does not show.
    """
    rng = np.random.default_rng([draw.seed, rank])
    values = rng.integers(0, 2, (rows, draw.shape[1]))
    if draw.op is not ReduceOp.PROD:
        values = rng.integers(0, 8, (rows, draw.shape[1]))
    return values.astype(draw.dtype)


def _reduced(parts: Sequence[Array], op: ReduceOp) -> Array:
    """Combine in rank order, halves in float32 and rounded once."""
    dtype = parts[0].dtype
    wide = np.float32 if dtype in HALVES else dtype
    total: Any = parts[0].astype(wide)
    for part in parts[1:]:
        total = ufunc_of(op)(total, part.astype(wide))
    if op is ReduceOp.MEAN:
        total = total / len(parts)
    if op in (ReduceOp.LAND, ReduceOp.LOR, ReduceOp.LXOR):
        total = total != 0
    return np.asarray(total).astype(dtype)


def _same_rows(draw: _Draw, group: ProcessGroup) -> list[Array]:
    return [_array(draw, rank, draw.shape[0]) for rank in range(group.size)]


def _uneven_rows(draw: _Draw, group: ProcessGroup) -> tuple[list[int], list[Array]]:
    spread = np.random.default_rng(draw.seed).integers(0, draw.shape[0] + 2, group.size)
    counts = spread.tolist()
    return counts, [_array(draw, rank, rows) for rank, rows in enumerate(counts)]


def _all_reduce(draw: _Draw, group: ProcessGroup) -> tuple[Work[Any], Array | None]:
    parts = _same_rows(draw, group)
    x = parts[group.rank].copy()
    out = x if draw.in_place else None
    return mpidist.iall_reduce(x, group, op=draw.op, out=out), _reduced(parts, draw.op)


def _reduce(draw: _Draw, group: ProcessGroup) -> tuple[Work[Any], Array | None]:
    parts = _same_rows(draw, group)
    expected = _reduced(parts, draw.op) if group.rank == draw.root else None
    return mpidist.ireduce(parts[group.rank], group, op=draw.op, root=draw.root), expected


def _broadcast(draw: _Draw, group: ProcessGroup) -> tuple[Work[Any], Array | None]:
    parts = _same_rows(draw, group)
    x = parts[group.rank].copy()
    out = x if draw.in_place else None
    return mpidist.ibroadcast(x, group, root=draw.root, out=out), parts[draw.root]


def _all_gather(draw: _Draw, group: ProcessGroup) -> tuple[Work[Any], Array | None]:
    counts, parts = _uneven_rows(draw, group)
    return mpidist.iall_gather(parts[group.rank], group, counts=counts), np.concatenate(parts)


def _gather(draw: _Draw, group: ProcessGroup) -> tuple[Work[Any], Array | None]:
    counts, parts = _uneven_rows(draw, group)
    expected = np.concatenate(parts) if group.rank == draw.root else None
    work = mpidist.igather(parts[group.rank], group, root=draw.root, counts=counts)
    return work, expected


def _scatter(draw: _Draw, group: ProcessGroup) -> tuple[Work[Any], Array | None]:
    counts, parts = _uneven_rows(draw, group)
    whole = np.concatenate(parts)
    return mpidist.iscatter(whole, group, root=draw.root, counts=counts), parts[group.rank]


def _reduce_scatter(draw: _Draw, group: ProcessGroup) -> tuple[Work[Any], Array | None]:
    counts, _ = _uneven_rows(draw, group)
    parts = [_array(draw, rank, sum(counts)) for rank in range(group.size)]
    start = sum(counts[: group.rank])
    expected = _reduced(parts, draw.op)[start : start + counts[group.rank]]
    work = mpidist.ireduce_scatter(parts[group.rank], group, op=draw.op, counts=counts)
    return work, expected


def _all_to_all(draw: _Draw, group: ProcessGroup) -> tuple[Work[Any], Array | None]:
    rng = np.random.default_rng(draw.seed)
    sent = rng.integers(0, draw.shape[0] // group.size + 2, (group.size, group.size))
    parts = [_array(draw, rank, int(rows.sum())) for rank, rows in enumerate(sent)]
    blocks = [np.split(x, np.cumsum(rows)[:-1]) for x, rows in zip(parts, sent, strict=True)]
    work = mpidist.iall_to_all(
        parts[group.rank],
        group,
        counts=sent[group.rank].tolist(),
        recv_counts=sent[:, group.rank].tolist(),
    )
    return work, np.concatenate([block[group.rank] for block in blocks])


def _ring(draw: _Draw, group: ProcessGroup) -> tuple[Work[Any], Array | None]:
    parts = _same_rows(draw, group)
    if group.size == 1:
        return mpidist.iall_gather(parts[0], group), parts[0]
    dst, src = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    mpidist.isend(parts[group.rank], group, dst=dst, tag=draw.seed % 1000)
    out = np.empty_like(parts[src]) if draw.in_place else None
    return mpidist.irecv(group, src=src, tag=draw.seed % 1000, out=out), parts[src]


_VERBS: dict[str, Callable[[_Draw, ProcessGroup], tuple[Work[Any], Array | None]]] = {
    "all_gather": _all_gather,
    "all_reduce": _all_reduce,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "gather": _gather,
    "reduce": _reduce,
    "reduce_scatter": _reduce_scatter,
    "ring of messages": _ring,
    "scatter": _scatter,
}


def _compare(draw: _Draw, result: Array | None, expected: Array | None, where: str) -> None:
    if expected is None:
        equal = result is None
    else:
        loose = draw.dtype == BFLOAT16 or draw.dtype in HALVES or draw.op is ReduceOp.MEAN
        wide = np.complex128 if draw.dtype.kind == "c" else np.float64
        equal = result is not None and (
            np.allclose(result.astype(wide), expected.astype(wide), rtol=1e-2 if loose else 0)
            if loose
            else np.array_equal(result, expected)
        )
    if not equal:
        raise AssertionError(f"{where}: {draw}\nexpected {expected!r}\ngot      {result!r}")


def soak(group: ProcessGroup, *, seed: int, seconds: float, rounds: int | None = None) -> int:
    """Perform random operations and compare each with numpy.

    Parameters
    ----------
    group : ProcessGroup
        The ranks taking part.
    seed : int
        Decides everything but the order in which each rank polls.
    seconds : float
        When to stop, by rank 0's clock.
    rounds : int, optional
        Stop after so many rounds in any case.

    Returns
    -------
    int
        Number of operations performed.

    Raises
    ------
    AssertionError
        If a result is not numpy's; names seed, round and operation.

    Notes
    -----
    Collective over `group`; blocks.
    """
    rng = np.random.default_rng(seed)
    own = np.random.default_rng([seed, group.rank])
    halves = group.split(group.rank % 2, group.rank)
    begin, done, number = time.monotonic(), 0, 0
    while number != rounds:
        number += 1
        over = np.array(time.monotonic() - begin > seconds)
        if mpidist.broadcast(over, group).item():
            break
        pending = []
        for _ in range(int(rng.integers(1, _OUTSTANDING))):
            # All ranks draw from the same numbers; the sub-groups' sizes may differ.
            state = int(rng.integers(2**63))
            ring = halves if halves is not None and state % 3 == 0 else group
            draw = _draw(np.random.default_rng(state), ring)
            pending.append((draw, *_VERBS[draw.verb](draw, ring)))
        for place in own.permutation(len(pending)):
            draw, work, expected = pending[place]
            for _ in range(int(own.integers(4))):
                work.done()
            _compare(draw, work.wait(), expected, f"seed {seed}, round {number}, {group}")
        done += len(pending)
    if halves is not None:
        halves.close()
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = RankArgumentParser(prog="python -m tests.soaks.operations", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the operations (default: 0)")
    options = parser.parse_args(arguments)
    with mpidist.init(timeout=120.0) as world:
        done = soak(world, seed=options.seed, seconds=options.seconds)
        if world.rank == 0:
            world.print(f"{done} operations equal numpy's, seed {options.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
