"""Stopping at a signal: one rank hears it, all ranks stop after the same step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import numpy as np

from mpidist._types import MAX
from mpidist.collectives import all_reduce
from mpidist.group import ProcessGroup

_TAKEN: dict[int, Any] = {}
"""The signals that a `StopSignal` handles or ignores now, and the handlers before it."""

_FORKING = threading.local()
"""The signals that a thread has blocked while it forks."""


def _block() -> None:
    """Before a fork: keep signals to the child back until it has given up the handlers."""
    _FORKING.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _TAKEN)


def _unblock() -> None:
    """After a fork."""
    signal.pthread_sigmask(signal.SIG_SETMASK, _FORKING.blocked)


def _give_up() -> None:
    """In a child that was forked: let signals act as if there had never been a `StopSignal`.

    A worker has to end when asked to (``multiprocessing.Process.terminate`` sends SIGTERM).
    """
    while _TAKEN:
        number, handler = _TAKEN.popitem()
        now = signal.getsignal(number)
        ours = now == signal.SIG_IGN or isinstance(getattr(now, "__self__", None), StopSignal)
        with contextlib.suppress(ValueError):  # not in the main interpreter
            if ours:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
    _unblock()


os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_give_up)


class StopSignal:
    """Let a signal stop all ranks after the same step, so that they can save and leave together.

    ::

        with StopSignal() as stop, mpidist.init() as world:
            for step in range(first, steps):
                train_one_step()
                if stop.agreed(world):        # every rank asks after every step
                    save()
                    break

    A signal only sets a flag on the rank that gets it. Batch systems send it to all ranks, which
    are in different steps by then, or to one; so the ranks agree.

    Parameters
    ----------
    signals : sequence of int, optional
        Which. When omitted: `SIGUSR1` and `SIGTERM`, which batch systems send before they end a
        job, and `SIGHUP`, which a terminal sends when it is closed.

    Attributes
    ----------
    requested : int
        The first of the signals that came to this rank; 0 if none has.
    stopping : int
        The signal that the ranks have agreed to stop at, the same on all; 0 if they have not.

    Raises
    ------
    RuntimeError
        On entering it outside the main thread: Python gives signals to no other.

    Notes
    -----
    Local, but for `agreed`. As a context manager it installs handlers and puts back those that were
    there. After an agreement the signals are ignored instead, until the process ends: a second one
    (batch systems send SIGTERM after SIGUSR1) would otherwise kill a rank between the save and its
    exit, and the job would count as failed. Processes that are forked meanwhile, such as workers of
    ``multiprocessing``, have the handlers that were there before, and a signal sent to them does
    not ask for a stop.

    A `SIGHUP` that is ignored when the context is entered stays ignored: ``nohup`` has started the
    process, so that it goes on when the terminal is closed. Ranks under `mpirun` get no SIGHUP from
    their terminal: the launcher gets it, and ends them.

    Enter it before `mpidist.init`, so that a signal during the start is not lost. MPICH sets a
    handler of its own for SIGUSR1 in MPI_Init, which calls the one that it finds there. If that one
    is replaced later, Python cannot put it back, and SIGUSR1 is ignored afterwards.

    A handler written in Python runs between two bytecodes, so never inside an MPI call; a rank that
    waits there notices the signal when the call returns. A signal ends no wait: a rank that hangs
    does so until its deadline, or until the launcher kills it.
    """

    def __init__(
        self, signals: Sequence[int] = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP)
    ) -> None:
        self._signals = tuple(signals)
        self._before: dict[int, Any] = {}
        self.requested = 0
        self.stopping = 0

    def __enter__(self) -> StopSignal:
        """Install the handlers."""
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "StopSignal: Python gives signals to the main thread only, and this is "
                f"{threading.current_thread().name!r}; enter it in the main thread, or do not "
                "enter it and call request()"
            )
        for number in self._signals:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._note)
            _TAKEN.setdefault(number, self._before[number])
        return self

    def __exit__(self, *_: object) -> None:
        """Put back the handlers that were there, or ignore the signals after an agreement."""
        for number, handler in self._before.items():
            # None is a handler of C code, which Python cannot put back.
            ignore = self.stopping or handler is None
            signal.signal(number, signal.SIG_IGN if ignore else handler)
            if not ignore and handler == _TAKEN.get(number):
                del _TAKEN[number]
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.request(number)

    def request(self, number: int = signal.SIGTERM) -> None:
        """Ask for a stop, as if this rank had received a signal.

        Parameters
        ----------
        number : int, optional
            The signal. The first one counts.

        Notes
        -----
        Local; for programs that see by other means that their time is over.
        """
        self.requested = self.requested or int(number)

    def agreed(self, group: ProcessGroup) -> bool:
        """Return whether any rank was asked to stop before it came here.

        Parameters
        ----------
        group : ProcessGroup
            The ranks that stop together.

        Returns
        -------
        bool
            The same on all ranks; once True it stays so.

        Notes
        -----
        Collective over `group`; blocks. One all_reduce of 4 bytes; nothing on one rank, or once
        agreed.
        """
        if not self.stopping:
            flag = np.array(self.requested, np.int32)
            self.stopping = int(all_reduce(flag, group, op=MAX) if group.size > 1 else flag)
        return self.stopping != 0
