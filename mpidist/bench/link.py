"""What the network alone takes: TCP sockets between the nodes, with nothing of MPI."""

from __future__ import annotations

import fcntl
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from mpidist.collectives import all_gather_object, barrier
from mpidist.group import ProcessGroup

__all__ = ["TcpRing", "open_link"]

_TIMEOUT = 60.0
"""Seconds until a connection, or a transfer that does not go on, fails."""

_SIOCGIFADDR = 0x8915
"""The request for an interface's address; netdevice(7)."""

_UNBUFFERED = 64 << 10
"""Bytes beyond which a socket may not take all that is sent before the peer reads."""


class TcpRing:
    """Connections between the first ranks of the nodes, on a ring.

    Parameters
    ----------
    after, before : socket or None
        To the next node and from the one before; None on ranks that are not the first of a node.
    nodes : int
        Number of nodes.
    """

    def __init__(
        self, after: socket.socket | None, before: socket.socket | None, nodes: int
    ) -> None:
        self._after = after
        self._before = before
        self._nodes = nodes

    def transfer(self, nbytes: int) -> Callable[[], None]:
        """Return a call that moves the least bytes that an all_reduce of `nbytes` can.

        Of m nodes each sends 2 (m - 1) / m of the bytes, and receives as many at the same time
        (Patarasuk, Yuan 2009). On ranks without connections it does nothing.
        """
        after, before = self._after, self._before
        if after is None or before is None:
            return lambda: None
        share = max(2 * (self._nodes - 1) * nbytes // self._nodes, 1)
        sent, received = bytes(share), memoryview(bytearray(share))

        def call() -> None:
            sender = None
            if share > _UNBUFFERED:
                sender = threading.Thread(target=after.sendall, args=(sent,))
                sender.start()
            else:
                after.sendall(sent)
            left = received
            while left:
                count = before.recv_into(left)
                if not count:
                    raise ConnectionError("bench: the node before has closed its connection")
                left = left[count:]
            if sender is not None:
                sender.join()

        return call


@contextmanager
def open_link(group: ProcessGroup) -> Iterator[TcpRing | str]:
    """Connect the nodes of a group; collective over it, blocks.

    Gives, on all ranks alike, the link or the sentence that says why there is none.
    """
    if group.num_nodes == 1:
        yield "no link: all ranks are on one node"
        return
    with ExitStack() as stack:
        listener = after = before = endpoint = None
        if group.local_rank == 0:
            listener = stack.enter_context(socket.create_server(("", 0)))
            listener.settimeout(_TIMEOUT)
            endpoint = _Endpoint(group.rank, _addresses(), listener.getsockname()[1])
        endpoints = list(filter(None, all_gather_object(endpoint, group)))
        problem = ""
        if endpoint is not None:
            try:
                after = _connect(endpoints[(endpoints.index(endpoint) + 1) % len(endpoints)])
                stack.enter_context(after)
            except ConnectionError as error:
                problem = str(error)
        problem = next(filter(None, all_gather_object(problem, group)), "")
        if problem:
            yield f"no link: {problem}"
            return
        if listener is not None and after is not None:
            before = stack.enter_context(listener.accept()[0])
            for connection in (after, before):
                connection.settimeout(_TIMEOUT)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield TcpRing(after, before, len(endpoints))
        barrier(group)


class _Endpoint(NamedTuple):
    """Where the first rank of a node listens."""

    rank: int
    addresses: list[str]
    port: int


def _addresses() -> list[str]:
    """Return the IPv4 addresses of this host, but for those of the host alone."""
    addresses = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)
            except OSError:  # an interface without one
                continue
            addresses.append(socket.inet_ntoa(answer[20:24]))
    outer = [address for address in addresses if not address.startswith("127.")]
    return outer or addresses


def _connect(endpoint: _Endpoint) -> socket.socket:
    """Connect to the first address that answers; raises ConnectionError if none does."""
    problems = []
    for address in endpoint.addresses:
        try:
            return socket.create_connection((address, endpoint.port), _TIMEOUT / 6)
        except OSError as error:
            problems.append(f"{address}: {error}")
    raise ConnectionError(f"rank {endpoint.rank} cannot be reached by TCP ({'; '.join(problems)})")
