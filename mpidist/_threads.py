"""Calls in a thread of their own, and futures of what they return.

Not an executor of the standard library: those take nothing any more once the interpreter ends,
which is when a job waits for its last save; and they join their threads, of which one may never
return from a library.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["fulfil", "run_in_thread"]

T = TypeVar("T")


def run_in_thread(call: Callable[..., T], *args: Any, name: str) -> Future[T]:
    """Call a function in a daemon thread, and return the future of its result.

    Parameters
    ----------
    call : callable
        Called with `args`.
    name : str
        Name of the thread; begins with ``mpidist-``.

    Raises
    ------
    RuntimeError
        If no thread can be started.
    """
    future: Future[T] = Future()
    threading.Thread(target=fulfil, args=(future, call, *args), name=name, daemon=True).start()
    return future


def fulfil(future: Future[T], call: Callable[..., T], *args: Any) -> Future[T]:
    """Call a function, put its result or exception into a future, and return the future.

    What is no `Exception`, such as KeyboardInterrupt, is raised here as well.
    """
    try:
        result = call(*args)
    except BaseException as error:
        future.set_exception(error)
        if not isinstance(error, Exception):
            raise
    else:
        future.set_result(result)
    return future
