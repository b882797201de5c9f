"""The verbs on arrays as a table, and one way to try any of them.

A `Trial` says what to call and with what; `attempt` makes the inputs of all ranks, works out the
answer with plain numpy, makes the call and compares.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from mpidist import collectives
from mpidist._types import SUM, Array, DType, ReduceOp
from mpidist.arrays.boxes import part_slices
from mpidist.backends.work import Work
from mpidist.group import ProcessGroup
from mpidist.testing.contract._landings import (
    Landing,
    Layout,
    fresh,
    in_place,
    overlapping,
    plain,
)
from mpidist.testing.contract._memory import HOST, Place
from mpidist.testing.contract._values import combined, expect, tolerance, values

FLOAT64: DType = np.dtype(np.float64)


class Shares(Enum):
    """What a rank's rows are: the same whole array, its own rows, or a block for each rank."""

    SAME = "same"
    OWN = "own"
    CUT = "cut"


Answer: TypeAlias = Callable[["Trial", "_Inputs", int], Array]


class Verb(NamedTuple):
    """A collective on one array.

    `answer` takes the trial, the inputs of all ranks and the rank whose result it is.
    """

    name: str
    shares: Shares
    answer: Answer
    rooted: bool = False
    reduces: bool = False
    root_only: bool = False

    def now(self, *args: Any, **kwargs: Any) -> Any:
        """Call the blocking form."""
        return getattr(collectives, self.name)(*args, **kwargs)

    def later(self, *args: Any, **kwargs: Any) -> Work[Any]:
        """Call the immediate form."""
        work: Work[Any] = getattr(collectives, f"i{self.name}")(*args, **kwargs)
        return work


@dataclass(frozen=True, slots=True)
class Trial:
    """One call of a verb: its arguments, and how its arrays lie.

    `rows` are those of each rank: a tuple is passed as `counts`, None makes 0-d arrays. `tail` has
    the lengths of the dimensions after the first. `layout` changes how an input lies in memory, and
    may change its values; `landing` makes `x` and `out` of the call. `seed` is that of the inputs.
    """

    verb: Verb
    rows: int | tuple[int, ...] | None = 2
    tail: tuple[int, ...] = (3,)
    dtype: DType = FLOAT64
    op: ReduceOp = SUM
    root: int = 0
    layout: Layout = plain
    landing: Landing = fresh
    seed: int = 0

    def __str__(self) -> str:
        """Return what a failure has to say about the call."""
        op = f", {self.op.name}" if self.verb.reduces else ""
        root = f", root={self.root}" if self.verb.rooted else ""
        return (
            f"{self.verb.name}({self.dtype}, rows={self.rows}, tail={self.tail}{op}{root}), "
            f"layout {self.layout.__name__}, out {self.landing.__name__}"
        )

    def counts(self, source: int, size: int) -> tuple[int, ...]:
        """Return the rows that rank `source` has for each rank, or that each rank has."""
        if not isinstance(self.rows, tuple):
            return (self.rows or 0,) * size
        if self.verb.name != "all_to_all":
            return tuple(self.rows[rank % len(self.rows)] for rank in range(size))
        return tuple(self.rows[(source + 2 * rank) % len(self.rows)] for rank in range(size))

    def shape(self, rank: int, size: int) -> tuple[int, ...]:
        """Return the shape of the input of a rank."""
        if self.rows is None:
            return ()
        counts = self.counts(rank, size)
        if self.verb.shares is Shares.SAME:
            return (counts[0], *self.tail)
        own = counts[rank] if self.verb.shares is Shares.OWN else sum(counts)
        return (own, *self.tail)

    def own_input(self, rank: int, size: int, device: Place) -> Array:
        """Return the input of a rank, for it to keep."""
        x = values(self.shape(rank, size), self.dtype, self.seed, rank)
        return self.layout(device.put(x))

    def keywords(self, group: ProcessGroup, out: Array | None) -> dict[str, Any]:
        """Return the keyword arguments of the call."""
        keywords: dict[str, Any] = {"out": out}
        if self.verb.rooted:
            keywords["root"] = self.root
        if self.verb.reduces:
            keywords["op"] = self.op
        if isinstance(self.rows, tuple) and self.verb.shares is not Shares.SAME:
            keywords["counts"] = self.counts(group.rank, group.size)
            if self.verb.name == "all_to_all":
                keywords["recv_counts"] = [
                    self.counts(source, group.size)[group.rank] for source in range(group.size)
                ]
        return keywords


class Begun(NamedTuple):
    """A call under way, and the comparison for its result."""

    work: Work[Any]
    check: Callable[[Any], None]


def attempt(trial: Trial, group: ProcessGroup, device: Place) -> Any:
    """Make a blocking call, check its result and return it; collective."""
    x, out, check = _prepare(trial, group, device)
    result = trial.verb.now(x, group, **trial.keywords(group, out))
    check(result)
    return result


def call(trial: Trial, group: ProcessGroup, device: Place) -> Callable[[], None]:
    """Make a blocking call, and return what checks its result; collective."""
    x, out, check = _prepare(trial, group, device)
    return partial(check, trial.verb.now(x, group, **trial.keywords(group, out)))


def begin(trial: Trial, group: ProcessGroup, device: Place) -> Begun:
    """Make an immediate call; collective."""
    x, out, check = _prepare(trial, group, device)
    return Begun(trial.verb.later(x, group, **trial.keywords(group, out)), check)


def attempt_later(trial: Trial, group: ProcessGroup, device: Place) -> None:
    """Make an immediate call, wait for it, and check its result; collective."""
    begun = begin(trial, group, device)
    begun.check(begun.work.wait())


class _Inputs(NamedTuple):
    """The inputs of all ranks, and for reductions their total and how far it may be off."""

    arrays: tuple[Array, ...]
    total: Array
    bound: Array | None


_MAKING = threading.Lock()


def _inputs(trial: Trial, size: int, *, round_once: bool) -> _Inputs:
    """Return the inputs of all ranks; simulated ranks, being threads, share them."""
    # Without the lock each of them would make its own at the same time.
    with _MAKING:
        return _make_inputs(replace(trial, landing=fresh), size, round_once=round_once)


@lru_cache(maxsize=16)
def _make_inputs(trial: Trial, size: int, *, round_once: bool) -> _Inputs:
    arrays = tuple(trial.own_input(rank, size, HOST) for rank in range(size))
    if not trial.verb.reduces:
        return _Inputs(arrays, arrays[0], None)
    bound = tolerance(arrays, trial.op, round_once=round_once)
    return _Inputs(arrays, combined(arrays, trial.op), bound)


def _expected(trial: Trial, inputs: _Inputs, rank: int) -> tuple[Array | None, Array | None]:
    """Return what a rank should get, and how far it may be off."""
    if trial.verb.root_only and rank != trial.root:
        return None, None
    size = len(inputs.arrays)
    result = trial.verb.answer(trial, inputs, rank)
    bound = inputs.bound
    if bound is not None and trial.verb.shares is Shares.CUT:
        bound = _cut(bound, trial.counts(rank, size), rank)
    return np.asarray(result, result.dtype.newbyteorder("=")), bound


def _prepare(
    trial: Trial, group: ProcessGroup, device: Place
) -> tuple[Array, Array | None, Callable[[Any], None]]:
    offered = device.capabilities(group)
    inputs = _inputs(trial, group.size, round_once=offered.halves_rounded_once)
    expected, within = _expected(trial, inputs, group.rank)
    x, out = trial.landing(trial.own_input(group.rank, group.size, device), expected)
    shared = out is not None and trial.landing in (in_place, overlapping)
    where = f"{trial} on {group}"

    def check(result: Any) -> None:
        expect(device.take(result), expected, where, within=within)
        if out is not None and expected is not None and result is not out:
            raise AssertionError(f"{where}: the result is not `out`")
        if not shared:
            expect(device.take(x), inputs.arrays[group.rank], f"{where}: the input afterwards")

    return x, out, check


def _cut(x: Array, counts: Sequence[int], rank: int) -> Array:
    return x[part_slices(counts)[rank]]


def _broadcast(trial: Trial, inputs: _Inputs, _: int) -> Array:
    return inputs.arrays[trial.root]


def _combine(_: Trial, inputs: _Inputs, __: int) -> Array:
    return inputs.total


def _join(_: Trial, inputs: _Inputs, __: int) -> Array:
    return np.concatenate([np.atleast_1d(x) for x in inputs.arrays])


def _scatter(trial: Trial, inputs: _Inputs, rank: int) -> Array:
    return _cut(inputs.arrays[trial.root], trial.counts(trial.root, len(inputs.arrays)), rank)


def _reduce_scatter(trial: Trial, inputs: _Inputs, rank: int) -> Array:
    return _cut(inputs.total, trial.counts(rank, len(inputs.arrays)), rank)


def _all_to_all(trial: Trial, inputs: _Inputs, rank: int) -> Array:
    size = len(inputs.arrays)
    return np.concatenate(
        [_cut(x, trial.counts(source, size), rank) for source, x in enumerate(inputs.arrays)]
    )


VERBS: dict[str, Verb] = {
    verb.name: verb
    for verb in (
        Verb("broadcast", Shares.SAME, _broadcast, rooted=True),
        Verb("reduce", Shares.SAME, _combine, rooted=True, reduces=True, root_only=True),
        Verb("all_reduce", Shares.SAME, _combine, reduces=True),
        Verb("gather", Shares.OWN, _join, rooted=True, root_only=True),
        Verb("all_gather", Shares.OWN, _join),
        Verb("scatter", Shares.CUT, _scatter, rooted=True),
        Verb("reduce_scatter", Shares.CUT, _reduce_scatter, reduces=True),
        Verb("all_to_all", Shares.CUT, _all_to_all),
    )
}

REDUCTIONS = tuple(verb for verb in VERBS.values() if verb.reduces)
