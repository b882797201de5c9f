"""What is known of one rank: whether its process is alive, and a value that can be sent."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from enum import Enum
from itertools import islice
from pathlib import Path
from time import monotonic_ns
from typing import Any

from mpidist.observe.recorder import Head, Kind
from mpidist.observe.recorder.recorder import Site
from mpidist.observe.recorder.recording import OperationRecord, Recording


class Status(str, Enum):
    """What is known of a rank."""

    ALIVE = "alive"
    STOPPED = "stopped"
    DEAD = "dead"
    LEAVING = "at its exit"
    SILENT = "silent"
    UNKNOWN = "?"

    def __str__(self) -> str:
        """Return the word."""
        return self.value


class Process:
    """A process of this node, by a descriptor: its number may come to stand for another one."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        try:
            self._descriptor: int | None = os.pidfd_open(pid)
        except OSError:
            self._descriptor = None

    def status(self) -> Status:
        """Return whether it is alive, stopped or dead."""
        if self._descriptor is None:
            return Status.UNKNOWN
        if self.ended():
            return Status.DEAD
        return Status.STOPPED if self._state() in ("T", "t") else Status.ALIVE

    def ended(self) -> bool:
        """Return whether it is known to be dead."""
        if self._descriptor is None:
            return False
        poll = select.poll()  # not select, which takes descriptors below 1024 only
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(0))

    def _state(self) -> str:
        """Return the letter for what the kernel does with it (proc(5), /proc/pid/stat)."""
        try:
            text = Path(f"/proc/{self._pid}/stat").read_text()
        except OSError:
            return "?"
        return text.rpartition(")")[2].split()[0]  # the name, in parentheses, may hold anything

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        """Let go of the process."""
        # No other name of this module: an interpreter that ends has emptied it when the last ones
        # go. Whoever has closed all descriptors has closed this one, too.
        descriptor = getattr(self, "_descriptor", None)
        if descriptor is not None:
            self._descriptor = None
            try:  # noqa: SIM105
                close(descriptor)
            except OSError:
                pass


_FRAMES = 40, 20, 10, 5
"""Frames of each thread that are kept: the most for which there is space."""

_OURS = "mpidist-"
"""How the names of this package's own threads begin."""

_STACKS_SIZE = 8000
"""Characters for the stacks of one rank."""


@dataclass(frozen=True, slots=True)
class Stack:
    """The frames of one thread, by its name, the innermost first."""

    thread: str
    frames: tuple[Site, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """A rank that waits for an immediate operation, by its `sequence` among the rank's records.

    `site` is where `Work.wait` was called, so many seconds ago.
    """

    sequence: int
    site: Site
    seconds: float


@dataclass(frozen=True, slots=True)
class RankState:
    """What is known of one rank.

    Attributes
    ----------
    rank, node : int
        Rank of the world, and index of its node.
    process : str
        Host and process number.
    status : Status
        Whether its process is alive.
    records : tuple of OperationRecord
        Its last operations, the oldest first.
    now : int
        `time.monotonic_ns` on its node, when they were read.
    wait : Wait or None
        The immediate operation for which it waits.
    stacks : tuple of Stack
        Stacks of its threads; none where it was not asked or did not answer.
    claimed : float
        Seconds since it set out to write a report; below 0 if it is not writing one.
    failed : int
        Checksum of the reason for which it ends; 0 if it does not. See
        `mpidist.observe.watch.failures`.
    """

    rank: int
    node: int
    process: str
    status: Status = Status.UNKNOWN
    records: tuple[OperationRecord, ...] = ()
    now: int = 0
    wait: Wait | None = None
    stacks: tuple[Stack, ...] = ()
    claimed: float = -1.0
    failed: int = 0

    @property
    def current(self) -> OperationRecord | None:
        """The operation at which the rank is, or its last one."""
        if self.wait is not None:
            for record in self.records:
                if record.sequence == self.wait.sequence:
                    return record
        under_way = [r for r in self.records if not r.ended and r.kind is Kind.BLOCKING]
        records = under_way or self.records
        return records[-1] if records else None

    def came_to(self, key: tuple[int, int]) -> OperationRecord | None:
        """Return this rank's record of a collective, if it has arrived at it."""
        for record in reversed(self.records):
            if record.is_of(key):
                return record
        return None

    def has_passed(self, key: tuple[int, int]) -> bool:
        """Whether it has called a later collective of the group: then it called this one, too."""
        group, number = key
        return any(r.number > number and r.is_of((group, r.number)) for r in self.records)

    def stays_away(self, key: tuple[int, int]) -> bool:
        """Whether it has begun an immediate collective that has not ended, and waits for none."""
        record = self.came_to(key)
        if record is None or record.ended or record.kind is not Kind.IMMEDIATE:
            return False
        blocked = any(not r.ended and r.kind is Kind.BLOCKING for r in self.records)
        return self.wait is None and not blocked and self.status is Status.ALIVE

    def seconds(self, time: int) -> float:
        """Return how long ago a time of its node's clock was when it was read."""
        return (self.now - abs(time)) / 1e9

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> RankState:
        """Return what `dataclasses.asdict` has made of one, after a way through JSON."""
        records = [
            OperationRecord(**{**r, "kind": Kind(r["kind"]), "site": Site(**r["site"])})
            for r in fields["records"]
        ]
        wait = fields["wait"]
        return cls(
            **{
                **fields,
                "status": Status(fields["status"]),
                "records": tuple(records),
                "wait": wait and Wait(**{**wait, "site": Site(**wait["site"])}),
                "stacks": _stacks_from_json(fields["stacks"]),
            }
        )

    def read(self, recording: Recording, stacks: str) -> RankState:
        """Return it with what a rank of this node has recorded, and `own_stacks` returned there."""
        cells, now = recording.cells, monotonic_ns()
        wait, threads = None, []
        if sequence := cells[Head.WAITS_FOR]:
            since = (now - cells[Head.WAITS_SINCE]) / 1e9
            wait = Wait(sequence, recording.waits_site(), since)
        with contextlib.suppress(ValueError):  # nothing has been written yet, or half of it
            threads = json.loads(stacks)
        claimed = cells[Head.CLAIMED] if cells[Head.CLAIMED] > cells[Head.REPORTED] else 0
        leaving = self.status is Status.ALIVE and cells[Head.LEAVING]
        return replace(
            self,
            status=Status.LEAVING if leaving else self.status,
            records=tuple(recording.records()),
            now=now,
            wait=wait,
            stacks=_stacks_from_json(threads),
            claimed=(now - claimed) / 1e9 if claimed else -1.0,
            failed=cells[Head.FAILED],
        )


def own_stacks() -> str:
    """Return the stacks of this process's threads as JSON, the main thread's first.

    Of many threads, those for which there is space.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    stacks: list[dict[str, Any]] = []
    for most in _FRAMES:
        stacks = []
        for ident, frame in frames:
            if names.get(ident, "").startswith(_OURS):
                continue
            sites = tuple(
                Site(at.f_code.co_filename, line, at.f_code.co_name)
                for at, line in islice(traceback.walk_stack(frame), most)
            )
            stacks.append(asdict(Stack(names.get(ident, str(ident)), sites)))
        if len(json.dumps(stacks)) <= _STACKS_SIZE:
            break
    while stacks and len(json.dumps(stacks)) > _STACKS_SIZE:
        del stacks[-max(len(stacks) // 8, 1) :]
    return json.dumps(stacks)


def _stacks_from_json(stacks: list[dict[str, Any]]) -> tuple[Stack, ...]:
    return tuple(
        Stack(stack["thread"], tuple(Site(**site) for site in stack["frames"])) for stack in stacks
    )
