"""How nodes ask each other what their ranks are doing: one question, one answer, by TCP.

Both sides know a secret, which has travelled over MPI. Each proves it before anything that it says
is read: the one that asks by a code over a number that the listener has just drawn, the listener by
a code over the answer and the number of the one that asks (HMAC, RFC 2104, with SHA-256). Answers
are JSON. They are not encrypted: they hold paths and lines of the program.
"""

from __future__ import annotations

import hmac
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from mpidist.watch.threads import in_thread

__all__ = ["Listener", "ask", "ask_all"]

_PATIENCE = 5.0
"""Seconds after which a node that does not answer is silent."""

_NONCE = _CODE = 32
_LONGEST = 64 << 20
"""Bytes of an answer."""

_MOST = 8
"""Questions that are answered at a time; further ones are turned away."""

_ASKED_AT_ONCE = 64
"""Nodes."""


class Listener:
    """Answers the other nodes.

    Parameters
    ----------
    answer : callable
        Returns the answer; called in a thread of its own.

    Attributes
    ----------
    port : int
        Where it listens, on all interfaces.
    """

    def __init__(self, answer: Callable[[], bytes]) -> None:
        self._answer = answer
        self._secret = b""
        self._socket = socket.create_server(("", 0))
        self._socket.setblocking(False)  # noqa: FBT003  # its interface
        self._room = threading.Semaphore(_MOST)
        self.port: int = self._socket.getsockname()[1]

    def open(self, secret: bytes) -> None:
        """Answer from now on those who know this secret."""
        self._secret = secret

    def __del__(self) -> None:
        """Stop listening."""
        self._socket.close()

    def fileno(self) -> int:
        """Return the descriptor that is ready when somebody asks."""
        return self._socket.fileno()

    def serve(self) -> None:
        """Answer one question, in a thread."""
        try:
            connection, _ = self._socket.accept()
        except OSError:
            return  # gone again, or this process may open no more files
        if not self._secret or not self._room.acquire(blocking=False):
            connection.close()
            return
        in_thread(lambda: self._serve(connection), "mpidist-listener")

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                deadline = time.monotonic() + _PATIENCE
                nonce = os.urandom(_NONCE)
                connection.settimeout(_PATIENCE)
                connection.sendall(nonce)
                theirs = _read(connection, _NONCE, deadline)
                code = _read(connection, _CODE, deadline)
                if not hmac.compare_digest(code, _code(self._secret, b"ask", nonce, theirs)):
                    return
                text = self._answer()
                code = _code(self._secret, b"answer", theirs, text)
                connection.settimeout(_PATIENCE)
                connection.sendall(code + len(text).to_bytes(8, "big") + text)
        except OSError:
            pass  # whoever asked will call this node silent
        finally:
            self._room.release()


def ask(host: str, port: int, secret: bytes) -> bytes:
    """Ask another node, and return its answer.

    Raises
    ------
    OSError
        If it does not answer within 5 s, or does not know the secret.
    """
    deadline = time.monotonic() + _PATIENCE
    with socket.create_connection((host, port), timeout=_PATIENCE) as connection:
        theirs, nonce = _read(connection, _NONCE, deadline), os.urandom(_NONCE)
        connection.sendall(nonce + _code(secret, b"ask", theirs, nonce))
        code = _read(connection, _CODE, deadline)
        length = int.from_bytes(_read(connection, 8, deadline), "big")
        if length > _LONGEST:
            raise OSError(f"{host}:{port} announces {length} bytes")
        text = _read(connection, length, deadline)
    if not hmac.compare_digest(code, _code(secret, b"answer", nonce, text)):
        raise OSError(f"{host}:{port} does not know the secret of this job")
    return text


def ask_all(doors: Sequence[tuple[str, int]], secret: bytes) -> SimpleQueue[bytes | None]:
    """Ask other nodes, and return at once where the answers will be: one for each, None for none.

    Finding out where a host is may take longer than any patience, so nobody should wait for all.
    """
    questions: SimpleQueue[tuple[str, int] | None] = SimpleQueue()
    answers: SimpleQueue[bytes | None] = SimpleQueue()
    askers = min(len(doors), _ASKED_AT_ONCE)
    for question in [*doors, *(None,) * askers]:
        questions.put(question)

    def work() -> None:
        while (door := questions.get()) is not None:
            try:
                answers.put(ask(*door, secret))
            except OSError:
                answers.put(None)

    for _ in range(askers):
        in_thread(work, "mpidist-asker")
    return answers


def _code(secret: bytes, *parts: bytes) -> bytes:
    return hmac.digest(secret, b"".join(parts), "sha256")


def _read(connection: socket.socket, length: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < length:
        # The whole of it: one that sends a byte now and then is not waited for, either.
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        chunk = connection.recv(min(length - len(data), 1 << 20))
        if not chunk:
            raise OSError("the connection was closed")
        data += chunk
    return bytes(data)
