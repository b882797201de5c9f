"""How a job ends: no rank hangs because one rank raised, left, or was lost.

The hooks are the only state of the process that mpidist sets, and `mpidist.init` sets it once:
`sys.excepthook`, `threading.excepthook`, one exit handler, and a handler of SIGUSR2 with the
wake-up descriptor that it needs, where nobody else handles that signal. None of them is set inside
pytest or IPython, which handle exceptions themselves. What a forked child has to give up is in
`mpidist.job.forks`.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import mmap
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

from mpidist import env
from mpidist._formatting import format_ranges
from mpidist._threads import act_in_thread
from mpidist.backends.job import ExitNotices, JobTransport, JobWorld
from mpidist.backends.work import Waiter
from mpidist.errors import (
    CollectiveMismatchError,
    CollectiveTimeoutError,
    DistributedError,
    PeerLostError,
)
from mpidist.group import ProcessGroup
from mpidist.group.operations import services
from mpidist.group.pending import GroupWork
from mpidist.group.state import GroupState, broken_states
from mpidist.log import shows
from mpidist.observe.watch import Watch
from mpidist.observe.watch.deadlines import limit_finalization, limit_loading, main_stack
from mpidist.observe.watch.failures import Ending, callers_of, lines_of, reason_of, summary_of
from mpidist.observe.watch.helper import helper

if TYPE_CHECKING:
    from mpidist.tracing.session import Session

_INTERRUPTED = 130
"""Exit code of a job that Ctrl-C ended, as shells report it."""

_FLUSH = 0.2
"""Seconds between the last output of a rank and the end of the job.

Ranks that check the same arguments raise together: each can show its traceback. And a launcher that
is asked to end the job need not read any more what ranks have written.
"""

_TRACEBACKS = 4
"""Different exceptions of one node of which the tracebacks are shown; of more, the messages."""

_HUNG = (CollectiveMismatchError, CollectiveTimeoutError, PeerLostError)
"""Errors whose cause the records of all ranks show better than the traceback."""

_SPARE = 8 << 20
"""Bytes of address space that a rank gives up when it has to say why it ends.

It may have run out of memory then. They are never written, and so take no memory before.
"""


class _Hooks:
    """What one process has installed.

    Attributes
    ----------
    starting : (float, float) or None
        When a call of `init` began, by `time.monotonic`, and its timeout in seconds, while it runs.
    leaving : (float, float) or None
        When the exit handler was done, and the seconds that the process may take to end.
    timeout : float
        The longest timeout of all calls of `init`, in seconds.
    """

    def __init__(self, job: JobTransport) -> None:
        self._job = job
        self._prefix = f"[world {job.rank}/{job.size}]"
        self._notices: dict[tuple[int, ...], tuple[ExitNotices, float]] = {}
        self._groups: weakref.WeakSet[ProcessGroup] = weakref.WeakSet()
        self.traces: list[Session] = []
        self._next_hook = sys.excepthook
        self.starting: tuple[float, float] | None = None
        self.leaving: tuple[float, float] | None = None
        self.timeout = 0.0
        self._ending = False
        self._pid = os.getpid()
        self._spare: mmap.mmap | None = mmap.mmap(-1, _SPARE, mmap.MAP_PRIVATE)
        sys.excepthook = self._on_exception
        threading.excepthook = self._on_thread_exception
        # Exit handlers run in reverse order: this one before that of the transport, which ends it.
        atexit.register(self._on_exit)
        self._reports_signals = helper().catch()
        helper().rounds.append(self._check_deadlines)

    def join(self, world: JobWorld, timeout: float) -> ExitNotices:
        """Return the exit notices among the ranks of a world; collective over it."""
        # Those of an earlier world of the same ranks serve again: mailboxes are never released.
        kept = self._notices.get(world.ranks)
        notices = kept[0] if kept else ExitNotices(world.mailbox(), world.ranks, self._job.nap)
        self._notices[world.ranks] = notices, timeout
        return notices

    def track(self, group: ProcessGroup) -> None:
        """Drive this group at the exit, and count its operations in the exit notice."""
        if not self._groups and group.rank == 0 and shows(logging.INFO):
            _write(f"mpidist: {group.watch.processes(all_of_them=shows(logging.DEBUG))}")
        self._groups.add(group)

    def _abort(self, code: int) -> None:
        for trace in self.traces:
            try:
                trace.abandon()
                self._say(f"has left its part of the trace in {trace.parts}")
            except Exception as error:  # noqa: BLE001  # whatever it is, the others must not wait
                self._say(f"could not leave its part of the trace in {trace.parts}: {error!r}")
        _flush()
        time.sleep(_FLUSH)
        self._job.abort(code)

    def _on_exception(
        self,
        kind: type[BaseException],
        error: BaseException,
        trace: TracebackType | None,
    ) -> None:
        """Print the traceback of an exception that nobody caught, and end the job."""
        self._spare = None
        if os.getpid() != self._pid:  # a child that was forked is no rank
            self._next_hook(kind, error, trace)
            return
        interrupted = issubclass(kind, KeyboardInterrupt)
        try:
            if interrupted:
                self._say_together("interrupted", "was interrupted; ending the job")
            else:
                self._print(error, trace)
        except BaseException as another:  # noqa: BLE001  # whatever it is, the others must not wait
            self._say(f"could not print all of it: {another!r}")
        finally:
            self._abort(_INTERRUPTED if interrupted else 1)

    def _print(self, error: BaseException, trace: TracebackType | None) -> None:
        """Print an exception, once for all ranks that raise it, and what the others are doing."""
        if self._next_hook is not sys.__excepthook__:
            self._next_hook(type(error), error, trace)
        ending, elsewhere = self._join(reason_of(error, trace))
        if not ending.ranks:
            return
        if elsewhere is not None:
            self._say(f"raised the same as rank {elsewhere}; ending the job", ending.ranks)
        else:
            self._say_why(error, trace, ending)
            hung = isinstance(error, _HUNG) and not error._reported
            if hung or ending.others or env.dump_requested():
                what = f"raised {type(error).__name__}"
                self._report(what, dump=hung, table=ending.others)
        self._spoken()

    def _say_why(self, error: BaseException, trace: TracebackType | None, ending: Ending) -> None:
        """Print an exception, its message first; briefly if there has been a report of it."""
        lines: list[str] = []
        if isinstance(error, DistributedError) and error._reported and not env.debug():
            word = "stops" if len(ending.ranks) == 1 else "stop"
            text = f"{word} because of this report: {type(error).__name__}: {error._reported}"
            callers = callers_of(trace)
            lines = [f"  {callers}"] if " < " in callers else []
        else:
            same = "" if len(ending.ranks) == 1 else " the same:"
            text = f"raised{same} {summary_of(error)}"
            if self._next_hook is sys.__excepthook__ and ending.earlier < _TRACEBACKS:
                lines = lines_of(error, trace, full=env.debug())
        more = "".join(f"\n{self._prefix} {line}" for line in lines)
        self._say(f"{text}; ending the job{more}", ending.ranks)

    def _on_thread_exception(self, args: threading.ExceptHookArgs) -> None:
        if args.exc_type is not SystemExit and args.exc_value is not None:
            self._on_exception(args.exc_type, args.exc_value, args.exc_traceback)

    def _on_exit(self) -> None:
        """Notify all that this rank exits, and wait until they do; abort if the job is broken."""
        if os.getpid() != self._pid or self._job.ended():
            return
        for group in tuple(self._groups):
            group.watch.leave()
        broken = [state for state in broken_states() if state.backend.name == self._job.name]
        if broken:
            text = f"ends with a broken group ({broken[0].name!r}); ending the job"
            self._say_together("broken", text)
            self._abort(1)
        operations = sum(group.operations.begun for group in self._groups)
        for notices, _ in self._notices.values():
            notices.send(operations)
        for notices, timeout in self._notices.values():
            remaining = notices.wait_for_all(timeout, self._progress)
            if remaining:
                self._report(f"has waited {timeout:g} s for the exit of others", dump=True)
                text = (
                    f"left after operation {operations} and has waited {timeout:g} s for the exit "
                    f"of rank {', '.join(map(str, remaining))}; ending the job"
                )
                self._say_together(text, text)
                self._abort(1)
        self._end_traces()
        self.leaving = (time.monotonic(), self.timeout)
        limit_finalization(self._prefix, self.timeout, stacks=self._reports_signals)

    def end_services(self) -> None:
        """Wait for what subsystems have under way, such as the last save; an exit handler."""
        if os.getpid() != self._pid or self._job.ended() or broken_states():
            return
        for _, service in services():
            try:
                service.close()
            except Exception as error:  # noqa: BLE001  # whatever it is, it must not be lost
                self._say(f"could not bring to its end what it had begun: {error}; ending the job")
                self._abort(1)

    def _end_traces(self) -> None:
        """Write what `MPIDIST_TRACE` asked for: all ranks are here."""
        while self.traces:
            trace = self.traces.pop()
            try:
                trace.end(together=False)
            except (OSError, DistributedError) as error:
                self._say(f"could not write the trace of {trace.parts}: {error}")

    def _progress(self) -> bool:
        """Drive the operations that were begun here and never waited for, on all groups.

        Returns whether any of them has finished.
        """
        held = self._job.held()
        before = len(held)
        # The program may have dropped a group whose operations are still under way.
        groups: set[ProcessGroup | GroupState] = set(self._groups)
        groups.update(work.state for work in tuple(held) if isinstance(work, GroupWork))
        for group in groups:
            with contextlib.suppress(Exception):
                group.progress()
        return len(held) < before

    def _check_deadlines(self) -> None:
        """End the job if a call of the library outlasts its deadline; called by the helper thread.

        All ranks had arrived at a collective, so one of them has been lost since, or is in another
        call. This one cannot be ended in any other way.
        """
        if self._ending:
            return
        now = time.monotonic()
        if self.starting is not None and now - self.starting[0] > self.starting[1]:
            self._end_late(
                f"has been in init for {now - self.starting[0]:.0f} s: another rank has not "
                "called it, or calls it on other ranks"
            )
        if self.leaving is not None and now - self.leaving[0] > self.leaving[1]:
            self._end_late(
                f"has left, and its process has not ended for {now - self.leaving[0]:.0f} s: an "
                "exit handler that was registered before mpidist.init does not return",
                stack=main_stack(),
            )
        for backend in self._job.alive():
            if backend.inside is None:
                continue
            waiter, since = backend.inside
            if now - since > waiter.timeout:
                self._end_late(
                    f"is stuck in the MPI library's part of {waiter.operation} for "
                    f"{now - since:.0f} s. All ranks had come to a collective: one has been "
                    "lost since (its own output, or the launcher's, may say why), or called "
                    "another collective, or this one with another shape",
                    waiter,
                )

    def _end_late(self, why: str, waiter: Waiter | None = None, stack: str = "") -> None:
        """Report and abort, in a thread of its own: the helper has to answer the other ranks."""

        def end() -> None:
            if waiter is not None:
                with contextlib.suppress(Exception):  # whatever a report fails of, the job ends
                    waiter.report(why)
            brief = why if waiter is None else why.partition(". ")[0]  # the report has it all
            self._say_together(f"late{stack}", f"{brief}; ending the job{stack}")
            self._abort(1)

        self._ending = True
        act_in_thread(end, "mpidist-end")

    def _report(self, what: str, *, dump: bool, table: bool = True) -> None:
        """Report what all ranks of this node are doing, unless a report has just been made.

        It is written as JSON, too, if the ranks have waited for each other, or the user wants it.
        """
        for group in tuple(self._groups):
            watch = group.watch
            if not watch.reported_lately():
                title = f"rank {watch.rank} {what}"
                dump = dump or env.dump_requested()
                watch.report(title, first=[watch.rank], ask=False, dump=dump, table=table)

    def _watch(self) -> Watch | None:
        """Return the watch of the largest world."""
        watches = [group.watch for group in tuple(self._groups)]
        return max(watches, key=lambda watch: len(watch.who()), default=None)

    def _join(self, reason: str) -> tuple[Ending, int | None]:
        """Return which ranks end for this reason, and the rank of another node that has said so."""
        watch = self._watch()
        if watch is None:
            return Ending((self._job.rank,), self._job.rank, others=True), None
        ending = watch.failures.join(reason)
        if ending.first != watch.rank:
            return ending, ending.first
        return ending, watch.fails_elsewhere(reason)

    def _spoken(self) -> None:
        watch = self._watch()
        if watch is not None:
            watch.failures.spoken()

    def _say_together(self, reason: str, text: str) -> None:
        """Write why this rank ends, once for all ranks of the node with this reason."""
        ending, elsewhere = self._join(reason)
        if ending.ranks:
            known = f"ends for the same reason as rank {elsewhere}"
            self._say(text if elsewhere is None else known, ending.ranks, who="each of ranks")
            self._spoken()

    def _say(self, text: str, ranks: Sequence[int] = (), *, who: str = "ranks") -> None:
        """Write a line about this rank, or about several ranks with it."""
        who = f"{who} {format_ranges(ranks)}" if len(ranks) > 1 else "this rank"
        _write(f"{self._prefix} mpidist: {who} {text}")


def _write(text: str) -> None:
    """Write a line to the error output by one call; errors, as of a full disk, are ignored."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def _flush() -> None:
    """Write what the program has printed, before a process ends without doing so."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the disk is full, or it is closed
            stream.flush()


_installed: _Hooks | None = None


def _someone_else_handles_exceptions() -> bool:
    if "_pytest.main" in sys.modules:
        return True
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


@contextlib.contextmanager
def loading(size: int | None, timeout: float) -> Iterator[None]:
    """Guard the import of mpi4py, in which the ranks wait for each other with Python's lock held.

    It may take `timeout` seconds. `size` is the number of ranks that the launcher promises; None
    where it does not say.
    """
    if size == 1 or _someone_else_handles_exceptions():
        yield
        return
    deadline = limit_loading(env.launcher_rank(), size, timeout)
    try:
        yield
    finally:
        deadline.cancel()


@contextlib.contextmanager
def starting(
    job: JobTransport, world: JobWorld, began: float, timeout: float
) -> Iterator[Callable[[], ExitNotices] | None]:
    """Guard a call of `init`, and install the hooks unless somebody else handles exceptions here.

    The call began at `began`, by `time.monotonic`, and may take `timeout` seconds.

    Yields
    ------
    callable or None
        Returns the exit notices of the ranks that are in `init`, collective; None if nothing is
        installed.
    """
    global _installed  # noqa: PLW0603  # the state of the process, and named as such
    if len(world.ranks) == 1 or _someone_else_handles_exceptions():
        yield None
        return
    if _installed is None:
        _installed = _Hooks(job)
    _installed.starting = (began, timeout)
    _installed.timeout = max(_installed.timeout, timeout)
    try:
        yield partial(_installed.join, world, timeout)
    finally:
        _installed.starting = None


def track(group: ProcessGroup) -> None:
    """Drive a group at this rank's exit, and count its operations in the exit notice."""
    if _installed is not None:
        _installed.track(group)


def end_services_at_exit() -> None:
    """Make the job wait for its services, such as the last save, before it ends.

    Call it after the modules that they need have been imported: exit handlers run in reverse
    order, so that these modules still work.
    """
    if _installed is not None:
        atexit.register(_installed.end_services)
    elif not _someone_else_handles_exceptions():
        atexit.register(_end_alone, os.getpid())


def _end_alone(pid: int) -> None:
    """Wait for the services in a job of one rank, in which no hooks are installed."""
    if os.getpid() != pid:  # a child that was forked has no thread that writes
        return
    for group, service in services():
        try:
            if group.size == 1:  # simulated ranks wait for each other, and have ended
                service.close()
        except Exception as error:  # noqa: BLE001  # whatever it is, it must not be lost
            _flush()
            _write(f"mpidist: could not bring to its end what was begun on {group}: {error}")
            os._exit(1)  # an exit handler has no other way to say that the program failed


def end_trace_at_exit(trace: Session) -> bool:
    """End the job's trace when all ranks are at their exit, or abandon it when the job is aborted.

    Returns False, and does nothing, if no hooks are installed.
    """
    if _installed is None:
        return False
    _installed.traces.append(trace)
    return True
