"""What others read of a rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from mpidist.observe.recorder.recorder import (
    GROUP,
    NUMBER,
    RECORD,
    RING,
    SEQUENCE,
    SITE,
    STACKS,
    TEXT_BITS,
    TEXT_MASK,
    TEXTS,
    Head,
    Kind,
    Over,
    Site,
    record_offset,
)


@dataclass(frozen=True, slots=True)
class OperationRecord:
    """One operation of a rank.

    Attributes
    ----------
    sequence : int
        Number of the record among those of this rank.
    kind : Kind
        How it was called.
    what, group : str
        Verb, op, dtype and shape; name of the group.
    identity, number : int
        Of the group, and of the operation: the same on all ranks of a collective.
    site : Site
        Where the program called it.
    began : int
        Nanoseconds of `time.monotonic_ns`, on this node.
    ended : int
        The same; 0 while it is under way, below 0 if it failed.
    call : int
        Checksum of what has to be the same on all ranks.
    """

    sequence: int
    kind: Kind
    what: str
    group: str
    identity: int
    number: int
    site: Site
    began: int
    ended: int
    call: int

    def is_of(self, key: tuple[int, int]) -> bool:
        """Whether this is of a collective: of its group's identity and number on all ranks."""
        return self.kind is not Kind.MESSAGE and (self.identity, self.number) == key

    def __str__(self) -> str:
        """Return the operation as messages name it."""
        return f"{self.what} #{self.number}"


class Event(NamedTuple):
    """An operation, or the wait for one, that is over; see `Recorder.sink`.

    Attributes
    ----------
    kind : Kind
        An operation or a wait.
    record : OperationRecord
        The operation; without its sequence number.
    began, ended : int
        Nanoseconds of `time.monotonic_ns`: of the operation, or of the wait.
    """

    kind: Kind
    record: OperationRecord
    began: int
    ended: int


class Recording:
    """What others read of one rank.

    Parameters
    ----------
    memory : memoryview
        The rank's part of the shared memory.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self.cells = memory.cast("q")

    def records(self) -> list[OperationRecord]:
        """Return what is kept, the oldest first."""
        memory, records = self._memory, []
        for slot in range(RING):
            fields = RECORD.unpack_from(memory, record_offset(slot))
            # See [Note: reading while another writes].
            if fields[SEQUENCE] and fields == RECORD.unpack_from(memory, record_offset(slot)):
                records.append(decode(memory, fields))
        return sorted(records, key=lambda record: record.sequence)

    def find(self, key: tuple[int, int]) -> OperationRecord | None:
        """Return the newest record of a collective, if it is still there."""
        memory, newest = self._memory, None
        for slot in range(RING):
            fields = RECORD.unpack_from(memory, record_offset(slot))
            if (fields[GROUP], fields[NUMBER]) == key and fields[SEQUENCE]:
                record = decode(memory, fields)
                if record.is_of(key) and (newest is None or record.sequence > newest.sequence):
                    newest = record
        return newest

    def site_of(self, sequence: int) -> Site:
        """Return from where an operation was called; unknown if its record is gone."""
        fields = RECORD.unpack_from(self._memory, record_offset(sequence))
        return _site(self._memory, fields[SITE] if fields[SEQUENCE] == sequence else 0)

    def waits_site(self) -> Site:
        """Return from where this rank last called `Work.wait`."""
        return _site(self._memory, self.cells[Head.WAITS_SITE])

    def stacks(self) -> str:
        """Return where the threads were when that was last written."""
        length = self.cells[Head.STACKS]
        return bytes(self._memory[STACKS : STACKS + length]).decode(errors="replace")


def decode_events(memory: memoryview, sink: Iterable[Over]) -> list[Event]:
    """Decode what a recorder's sink has collected, given the recorder's memory."""
    events = []
    for kind, what, group, number, site, began, ended in sink:
        record = decode(memory, (what, group, 0, number, site, began, ended, 0))
        events.append(Event(kind, record, began, ended))
    return events


def decode(memory: memoryview, fields: tuple[int, ...]) -> OperationRecord:
    """Decode the numbers of a record."""
    what, identity, call, number, site, began, ended, sequence = fields
    return OperationRecord(
        sequence=sequence,
        kind=Kind(what >> 2 * TEXT_BITS),
        what=_read_text(memory, what & TEXT_MASK) or "?",
        group=_read_text(memory, what >> TEXT_BITS & TEXT_MASK) or "?",
        identity=identity,
        number=number,
        site=_site(memory, site),
        began=began,
        ended=ended,
        call=call,
    )


def _site(memory: memoryview, word: int) -> Site:
    file, _, function = _read_text(memory, word & TEXT_MASK).partition("\n")
    return Site(file, word >> TEXT_BITS, function)


def _read_text(memory: memoryview, start: int) -> str:
    if not start:
        return ""
    at = TEXTS + start
    length = int.from_bytes(memory[at : at + 2], "little")
    return bytes(memory[at + 2 : at + 2 + length]).decode(errors="replace")
