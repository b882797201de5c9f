"""What is known of the ranks of a job, and which rank reports it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from queue import Empty
from time import monotonic_ns
from typing import TYPE_CHECKING

from mpidist import env
from mpidist.log import rank_logger
from mpidist.observe.recorder import Head, Recorder
from mpidist.observe.recorder.recorder import ON_DEVICE
from mpidist.observe.recorder.recording import Recording
from mpidist.observe.watch.failures import Failures, digest_of
from mpidist.observe.watch.report import (
    Stall,
    callers,
    format_site,
    processes,
    render_report,
    write_dump,
)
from mpidist.observe.watch.states import Process, RankState, Status, own_stacks

if TYPE_CHECKING:
    from mpidist.observe.watch.listener import Listener

_ENDPOINT_NBYTES = 512
"""Bytes of what `Watch.endpoint` returns."""

_ANSWER = 1.5
"""Seconds that a process of this node has to write its stacks."""

_WRITING = 8.0
"""Seconds that a rank which has set out to write a report has for it."""

_FRESH = 3.0
"""Seconds during which no rank repeats a report."""

_ASKING = 0.5
"""Seconds between two questions to another node whether it has written its report."""

_HEARD = 6.0
"""Seconds after which an answer of another node is not waited for."""

_BEAT = 2.0
"""Seconds after which the helper thread of a rank has been kept from running: it runs five times a
second, unless foreign code holds the interpreter's lock."""

_ELSEWHERE = 1.0
"""Seconds that other nodes have to say whether they fail for the same reason."""

_POLL = 0.02


class Watch:
    """Finds out what the ranks of a job are doing.

    The recorders of the ranks of this node are read as they are, also after their death. Their
    processes are asked for their stacks, and other nodes for everything.

    Parameters
    ----------
    rank : int
        This rank, in the world.
    recorder : Recorder
        The recorder of this rank.
    records : mapping of int to memoryview
        The memory of the recorders of the ranks that can be read here, by rank.

    Attributes
    ----------
    debug : bool
        Whether all collectives are compared before they begin.
    failures : Failures
        Why ranks of this node end.
    """

    def __init__(self, rank: int, recorder: Recorder, records: Mapping[int, memoryview]) -> None:
        self.rank = rank
        self._recorder = recorder
        self.debug = False
        self.listener: Listener | None = None
        self._recordings = {other: Recording(memory) for other, memory in records.items()}
        self._cells = recorder.cells
        self._reporting = threading.Lock()
        self._secret = b""
        known = 1 + max(rank, *records)  # until `connect` says where all of them are
        self._nodes: Sequence[int] = [0] * known
        self._hosts = ["?"] * known
        self._pids = [os.getpid() if other == rank else 0 for other in range(known)]
        self._processes: dict[int, Process] = {}
        self._endpoints: list[tuple[str, int]] = []
        self.failures = Failures(rank, self._recordings, self._can_speak)

    # -- where the ranks are --------------------------------------------------

    def listen(self, nodes: Sequence[int]) -> None:
        """Promise that `answer` is called from now on, several times a second.

        Where there are several nodes, of which `nodes` has that of each rank, the first rank of
        each listens for the others.
        """
        self._cells[Head.LISTENING] = 1
        if max(nodes) and nodes.index(nodes[self.rank]) == self.rank:
            from mpidist.observe.watch.listener import Listener

            self.listener = Listener(self._answer)

    def endpoint(self) -> bytes:
        """Return where this rank's process is and listens, serialized for the other ranks."""
        fields = {
            "host": os.uname().nodename[:200],
            "pid": os.getpid(),
            "address": "" if self.listener is None else self.listener.address,
            "port": 0 if self.listener is None else self.listener.port,
            "secret": os.urandom(32).hex(),
            "debug": env.debug(),
        }
        return json.dumps(fields).encode().ljust(_ENDPOINT_NBYTES)

    def connect(self, nodes: Sequence[int], endpoints: Sequence[bytes]) -> None:
        """Take what `endpoint` returned on each rank; rank 0's settings apply to all.

        Endpoints travel from rank to rank of one job, so that no other process knows its secret.
        """
        read = [json.loads(endpoint) for endpoint in endpoints]
        self._nodes = nodes
        self._hosts = [endpoint["host"] for endpoint in read]
        self._pids = [endpoint["pid"] for endpoint in read]
        self._endpoints = [
            (endpoint["address"], endpoint["port"]) for endpoint in read if endpoint["port"]
        ]
        self._secret = bytes.fromhex(read[0]["secret"])
        self.debug = read[0]["debug"]
        if self.listener is not None:
            self.listener.open(self._secret)
        for rank, recording in self._recordings.items():
            same = recording.cells[Head.PID_NAMESPACE] == self._cells[Head.PID_NAMESPACE]
            if rank != self.rank and same and self._pids[rank] != os.getpid():
                self._processes[rank] = Process(self._pids[rank])

    def who(self) -> list[str]:
        """Return host and process number of every rank."""
        return [*map(self._process_name, range(len(self._nodes)))]

    def processes(self, *, all_of_them: bool = False) -> str:
        """Return which ranks are on which host, and their process numbers, in some 400 characters.

        With `all_of_them` all are named, however long the line gets.
        """
        return processes(self._nodes, self._hosts, self._pids, short=not all_of_them)

    # -- what they are doing -------------------------------------------------------------------

    def call_site(self, sequence: int) -> str:
        """Return where this rank called an operation."""
        return format_site(self._recordings[self.rank].site_of(sequence))

    def states(self, *, ask: bool = True) -> dict[int, RankState]:
        """Return what is known of the ranks of this node.

        With `ask` their processes are asked for their stacks, which may take 1.5 s.
        """
        stacks = self._ask() if ask else {}
        states = {}
        for rank in self._recordings:
            status = self._status(rank)
            asked = ask and rank not in stacks and self._listens(rank)
            if status is Status.ALIVE and (asked or self._is_held(rank)):
                status = Status.SILENT
            state = RankState(rank, self._nodes[rank], self._process_name(rank), status)
            states[rank] = state.read(self._recordings[rank], stacks.get(rank, ""))
        return states

    def all_states(self) -> dict[int, RankState]:
        """Return what is known of all ranks, other nodes asked as well, which may take 6 s."""
        heard = self._ask_others(_HEARD)
        states = self.states()
        states |= heard()
        # The others are on nodes that have not answered.
        status = Status.SILENT if self._endpoints else Status.UNKNOWN
        for rank, node in enumerate(self._nodes):
            if rank not in states:
                states[rank] = RankState(rank, node, self._process_name(rank), status)
        return states

    def _ask_others(self, seconds: float) -> Callable[[], dict[int, RankState]]:
        """Ask the other nodes; return at once a function that waits for their answers so long."""
        deadline = time.monotonic() + seconds
        own_node = self._nodes[self.rank]
        far = [endpoint for node, endpoint in enumerate(self._endpoints) if node != own_node]
        if not far:
            return dict
        from mpidist.observe.watch.listener import ask_all

        answers = ask_all(far, self._secret)

        def heard() -> dict[int, RankState]:
            states: dict[int, RankState] = {}
            with contextlib.suppress(Empty):
                for _ in far:
                    answer = answers.get(timeout=max(deadline - time.monotonic(), 0))
                    for fields in () if answer is None else json.loads(answer):
                        states[fields["rank"]] = RankState.from_json(fields)
            return states

        return heard

    def _answer(self) -> bytes:
        """Return the states of this node's ranks, for another node."""
        return json.dumps([asdict(state) for state in self.states().values()]).encode()

    def _process_name(self, rank: int) -> str:
        return f"{self._hosts[rank]}:{self._pids[rank]}"

    def _status(self, rank: int) -> Status:
        process = self._processes.get(rank)
        if process is not None:
            return process.status()
        return Status.ALIVE if self._pids[rank] == os.getpid() else Status.UNKNOWN

    def _is_held(self, rank: int) -> bool:
        """Whether the helper thread of a rank of this node is kept from running; see `_BEAT`."""
        last = self._recordings[rank].cells[Head.BEAT]
        return rank != self.rank and 0 < last < monotonic_ns() - _BEAT * 1e9

    def _can_speak(self, rank: int) -> bool:
        """Whether a rank of this node may still fail, or say that it has."""
        cells = self._recordings[rank].cells
        gone = self._status(rank) in (Status.DEAD, Status.STOPPED)
        return not gone and bool(cells[Head.FAILED] or not cells[Head.LEAVING])

    def fails_elsewhere(self, reason: str) -> int | None:
        """Return the first rank before this one, on another node, that ends for this reason.

        Takes up to 1 s where there are other nodes.
        """
        digest, states = digest_of(reason), self._ask_others(_ELSEWHERE)()
        same = [rank for rank, state in states.items() if state.failed == digest]
        return min((rank for rank in same if rank < self.rank), default=None)

    def killed(self) -> list[int]:
        """Return the ranks of this node whose processes have ended before they came to their exit.

        A launcher that ends the job with its first dead rank leaves nobody to ask this.
        """
        return [
            rank
            for rank, process in self._processes.items()
            if not self._recordings[rank].cells[Head.LEAVING] and process.ended()
        ]

    def _listens(self, rank: int) -> bool:
        return bool(self._recordings[rank].cells[Head.LISTENING])

    def _ask(self) -> dict[int, str]:
        """Return the stacks of the ranks of this node, asked of all that listen."""
        asked, stacks = monotonic_ns(), {self.rank: own_stacks()}
        waiting = [rank for rank in self._recordings if rank != self.rank and self._listens(rank)]
        for rank in waiting:
            self._recordings[rank].cells[Head.ASKED] = asked
        deadline = time.monotonic() + _ANSWER
        while waiting and time.monotonic() < deadline:
            for rank in tuple(waiting):
                recording = self._recordings[rank]
                if recording.cells[Head.ANSWERED] >= asked:
                    stacks[rank] = recording.stacks()
                    waiting.remove(rank)
                elif self._status(rank) in (Status.DEAD, Status.STOPPED):
                    waiting.remove(rank)
            if waiting:
                time.sleep(_POLL)
        return stacks

    # -- reports -------------------------------------------------------------------------------

    def describe_stall(
        self, members: Sequence[int], key: tuple[int, int] | None, missing: Sequence[int]
    ) -> str:
        """Say who keeps an operation from ending, as far as is known on this node; see `Stall`."""
        return str(Stall(self.states(ask=False), members, key, missing))

    def callers(self, members: Sequence[int], key: tuple[int, int]) -> str:
        """Return which ranks called what at which lines, as far as is known on this node."""
        return callers(self.states(ask=False), members, key)

    def differences(self, members: Sequence[int], key: tuple[int, int], *, compared: bool) -> str:
        """Return `callers` if all have arrived at a collective, with different calls.

        Nothing if they have called the same, or as long as it is not known of all of them. Where
        the transport has `compared` the calls on host arrays, it knows better: only calls of which
        some are on host arrays and some on device arrays never match there.
        """
        if any(rank not in self._recordings for rank in members):
            return ""
        records = {self._recordings[rank].find(key) for rank in members}
        calls = {None if record is None else record.call for record in records}
        if None in calls or len(calls) == 1:
            return ""
        if compared and not any(call is not None and call & ON_DEVICE for call in calls):
            return ""
        return self.callers(members, key)

    def report(
        self,
        title: str,
        *,
        members: Sequence[int] | None = None,
        key: tuple[int, int] | None = None,
        missing: Sequence[int] = (),
        first: Sequence[int] = (),
        ask: bool = True,
        dump: bool = False,
        table: bool = True,
    ) -> None:
        """Log what all ranks are doing, if no other rank has just done so or is about to.

        Parameters
        ----------
        title : str
            What does not end, or why there is a report.
        members : sequence of int, optional
            The ranks of the group, in the world; all when omitted.
        key : (int, int), optional
            Of the collective that does not end.
        missing : sequence of int, optional
            Ranks of the world that are known not to have arrived.
        first : sequence of int, optional
            Other ranks of the world that stand at the top.
        ask : bool, optional
            Whether to ask other processes and nodes.
        dump : bool, optional
            Whether to write it as JSON, too; see `mpidist.env.dump_directory`. It is logged as an
            error then, else as a warning.
        table : bool, optional
            Whether to log what each rank is doing; all of it is written as JSON in any case.

        Notes
        -----
        Returns when the rank that writes the report has written it, at the latest after 8 s:
        whoever ends the job afterwards must not take it from the screen.
        """
        # One thread of this process at a time: ranks see from each other which one reports.
        held = self._reporting.acquire(timeout=_WRITING)
        try:
            if not self._claim():
                return
            states = self.all_states() if ask else self.states(ask=False)
            if not self._wait_for_report_elsewhere(states):
                members = range(len(self._nodes)) if members is None else members
                stall = Stall(states, members, key, missing)
                top, shown = {*first, *stall.stragglers()}, states.values() if table else ()
                text = render_report(title, shown, top, causes=stall.causes(), cure=stall.cure())
                if dump and self._cells[Head.LISTENING]:
                    text += f"\n  {write_dump(title, states)}"
                level = logging.ERROR if dump else logging.WARNING
                rank_logger("world", self.rank, len(self._nodes)).log(level, "%s", text)
            self._cells[Head.REPORTED] = monotonic_ns()
        finally:
            if held:
                self._reporting.release()

    def _wait_for_report_elsewhere(self, states: Mapping[int, RankState]) -> bool:
        """Wait while a rank of another node writes the report; return whether one does.

        The lowest rank writes it: nodes cannot know who was first, and two that waited for each
        other would report nothing.
        """
        deadline, waited = time.monotonic() + _WRITING, False
        while any(
            rank < self.rank and rank not in self._recordings and 0 <= state.claimed < _WRITING
            for rank, state in states.items()
        ):
            waited = True
            if time.monotonic() > deadline:
                break
            time.sleep(_ASKING)
            states = self.all_states()
        return waited

    def reported_lately(self) -> bool:
        """Whether this rank has just reported what all ranks are doing."""
        return 0 < monotonic_ns() - self._cells[Head.REPORTED] < _FRESH * 1e9

    def _claim(self) -> bool:
        """Set out to write a report; else wait until the rank of this node that does has done so.

        Returns whether this rank is the one that writes it.
        """
        self._cells[Head.CLAIMED] = claimed = monotonic_ns()
        deadline = time.monotonic() + _WRITING
        while time.monotonic() < deadline:
            faster = [rank for rank in self._recordings if self._is_faster(rank, claimed)]
            if not faster:
                return True
            self._cells[Head.CLAIMED] = 0
            if any(self._is_done(rank) for rank in faster):
                return False
            time.sleep(_POLL)
        self._cells[Head.CLAIMED] = claimed  # the process that claimed it first has not finished
        return True

    def _is_faster(self, rank: int, claimed: int) -> bool:
        """Whether a rank of this node that lives set out to report before this one, and lately."""
        cells = self._recordings[rank].cells
        theirs, done = cells[Head.CLAIMED], self._is_done(rank)
        if rank == self.rank or not theirs or (theirs, rank) > (claimed, self.rank):
            return False
        last = cells[Head.REPORTED] if done else theirs
        fresh = claimed - last < (_FRESH if done else _WRITING) * 1e9
        return fresh and (done or self._status(rank) in (Status.ALIVE, Status.LEAVING))

    def _is_done(self, rank: int) -> bool:
        cells = self._recordings[rank].cells
        return bool(cells[Head.REPORTED] >= cells[Head.CLAIMED] > 0)

    # -- the helper thread ---------------------------------------------------------------------

    def answer(self) -> None:
        """Show that this thread runs, and write the stacks of all, if somebody has asked."""
        cells = self._cells
        cells[Head.BEAT] = monotonic_ns()
        if cells[Head.ASKED] > cells[Head.ANSWERED]:
            self._recorder.write_stacks(own_stacks())

    def leave(self) -> None:
        """Say that this rank has reached its exit."""
        self._cells[Head.LEAVING] = monotonic_ns()

    def report_signal(self) -> None:
        """Report because the user has asked for it, by a signal."""
        self.report("SIGUSR2: what all ranks are doing", dump=True)
