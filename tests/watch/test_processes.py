"""What the kernel says of a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpidist.observe.watch import states
from mpidist.observe.watch.states import Process, Status


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def becomes(process: Process, status: Status) -> bool:
    deadline = time.monotonic() + 5
    while process.status() is not status and time.monotonic() < deadline:
        time.sleep(0.01)
    return process.status() is status


def test_alive_stopped_and_dead(child: subprocess.Popen[bytes]) -> None:
    process = Process(child.pid)
    assert process.status() is Status.ALIVE
    child.send_signal(signal.SIGSTOP)
    assert becomes(process, Status.STOPPED)
    child.send_signal(signal.SIGCONT)
    assert becomes(process, Status.ALIVE)
    child.kill()
    assert becomes(process, Status.DEAD)  # though nobody has waited for it


def test_dead_also_when_its_number_is_free_again(child: subprocess.Popen[bytes]) -> None:
    process = Process(child.pid)
    child.kill()
    child.wait()
    assert process.status() is Status.DEAD


def test_a_process_that_is_not_there_is_unknown() -> None:
    largest = int(Path("/proc/sys/kernel/pid_max").read_text())
    assert Process(largest + 1).status() is Status.UNKNOWN


def test_its_descriptor_is_given_back() -> None:
    process = Process(os.getpid())
    descriptor = process._descriptor
    assert descriptor is not None
    os.fstat(descriptor)
    del process
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_nothing_is_said_when_it_goes_late(monkeypatch) -> None:
    """When the interpreter ends its modules are empty, and somebody may have closed everything."""
    process, other = Process(os.getpid()), Process(os.getpid())
    assert other._descriptor is not None
    os.close(other._descriptor)
    other.__del__()
    monkeypatch.setattr(states, "os", None)
    process.__del__()
    assert process._descriptor is None
    Process.__new__(Process).__del__()
