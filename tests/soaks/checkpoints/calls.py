"""The calls by which a program touches the files of a directory: seen, delayed, made to fail."""

from __future__ import annotations

import functools
import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any, NamedTuple
from unittest import mock
from weakref import WeakKeyDictionary

from mpidist.checkpoint.format import files, view

__all__ = ["Call", "Hook", "Perform", "intercepted"]

_NO_FILES = frozenset({"fspath", "getpid", "kill", "strerror", "urandom"})
"""Functions of os that take text or a number, and touch no file by it."""


_BY_HDF5 = (
    (files, "create_file"),
    (files, "parallel_file"),
    (view, "create_view"),
    (view, "contents"),
)
"""Functions by which HDF5 touches files."""


class Call(NamedTuple):
    """A call that touches a file.

    Attributes
    ----------
    rank : int or None
        Which simulated rank makes it, itself or by a thread that it has started; None elsewhere.
    name : str
        Of the function, such as ``os.fsync``.
    file : str
        What it touches first, counted from the directory; ``.`` for the directory itself.
    """

    rank: int | None
    name: str
    file: str


Perform = Callable[..., Any]
"""Makes the call; given other arguments, with those."""

Hook = Callable[[Call, Perform, tuple[Any, ...]], Any]
"""Gets the call, what performs it, and its arguments; returns what the caller gets."""


@contextmanager
def intercepted(directory: Path, hook: Hook) -> Iterator[None]:
    """Let a function decide about every call that touches a directory or what is in it.

    Parameters
    ----------
    directory : Path
        Which one; need not exist.
    hook : callable
        What each call comes to. May be called by several threads at once.

    Notes
    -----
    Every built-in function of `os` is watched, whoever calls it, by path or by descriptor, so that
    a call that is new in the package is among them. What HDF5 does in C is not: there
    the functions stand for its calls that make a file or look into one.
    """
    directory = directory.absolute()
    parents: WeakKeyDictionary[threading.Thread, threading.Thread] = WeakKeyDictionary()
    start = threading.Thread.start
    inside = threading.local()

    def note_parent(thread: threading.Thread) -> None:
        parents[thread] = threading.current_thread()
        start(thread)

    def watch(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **options: Any) -> Any:
            file = None if getattr(inside, "hook", False) else _file(directory, args, options)
            if file is None:
                return original(*args, **options)

            def perform(*others: Any) -> Any:
                return original(*(others or args), **options)

            inside.hook = True
            try:
                return hook(Call(_rank(parents), name, file), perform, args)
            finally:
                inside.hook = False

        return call

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(threading.Thread, "start", note_parent))
        for name, function in list(vars(os).items()):
            if isinstance(function, BuiltinFunctionType) and name not in _NO_FILES:
                watched = watch(f"os.{name}", function)
                stack.enter_context(mock.patch.object(os, name, watched))
                if getattr(_OLD_PATHLIB, name, None) is function:  # it has kept it for itself
                    kept = staticmethod(watched)
                    stack.enter_context(mock.patch.object(_OLD_PATHLIB, name, kept))
        for module, name in _BY_HDF5:
            watched = watch(f"hdf5.{name}", getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, watched))
        yield


def _rank(parents: WeakKeyDictionary[threading.Thread, threading.Thread]) -> int | None:
    """Return the rank whose thread this is, or has started this one."""
    thread: threading.Thread | None = threading.current_thread()
    while thread is not None:
        kind, _, number = thread.name.partition("-")
        if kind == "rank" and number.isdigit():
            return int(number)
        thread = parents.get(thread)
    return None


_OLD_PATHLIB = getattr(pathlib, "_NormalAccessor", None)
"""What paths call under Python 3.10."""

_readlink = os.readlink


def _file(directory: Path, args: tuple[Any, ...], options: dict[str, Any]) -> str | None:
    """Return which file of the directory a call is about, or None."""
    subject = args[0] if args else options.get("path")
    base = options.get("dir_fd")
    try:
        if isinstance(subject, bool):
            return None
        if isinstance(subject, int):
            place = Path(_readlink(f"/proc/self/fd/{subject}"))
        elif isinstance(subject, (str, os.PathLike)):
            place = Path(_readlink(f"/proc/self/fd/{base}") if base is not None else ".", subject)
        else:
            return None
        return str(place.absolute().relative_to(directory))
    except (OSError, ValueError):
        return None
