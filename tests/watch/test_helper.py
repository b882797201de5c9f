"""The thread that answers while the main thread cannot: what wakes it, and what must not."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

import pytest

HEAD = """
import asyncio, hashlib, os, resource, signal, threading, time
from mpidist.observe.watch.helper import Helper

began = time.monotonic()
most = reports = 0

class Watched:
    listener = None
    def listen(self, nodes): pass
    def answer(self): pass
    def report_signal(self):
        global most, reports
        most = max(most, threading.active_count())
        time.sleep(lasts)
        os.write(1, f"report {time.monotonic() - began:.3f}\\n".encode())
        reports += 1

lasts = 0.01
watched = Watched()

def start():
    helper = Helper()
    helper.serve(watched, [0])
    return helper

def ask():
    os.kill(os.getpid(), signal.SIGUSR2)

def reporting():
    return any(thread.name == "mpidist-report" for thread in threading.enumerate())

def reported(number):
    end = time.monotonic() + 20
    while (reports < number or reporting()) and time.monotonic() < end:
        time.sleep(0.01)
    return reports == number

async def woken(heard):
    end = time.monotonic() + 20
    while not (heard and reports) and time.monotonic() < end:
        await asyncio.sleep(0.01)
    return bool(heard)
"""


@pytest.fixture
def run() -> Callable[[str], str]:
    def run_script(body: str) -> str:
        command = [sys.executable, "-W", "error", "-c", HEAD + body]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert "Traceback" not in ended.stderr, ended.stderr
        return ended.stdout

    return run_script


def test_a_signal_is_reported_while_the_main_thread_is_in_a_library(run) -> None:
    body = """
assert start().catch()
threading.Timer(0.2, ask).start()
hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)
print(f"back {time.monotonic() - began:.3f}")
"""
    report, back = (float(word) for word in re.findall(r" ([0-9.]+)", run(body)))
    assert report < back


def test_signals_without_end_make_one_report_at_a_time(run) -> None:
    body = """
assert start().catch()
lasts = 0.3
until = time.monotonic() + 0.8
while time.monotonic() < until:
    ask()
    time.sleep(0.0005)
while reporting():
    time.sleep(0.01)
assert most <= 3, most
"""
    assert 1 <= run(body).count("report") <= 5


def test_an_event_loop_that_takes_the_descriptor_does_not_end_it(run) -> None:
    body = """
assert start().catch()
heard = []

async def listen():
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, heard.append, 1)
    os.kill(os.getpid(), signal.SIGUSR1)
    ask()
    return await woken(heard)

assert asyncio.run(listen())
assert reported(1)
for number in (2, 3):
    ask()
    assert reported(number)
"""
    assert run(body).count("report") == 3


def test_an_event_loop_that_had_the_descriptor_is_still_woken(run) -> None:
    body = """
heard = []

async def listen():
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, heard.append, 1)
    assert start().catch()
    ask()
    os.kill(os.getpid(), signal.SIGUSR1)
    return await woken(heard)

assert asyncio.run(listen())
assert reported(1)
"""
    assert run(body).count("report") == 1


def test_the_signals_of_a_forked_child_are_its_own(run) -> None:
    body = """
assert start().catch()
child = os.fork()
if not child:
    ask()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
time.sleep(0.3)
print("asked")
ask()
assert reported(1)
"""
    assert re.fullmatch(r"asked\nreport [0-9.]+\n", run(body))


def test_descriptors_may_have_large_numbers(run) -> None:
    body = """
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
if hard < 2000:
    print("report")
    raise SystemExit
resource.setrlimit(resource.RLIMIT_NOFILE, (2000, hard))
held = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
from mpidist.observe.watch.states import Process, Status
assert Process(os.getpid()).status() is Status.ALIVE
assert start().catch()
ask()
assert reported(1)
"""
    assert "report" in run(body)


def test_a_handler_of_somebody_else_stays(run) -> None:
    body = """
signal.signal(signal.SIGUSR2, lambda *_: print("mine"))
assert not start().catch()
ask()
time.sleep(0.3)
"""
    assert run(body) == "mine\n"
