"""The flight recorder: the last operations of each rank, where the ranks of its node can read them.

It is always on, so it must cost next to nothing: the begin of an operation writes eight integers to
memory, its end one. Nothing is sent. The other processes of the node read the memory, also after
the rank has died.

There is space for some hundred texts. A job that keeps calling with new shapes is recorded without
the shapes once these have filled their part of the space. Ranks are compared by numbers alone.

[Note: reading while another writes] The writer never waits for a reader. One call writes a
record together with its sequence number, and a reader accepts bytes that it has read twice alike.
On a processor that makes writes visible in another order a reader may see a record of which one
half is new. That is accepted: nothing but a report depends on it.
"""

from __future__ import annotations

from mpidist.observe.recorder.recorder import (
    Head,
    Kind,
    Name,
    Recorder,
    add_inside,
    caller,
    is_inside,
    site_of,
)

__all__ = [
    "Head",
    "Kind",
    "Name",
    "Recorder",
    "add_inside",
    "caller",
    "is_inside",
    "site_of",
]
