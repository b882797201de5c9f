"""Deadlines for what comes before and after this package's own waits: MPI's start and its end."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import traceback

from mpidist.observe.watch.process_deadline import ProcessDeadline

__all__ = ["limit_finalization", "limit_loading", "main_stack"]

_STUCK_INTERPRETER = 2.0
"""Seconds after a deadline, for the helper thread, at which the process ends without it."""

_FINALIZING = 6.0
"""Seconds after it for a rank that has ended its part, and waits for others in MPI_Finalize."""


def limit_loading(rank: int, size: int | None, timeout: float) -> ProcessDeadline:
    """Return a deadline for the start of MPI, in which the ranks wait for each other.

    Parameters
    ----------
    rank : int
        This rank, as the launcher has it.
    size : int or None
        The number of ranks that the launcher promises; None where it does not say.
    timeout : float
        Seconds.
    """
    ranks = f"rank {rank}" if size is None else f"rank {rank} of {size}"
    return ProcessDeadline(
        timeout,
        f"[world {rank}/{'?' if size is None else size}] mpidist: this rank has waited {timeout:g} "
        f"s in mpidist.init for MPI to start; ending the job. It is {ranks}, "
        f"{os.uname().nodename}:{os.getpid()}. MPI starts when all ranks have called init, and "
        "another one has not: look for its traceback in the output of the job (an import that "
        "fails, sys.exit), or for a process that is stopped or still at work before init (ps -o "
        "pid,stat,etime,args). If it only needs longer: init(timeout=...)",
    )


def limit_finalization(name: str, timeout: float, *, stacks: bool) -> None:
    """Let this process end within a deadline from now: its exit handler is done.

    What follows is exit handlers that were registered before `init`, for which the helper thread
    speaks as long as it can, then finalisers, and MPI_Finalize, which waits for the other ranks. A
    rank that has come to the last is not the one that keeps them, and speaks later.

    Parameters
    ----------
    name : str
        Of this rank, for messages.
    timeout : float
        Seconds.
    stacks : bool
        Whether SIGUSR2 is free: from now on it writes the stack without the interpreter.
    """
    if stacks:
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)  # or the interpreter does so at its end
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=False)
    seconds = timeout + _STUCK_INTERPRETER
    message = (
        f"{name} mpidist: this rank has left, and its process has not ended for {seconds:g} s: a "
        "finaliser (__del__), an exit handler that was registered before mpidist.init, or "
        "MPI_Finalize does not return; ending the job. Where it is, if in Python:"
    )
    deadline = ProcessDeadline(seconds, message, signal.SIGUSR2 if stacks else None)
    deadline.start_anew_at_finalization(timeout + _FINALIZING)


def main_stack() -> str:
    """Return where the main thread is, as a traceback tells it; begins with a colon."""
    number = threading.main_thread().ident
    frame = None if number is None else sys._current_frames().get(number)
    return "" if frame is None else ":\n" + "".join(traceback.format_stack(frame)).rstrip()
