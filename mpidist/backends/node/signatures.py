"""What the ranks of a group compare: the signature of a call, and how the call travels."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from mpidist._types import Array
from mpidist.backends.node.registered_memory import Place, Registry

__all__ = [
    "DIRECT_VERBS",
    "Described",
    "Record",
    "Route",
    "Signature",
    "balance_of",
    "describe_with_route",
    "record_of",
    "registered_place",
    "whole_array",
]

DIRECT_VERBS = ("all_reduce", "all_gather", "broadcast", "reduce_scatter")
"""The collectives that can be performed where the arrays lie."""


class Route(IntEnum):
    """How a call travels. It has to be the same on all ranks.

    Ranks that go different ways would take what lies in shared memory for something else.
    """

    MESSAGES = 1
    LIBRARY = 2
    ARRIVAL = 3
    SCRATCH = 4
    REGISTERED = 5


_ROUTES = {
    Route.MESSAGES: "by messages",
    Route.LIBRARY: "by the MPI library",
    Route.ARRIVAL: "with the arrival, as a small array",
    Route.SCRATCH: "by way of scratch in shared memory",
}

_BREAKS = 4
"""Word of a record that says whether a difference breaks the group."""

_KEPT = 1024
"""Records that are kept to be used again."""


class Described(NamedTuple):
    """A call in words, for an error.

    Attributes
    ----------
    what : str
        What has to be the same on all ranks, such as ``"all_reduce SUM float32[3]"``.
    site : str
        Where it was called.
    how : str
        How it travels; matters only between calls that are the same otherwise.
    balance : int
        As of the `Signature`; 0 where there is none.
    """

    what: str
    site: str
    how: str = ""
    balance: int = 0


class Signature(Protocol):
    """What one rank calls, to be compared with what the others call.

    The waiter of a collective is one: an object of its own would cost more than the comparison.

    Attributes
    ----------
    digest : int
        Checksum of what has to be the same on all ranks: form, verb, op, dtype, shape or rows of
        each rank, root.
    breaks : bool
        Whether a difference breaks the group, since a part of what was called is under way.
    """

    digest: int
    breaks: bool

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of the caller's array, for verbs that take a whole one."""

    @property
    def balance(self) -> int | None:
        """For all_to_all, `balance_of` what this rank sends and expects; else None."""

    def describe(self) -> Described:
        """Return the call in words."""


class Record(NamedTuple):
    """What a rank comes with, in a form that is quick to compare.

    Attributes
    ----------
    words : Array, shape (7,), uint64
        Five numbers that have to be the same on all ranks, the balance, and the digest.
    digest : int
        A hash of the five.
    balance : int or None
        What has to add up to 0 over all ranks, where something has to.
    """

    words: Array
    digest: int
    balance: int | None

    @classmethod
    def of(cls, numbers: Sequence[int], balance: int | None = None) -> Record:
        """Make the record of five numbers."""
        # Python salts the hashes of texts, not those of whole numbers: all ranks get the same.
        digest = hash(tuple(map(int, numbers))) & (2**64 - 1)
        words = np.array([*numbers, balance or 0, digest], np.uint64)
        return cls(words, digest, balance)

    @property
    def breaks(self) -> bool:
        """Whether a difference breaks the group; see `Signature`."""
        return bool(self.words[_BREAKS])


def record_of(
    signature: Signature, route: Route, place: Place | None = None, *, begun: bool = False
) -> Record:
    """Return the numbers that the ranks compare.

    Parameters
    ----------
    signature : Signature
        Of the call.
    route : Route
        How it travels.
    place : Place, optional
        Where its arrays lie, if they are registered.
    begun : bool, optional
        Whether the call is under way when it is compared.
    """
    if place is None:
        breaks = begun or signature.breaks
        return _record(signature.digest, route, breaks, signature.balance)
    block, offset = place.block.number, place.offset
    return Record.of((signature.digest, route, block, offset, signature.breaks))


@lru_cache(_KEPT)
def _record(digest: int, route: Route, breaks: bool, balance: int | None) -> Record:  # noqa: FBT001
    """Return the record of a call that has no place; the same object for the same call."""
    return Record.of((digest, route, 0, 0, breaks), balance)


def describe_with_route(signature: Signature, record: Record) -> Described:
    """Return a call in words, with how it travels according to its record."""
    described = signature.describe()
    _, route, block, offset = record.words[:4].tolist()
    if block:
        how = f"at byte {offset} of registered block {block}"
    else:
        how = f"not in registered memory, {_ROUTES[Route(route)]}"
    return described._replace(how=described.how or how)


def registered_place(verb: str, args: tuple[Any, ...], registered: Registry) -> Place | None:
    """Return where the arrays of a call lie if they can be worked on there.

    Parameters
    ----------
    verb, args : str, tuple
        One of `DIRECT_VERBS`, and its arguments as a transport gets them.
    registered : Registry
        Knows the arrays that lie in shared memory.
    """
    if verb == "all_reduce" and args[0] is not args[1]:
        return None
    if verb == "all_gather" and args[0] is not None:
        return None
    return registered.place(whole_array(verb, args))


def whole_array(verb: str, args: tuple[Any, ...]) -> Array:
    """Return the argument that has the same size on all ranks, of one of `DIRECT_VERBS`."""
    whole: Array = args[1] if verb == "all_gather" else args[0]
    return whole


@lru_cache(_KEPT)
def balance_of(rank: int, sends: tuple[int, ...], receives: tuple[int, ...]) -> int:
    """Return a number whose sum over all ranks is 0 modulo 2**64 if all expect what is sent.

    Parameters
    ----------
    rank : int
        This rank.
    sends, receives : tuple of int
        Elements for, and from, each rank.

    Notes
    -----
    Each pair of ranks adds a hash of (sender, receiver, elements) on the sender and subtracts it
    on the receiver.
    """
    size = len(sends)
    others = np.arange(size, dtype=np.uint64)
    sent = _hashes(np.uint64(rank * size) + others, sends)
    expected = _hashes(others * np.uint64(size) + np.uint64(rank), receives)
    return int(np.sum(sent - expected, dtype=np.uint64))


def _hashes(pairs: Array, counts: Sequence[int]) -> Array:
    return _mixed(_mixed(pairs) ^ np.array(counts, np.uint64))


def _mixed(x: Array) -> Array:
    """Return the output function of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014, figure 16)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = x ^ (x >> np.uint64(31))
    return mixed
