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
from collections.abc import Callable

__all__ = ["Listener", "ask"]

_PATIENCE = 5.0
"""Seconds after which a node that does not answer is silent."""

_NONCE = _CODE = 32
_LONGEST = 64 << 20
"""Bytes of an answer."""

_MOST = 8
"""Questions that are answered at a time; further ones are turned away."""


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
        connection, _ = self._socket.accept()
        if not self._secret or not self._room.acquire(blocking=False):
            connection.close()
            return
        threading.Thread(
            target=self._serve, args=(connection,), name="mpidist-listener", daemon=True
        ).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.settimeout(_PATIENCE)
                nonce = os.urandom(_NONCE)
                connection.sendall(nonce)
                theirs, code = _read(connection, _NONCE), _read(connection, _CODE)
                if not hmac.compare_digest(code, _code(self._secret, b"ask", nonce, theirs)):
                    return
                text = self._answer()
                code = _code(self._secret, b"answer", theirs, text)
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
    with socket.create_connection((host, port), timeout=_PATIENCE) as connection:
        connection.settimeout(_PATIENCE)
        theirs, nonce = _read(connection, _NONCE), os.urandom(_NONCE)
        connection.sendall(nonce + _code(secret, b"ask", theirs, nonce))
        code = _read(connection, _CODE)
        length = int.from_bytes(_read(connection, 8), "big")
        if length > _LONGEST:
            raise OSError(f"{host}:{port} announces {length} bytes")
        text = _read(connection, length)
    if not hmac.compare_digest(code, _code(secret, b"answer", nonce, text)):
        raise OSError(f"{host}:{port} does not know the secret of this job")
    return text


def _code(secret: bytes, *parts: bytes) -> bytes:
    return hmac.digest(secret, b"".join(parts), "sha256")


def _read(connection: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        chunk = connection.recv(min(length - len(data), 1 << 20))
        if not chunk:
            raise OSError("the connection was closed")
        data += chunk
    return bytes(data)
