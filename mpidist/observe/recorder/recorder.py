"""What a rank writes: the layout of its memory, and how operations are written to it."""

from __future__ import annotations

import itertools
import os
import re
import struct
import sys
import threading
import weakref
from dataclasses import dataclass
from enum import IntEnum
from time import monotonic_ns
from types import CodeType, FrameType
from typing import NamedTuple, Protocol, TypeAlias
from zlib import crc32

RING = 128
"""Records that are kept."""

NBYTES, TEXTS_NBYTES = 52 << 10, 32 << 10
"""Bytes of each rank's part, whole pages, and of the texts that the records in it refer to."""

DETAILS_NBYTES, GROUPS_NBYTES = TEXTS_NBYTES // 2, TEXTS_NBYTES * 3 // 4
"""Where the space for texts with shapes, and for names of groups, ends.

A job may have any number of either. The rest is for texts of which every job has few: operations
without their shapes, and call sites.
"""

_HEAD_CELLS, _RECORD_CELLS = 64, 8
_RING = _HEAD_CELLS * 8

TEXTS = _RING + RING * _RECORD_CELLS * 8
"""Where the texts begin."""

STACKS = TEXTS + TEXTS_NBYTES
"""Where the stacks of the threads are written; from here to the end."""

RECORD = struct.Struct("<8q")
WHAT, GROUP, CALL, NUMBER, SITE, BEGAN, ENDED, SEQUENCE = range(8)

ON_DEVICE = 1 << 32
"""A bit of a call's checksum: its arrays lie on a device."""

TEXT_BITS = 20
TEXT_MASK = (1 << TEXT_BITS) - 1
"""A text is identified by where it begins, in so many bits: several share an integer."""


class Kind(IntEnum):
    """What an entry of the record, or of a trace, stands for."""

    BLOCKING = 0
    IMMEDIATE = 1
    MESSAGE = 2
    WAIT = 3


class Head(IntEnum):
    """Indices of the integers in the head of a rank's part; times are by `time.monotonic_ns`."""

    PID = 1
    PID_NAMESPACE = 2
    WAITS_FOR = 3  # sequence of the record for which a Work.wait waits
    WAITS_SITE = 4
    WAITS_SINCE = 5
    TEXTS = 6  # bytes of texts in use
    LISTENING = 7  # whether a helper thread answers
    ASKED = 8  # when a rank last asked for the stacks
    ANSWERED = 9  # when they were last written
    STACKS = 10  # bytes of the stacks
    CLAIMED = 11  # when this rank last began to write a report
    REPORTED = 12  # when it had written the report
    LEAVING = 13  # when its exit began
    BEAT = 14  # when the helper thread last ran
    FAILED = 15  # checksum of the reason for which it ends, see `mpidist.observe.watch.failures`
    FAILED_AT = 16  # when that was written
    LISTED = 17  # when it looked which others end for the same reason
    SPOKEN = 18  # when it had printed the reason for all of them


def record_offset(sequence: int) -> int:
    """Return the offset of a record in bytes."""
    return _RING + sequence % RING * _RECORD_CELLS * 8


Over: TypeAlias = tuple[Kind, int, int, int, int, int, int]
"""An operation that is over, or a wait: kind, what, group, number, site, began, ended."""

_PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep  # noqa: PTH100, PTH120
_OUTSIDE = tuple(_PACKAGE + part + os.sep for part in ("bench", "examples", "testing"))
"""Parts of this package that call it as a program does."""

_ADDED: list[str] = []
"""Directories of adapters, whose files count as this package's own."""

_DETAILS = re.compile(r"(\[|\(| in parts of | of a list of ).*")
"""The part of a text that may differ from call to call: shapes, counts."""

_REMEMBERED = 4096
"""Functions whose call sites are cached."""


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


class Name(NamedTuple):
    """How operations of one name are recorded, in numbers.

    Attributes
    ----------
    what : int
        Where the texts stand that say what it is, and how it is called.
    group : int
        Identity of the group.
    call : int
        A checksum of what has to be the same on all ranks, and `ON_DEVICE`. Calls are compared by
        it, never by the texts: on one rank there may be room for them where there is none on
        another.
    """

    what: int
    group: int
    call: int


class Sink(Protocol):
    """What receives every operation; a list will do."""

    def append(self, over: Over, /) -> None:
        """Receive an operation that is over, or a wait."""


class Recorder:
    """What one rank writes.

    Parameters
    ----------
    memory : memoryview, optional
        `nbytes()` bytes, zero at first, that others may read. Memory of its own when omitted.

    Attributes
    ----------
    sink : Sink or None
        While there is one, every operation that is over, and every wait for one, is appended, in
        numbers; `mpidist.observe.recorder.recording.decode_events` turns them into words.
    memory : memoryview
        Everything that is recorded, as bytes.
    cells : memoryview of int64
        The head; see `Head`.
    """

    def __init__(self, memory: memoryview | None = None) -> None:
        if memory is None:
            memory = memoryview(bytearray(NBYTES))
        self.memory = memory
        self.cells = memory.cast("q")
        self.sink: Sink | None = None
        self._next = itertools.count(1).__next__
        self._sites: dict[tuple[int, int], int] = {}
        self._inside: dict[int, tuple[bool, CodeType]] = {}
        self._offsets: dict[str, int] = {}
        self._writing = threading.Lock()
        _RECORDERS.add(self)
        self._record_offsets = [record_offset(slot) for slot in range(RING)]
        # A text begins behind the first byte: none begins at 0, which stands for no text.
        self.cells[Head.TEXTS] = 1
        self.cells[Head.PID] = os.getpid()
        self.cells[Head.PID_NAMESPACE] = _pid_namespace()

    @staticmethod
    def nbytes() -> int:
        """Return the memory that one rank's part takes."""
        return NBYTES

    # -- operations ----------------------------------------------------------------------------

    def name(
        self,
        what: str,
        group: tuple[int, int],
        kind: Kind,
        alike: str | None = None,
        *,
        on_device: bool = False,
    ) -> Name:
        """Return how operations of this name are recorded.

        Parameters
        ----------
        what : str
            Verb, op, dtype and shape. Where there is no room for it, the text ends at the shape.
        group : (int, int)
            What `name_group` returned for the group.
        kind : Kind
            How it is called.
        alike : str, optional
            What of it has to be the same on all ranks; all when omitted.
        on_device : bool, optional
            Whether its arrays lie on a device.
        """
        text, identity = group
        start = self._text(what, DETAILS_NBYTES) or self._text(_DETAILS.sub("...", what))
        packed = start | text << TEXT_BITS | kind << 2 * TEXT_BITS
        call = crc32((what if alike is None else alike).encode())
        return Name(packed, identity, call | ON_DEVICE * on_device)

    def name_group(self, name: str, identity: int) -> tuple[int, int]:
        """Return what `name` wants to know of a group."""
        return self._text(name, GROUPS_NBYTES), identity

    def begin(self, name: Name, number: int, frame: FrameType) -> int:
        """Record that an operation begins.

        Parameters
        ----------
        name : Name
            What `name` returned for such operations.
        number : int
            Of the operation; for a collective the same on all ranks of its group.
        frame : FrameType
            Of the caller, or of a function of this package that it has called.

        Returns
        -------
        int
            The record's sequence number.
        """
        sequence = self._next()  # atomic: threads of one group begin operations at once
        # A hit costs one lookup, and no walk up the frames to the program.
        site = self._sites.get((id(frame.f_code), frame.f_lasti)) or self._find_site(frame)
        at, memory = self._record_offsets[sequence % RING], self.memory
        what, group, call = name  # a star in the call takes 0.1 us
        # One call writes the record, its sequence number last: see [Note: reading while another
        # writes].
        RECORD.pack_into(memory, at, what, group, call, number, site, monotonic_ns(), 0, sequence)
        return sequence

    def begin_at(self, name: Name, number: int, site: int) -> int:
        """Record that an operation begins which was called at a site from `site`; see `begin`."""
        sequence = self._next()
        at, memory = self._record_offsets[sequence % RING], self.memory
        what, group, call = name
        RECORD.pack_into(memory, at, what, group, call, number, site, monotonic_ns(), 0, sequence)
        return sequence

    def end(self, sequence: int, *, failed: bool = False) -> None:
        """Record that an operation is over; a time below 0 stands for one that failed."""
        cells = self.cells  # as int64, so that an index is an eighth of the offset
        at = self._record_offsets[sequence % RING] >> 3
        if cells[at + SEQUENCE] == sequence:  # not overwritten by an operation begun since
            cells[at + ENDED] = -monotonic_ns() if failed else monotonic_ns()
            if self.sink is not None:
                self._emit(at, Kind(cells[at + WHAT] >> 2 * TEXT_BITS), cells[at + BEGAN])

    def wait(self, sequence: int, frame: FrameType) -> None:
        """Record that this rank waits for an immediate operation."""
        self.wait_at(sequence, self._find_site(frame))

    def wait_at(self, sequence: int, site: int) -> None:
        """Record that it waits at a site from `site`."""
        cells = self.cells
        cells[Head.WAITS_SITE] = site
        cells[Head.WAITS_SINCE] = monotonic_ns()
        cells[Head.WAITS_FOR] = sequence  # last: a reader takes the others as belonging to it

    def waited(self) -> None:
        """Record that the wait is over."""
        cells = self.cells
        sequence, cells[Head.WAITS_FOR] = cells[Head.WAITS_FOR], 0
        if self.sink is not None and sequence:
            at = self._record_offsets[sequence % RING] >> 3
            if cells[at + SEQUENCE] == sequence:
                self._emit(at, Kind.WAIT, cells[Head.WAITS_SINCE])

    def _emit(self, at: int, kind: Kind, began: int) -> None:
        if self.sink is not None:
            cells = self.cells
            what, group = cells[at + WHAT], cells[at + GROUP]
            number, site = cells[at + NUMBER], cells[at + SITE]
            self.sink.append((kind, what, group, number, site, began, monotonic_ns()))

    # -- texts ---------------------------------------------------------------------------------

    def _text(self, text: str, end: int = TEXTS_NBYTES) -> int:
        """Return the offset of a text; 0 if it would end beyond the space for such texts."""
        start = self._offsets.get(text)
        if start is not None:
            return start
        data = text.encode(errors="replace")
        with self._writing:  # threads may use groups of their own at once
            start = self.cells[Head.TEXTS]
            if start + 2 + len(data) > end:
                return 0
            at = TEXTS + start
            self.memory[at : at + 2 + len(data)] = len(data).to_bytes(2, "little") + data
            self.cells[Head.TEXTS] = start + 2 + len(data)
            self._offsets[text] = start
            return start

    def site(self, site: Site) -> int:
        """Return the number under which a place in a program is recorded."""
        return self._text(f"{site.file}\n{site.function}") | site.line << TEXT_BITS

    def _find_site(self, frame: FrameType) -> int:
        """Return the call site outside this package that led to a frame."""
        user = frame
        while self._is_inside(user.f_code) and user.f_back is not None:
            if user.f_back.f_code.co_filename == "<frozen runpy>":
                break  # the package's own programs
            user = user.f_back
        key = (id(user.f_code), user.f_lasti)
        site = self._sites.get(key)
        if site is None:
            code = user.f_code
            site = (
                self._text(f"{code.co_filename}\n{code.co_name}")
                | (user.f_lineno or 0) << TEXT_BITS
            )
            self._sites[key] = site
        return site

    def _is_inside(self, code: CodeType) -> bool:
        # By identity: hashing a code object takes longer than all the rest. Holding it keeps the
        # identity from being given to another.
        inside = self._inside.get(id(code))
        if inside is None:
            if len(self._inside) >= _REMEMBERED:
                self._forget_sites()
            inside = self._inside[id(code)] = (is_inside(code.co_filename), code)
        return inside[0]

    def _forget_sites(self) -> None:
        self._inside.clear()
        self._sites.clear()

    # -- the helper thread ---------------------------------------------------------------------

    def write_stacks(self, text: str) -> None:
        """Say where this process's threads are; what is too long is cut."""
        data = text.encode(errors="replace")[: NBYTES - STACKS]
        self.memory[STACKS : STACKS + len(data)] = data
        self.cells[Head.STACKS] = len(data)
        self.cells[Head.ANSWERED] = monotonic_ns()


_RECORDERS: weakref.WeakSet[Recorder] = weakref.WeakSet()


def caller(depth: int) -> FrameType:
    """Return the frame so many calls above that of the function which asks.

    That function's own where there is none: an exit handler, for one, is called by no Python.
    """
    try:
        return sys._getframe(depth + 1)
    except ValueError:
        return sys._getframe(1)


def is_inside(file: str) -> bool:
    """Whether a file is one of this package's own, rather than one that calls it."""
    if file.startswith(_PACKAGE):
        return not file.startswith(_OUTSIDE)
    return bool(_ADDED) and file.startswith(tuple(_ADDED))


def add_inside(directory: str) -> None:
    """Let the files of a directory count as this package's own, from now on.

    For adapters, such as one that a framework calls: records and errors name the line of the user
    that called the adapter, not one of its own.

    Parameters
    ----------
    directory : str
        Path of the directory; those below it count, too.
    """
    path = os.path.join(os.path.abspath(directory), "")  # noqa: PTH100, PTH118  # as above
    if path not in _ADDED:
        _ADDED.append(path)
        for recorder in tuple(_RECORDERS):
            recorder._forget_sites()


def site_of(frame: FrameType) -> Site:
    """Return the line of the user from which a frame was called, without holding the frame.

    A frame keeps all local variables of its function alive, arrays included; a `Site` keeps none.
    """
    user = frame
    while is_inside(user.f_code.co_filename) and user.f_back is not None:
        user = user.f_back
    return Site(user.f_code.co_filename, user.f_lineno or 0, user.f_code.co_name)


def _pid_namespace() -> int:
    """Return a number that is the same for processes that see each other under the same numbers."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116  # pathlib is a part of the import
    except OSError:
        return 0
