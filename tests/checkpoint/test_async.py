from __future__ import annotations

import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from mpidist import Box, ShardedArray, checkpoint
from mpidist.backends.simulated.backend import SimulatedBackend
from mpidist.checkpoint.saving import save as saving
from mpidist.checkpoint.saving.writing import write_file
from mpidist.collectives import barrier
from mpidist.errors import CheckpointAsyncError, CheckpointError, CheckpointNotFoundError
from mpidist.testing import run_ranks
from tests._ranks.launcher import clean_environment

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gate(monkeypatch):
    """Writers wait at it; closed at first."""
    opened = threading.Event()
    write = saving.write_file

    def waiting(*args):
        assert opened.wait(20), "nobody has opened the gate"
        return write(*args)

    monkeypatch.setattr(saving, "write_file", waiting)
    yield opened
    opened.set()


def failing(monkeypatch, rank, step=None):
    """Let writing fail on one rank."""
    write = saving.write_file

    def fail(path, boxes, attributes, *more):
        if attributes["rank"] == rank and step in (None, attributes["step"]):
            raise OSError(28, "No space left on device")
        return write(path, boxes, attributes, *more)

    monkeypatch.setattr(saving, "write_file", fail)


def some_state(group, value):
    rows = np.full((2, 3), 10.0 * value + group.rank)
    return {
        "whole": np.full((400, 700), float(value)),  # large enough to be shared out
        "rows": ShardedArray((2 * group.size, 3), float, {Box((2 * group.rank, 0), (2, 3)): rows}),
        "step": value,
        "rng": np.random.Generator(np.random.MT19937(value)),
    }


def check_saved(path, step, size):
    full = checkpoint.load_full(path, step=step)
    np.testing.assert_array_equal(full["whole"], np.full((400, 700), float(step)))
    rows = np.repeat(10.0 * step + np.arange(size), 2)
    np.testing.assert_array_equal(full["rows"], np.stack([rows] * 3, axis=1))
    assert full["step"] == step
    state = np.random.MT19937(step).state["state"]
    np.testing.assert_array_equal(full["rng/state/key"], state["key"])


@pytest.mark.parametrize("size", [1, 3])
def test_the_state_may_change_at_once(tmp_path, gate, size):
    def body(group):
        state = some_state(group, 1)
        future = checkpoint.save_async(tmp_path, state, group, step=1)
        state["whole"][...] = -1
        next(iter(state["rows"].pieces.values()))[...] = -1
        state["rng"].random(1000)
        state["step"] = 2
        assert not future.done()
        assert checkpoint.latest(tmp_path) is None
        barrier(group)
        gate.set()
        assert future.wait().step == 1
        assert future.done()
        assert not future.failed
        assert future.wait() == checkpoint.latest(tmp_path)

    run_ranks(size, body)
    check_saved(tmp_path, 1, size)


def until(future, drive):
    end = time.monotonic() + 20
    while not drive():
        assert time.monotonic() < end
        time.sleep(0.001)
    assert future.wait(0).step == 1


def test_asking_drives_it(tmp_path):
    def body(group):
        future = checkpoint.save_async(tmp_path, some_state(group, 1), group, step=1)
        until(future, future.done)

    run_ranks(3, body)
    check_saved(tmp_path, 1, 3)


def test_the_groups_progress_drives_it(tmp_path):
    def body(group):
        future = checkpoint.save_async(tmp_path, some_state(group, 1), group, step=1)

        def drive():
            group.progress()
            return future._over

        until(future, drive)

    run_ranks(3, body)
    check_saved(tmp_path, 1, 3)


def test_closing_the_group_waits(tmp_path):
    def body(group):
        checkpoint.save_async(tmp_path, some_state(group, 1), group, step=1)

    run_ranks(3, body)  # closes it
    check_saved(tmp_path, 1, 3)
    names = [thread.name for thread in threading.enumerate()]
    end = time.monotonic() + 5
    while "mpidist checkpoint" in names and time.monotonic() < end:
        names = [thread.name for thread in threading.enumerate()]
    assert "mpidist checkpoint" not in names


def test_one_is_in_flight(tmp_path, gate):
    """The second save, and a load, wait for the first."""

    def body(group):
        first = checkpoint.save_async(tmp_path, some_state(group, 1), group, step=1)
        threading.Timer(0.05, gate.set).start()
        second = checkpoint.save_async(tmp_path, some_state(group, 2), group, step=2)
        assert first._over
        whole = np.zeros((400, 700))
        assert checkpoint.load(tmp_path, {"whole": whole}, group).step == 2
        assert second._over
        assert (whole == 2).all()

    run_ranks(2, body)
    assert [found.step for found in checkpoint.list(tmp_path)] == [1, 2]
    check_saved(tmp_path, 1, 2)


def test_two_are_in_flight_if_asked(tmp_path, gate):
    def body(group):
        futures = [
            checkpoint.save_async(tmp_path, some_state(group, n), group, step=n, in_flight=2)
            for n in (1, 2)
        ]
        assert not any(future.done() for future in futures)
        with pytest.raises(CheckpointError, match="this step is still under way"):
            checkpoint.save_async(tmp_path, some_state(group, 2), group, step=2, in_flight=3)
        barrier(group)
        gate.set()
        # Ranks may ask in any order: what the first one has to say does not go to the second.
        for future in futures if group.rank else reversed(futures):
            future.wait()

    run_ranks(3, body)
    for step in (1, 2):
        check_saved(tmp_path, step, 3)


def test_at_least_one_is_in_flight(tmp_path):
    with pytest.raises(ValueError, match="in_flight must be at least 1"):
        run_ranks(1, lambda g: checkpoint.save_async(tmp_path, {}, g, step=0, in_flight=0))


WORDS = r"rank 1 failed: OSError: \[Errno 28\] No space left on device"


def test_a_failure_surfaces_where_one_waits(tmp_path, monkeypatch):
    failing(monkeypatch, rank=1, step=2)

    def body(group):
        checkpoint.save(tmp_path, some_state(group, 1), group, step=1)
        future = checkpoint.save_async(tmp_path, some_state(group, 2), group, step=2)
        words = []
        for _ in range(2):
            with pytest.raises(CheckpointAsyncError, match=WORDS) as caught:
                future.wait()
            words.append(str(caught.value))
        assert future.failed
        # Who has been told is not told again.
        checkpoint.save_async(tmp_path, some_state(group, 3), group, step=3).wait()
        return words

    words = run_ranks(3, body)
    assert len({word for some in words for word in some}) == 1
    assert [found.step for found in checkpoint.list(tmp_path)] == [1, 3]
    assert not (tmp_path / "step-000002").exists()


@contextmanager
def asynchronous_failure(words):
    with pytest.raises(CheckpointAsyncError, match=WORDS) as caught:
        yield
    words.append(str(caught.value))


@pytest.mark.parametrize("told", [(), (0,), (1, 2)])
@pytest.mark.parametrize("call", ["save", "save_async", "load"])
def test_a_failure_surfaces_at_the_next_call(tmp_path, monkeypatch, call, told):
    """On all ranks, also if only some have waited for it."""
    failing(monkeypatch, rank=1, step=2)

    def body(group):
        checkpoint.save(tmp_path, some_state(group, 1), group, step=1)
        future = checkpoint.save_async(tmp_path, some_state(group, 2), group, step=2)
        if group.rank in told:
            with pytest.raises(CheckpointAsyncError):
                future.wait()
        state = some_state(group, 3)
        calls = {
            "save": lambda: checkpoint.save(tmp_path, state, group, step=3),
            "save_async": lambda: checkpoint.save_async(tmp_path, state, group, step=3).wait(),
            "load": lambda: checkpoint.load(tmp_path, state, group),
        }
        words = []
        with asynchronous_failure(words):
            calls[call]()
        assert np.all(state["whole"] == 3)
        calls[call]()
        return words

    assert len({tuple(words) for words in run_ranks(3, body)}) == 1
    assert [found.step for found in checkpoint.list(tmp_path)] == [1, *([3] * (call != "load"))]


def test_a_failure_that_nobody_has_seen_surfaces_where_the_group_is_closed(tmp_path, monkeypatch):
    failing(monkeypatch, rank=1)

    def body(group):
        checkpoint.save_async(tmp_path, some_state(group, 2), group, step=2)
        words = []
        with asynchronous_failure(words):
            group.close()
        return words

    assert len({tuple(words) for words in run_ranks(3, body)}) == 1


def test_the_writers_thread_does_not_communicate(tmp_path, monkeypatch):
    callers = set()

    def watched(name):
        method = getattr(SimulatedBackend, name)

        def noted(*args, **kwargs):
            callers.add(threading.current_thread().name)
            return method(*args, **kwargs)

        monkeypatch.setattr(SimulatedBackend, name, noted)

    for name in ("exchange", "split", "create", "poll", "progress", "begin", "run", "close"):
        watched(name)
    writers = set()
    write = saving.write_file

    def noted_write(*args):
        writers.add(threading.current_thread().name)
        return write(*args)

    monkeypatch.setattr(saving, "write_file", noted_write)

    def body(group):
        for step in (1, 2):
            checkpoint.save_async(tmp_path, some_state(group, step), group, step=step)
        checkpoint.load(tmp_path, {"whole": np.zeros((400, 700))}, group)

    run_ranks(2, body)
    assert writers == {"mpidist checkpoint"}
    assert callers == {"rank-0", "rank-1"}


def test_memory_of_the_copy_is_used_again(tmp_path, monkeypatch):
    places = set()
    write = saving.write_file

    def noted_write(path, boxes, attributes, *more):
        places.add((attributes["rank"], min(box.data.ctypes.data for box in boxes)))
        return write(path, boxes, attributes, *more)

    monkeypatch.setattr(saving, "write_file", noted_write)

    def body(group):
        for step in range(1, 6):
            checkpoint.save_async(tmp_path, some_state(group, step), group, step=step)

    run_ranks(2, body)
    assert sorted(rank for rank, _ in places) == [0, 1]
    for step in range(1, 6):
        check_saved(tmp_path, step, 2)


def test_waiting_has_an_end_and_the_save_goes_on(tmp_path, gate, monkeypatch):
    write = saving.write_file  # at the gate

    def one_waits(path, boxes, attributes, *more):
        there = write if attributes["rank"] == 0 else write_file  # the other one waits for it
        return there(path, boxes, attributes, *more)

    monkeypatch.setattr(saving, "write_file", one_waits)

    def body(group):
        future = checkpoint.save_async(tmp_path, some_state(group, 1), group, step=1)
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"step-000001: not over after 0\.05 s"):
                future.wait(0.05)
        barrier(group)
        gate.set()
        assert future.wait(20).step == 1

    run_ranks(2, body)
    check_saved(tmp_path, 1, 2)


def test_a_save_that_was_interrupted_is_not_taken_for_complete(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    def body(group):
        future = checkpoint.save_async(tmp_path, some_state(group, 1), group, step=1)
        with monkeypatch.context() as patch:
            patch.setattr("mpidist.checkpoint.saving.save.commit", interrupt)
            with pytest.raises(KeyboardInterrupt):
                future.wait()
        assert future.done()
        with pytest.raises(CheckpointError, match="interrupted by KeyboardInterrupt"):
            future.wait()
        checkpoint.save(tmp_path, some_state(group, 2), group, step=2)

    run_ranks(1, body)
    check_saved(tmp_path, 2, 1)


def test_what_fails_on_rank_0_at_the_end_is_told_to_all(tmp_path, monkeypatch):
    def no_memory(*_):
        raise MemoryError("no room for a manifest")

    monkeypatch.setattr("mpidist.checkpoint.saving.save.assemble", no_memory)

    def body(group):
        future = checkpoint.save_async(tmp_path, some_state(group, 1), group, step=1)
        with pytest.raises(CheckpointAsyncError, match="rank 0 failed: MemoryError") as caught:
            future.wait()
        return str(caught.value)

    assert len(set(run_ranks(2, body))) == 1
    assert not list(tmp_path.iterdir())


def test_a_rank_without_a_thread_to_write_with_is_told_to_all(tmp_path, monkeypatch):
    start = threading.Thread.start

    def no_thread(thread):
        if thread.name == "mpidist checkpoint":
            raise RuntimeError("can't start new thread")
        start(thread)

    def body(group):
        with pytest.raises(CheckpointAsyncError, match="RuntimeError: can't start new thread"):
            checkpoint.save_async(tmp_path, some_state(group, 1), group, step=1).wait()
        barrier(group)
        monkeypatch.undo()
        barrier(group)
        checkpoint.save_async(tmp_path, some_state(group, 2), group, step=2).wait()

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    run_ranks(2, body)
    check_saved(tmp_path, 2, 2)


def test_nothing_saved_is_nothing_to_load(tmp_path):
    with pytest.raises(CheckpointNotFoundError):
        run_ranks(2, lambda group: checkpoint.load(tmp_path, {}, group))


NO_WAIT = """
import sys, threading, time
import numpy as np
import mpidist
from mpidist import checkpoint
from mpidist.checkpoint.saving import save as saving
from mpidist.collectives import barrier

write = saving.write_file
def slow(*args):
    time.sleep(0.3)
    return write(*args)
saving.write_file = slow

world = mpidist.init()
w = np.full((300, 1000), 1.5)
checkpoint.save_async(sys.argv[1], {"w": w, "done": True}, world, step=4)
w[...] = 0
assert checkpoint.latest(sys.argv[1]) is None
"""


def ended(*command):
    return subprocess.run(
        command,
        env=clean_environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.mpirun
def test_a_job_that_ends_waits_for_its_last_save(mpirun, tmp_path):
    check_last(ended(*mpirun, "-n", "2", sys.executable, "-c", NO_WAIT, str(tmp_path)), tmp_path)


def test_so_does_a_job_of_one_rank(tmp_path):
    check_last(ended(sys.executable, "-c", NO_WAIT, str(tmp_path)), tmp_path)


def test_a_job_of_one_rank_whose_last_save_fails_has_failed(tmp_path):
    fails = NO_WAIT.replace("return write(*args)", "raise OSError(28, 'No space left on device')")
    end = ended(sys.executable, "-c", fails, str(tmp_path))
    assert end.returncode == 1
    assert "rank 0 failed: OSError: [Errno 28] No space left on device" in end.stderr
    assert not list(tmp_path.iterdir())


def check_last(end, tmp_path):
    assert end.returncode == 0, end.stdout + end.stderr
    full = checkpoint.load_full(tmp_path, step=4)
    assert full["done"] is True
    assert (full["w"] == 1.5).all()
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000004"]
