"""What the ranks of a group compare: the signature of a call, and how the call travels."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from mpidist._types import Array
from mpidist.backends.node.registered_memory import RegisteredArray

__all__ = [
    "CallSignature",
    "ComparedCall",
    "Described",
    "Route",
    "balance_of",
    "describe_with_route",
    "signature_of",
    "splitmix64",
]


class Route(IntEnum):
    """How the data of a call travels; compared, since it has to be the same on all ranks.

    Ranks on different routes would misread what lies in shared memory.
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
"""Index of the word that says whether a difference breaks the group."""

_KEPT = 1024
"""Signatures that are kept to be used again."""


class Described(NamedTuple):
    """The description of a call, for an error message.

    Attributes
    ----------
    what : str
        What has to be the same on all ranks, such as ``"all_reduce SUM float32[3]"``.
    site : str
        Where it was called.
    how : str
        How it travels; matters only between calls that are the same otherwise.
    balance : int
        See `ComparedCall.balance`; 0 where there is none.
    """

    what: str
    site: str
    how: str = ""
    balance: int = 0


class ComparedCall(Protocol):
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
    def balance(self) -> int | None:
        """For all_to_all, `balance_of` what this rank sends and expects; else None."""

    def describe(self) -> Described:
        """Return the description of the call."""


class CallSignature(NamedTuple):
    """A call signature with a precomputed digest, quick to compare.

    Attributes
    ----------
    values : Array, shape (7,), uint64
        Five numbers that have to be the same on all ranks, the balance, and the digest.
    digest : int
        A hash of the five.
    balance : int or None
        What has to add up to 0 over all ranks, where something has to.
    breaks : bool
        Whether a difference breaks the group; see `ComparedCall`.
    """

    values: Array
    digest: int
    balance: int | None
    breaks: bool

    @classmethod
    def of(cls, numbers: Sequence[int], balance: int | None = None) -> CallSignature:
        """Make the signature of five numbers."""
        # Python salts the hashes of texts, not those of whole numbers: all ranks get the same.
        digest = hash(tuple(map(int, numbers))) & (2**64 - 1)
        values = np.array([*numbers, balance or 0, digest], np.uint64)
        return cls(values, digest, balance, bool(numbers[_BREAKS]))


def signature_of(
    call: ComparedCall, route: Route, array: RegisteredArray | None = None, *, begun: bool = False
) -> CallSignature:
    """Return the signature of a call, as the ranks compare it.

    Parameters
    ----------
    call : ComparedCall
        The call of this rank.
    route : Route
        How it travels.
    array : RegisteredArray, optional
        The registered array that it works on, if any.
    begun : bool, optional
        Whether the call is already under way when it is compared.
    """
    if array is None:
        breaks = begun or call.breaks
        return _signature(call.digest, route, breaks, call.balance)
    block, offset = array.block_number, array.offset
    return CallSignature.of((call.digest, route, block, offset, call.breaks))


@lru_cache(_KEPT)
def _signature(digest: int, route: Route, breaks: bool, balance: int | None) -> CallSignature:  # noqa: FBT001
    """Return the signature of a call on ordinary arrays; the same object for the same call."""
    return CallSignature.of((digest, route, 0, 0, breaks), balance)


def describe_with_route(call: ComparedCall, signature: CallSignature) -> Described:
    """Return the description of a call, with its route as its signature says."""
    described = call.describe()
    _, route, block, offset = signature.values[:4].tolist()
    if block:
        how = f"at byte {offset} of registered block {block}"
    else:
        how = f"not in registered memory, {_ROUTES[Route(route)]}"
    return described._replace(how=described.how or how)


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
    return splitmix64(splitmix64(pairs) ^ np.array(counts, np.uint64))


_Word = TypeVar("_Word", int, "Array")


def splitmix64(x: _Word) -> _Word:
    """Return the output function of SplitMix64, for an int below 2**64 or an array of uint64.

    References
    ----------
    Steele, Lea, Flood (2014), Fast splittable pseudorandom number generators, figure 16.
    """
    mask = 2**64 - 1  # arrays wrap around by themselves
    x = x + 0x9E3779B97F4A7C15 & mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31
