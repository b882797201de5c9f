"""Where the messages of a simulated job meet their receives."""

from __future__ import annotations

import errno
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from mpidist._types import Array
from mpidist.arrays.namespaces import as_bytes
from mpidist.backends.work import ANY_SOURCE, Message
from mpidist.errors import TransportError

if TYPE_CHECKING:
    from mpidist.backends.simulated.network import ExchangeWork

__all__ = ["Matcher", "Parcel", "Place", "Slot"]

T = TypeVar("T", "Parcel", "Slot")


class Place(NamedTuple):
    """A rank in one of the groups: what tells the groups apart, and the members' world ranks."""

    context: Hashable
    rank: int
    members: tuple[int, ...]


class _Address(NamedTuple):
    """Where messages meet receives: a rank of one group, and a lane."""

    context: Hashable
    rank: int
    lane: int


class Parcel:
    """One message on its way; `work` is the sender's until its array is no longer needed."""

    __slots__ = ("address", "data", "members", "source", "work")

    def __init__(self, sender: Place, message: Message, work: ExchangeWork) -> None:
        self.address = _Address(sender.context, message.peer, message.lane)
        self.members = sender.members
        self.source = sender.rank
        self.data = as_bytes(message.array)
        self.work: ExchangeWork | None = work


class Slot:
    """One posted receive; its source is the `index`-th of its work's."""

    __slots__ = ("address", "index", "room", "source", "work")

    def __init__(self, receiver: Place, message: Message, work: ExchangeWork, index: int) -> None:
        self.address = _Address(receiver.context, receiver.rank, message.lane)
        self.room: Array = as_bytes(message.array)
        self.source = message.peer
        self.work = work
        self.index = index

    def take(self, parcel: Parcel) -> None:
        """Copy the bytes of a message, or note that it is too long."""
        self.work.sources[self.index] = parcel.source
        if parcel.data.size > self.room.size:
            # Too late for an error of arguments: the other rank goes on as if all were well.
            self.work.error = TransportError(
                f"receive on rank {parcel.address.rank}: the message of rank {parcel.source} has "
                f"{parcel.data.size} bytes, the array that takes it {self.room.size}; "
                "the ranks' arguments must fit together",
                code=errno.EMSGSIZE,
            )
            return
        np.copyto(self.room[: parcel.data.size], parcel.data)


class Matcher:
    """The messages that wait for their receive, and the receives that wait for their message."""

    def __init__(self) -> None:
        self._arrived: dict[_Address, list[Parcel]] = {}
        self._posted: dict[_Address, list[Slot]] = {}

    def post(self, slot: Slot) -> Parcel | None:
        """Return the first message that fits a new receive; else the receive waits."""
        wanted = slot.source
        found = _take(self._arrived, slot.address, lambda p: wanted in (ANY_SOURCE, p.source))
        if found is None:
            self._posted.setdefault(slot.address, []).append(slot)
        return found

    def arrive(self, parcel: Parcel) -> Slot | None:
        """Return the first receive that fits a new message; else the message waits."""
        source = parcel.source
        found = _take(self._posted, parcel.address, lambda s: s.source in (ANY_SOURCE, source))
        if found is None:
            self._arrived.setdefault(parcel.address, []).append(parcel)
        return found


def _take(table: dict[_Address, list[T]], address: _Address, fits: Callable[[T], bool]) -> T | None:
    """Remove and return the first entry that fits."""
    entries = table.get(address, [])
    for index, entry in enumerate(entries):
        if fits(entry):
            del entries[index]
            if not entries:
                del table[address]
            return entry
    return None
