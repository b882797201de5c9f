"""What a child that was forked from a rank gives up, since it is no rank.

`fork` copies everything that a rank has set up in its process. The child may compute, and may use
groups of its own (``mpidist.init("simulated")``). It must not use the rank's connections, answer
in its place, handle its signals, or end its transport. Signal handlers are given up where they are
installed: `mpidist.observe.watch.helper` and `mpidist.train.StopSignal`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from types import TracebackType
from typing import Any

from mpidist.group.state import abandon_groups

_PR_SET_PDEATHSIG = 1

_guarded = False


def guard(transport: str, rank: int) -> None:
    """Keep children that this rank forks from now on from acting as it.

    They cannot use the groups of `transport`, named as in `init`.
    """
    global _guarded  # noqa: PLW0603  # such functions cannot be taken back
    if _guarded:
        return
    _guarded = True
    fork = _Fork(transport, rank)
    os.register_at_fork(before=fork.before, after_in_child=fork.in_child)


class _Fork:
    """What is done around a fork."""

    def __init__(self, transport: str, rank: int) -> None:
        self._transport = transport
        self._rank = rank
        self._parent = os.getpid()
        self._by_main_thread = False
        self._is_child = False
        self._code = 0

    def before(self) -> None:
        self._by_main_thread = threading.current_thread() is threading.main_thread()

    def in_child(self) -> None:
        if self._is_child:  # a child of a child, which has all this already
            return
        self._is_child = True
        abandon_groups(
            self._transport,
            f"this process was forked from rank {self._rank} (process {self._parent}), and is no "
            "rank. Let the rank communicate, and pass it the results by a pipe or a queue",
        )
        util = sys.modules.get("multiprocessing.util")
        if util is not None and self._by_main_thread:
            util.register_after_fork(self, _Fork.end_with_rank)
        self._end_without_handlers()

    def end_with_rank(self) -> None:
        """Let a daemonic worker end with its rank, however that ends; called by multiprocessing.

        It has the rank's output open, and mpirun waits until that is closed. Python ends such
        workers at the rank's exit only, not if it is killed. The kernel sends the signal when the
        thread that has forked ends, so that this is done for the main thread's children only.
        """
        from multiprocessing import current_process

        if not current_process().daemon:
            return
        import ctypes

        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != self._parent:  # it ended before
            os.kill(os.getpid(), signal.SIGTERM)

    def _end_without_handlers(self) -> None:
        """End the child before the exit handler of an MPI library, which would end the whole job.

        This one is registered last, and so called first; it runs none of the rank's exit handlers.
        It does not get the exit code, which is therefore noted where it is given.
        """
        atexit.register(self._end)
        exit_before, hook_before = sys.exit, sys.excepthook

        def noting_exit(status: Any = None, /) -> None:
            self._code = 0 if status is None else status if isinstance(status, int) else 1
            exit_before(status)

        def noting_hook(
            kind: type[BaseException], error: BaseException, trace: TracebackType | None
        ) -> None:
            self._code = 1
            hook_before(kind, error, trace)

        sys.exit = noting_exit  # type: ignore[assignment]  # it does not return, either
        sys.excepthook = noting_hook

    def _end(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):
                stream.flush()
        os._exit(self._code & 0xFF)
