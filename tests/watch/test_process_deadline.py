"""The process ends at its deadline, whatever the interpreter is doing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

HEAD = """
import ctypes, faulthandler, os, signal, sys, time
from mpidist.observe.watch.deadlines import ProcessDeadline

sleep = ctypes.PyDLL(None).sleep  # holds the interpreter lock
"""

Run = Callable[[str], subprocess.CompletedProcess[str]]


@pytest.fixture
def run() -> Run:
    def run_script(body: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", HEAD + body]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)

    return run_script


def test_a_process_that_holds_the_interpreter_lock(run: Run) -> None:
    ended = run('ProcessDeadline(0.1, "mpidist: 100% late"); sleep(20)')
    assert ended.returncode == 1
    assert ended.stderr.endswith("mpidist: 100% late\n")


def test_a_finaliser_that_blocks_is_shown(run: Run) -> None:
    body = """
class Blocks:
    def __del__(self, sleep=sleep):
        sleep(20)

blocks = Blocks()
faulthandler.register(signal.SIGUSR2, file=2)
deadline = ProcessDeadline(0.1, "mpidist: late", signal.SIGUSR2)
deadline.start_anew_at_finalization(10)
"""
    ended = run(body)
    assert "mpidist: late\n" in ended.stderr
    assert "in __del__" in ended.stderr


def test_a_deadline_that_is_not_reached(run: Run) -> None:
    """Cancelled, begun again when the interpreter ends, or in a child that was forked."""
    body = """
ProcessDeadline(0.1, "cancelled").cancel()
ProcessDeadline(float("inf"), "never")
child = os.fork()
if not child:
    time.sleep(0.6)
    os._exit(3)
last = ProcessDeadline(0.3, "last")
last.start_anew_at_finalization(20)
last.start(20)
assert os.waitpid(child, 0)[1] == 3 << 8
"""
    ended = run(body)
    assert ended.returncode == 0
    # Newer interpreters warn of the fork.
    assert not any(name in ended.stderr for name in ("cancelled", "never", "last")), ended.stderr


def test_a_timer_of_faulthandler_is_kept(run: Run) -> None:
    body = """
faulthandler.dump_traceback_later(0.3, exit=True)
ProcessDeadline(0.1, "cancelled").cancel()
sleep(20)
"""
    assert "Timeout (0:00:00" in run(body).stderr
