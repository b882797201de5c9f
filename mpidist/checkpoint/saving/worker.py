"""The thread of a rank that writes while the program goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["Worker", "done_here", "settle"]

T = TypeVar("T")


class Worker:
    """A thread that does what it is given, in order; it is started with the first thing to do.

    Notes
    -----
    Not an executor of the standard library: those take nothing any more once the interpreter ends,
    and that is when a job waits for its last save.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, call: Callable[..., T], *args: Any) -> Future[T]:
        """Have a function called in the thread, after all that was given before."""
        future: Future[T] = Future()
        try:
            self._start()
        except RuntimeError as error:  # the user may have no more threads
            future.set_exception(error)
        else:
            self._tasks.put(lambda: settle(future, call, *args))
        return future

    def close(self) -> None:
        """Let the thread end when it has done what it was given."""
        self._tasks.put(None)

    def _start(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            thread.start()
            self._thread = thread

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()


def done_here(call: Callable[..., T], *args: Any) -> Future[T]:
    """Call a function at once, in this thread; what it raises is kept like its result."""
    future: Future[T] = Future()
    settle(future, call, *args)
    return future


def settle(future: Future[T], call: Callable[..., T], *args: Any) -> None:
    """Call a function, and put into a future what comes of it."""
    try:
        result = call(*args)
    except Exception as error:  # noqa: BLE001  # raised where the result is asked for
        future.set_exception(error)
    else:
        future.set_result(result)
