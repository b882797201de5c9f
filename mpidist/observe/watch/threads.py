"""How the watch does things beside the thread that has to answer."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["in_thread"]


def in_thread(act: Callable[[], None], name: str) -> None:
    """Do something in a thread of its own, whose name begins with ``mpidist-``.

    Where no thread can be started it is done at once: from Python 3.12 on, an interpreter that ends
    starts none.
    """
    thread = threading.Thread(target=act, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        act()
