"""How the memory of a rank's recorder is laid out: the head, the ring of records, texts, stacks."""

from __future__ import annotations

import struct
from enum import IntEnum

__all__ = [
    "BEGAN",
    "CALL",
    "DETAILS_NBYTES",
    "ENDED",
    "GROUP",
    "GROUPS_NBYTES",
    "NBYTES",
    "NUMBER",
    "ON_DEVICE",
    "RECORD",
    "RING",
    "SEQUENCE",
    "SITE",
    "STACKS",
    "TEXTS",
    "TEXTS_NBYTES",
    "TEXT_BITS",
    "TEXT_MASK",
    "WHAT",
    "Head",
    "Kind",
    "place",
]

RING = 128
"""Records that are kept."""

NBYTES, TEXTS_NBYTES = 52 << 10, 32 << 10
"""Bytes of each rank's part, whole pages, and of the texts that the records in it refer to."""

DETAILS_NBYTES, GROUPS_NBYTES = TEXTS_NBYTES // 2, TEXTS_NBYTES * 3 // 4
"""Where texts with shapes, and names of groups, find no room any more.

A job may have any number of either. The rest is for what every job has few of: operations without
their shapes, and places in the program.
"""

_HEAD_WORDS, _RECORD_WORDS = 64, 8
_RING = _HEAD_WORDS * 8

TEXTS = _RING + RING * _RECORD_WORDS * 8
"""Where the texts begin."""

STACKS = TEXTS + TEXTS_NBYTES
"""Where it is written where the threads are; from here to the end."""

RECORD = struct.Struct("<8q")
WHAT, GROUP, CALL, NUMBER, SITE, BEGAN, ENDED, SEQUENCE = range(8)

ON_DEVICE = 1 << 32
"""In the checksum of a call: its arrays lie on a device."""

TEXT_BITS = 20
TEXT_MASK = (1 << TEXT_BITS) - 1
"""A text is known by where it begins; several of them share a word."""


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
    BEAT = 14  # when the helper thread last ran
    FAILED = 15  # checksum of the reason for which it ends, see `mpidist.observe.watch.failures`
    FAILED_AT = 16  # when it came to that
    LISTED = 17  # when it looked which others end for the same reason
    TOLD = 18  # when it had said so


def place(sequence: int) -> int:
    """Return where a record stands."""
    return _RING + sequence % RING * _RECORD_WORDS * 8
