"""How nodes ask each other what their ranks are doing: one question, one answer, by TCP.

Both sides know a secret, which has travelled over MPI. Each proves that before anything it sends is
read: the asker by a code over a random number that the listener has just sent it, the listener by a
code over the answer and a random number of the asker (HMAC, RFC 2104, with SHA-256). Answers are
JSON. They are not encrypted: they hold paths and lines of the program.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_address
from queue import Empty, SimpleQueue

from mpidist._threads import act_in_thread

_PATIENCE = 5.0
"""Seconds after which a node that does not answer is silent."""

_NONCE = _CODE = 32
_LONGEST = 64 << 20
"""Bytes of an answer."""

_ANSWERED_AT_ONCE = 8
"""Questions that are answered at a time; more of them wait."""

_UNPROVEN = 64
"""Connections that have not proved yet that they know the secret; a further one takes the place of
the oldest, so that whoever holds connections open keeps nobody else out."""

_ASKED_AT_ONCE = 64
"""Nodes that are asked at a time."""

_RESOLVED = 1.0
"""Seconds in which the name service has to say which addresses this host has."""

_SIOCGIFADDR = 0x8915


class Listener:
    """Answers the other nodes, by a function that is called in a thread of its own.

    It listens at `address`, the only one by which the other nodes reach this one, and `port`.
    """

    def __init__(self, answer: Callable[[], bytes]) -> None:
        self._answer = answer
        self._secret = b""
        self._socket = _listen()
        self._socket.setblocking(False)  # noqa: FBT003  # its interface
        self._unproven: deque[socket.socket] = deque()
        self._changing = threading.Lock()
        self._answering = threading.Semaphore(_ANSWERED_AT_ONCE)
        self.address, self.port = self._socket.getsockname()[:2]

    def open(self, secret: bytes) -> None:
        """Answer from now on those who know this secret."""
        self._secret = secret

    def close(self) -> None:
        """Stop listening."""
        listening = getattr(self, "_socket", None)  # the constructor may have failed before
        if listening is not None:
            try:  # noqa: SIM105  # no name of this module: it may have been emptied
                listening.close()
            except OSError:
                pass

    __del__ = close

    def fileno(self) -> int:
        """Return the descriptor that is ready when a request arrives."""
        return self._socket.fileno()

    def serve(self) -> None:
        """Answer one question, in a thread."""
        try:
            connection, _ = self._socket.accept()
        except OSError:
            return  # gone again, or this process may open no more files
        if not self._secret:
            connection.close()
            return
        with self._changing:
            if len(self._unproven) == _UNPROVEN:
                with contextlib.suppress(OSError):  # it has gone
                    self._unproven.popleft().shutdown(socket.SHUT_RDWR)  # wakes its thread
            self._unproven.append(connection)
        act_in_thread(lambda: self._serve(connection), "mpidist-listener")

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # the asker will report this node as silent
            try:
                theirs = self._prove(connection)
            finally:
                with self._changing, contextlib.suppress(ValueError):  # it has been dropped
                    self._unproven.remove(connection)
            if theirs is None:
                return
            with self._answering:
                text = self._answer()
            code = _code(self._secret, b"answer", theirs, text)
            connection.settimeout(_PATIENCE)
            connection.sendall(code + len(text).to_bytes(8, "big") + text)

    def _prove(self, connection: socket.socket) -> bytes | None:
        """Return the random number of an asker that knows the secret; None if it does not."""
        deadline = time.monotonic() + _PATIENCE
        nonce = os.urandom(_NONCE)
        connection.settimeout(_PATIENCE)
        connection.sendall(nonce)
        theirs = _read(connection, _NONCE, deadline)
        code = _read(connection, _CODE, deadline)
        proven = hmac.compare_digest(code, _code(self._secret, b"ask", nonce, theirs))
        return theirs if proven else None


def _listen() -> socket.socket:
    """Return a socket that listens at the first address of this host by which others reach it.

    Raises
    ------
    OSError
        If not even this machine itself can be reached.
    """
    for address in _addresses():
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with contextlib.suppress(OSError):  # not this host's, whatever the name service says
            return socket.create_server((address, 0), family=family, backlog=_UNPROVEN)
    return socket.create_server(("127.0.0.1", 0), backlog=_UNPROVEN)


def _addresses() -> Iterator[str]:
    """Yield the addresses of this host that others may reach, the likeliest first.

    First those of its name, by which a launcher mostly finds it, then that of the default route,
    then those of its interfaces, for hosts with neither a known name nor a route.
    """
    for find in (_addresses_of_name, _address_of_route, _addresses_of_interfaces):
        for address in find():
            parsed = ip_address(address.partition("%")[0])
            if not (parsed.is_loopback or parsed.is_link_local or parsed.is_unspecified):
                yield address


def _addresses_of_name() -> list[str]:
    """Return the addresses of this host's name; none if the name service takes too long."""
    answers: SimpleQueue[list[str]] = SimpleQueue()

    def resolve() -> None:
        try:
            addresses = socket.getaddrinfo(os.uname().nodename, None, type=socket.SOCK_STREAM)
        except OSError:  # the name is not known
            addresses = []
        answers.put([str(address[0]) for *_, address in addresses])

    act_in_thread(resolve, "mpidist-resolver")
    try:
        return answers.get(timeout=_RESOLVED)
    except Empty:
        return []


def _address_of_route() -> list[str]:
    """Return the address of the interface of the default route; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # RFC 5737: nobody has this address
        except OSError:
            return []
        return [probe.getsockname()[0]]


def _addresses_of_interfaces() -> Iterator[str]:
    """Yield the IPv4 address of each interface (netdevice(7), SIOCGIFADDR)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):  # it has none
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                yield socket.inet_ntoa(reply[20:24])


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


def ask_all(endpoints: Sequence[tuple[str, int]], secret: bytes) -> SimpleQueue[bytes | None]:
    """Ask other nodes, and return at once the queue of their answers: one each, None for no answer.

    A connection to a lost host may take long to fail, so the caller waits with a deadline.
    """
    questions: SimpleQueue[tuple[str, int] | None] = SimpleQueue()
    answers: SimpleQueue[bytes | None] = SimpleQueue()
    askers = min(len(endpoints), _ASKED_AT_ONCE)
    for question in [*endpoints, *(None,) * askers]:
        questions.put(question)

    def work() -> None:
        while (endpoint := questions.get()) is not None:
            try:
                answers.put(ask(*endpoint, secret))
            except OSError:
                answers.put(None)

    for _ in range(askers):
        act_in_thread(work, "mpidist-asker")
    return answers


def _code(secret: bytes, *parts: bytes) -> bytes:
    return hmac.digest(secret, b"".join(parts), "sha256")


def _read(connection: socket.socket, length: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < length:
        # The deadline is for all bytes: a peer that sends one now and then must not hold us.
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        chunk = connection.recv(min(length - len(data), 1 << 20))
        if not chunk:
            raise OSError("the connection was closed")
        data += chunk
    return bytes(data)
