"""Calls in a thread of their own, and futures of what they return.

No executors of the standard library: those take nothing any more once the interpreter ends,
which is when a job waits for its last save; and they join their threads, of which one may never
return from a library.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")


def act_in_thread(act: Callable[[], None], name: str) -> None:
    """Call a function in a daemon thread; what it raises is printed.

    Where no thread can be started it is called at once: from Python 3.12 on, an interpreter that
    ends starts none. Names of threads begin with ``mpidist-``.
    """
    thread = threading.Thread(target=act, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        act()


def run_in_thread(call: Callable[..., T], *args: Any, name: str) -> Future[T]:
    """Call a function in a daemon thread, and return the future of its result.

    Raises RuntimeError if no thread can be started.
    """
    from concurrent.futures import Future  # not at import: `act_in_thread` does without

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
