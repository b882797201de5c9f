"""Command lines of programs that run as ranks: usage errors are reported once, not by each rank.

Each rank parses the same command line before MPI is started, so that the ranks cannot communicate
yet. One rank of each node reports what is wrong with it, and all end with code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import socket
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any, NoReturn

from mpidist import env

_LINGER = 1.0
"""Seconds that a rank stays alive after it has reached a message that is written once.

Ranks that reach it later see that the message has been written. And a launcher that ends the job
because of the first exit code has had time to read it.
"""


class RankArgumentParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` whose messages appear once per node and not once per rank.

    To be used as that one, before `mpidist.init`: usage errors end all ranks with code 2, and help
    and version with 0. Help is shown without the backticks of docstrings. Parsers of subcommands
    are of the same class.
    """

    def format_help(self) -> str:
        """Return the help as plain text."""
        return super().format_help().replace("`", "")

    def error(self, message: str) -> NoReturn:
        """Write usage and message to the error output, and end this process with code 2."""
        write_once(f"{self.format_usage()}{self.prog}: error: {message}\n")
        raise SystemExit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Write help or version once; argparse has no public place for this."""
        write_once(message, file)


def write_once(text: str, file: Any = None) -> None:
    """Write what all ranks have to say alike, from one rank of each node.

    Ranks with different texts all write.

    Written to the error output unless `file` is given. Local, for the time before MPI is started,
    just before the process ends. Where a launcher has started several ranks it returns after a
    second.
    """
    evidence = env.launcher_evidence()
    if evidence is None or not evidence.several:
        _write(text, file)
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as held:
        if _first_to_hold(held, text):
            _write(text, file)
        time.sleep(_LINGER)


def _write(text: str, file: Any) -> None:
    stream = sys.stderr if file is None else file
    with contextlib.suppress(OSError):  # as argparse does: nobody may be reading
        stream.write(text)
        stream.flush()


def _first_to_hold(held: socket.socket, text: str) -> bool:
    """Return False if another rank of this node holds the name of this text.

    The name is that of an abstract socket of Linux, so no file is left behind. The ranks of a job
    have one parent on each node, the launcher's process.
    """
    digest = zlib.crc32(text.encode(errors="surrogateescape"))
    try:
        held.bind(f"\0mpidist-usage-{os.getuid()}-{os.getppid()}-{digest:08x}")
    except OSError as error:
        return error.errno != errno.EADDRINUSE
    return True


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """Return a reader of numbers above 0, `int` or `float`, for the ``type`` of an option."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
        return value

    return read
