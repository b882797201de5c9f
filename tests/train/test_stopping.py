"""`StopSignal`: handlers come and go, the ranks agree, and a second signal does no harm."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

import mpidist
from mpidist.group import ProcessGroup
from mpidist.testing import run_ranks
from mpidist.train import StopSignal

ALL = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """Signals that reach a handler which was there before; the process's own are put back."""
    numbers: list[int] = []
    before = {n: signal.signal(n, lambda number, _: numbers.append(number)) for n in ALL}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


def test_handlers_are_put_back(heard: list[int]) -> None:
    before = [signal.getsignal(number) for number in ALL]
    with StopSignal() as stop:
        assert stop.requested == 0
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        assert stop.requested == signal.SIGTERM  # the first one counts
        inner = StopSignal((signal.SIGUSR1,))
        with contextlib.suppress(KeyError), inner:
            signal.raise_signal(signal.SIGUSR1)
            raise KeyError
        assert inner.requested == signal.SIGUSR1
    assert [signal.getsignal(number) for number in ALL] == before
    assert heard == []
    signal.raise_signal(signal.SIGUSR1)
    assert heard == [signal.SIGUSR1]


def test_a_closed_terminal_stops_the_run(heard: list[int]) -> None:
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.requested == signal.SIGHUP
    assert heard == []


def test_nohup_is_respected(heard: list[int]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the fixture puts back what was there
    with StopSignal() as stop, mpidist.init("simulated") as world:
        signal.raise_signal(signal.SIGHUP)
        assert stop.requested == 0
        stop.request()
        assert stop.agreed(world)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_after_an_agreement_the_signals_are_ignored(heard: list[int]) -> None:
    with mpidist.init("simulated") as world, StopSignal() as stop:
        assert not stop.agreed(world)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.agreed(world)
        assert stop.stopping == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGTERM)  # while saving
        assert stop.agreed(world)
    os.kill(os.getpid(), signal.SIGTERM)  # after the save, before the exit
    assert heard == []


FORK = """
import os, signal, sys, time
import mpidist
from mpidist.train import StopSignal

signal.signal(signal.SIGUSR1, lambda number, frame: os._exit(7))
signal.signal(signal.SIGHUP, signal.SIG_IGN)
world = mpidist.init("simulated")

def ending(number):
    child = os.fork()
    if not child:
        time.sleep(0.2)
        os._exit(0)
    os.kill(child, number)  # it may not have come back from fork yet
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def endings():
    return [ending(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)]

outer = StopSignal((signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP))
with outer, StopSignal((signal.SIGTERM,)) as stop:
    print(endings())
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested and not outer.requested
    outer.request()
    assert outer.agreed(world)
    print(endings())
print(endings())
os.kill(os.getpid(), signal.SIGTERM)
with StopSignal((signal.SIGINT,)):
    pass
signal.signal(signal.SIGINT, lambda number, frame: os._exit(8))
child = os.fork()
if not child:
    signal.raise_signal(signal.SIGINT)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_has_the_handlers_that_were_there_before() -> None:
    """While the signals are handled, and when they are ignored after an agreement."""
    command = [sys.executable, "-c", FORK]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout.splitlines() == [str([-signal.SIGTERM, 7, 0])] * 3 + ["8"], ended


def test_other_threads_are_refused_before_anything_is_installed(heard: list[int]) -> None:
    before = [signal.getsignal(number) for number in ALL]
    errors: list[RuntimeError] = []

    def enter() -> None:
        try:
            StopSignal().__enter__()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=enter, name="loader")
    thread.start()
    thread.join()
    assert "to the main thread only, and this is 'loader'" in str(errors[0])
    assert [signal.getsignal(number) for number in ALL] == before


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_ranks_stop_after_the_same_step(size: int) -> None:
    def body(group: ProcessGroup) -> tuple[int, int]:
        stop = StopSignal()
        for step in range(10):
            if step == 3 and group.rank == size - 1:
                stop.request(signal.SIGUSR1)
            if step == 4:
                stop.request()  # too late on one rank, never needed on the others
            if stop.agreed(group):
                return step, stop.stopping
        return -1, 0

    assert run_ranks(size, body) == [(3, signal.SIGUSR1)] * size


@pytest.mark.ranks(2, 3)
def test_a_signal_reaches_a_rank_that_waits_in_a_collective(world: ProcessGroup) -> None:
    with StopSignal((signal.SIGTERM,)) as stop:
        if world.rank == 0:
            # The others are inside the barrier by then; the last one gets the signal there.
            pids = mpidist.gather(np.array([os.getpid()]), world, root=0)
            assert pids is not None
            time.sleep(0.2)
            os.kill(int(pids[-1]), signal.SIGTERM)
        else:
            mpidist.gather(np.array([os.getpid()]), world, root=0)
        mpidist.barrier(world)
        steps = 0
        while not stop.agreed(world):
            steps += 1
            assert steps < 10_000
        assert stop.stopping == signal.SIGTERM
        assert (stop.requested == signal.SIGTERM) is (world.rank == world.size - 1)
