"""The flight recorder: the last operations of each rank, where the ranks of its node can read them.

It is always on, so it must cost next to nothing: beginning an operation writes eight words to
memory, ending it one. Nobody is told and nothing is sent; whoever needs to know what a rank was
doing reads its memory, also after that rank has died.

There is room for some hundred texts. A job that calls with other shapes for ever is recorded
without the shapes when they have filled their part of it; ranks are compared by numbers alone.

[Note: reading while another writes] The writer never waits for a reader. A record's number is
written with the rest of it in one call, and a reader that finds the same bytes twice takes them as
they are. Where a processor makes writes visible in another order than they were made, a reader may
see a record of which half is new; that is borne, since nothing but a report depends on it.
"""

from __future__ import annotations

from mpidist.observe.recorder.recorder import Head, Kind, Name, Recorder, caller, is_inside

__all__ = ["Head", "Kind", "Name", "Recorder", "caller", "is_inside"]
