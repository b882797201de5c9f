"""Cases of the fuzzer of mismatches: which call all ranks make, and how one of them deviates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

import numpy as np

from mpidist._types import MAX, MIN, PROD, SUM, Array, ReduceOp

__all__ = ["BLOCK", "SIZES", "Call", "Case", "array_of", "draw", "plain_call"]

Shape = tuple[int, ...]

SIZES = ("small", "large", "registered")
LIKE_REDUCE = ("all_reduce", "broadcast", "reduce")
LIKE_GATHER = ("all_gather", "gather")
LIKE_SCATTER = ("scatter", "reduce_scatter")
VERBS = ("barrier", *LIKE_REDUCE, *LIKE_GATHER, *LIKE_SCATTER, "all_to_all")
IN_LISTS = ("all_reduce", "broadcast", "all_gather", "reduce_scatter")
OBJECTS = ("broadcast_object", "all_gather_object", "gather_object", "scatter_object")
WITH_OP = ("all_reduce", "reduce", "reduce_scatter")
WITH_ROOT = ("broadcast", "reduce", "gather", "scatter", "broadcast_object")
WITH_ROOT += ("gather_object", "scatter_object")
WITH_COUNTS = (*LIKE_GATHER, *LIKE_SCATTER, "all_to_all")
OPS = (SUM, MAX, MIN, PROD)
DTYPES = ("f8", "f4", "i8", "i4")
BLOCK = 1 << 21
"""Bytes of a registered block: no member of a list is longer."""


@dataclass(frozen=True)
class Call:
    """What one rank calls.

    Attributes
    ----------
    verb : str
        Without its prefix and suffix.
    form : {"blocking", "immediate", "coalesced", "immediate coalesced", "object"}
        How it is called.
    shapes : tuple of tuple of int
        Of the rank's own arrays: one, or those of a list.
    dtypes : tuple of str
        One per shape.
    op, root
        As the verb takes them.
    counts, recv_counts : tuple of int or None
        As the verb takes them.
    registered : bool
        Whether the arrays lie in memory that the group has made.
    objects : int
        Number of objects that the root of scatter_object gives.
    """

    verb: str
    form: str
    shapes: tuple[Shape, ...] = ()
    dtypes: tuple[str, ...] = ()
    op: ReduceOp = SUM
    root: int = 0
    counts: tuple[int, ...] | None = None
    recv_counts: tuple[int, ...] | None = None
    registered: bool = False
    objects: int = 0

    @property
    def immediate(self) -> bool:
        """Whether it returns a Work."""
        return self.form.startswith("immediate")

    @property
    def in_list(self) -> bool:
        """Whether it takes a list of arrays."""
        return self.form.endswith("coalesced")

    @property
    def name(self) -> str:
        """The function's name."""
        prefix, suffix = "i" * self.immediate, "_coalesced" * self.in_list
        return f"{prefix}{self.verb}{suffix}"

    def __str__(self) -> str:
        arrays = ", ".join(f"{d}{list(s)}" for d, s in zip(self.dtypes, self.shapes, strict=True))
        more = f" op {self.op.name}" * (self.verb in WITH_OP)
        more += f" root {self.root}" * (self.verb in WITH_ROOT)
        more += f" counts {self.counts}" * (self.counts is not None)
        more += f" recv_counts {self.recv_counts}" * (self.recv_counts is not None)
        more += f" of {self.objects}" * (self.verb == "scatter_object")
        return f"{self.name}({arrays}){more}{' registered' * self.registered}"


@dataclass(frozen=True)
class Case:
    """One call of all ranks, from which one of them deviates, unless `kind` is "none".

    Attributes
    ----------
    number : int
        With the seed it makes the case.
    kind : str
        What is different in the call of rank `guilty`.
    size : str
        One of `SIZES`.
    guilty : int
        The rank that deviates.
    calls : tuple of Call
        What each rank calls.
    """

    number: int
    kind: str
    size: str
    guilty: int
    calls: tuple[Call, ...]

    def __str__(self) -> str:
        other = self.calls[(self.guilty + 1) % len(self.calls)]
        text = f"case {self.number}, {self.kind}, {self.size}: {other}"
        if self.kind != "none":
            text += f"; rank {self.guilty}: {self.calls[self.guilty]}"
        return text


def draw(seed: int, number: int, ranks: int) -> Case:
    """Return a case, the same on all ranks."""
    random = Random(f"{seed} {number}")
    form = random.choice(("blocking", "immediate", "coalesced", "immediate coalesced", "object"))
    verbs = {"object": OBJECTS, "coalesced": IN_LISTS, "immediate coalesced": IN_LISTS}
    verb = random.choice(verbs.get(form, VERBS))
    kind = random.choice(_kinds(verb, form))
    size = "small" if form == "object" or verb == "barrier" else random.choice(SIZES)
    guilty = random.randrange(ranks)
    calls = _calls(random, verb, form, size, ranks)
    if kind != "none":
        if verb == "scatter_object" and kind == "list":
            guilty = calls[0].root
        deviating = _deviate(random, calls[guilty], kind, size, guilty, ranks)
        assert deviating != calls[guilty], (seed, number)
        calls[guilty] = deviating
    return Case(number, kind, size, guilty, tuple(calls))


def plain_call(seed: int, number: int, ranks: int) -> list[Call]:
    """Return a small all_reduce, to see whether a group still works."""
    shape = (1 + (seed + number) % 50,)
    return [Call("all_reduce", "blocking", (shape,), ("f8",))] * ranks


def array_of(case: Case, rank: int, member: int) -> Array:
    """Return an array that a rank gives; every rank can make those of all."""
    call = case.calls[rank]
    rng = np.random.default_rng([case.number, rank, member])
    return rng.integers(0, 3, call.shapes[member]).astype(call.dtypes[member])


def _kinds(verb: str, form: str) -> list[str]:
    """Return in what a call can deviate."""
    if form == "object":
        kinds = ["none", "verb"]
        return kinds + ["root"] * (verb in WITH_ROOT) + ["list"] * (verb == "scatter_object")
    kinds = ["none", "verb", "form"]
    if verb == "barrier":
        return kinds
    kinds += ["shape", "order", "dtype"]
    kinds += ["op"] * (verb in WITH_OP) + ["root"] * (verb in WITH_ROOT)
    if form.endswith("coalesced"):
        return [*kinds, "list", "list"]
    return kinds + ["counts"] * (verb in WITH_COUNTS)


def _calls(random: Random, verb: str, form: str, size: str, ranks: int) -> list[Call]:
    """Return a call of all ranks that is right."""
    call = Call(verb, form, op=random.choice(OPS), root=random.randrange(ranks))
    call = replace(call, registered=size == "registered")
    if form == "object":
        return [replace(call, objects=ranks)] * ranks
    if verb == "barrier":
        return [call] * ranks
    members = random.randint(2, 4) if call.in_list else 1
    # Both lengths differ, and so do those of the members: another order is another call.
    longest = random.randint(60, 90) if size != "small" else random.randint(3, 6)
    tails = [(longest + member, longest + member + 2) for member in range(members)]
    dtypes = tuple(random.choice(DTYPES) for _ in tails)
    if verb in LIKE_REDUCE:
        return [replace(call, shapes=tuple(tails), dtypes=dtypes)] * ranks
    uneven = verb in WITH_COUNTS and not call.in_list and random.random() < 0.5
    rows = [[random.randint(1, 3) for _ in range(ranks)] for _ in range(ranks)]
    if not uneven:
        rows = [[1 + random.randrange(2)] * ranks] * ranks
    return [
        _with_rows(replace(call, dtypes=dtypes), tails, rows, rank, uneven=uneven)
        for rank in range(ranks)
    ]


def _with_rows(
    call: Call, tails: list[Shape], rows: list[list[int]], rank: int, *, uneven: bool
) -> Call:
    """Return the call of a rank, whose arrays have rows of these shapes."""
    sent = rows[rank] if call.verb == "all_to_all" else rows[0]
    own = rows[0][rank] if call.verb in LIKE_GATHER else sum(sent)
    call = replace(call, shapes=tuple((own, *tail) for tail in tails))
    if not uneven:
        return call
    if call.verb == "all_to_all":
        call = replace(call, recv_counts=tuple(row[rank] for row in rows))
    return replace(call, counts=tuple(sent))


def _deviate(random: Random, call: Call, kind: str, size: str, guilty: int, ranks: int) -> Call:
    """Return another call, which is as right as the first one to the rank that makes it."""
    if kind == "verb":
        same = {"object": OBJECTS, "coalesced": IN_LISTS, "immediate coalesced": IN_LISTS}
        others = [verb for verb in same.get(call.form, VERBS) if verb != call.verb]
        return _calls(random, random.choice(others), call.form, size, ranks)[guilty]
    if kind == "form":
        return replace(call, form=_OTHER_FORM[call.form])
    if kind == "op":
        return replace(call, op=random.choice([op for op in OPS if op is not call.op]))
    if kind == "root":
        return replace(call, root=(call.root + random.randrange(1, ranks)) % ranks)
    if kind == "list" and call.verb == "scatter_object":
        return replace(call, objects=call.objects + random.choice((-1, 1)))
    return _OF_ARRAYS[kind](random, call, guilty, ranks)


_OTHER_FORM = {
    "blocking": "immediate",
    "immediate": "blocking",
    "coalesced": "immediate coalesced",
    "immediate coalesced": "coalesced",
}


def _other_shape(random: Random, call: Call, guilty: int, ranks: int) -> Call:
    """Return the call with more elements: more rows, or longer ones where there are counts."""
    member = random.randrange(len(call.shapes))
    first, *rest = call.shapes[member]
    if call.verb in LIKE_REDUCE or (call.counts is None and random.random() < 0.5):
        first += ranks if call.verb in (*LIKE_SCATTER, "all_to_all") else 1
    else:
        rest[-1] += 1
    return _with_shape(call, member, (first, *rest))


def _other_order(random: Random, call: Call, guilty: int, ranks: int) -> Call:
    """Return the call with as many elements in another shape."""
    member = random.randrange(len(call.shapes))
    *first, a, b = call.shapes[member]
    return _with_shape(call, member, (*first, *random.choice([(b, a), (a * b,), (1, a, b)])))


def _other_dtype(random: Random, call: Call, guilty: int, ranks: int) -> Call:
    dtypes = list(call.dtypes)
    member = random.randrange(len(dtypes))
    dtypes[member] = random.choice([dtype for dtype in DTYPES if dtype != dtypes[member]])
    return replace(call, dtypes=tuple(dtypes))


def _other_counts(random: Random, call: Call, guilty: int, ranks: int) -> Call:
    """Return the call with one row less for one rank and one more for another, never itself."""
    giver, taker = random.sample([rank for rank in range(ranks) if rank != guilty], 2)
    first = call.shapes[0][0]
    uniform = (first if call.verb in LIKE_GATHER else first // ranks,) * ranks
    counts, received = call.counts or uniform, call.recv_counts or uniform
    if call.verb != "all_to_all":
        return replace(call, counts=_moved(counts, giver, taker))
    if random.random() < 0.5:
        return replace(call, counts=_moved(counts, giver, taker), recv_counts=received)
    return replace(call, counts=counts, recv_counts=_moved(received, giver, taker))


def _moved(counts: tuple[int, ...], giver: int, taker: int) -> tuple[int, ...]:
    moved = list(counts)
    moved[giver] -= 1
    moved[taker] += 1
    return tuple(moved)


def _other_list(random: Random, call: Call, guilty: int, ranks: int) -> Call:
    """Return the call with its arrays in another order, one less, or one more."""
    pairs = list(zip(call.shapes, call.dtypes, strict=True))
    change = random.choice(("order", "less", "more"))
    if change == "order":
        pairs.reverse()
    elif change == "less":
        pairs.pop(random.randrange(len(pairs)))
    else:
        pairs.append(pairs[0])
    shapes, dtypes = zip(*pairs, strict=True)
    return replace(call, shapes=shapes, dtypes=dtypes)


_OF_ARRAYS: dict[str, Callable[[Random, Call, int, int], Call]] = {
    "shape": _other_shape,
    "order": _other_order,
    "dtype": _other_dtype,
    "counts": _other_counts,
    "list": _other_list,
}


def _with_shape(call: Call, member: int, shape: Shape) -> Call:
    shapes = list(call.shapes)
    shapes[member] = shape
    return replace(call, shapes=tuple(shapes))
