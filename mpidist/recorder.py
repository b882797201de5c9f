"""The flight recorder: the last operations of each rank, where the ranks of its node can read them.

It is always on, so it must cost next to nothing: beginning an operation writes six words to memory,
ending it one. Nobody is told and nothing is sent; whoever needs to know what a rank was doing reads
its memory, also after that rank has died.

[Note: reading while another writes] The writer never waits for a reader. A record's number is
written with the rest of it in one call, and a reader that finds the same bytes twice takes them as
they are. Where a processor makes writes visible in another order than they were made, a reader may
see a record of which half is new; that is borne, since nothing but a report depends on it.
"""

from __future__ import annotations

import itertools
import os
import struct
from dataclasses import dataclass
from enum import IntEnum
from time import monotonic_ns
from types import CodeType, FrameType
from typing import Any, NamedTuple

__all__ = ["Event", "Head", "Kind", "Record", "Recorder", "Recording", "Site", "is_inside"]

RING = 128
"""Records that are kept."""

_NBYTES, _TEXTS = 36 << 10, 16 << 10
"""Bytes of each rank's part, whole pages, and of the texts that the records in it refer to."""

_HEAD_WORDS, _RECORD_WORDS = 64, 8
_RING_START = _HEAD_WORDS * 8
_TEXTS_START = _RING_START + RING * _RECORD_WORDS * 8
_STACKS_START = _TEXTS_START + _TEXTS

_RECORD = struct.Struct("<6q")
_WHAT, _NUMBER, _SITE, _BEGAN, _ENDED, _SEQUENCE = range(6)

_TEXT_BITS = 20
_TEXT_MASK = (1 << _TEXT_BITS) - 1
"""A text is known by where it begins; several of them share a word."""

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep  # noqa: PTH100, PTH120  # import time
_OUTSIDE = tuple(_PACKAGE + part + os.sep for part in ("bench", "testing"))
"""Parts of this package that use it as anybody does."""


_REMEMBERED = 4096
"""Functions whose places are remembered."""


class Kind(IntEnum):
    """What an entry of the record, or of a trace, stands for."""

    BLOCKING = 0
    IMMEDIATE = 1
    MESSAGE = 2
    WAIT = 3


class Head(IntEnum):
    """The words of a rank's part that stand for themselves; times by `time.monotonic_ns`."""

    PID = 1
    PID_NAMESPACE = 2
    WAITS_FOR = 3  # sequence of the record for which a Work.wait waits
    WAITS_SITE = 4
    WAITS_SINCE = 5
    TEXTS = 6  # bytes of texts in use
    LISTENING = 7  # whether a helper thread answers
    ASKED = 8  # when somebody last asked where the threads are
    ANSWERED = 9  # when that was last written
    STACKS = 10  # its length
    CLAIMED = 11  # when this rank last set out to write a report
    REPORTED = 12  # when it had written it
    LEAVING = 13  # when it came to its exit


class Event(NamedTuple):
    """An operation, or the wait for one, that is over; see `Recorder.sink`.

    Attributes
    ----------
    kind : Kind
        What it is.
    what, group : str
        Verb, op, dtype and shape; name of the group.
    identity, number : int
        Of the group and of the operation: the same on all ranks of a collective.
    site : str
        The caller's file and line.
    began, ended : int
        Nanoseconds of `time.monotonic_ns`.
    """

    kind: Kind
    what: str
    group: str
    identity: int
    number: int
    site: str
    began: int
    ended: int


class Recorder:
    """What one rank writes.

    Parameters
    ----------
    memory : memoryview, optional
        `nbytes()` bytes, zero at first, that others may read. Memory of its own when omitted.

    Attributes
    ----------
    sink : list of Event or None
        While it is a list, every operation that is over is appended.
    words : memoryview
        The head; see `Head`.
    """

    def __init__(self, memory: memoryview | None = None) -> None:
        if memory is None:
            memory = memoryview(bytearray(_NBYTES))
        self._memory = memory
        self.words = memory.cast("q")
        self.sink: list[Event] | None = None
        self._next = itertools.count(1).__next__
        self._sites: dict[tuple[int, int], int] = {}
        self._inside: dict[int, tuple[bool, CodeType]] = {}
        self._offsets: dict[str, int] = {}
        self._places = [_place(slot) for slot in range(RING)]
        # A text begins behind the first byte: none begins at 0, which stands for no text.
        self.words[Head.TEXTS] = 1
        self.words[Head.PID] = os.getpid()
        self.words[Head.PID_NAMESPACE] = _pid_namespace()

    @staticmethod
    def nbytes() -> int:
        """Return the memory that one rank's part takes."""
        return _NBYTES

    # -- operations ----------------------------------------------------------------------------

    def name(self, what: str, group: int, kind: Kind) -> int:
        """Return the number under which operations of this name are recorded.

        Parameters
        ----------
        what : str
            Verb, op, dtype and shape.
        group : int
            From `name_group`.
        kind : Kind
            How it is called.
        """
        return self._text(what) | group << _TEXT_BITS | kind << 2 * _TEXT_BITS

    def name_group(self, name: str, identity: int) -> int:
        """Return the number under which operations of a group are recorded."""
        return self._text(f"{identity} {name}")

    def begin(self, what: int, number: int, frame: FrameType) -> int:
        """Record that an operation begins.

        Parameters
        ----------
        what : int
            From `name`.
        number : int
            Of the operation; for a collective the same on all ranks of its group.
        frame : FrameType
            Of the caller, or of a function of this package that it has called.

        Returns
        -------
        int
            The record's sequence number.
        """
        sequence = self._next()
        site = self._sites.get((id(frame.f_code), frame.f_lasti)) or self._find_site(frame)
        place = self._places[sequence % RING]
        _RECORD.pack_into(self._memory, place, what, number, site, monotonic_ns(), 0, sequence)
        return sequence

    def end(self, sequence: int, *, failed: bool = False) -> None:
        """Record that an operation is over; a time below 0 stands for one that failed."""
        words = self.words
        place = self._places[sequence % RING] >> 3
        if words[place + _SEQUENCE] == sequence:
            words[place + _ENDED] = -monotonic_ns() if failed else monotonic_ns()
            if self.sink is not None:
                self._tell(place, Kind(words[place] >> 2 * _TEXT_BITS), words[place + _BEGAN])

    def wait(self, sequence: int, frame: FrameType) -> None:
        """Record that this rank waits for an immediate operation."""
        words = self.words
        words[Head.WAITS_SITE] = self._find_site(frame)
        words[Head.WAITS_SINCE] = monotonic_ns()
        words[Head.WAITS_FOR] = sequence

    def waited(self) -> None:
        """Record that it does so no more."""
        words = self.words
        sequence, words[Head.WAITS_FOR] = words[Head.WAITS_FOR], 0
        if self.sink is not None and sequence:
            place = self._places[sequence % RING] >> 3
            if words[place + _SEQUENCE] == sequence:
                self._tell(place, Kind.WAIT, words[Head.WAITS_SINCE])

    def _tell(self, place: int, kind: Kind, began: int) -> None:
        words, ended = self.words, monotonic_ns()
        what, number, site = words[place], words[place + _NUMBER], words[place + _SITE]
        record = _decode(self._memory, (what, number, site, began, ended, 0))
        if self.sink is not None:
            self.sink.append(
                Event(
                    kind,
                    record.what,
                    record.group,
                    record.identity,
                    number,
                    str(record.site),
                    began,
                    ended,
                )
            )

    # -- texts ---------------------------------------------------------------------------------

    def _text(self, text: str) -> int:
        """Return where a text stands; 0 when there is no room for it."""
        found = self._offsets.get(text)
        if found is not None:
            return found
        data = text.encode(errors="replace")
        start = self.words[Head.TEXTS]
        if start + 2 + len(data) > _TEXTS:
            return 0
        at = _TEXTS_START + start
        self._memory[at : at + 2 + len(data)] = len(data).to_bytes(2, "little") + data
        self.words[Head.TEXTS] = start + 2 + len(data)
        self._offsets[text] = start
        return start

    def _find_site(self, frame: FrameType) -> int:
        """Return the place outside this package from which a frame was called."""
        user = frame
        while self._is_inside(user.f_code) and user.f_back is not None:
            if user.f_back.f_code.co_filename == "<frozen runpy>":
                break  # the package's own programs
            user = user.f_back
        key = (id(user.f_code), user.f_lasti)
        site = self._sites.get(key)
        if site is None:
            code = user.f_code
            site = self._text(f"{code.co_filename}\n{code.co_name}") | user.f_lineno << _TEXT_BITS
            self._sites[key] = site
        return site

    def _is_inside(self, code: CodeType) -> bool:
        # By identity: hashing a code object takes longer than all the rest. Holding it keeps the
        # identity from being given to another.
        found = self._inside.get(id(code))
        if found is None:
            if len(self._inside) >= _REMEMBERED:
                self._inside.clear()
                self._sites.clear()
            found = self._inside[id(code)] = (is_inside(code.co_filename), code)
        return found[0]

    # -- the helper thread ---------------------------------------------------------------------

    def write_stacks(self, text: str) -> None:
        """Say where this process's threads are; what is too long is cut."""
        data = text.encode(errors="replace")[: _NBYTES - _STACKS_START]
        self._memory[_STACKS_START : _STACKS_START + len(data)] = data
        self.words[Head.STACKS] = len(data)
        self.words[Head.ANSWERED] = monotonic_ns()


@dataclass(frozen=True, slots=True)
class Site:
    """A place in a program.

    Attributes
    ----------
    file : str
        Path; nothing where it is not known.
    line : int
        Number of the line.
    function : str
        Name of the function.
    """

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        """Return file and line, as editors take them."""
        return f"{self.file}:{self.line}" if self.file else "?"


@dataclass(frozen=True, slots=True)
class Record:
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
        The caller.
    began : int
        Nanoseconds of `time.monotonic_ns`, on this node.
    ended : int
        The same; 0 while it is under way, below 0 if it failed.
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

    @property
    def key(self) -> tuple[int, int]:
        """What a collective has in common on all ranks."""
        return self.identity, self.number

    def __str__(self) -> str:
        """Return the operation as messages name it."""
        return f"{self.what} #{self.number}"


class Recording:
    """What others read of one rank.

    Parameters
    ----------
    memory : memoryview
        The rank's part.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self.words = memory.cast("q")

    def records(self) -> list[Record]:
        """Return what is kept, the oldest first."""
        memory, found = self._memory, []
        for slot in range(RING):
            place = _place(slot)
            fields = _RECORD.unpack_from(memory, place)
            # See [Note: reading while another writes].
            if fields[_SEQUENCE] and fields == _RECORD.unpack_from(memory, place):
                found.append(_decode(memory, fields))
        return sorted(found, key=lambda record: record.sequence)

    def site_of(self, sequence: int) -> Site:
        """Return from where an operation was called; unknown if its record is gone."""
        fields = _RECORD.unpack_from(self._memory, _place(sequence))
        return _site(self._memory, fields[_SITE] if fields[_SEQUENCE] == sequence else 0)

    def waits_site(self) -> Site:
        """Return from where this rank last called `Work.wait`."""
        return _site(self._memory, self.words[Head.WAITS_SITE])

    def stacks(self) -> str:
        """Return where the threads were when that was last written."""
        length = self.words[Head.STACKS]
        return bytes(self._memory[_STACKS_START : _STACKS_START + length]).decode(errors="replace")


def is_inside(file: str) -> bool:
    """Whether a file is one of this package's own, rather than one that calls it."""
    return file.startswith(_PACKAGE) and not file.startswith(_OUTSIDE)


def _place(sequence: int) -> int:
    """Return where a record stands."""
    return _RING_START + sequence % RING * _RECORD_WORDS * 8


def _decode(memory: memoryview, fields: tuple[Any, ...]) -> Record:
    what, number, site, began, ended, sequence = fields
    identity, _, group = _read_text(memory, what >> _TEXT_BITS & _TEXT_MASK).partition(" ")
    return Record(
        sequence=sequence,
        kind=Kind(what >> 2 * _TEXT_BITS),
        what=_read_text(memory, what & _TEXT_MASK) or "?",
        group=group or "?",
        identity=int(identity or 0),
        number=number,
        site=_site(memory, site),
        began=began,
        ended=ended,
    )


def _site(memory: memoryview, word: int) -> Site:
    file, _, function = _read_text(memory, word & _TEXT_MASK).partition("\n")
    return Site(file, word >> _TEXT_BITS, function)


def _read_text(memory: memoryview, start: int) -> str:
    if not start:
        return ""
    at = _TEXTS_START + start
    length = int.from_bytes(memory[at : at + 2], "little")
    return bytes(memory[at + 2 : at + 2 + length]).decode(errors="replace")


def _pid_namespace() -> int:
    """Return a number that is the same for processes that see each other under the same numbers."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116  # pathlib is a part of the import
    except OSError:
        return 0
