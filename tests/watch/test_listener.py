"""Only those who know the secret of the job are heard, and answered."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from mpidist.observe.watch import listener as module
from mpidist.observe.watch.listener import Listener, ask, ask_all

SECRET = bytes(range(32))
ANSWER = b"what they are doing" * 100_000


class Served:
    """A listener and the thread that serves it."""

    def __init__(self) -> None:
        self.answers = 0
        self.listener = Listener(self.answer)
        self.over = False
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    @property
    def endpoint(self) -> tuple[str, int]:
        return self.listener.address, self.listener.port

    def answer(self) -> bytes:
        self.answers += 1
        return ANSWER

    def run(self) -> None:
        while not self.over:
            if select.select([self.listener], [], [], 0.02)[0]:
                self.listener.serve()


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.over = True
    served.thread.join()


def test_who_knows_the_secret_gets_the_answer(served: Served) -> None:
    served.listener.open(SECRET)
    assert ask(*served.endpoint, SECRET) == ANSWER


def test_who_does_not_is_not_even_asked_for_an_answer(served: Served) -> None:
    served.listener.open(SECRET)
    with pytest.raises(OSError, match="closed"):
        ask(*served.endpoint, bytes(32))
    assert served.answers == 0


def test_before_there_is_a_secret_nobody_is_heard(served: Served) -> None:
    with pytest.raises(OSError, match=r"closed|reset"):
        ask(*served.endpoint, b"")
    assert served.answers == 0


def test_a_stranger_that_answers_in_its_place_is_not_believed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:

        def lie() -> None:
            connection, _ = stranger.accept()
            with connection:
                connection.sendall(bytes(32))
                received = b""
                while len(received) < 64:
                    received += connection.recv(64)
                connection.sendall(bytes(32) + (2).to_bytes(8, "big") + b"[]")

        thread = threading.Thread(target=lie)
        thread.start()
        with pytest.raises(OSError, match="does not know the secret"):
            ask("127.0.0.1", stranger.getsockname()[1], SECRET)
        thread.join()


def test_silent_strangers_keep_nobody_from_being_answered(served: Served) -> None:
    """However many: the oldest of those that have proved nothing makes room."""
    served.listener.open(SECRET)
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stranger = stack.enter_context(socket.create_connection(served.endpoint, timeout=10))
            assert stranger.recv(32)  # its number has come, so that it is served
        began = time.monotonic()
        assert ask(*served.endpoint, SECRET) == ANSWER
        assert time.monotonic() - began < module._PATIENCE


def test_it_listens_at_one_address_only(monkeypatch) -> None:
    monkeypatch.setattr(module, "_addresses", lambda: iter(["192.0.2.1", "127.0.0.1"]))
    listener = Listener(lambda: ANSWER)
    assert listener.address == "127.0.0.1"  # the first one is nobody's
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", listener.port), timeout=10)


def test_where_the_name_is_not_known_an_interface_is_found(monkeypatch) -> None:
    """Nothing that only this host itself can reach, as 127.0.1.1 for its name (Debian)."""
    monkeypatch.setattr(module, "_addresses_of_name", lambda: ["127.0.1.1", "fe80::1%eth0"])
    monkeypatch.setattr(module, "_address_of_route", list)
    monkeypatch.setattr(module, "_addresses_of_interfaces", lambda: ["127.0.0.1", "10.1.2.3"])
    assert list(module._addresses()) == ["10.1.2.3"]
    monkeypatch.undo()
    assert "127.0.0.1" in module._addresses_of_interfaces()


def test_a_host_whose_name_nobody_knows_is_not_waited_for(monkeypatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(module, "_RESOLVED", 60.0)
    began = time.monotonic()
    assert module._addresses_of_name() == []
    assert time.monotonic() - began < 30


def test_a_name_service_that_says_nothing_is_waited_for_a_moment(monkeypatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(20) and [])
    monkeypatch.setattr(module, "_RESOLVED", 0.05)
    assert module._addresses_of_name() == []
    over.set()


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        ask("127.0.0.1", port, SECRET)


def test_one_that_accepts_and_says_nothing(monkeypatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(TimeoutError):
        ask("127.0.0.1", mute.getsockname()[1], SECRET)


def test_who_sends_a_byte_now_and_then_is_not_waited_for(served: Served, monkeypatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.5)
    served.listener.open(SECRET)
    began = time.monotonic()
    with socket.create_connection(served.endpoint) as slow, contextlib.suppress(OSError):
        while time.monotonic() - began < 6:
            slow.send(b"x")
            time.sleep(0.1)
    assert time.monotonic() - began < 3


def test_who_answers_byte_by_byte_is_silent(monkeypatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as stranger:

        def trickle() -> None:
            connection, _ = stranger.accept()
            with connection, contextlib.suppress(OSError):
                for _ in range(50):
                    connection.sendall(b"x")
                    time.sleep(0.1)

        thread = threading.Thread(target=trickle)
        thread.start()
        began = time.monotonic()
        with pytest.raises(OSError, match="timed out"):
            ask("127.0.0.1", stranger.getsockname()[1], SECRET)
        assert time.monotonic() - began < 3
        thread.join()


def test_nobody_at_the_door_is_no_error(served: Served) -> None:
    served.listener.serve()


def test_many_are_asked_and_some_are_silent(served: Served, monkeypatch) -> None:
    monkeypatch.setattr(module, "_ASKED_AT_ONCE", 2)
    served.listener.open(SECRET)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        closed = nobody.getsockname()[1]
    endpoints = [served.endpoint] * 3 + [("127.0.0.1", closed)]
    answers = ask_all(endpoints, SECRET)
    got = [answers.get(timeout=10) for _ in endpoints]
    assert got.count(ANSWER) == 3
    assert got.count(None) == 1
