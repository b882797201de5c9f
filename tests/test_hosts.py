"""Pretended hosts: what their ranks see, that two runs do not meet, and what is removed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import mpidist
from mpidist.collectives import all_gather_object, all_reduce
from mpidist.group import ProcessGroup
from tests._ranks.hosts import MARK, NO_HOSTS, Hosts, HostsUnavailableError, remove_dead
from tests._ranks.launcher import clean_environment, marked_processes
from tests._ranks.plugin import hosts_are_required
from tests.test_ranks_plugin import run_sample

ROOT = Path(__file__).parents[1]


@pytest.mark.hosts(2)
def test_ranks_of_a_host_share_a_name_and_memory(world: ProcessGroup) -> None:
    check_hosts(world)


@pytest.mark.any_mpi
@pytest.mark.hosts(4)
def test_four_hosts(world: ProcessGroup) -> None:
    check_hosts(world)


def check_hosts(world: ProcessGroup) -> None:
    """Check what the ranks of a host share, and that all of them can sum."""
    assert world.local_size == 2
    assert world.node_rank == world.rank // 2
    (Path("/dev/shm") / f"mpidist-test-{world.rank}").touch()
    mpidist.barrier(world)
    seen = sorted(path.name for path in Path("/dev/shm").glob("mpidist-test-*"))
    first = world.rank - world.local_rank
    assert seen == [f"mpidist-test-{first}", f"mpidist-test-{first + 1}"]
    mpidist.barrier(world)
    (Path("/dev/shm") / f"mpidist-test-{world.rank}").unlink()
    names = all_gather_object(socket.gethostname(), world)
    assert [names.count(name) for name in names] == [2] * world.size

    x = np.arange(1000) + world.rank
    np.testing.assert_array_equal(
        all_reduce(x, world), world.size * np.arange(1000) + sum(range(world.size))
    )


@pytest.fixture
def unmarked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A temporary directory in which this test alone makes hosts."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def make(count: int) -> Hosts:
    """Make hosts, or skip or fail as tests on their ranks are."""
    try:
        return Hosts(count)
    except HostsUnavailableError as error:
        if hosts_are_required():
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))


def output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


@pytest.mark.any_mpi
class TestHosts:
    def test_two_runs_do_not_meet(self) -> None:
        with make(2) as one, make(2) as other:
            assert not set(one.names) & set(other.names)
            for hosts in (one, other):
                assert [output(hosts.on(i, "hostname")).strip() for i in (0, 1)] == hosts.names
            # The same address: what one run sends never comes to the other.
            listen = "import socket; s = socket.create_server(('', 4000)); print(flush=True); "
            answers = []
            for index, hosts in enumerate((one, other)):
                reply = f"s.accept()[0].sendall(b'{index}')"
                server = subprocess.Popen(
                    hosts.on(1, sys.executable, "-c", listen + reply), stdout=subprocess.PIPE
                )
                answers.append(server)
            ask = "import socket, sys; print(socket.create_connection((sys.argv[1], 4000)).recv(1))"
            for index, (hosts, server) in enumerate(zip((one, other), answers, strict=True)):
                assert server.stdout is not None
                with server, server.stdout:
                    server.stdout.readline()
                    asked = hosts.on(0, sys.executable, "-c", ask, hosts.addresses[1])
                    assert output(asked).strip() == f"b'{index}'"

    def test_nothing_is_left(self, unmarked: Path) -> None:
        with make(2) as hosts:
            left = subprocess.Popen(hosts.on(1, "sleep", "100"))
            directory = str(next(unmarked.iterdir()))
            wait_until(lambda: len(marked_processes(directory, name=MARK)) == 4)
        assert left.wait(timeout=5) == -signal.SIGKILL
        assert marked_processes(directory, name=MARK) == []
        assert list(unmarked.iterdir()) == []

    def test_what_a_killed_run_left_is_removed_and_what_lives_is_not(self, unmarked: Path) -> None:
        script = """
import subprocess, sys, tempfile
tempfile.tempdir = sys.argv[1]
from tests._ranks.hosts import Hosts
hosts = Hosts(1)
job = subprocess.Popen(hosts.on(0, "sleep", "100"))
print(job.pid, flush=True)
job.wait()
"""
        with make(1) as alive:
            of_alive = list(unmarked.iterdir())
            run = subprocess.Popen(
                [sys.executable, "-c", script, str(unmarked)], cwd=ROOT, stdout=subprocess.PIPE
            )
            assert run.stdout is not None
            with run, run.stdout:
                job = int(run.stdout.readline())
                wait_until(lambda: is_sleep(job))
                run.kill()
            assert len(list(unmarked.iterdir())) == 2
            assert is_sleep(job)
            remove_dead()
            wait_until(lambda: not is_sleep(job))  # a kill takes effect a moment later
            assert list(unmarked.iterdir()) == of_alive
            assert output(alive.on(0, "hostname")).strip() == alive.names[0]

    def test_a_kernel_without_the_queue_makes_hosts_that_say_so(self) -> None:
        make(1).close()
        with Hosts(1, rate="no number") as hosts:
            assert hosts.without_rate
            assert output(hosts.on(0, "hostname")).strip() == hosts.names[0]
        with Hosts(1) as hosts:
            shown = output(hosts.on(0, "tc", "qdisc", "show", "dev", "eth0"))
            assert "tbf" in shown or hosts.without_rate


def is_sleep(pid: int) -> bool:
    try:
        # Not the command line: that of nsenter, which becomes sleep, has the word, too.
        return Path(f"/proc/{pid}/comm").read_bytes() == b"sleep\n"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


SAMPLE = """
@pytest.mark.hosts(2)
def test_on_hosts():
    assert WORLD.size == 4

@pytest.mark.hosts(2)
def test_again():
    pass
"""


@pytest.mark.mpirun
@pytest.mark.any_mpi
@pytest.mark.parametrize(("required", "outcome"), [("0", "SKIPPED"), ("1", "FAILED")])
def test_without_the_right_to_make_hosts(tmp_path: Path, required: str, outcome: str) -> None:
    (tmp_path / "ip").write_text("#!/bin/sh\necho Operation not permitted >&2\nexit 2\n")
    (tmp_path / "ip").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {"PATH": path, "MPIDIST_TEST_REQUIRE_HOSTS": required}
    answer = run_sample(tmp_path, SAMPLE, environment=environment)
    assert answer.outcome("test_on_hosts[2hosts]") == outcome
    assert answer.outcome("test_again[2hosts]") == outcome
    assert f"{NO_HOSTS}: Operation not permitted" in answer.text


@pytest.mark.mpirun
@pytest.mark.any_mpi
def test_the_bench_runs_on_hosts() -> None:
    make(1).close()
    bench = ["mpidist", "bench", "all_reduce", "--sizes", "4", "--repeats", "2", "--no-gloo"]
    answer = subprocess.run(
        [sys.executable, "-m", "tests._ranks.hosts", "--", sys.executable, "-m", *bench],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "4 ranks on 2 nodes" in answer.stdout
