"""Collectives from one thread at a time, messages from any; deadline and site of one call."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

import mpidist
from mpidist.group import ProcessGroup
from mpidist.observe.recorder import Kind, add_inside, caller
from mpidist.observe.recorder.recorder import Site
from mpidist.observe.recorder.recording import Recording
from mpidist.testing import run_ranks

MESSAGES = 60

HERE = Site("/home/user/train.py", 42, "main")


def in_threads(number: int, body: object) -> None:
    """Run a function of the thread's number in several threads, and raise what any raised."""
    errors: list[BaseException] = []

    def run(thread: int) -> None:
        try:
            body(thread)  # type: ignore[operator]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(each,)) for each in range(number)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for error in errors:
        raise error


@pytest.mark.ranks(2)
def test_any_thread_sends_and_receives_while_one_calls_collectives(world: ProcessGroup) -> None:
    other = 1 - world.rank

    def body(thread: int) -> None:
        if thread == 0:
            x = np.ones(100)
            for _ in range(MESSAGES):
                assert (mpidist.all_reduce(x, world) == world.size).all()
            return
        for number in range(MESSAGES):
            # Some inside their envelopes, some behind them.
            size = 10 + 1000 * (number % 3)
            x = np.full(size, 1000 * thread + number)
            received = mpidist.sendrecv(x, world, dst=other, src=other, tag=thread)
            assert received.shape == (size,)
            assert (received == x).all()

    in_threads(4, body)
    mpidist.barrier(world)


def test_a_collective_of_a_second_thread_at_the_same_time_is_refused() -> None:
    def body(group: ProcessGroup) -> None:
        if group.rank == 1:
            mpidist.recv(group, src=0)
            mpidist.barrier(group)
            return
        waiting = threading.Thread(target=mpidist.barrier, args=(group,))
        waiting.start()
        while not group.operations.inside:
            time.sleep(0.001)
        x = np.ones(3)
        for call in (mpidist.all_reduce, mpidist.iall_reduce):
            with pytest.raises(mpidist.UnsupportedOperationError, match="another thread"):
                call(x, group)
        with pytest.raises(mpidist.UnsupportedOperationError, match="duplicate"):
            mpidist.all_reduce(x, group, out=x)
        mpidist.send(x, group, dst=1)
        waiting.join()

    def both(group: ProcessGroup) -> None:
        body(group)
        assert (mpidist.all_reduce(np.ones(3), group) == 2).all()

    run_ranks(2, both)


@pytest.mark.parametrize("timeout", [0.2, timedelta(seconds=0.2)])
@pytest.mark.parametrize(
    "call",
    [
        lambda group, timeout: mpidist.barrier(group, timeout=timeout),
        lambda group, timeout: mpidist.all_reduce(np.ones(3), group, timeout=timeout),
        lambda group, timeout: mpidist.iall_reduce(np.ones(3), group, timeout=timeout).wait(),
        lambda group, timeout: mpidist.all_gather_object(1, group, timeout=timeout),
        lambda group, timeout: mpidist.all_reduce_coalesced([np.ones(3)], group, timeout=timeout),
        lambda group, timeout: mpidist.recv(group, src=1, timeout=timeout),
    ],
)
def test_a_call_may_have_a_deadline_of_its_own(call: object, timeout: object) -> None:
    def body(group: ProcessGroup) -> None:
        if group.rank == 0:
            late = r"not complete after 0\.2 s.*; the call's own timeout sets the deadline"
            with pytest.raises(mpidist.CollectiveTimeoutError, match=late):
                call(group, timeout)  # type: ignore[operator]

    run_ranks(2, body, timeout=60)


def register_eight_bytes(group: ProcessGroup, timeout: float | None) -> object:
    descriptor = os.memfd_create("registered")
    try:
        os.ftruncate(descriptor, 8)
        return group.register(descriptor, 8, timeout=timeout)
    finally:
        os.close(descriptor)


CALLS_OF_GROUPS = {
    "split": lambda group, timeout: group.split(0, timeout=timeout),
    "new_group": lambda group, timeout: group.new_group([1, 0], timeout=timeout),
    "duplicate": lambda group, timeout: group.duplicate("another", timeout=timeout),
    "empty": lambda group, timeout: group.empty(3, timeout=timeout),
    "shared": lambda group, timeout: group.shared(3, timeout=timeout),
    "register": register_eight_bytes,
    "unregister": lambda group, timeout: group.unregister(np.ones(3), timeout=timeout),
}


def groups_and_memory_have_a_deadline(world: ProcessGroup) -> None:
    """Make what rank 1 does not make, each on a group that is broken by it."""
    for name, call in CALLS_OF_GROUPS.items():
        verb = name.replace("duplicate", "split")
        group = world.duplicate(verb)
        if world.rank == 0:
            with pytest.raises(
                mpidist.UnsupportedOperationError, match=rf"{verb}.* on .*: timeout"
            ):
                call(group, "soon")
            late = (
                rf"{verb}.* not complete after 0\.2 s.*; the call's own timeout sets the deadline"
            )
            with pytest.raises(mpidist.CollectiveTimeoutError, match=late):
                call(group, 0.2)
            with pytest.raises(mpidist.GroupBrokenError):
                mpidist.barrier(group)
        mpidist.barrier(world)
    with_time = [call(world, 60.0) for verb, call in CALLS_OF_GROUPS.items() if verb[0] != "u"]
    assert all(made is not None for made in with_time)
    world.unregister(with_time[-1], timeout=60.0)


def test_groups_and_memory_may_have_a_deadline_of_their_own() -> None:
    run_ranks(2, groups_and_memory_have_a_deadline, node_memory=True, timeout=60)


@pytest.mark.ranks(2)
def test_groups_and_memory_may_have_a_deadline_of_their_own_over_mpi(world: ProcessGroup) -> None:
    groups_and_memory_have_a_deadline(world)


def test_a_deadline_that_is_none_is_refused_before_anything_has_begun() -> None:
    def body(group: ProcessGroup) -> None:
        with pytest.raises(mpidist.UnsupportedOperationError, match=r"all_reduce on .*: timeout"):
            mpidist.all_reduce(np.ones(3), group, timeout="soon")
        assert (mpidist.all_reduce(np.ones(3), group, timeout=30) == 2).all()

    run_ranks(2, body)


def test_a_caller_says_which_line_of_the_user_this_is() -> None:
    def body(group: ProcessGroup) -> None:
        with group.called_at(HERE):
            mpidist.iall_reduce(np.ones(3), group).wait()
            in_threads(1, lambda _: mpidist.send(np.ones(1), group, dst=1 - group.rank))
        mpidist.recv(group, src=1 - group.rank)
        records = Recording(group.transport.recorder.memory).records()
        sites = {record.what.split()[0]: record.site for record in records}
        assert sites["iall_reduce"] == HERE
        assert sites["send"].file == sites["recv"].file == __file__

    run_ranks(2, body)


def test_an_error_names_the_line_that_was_said() -> None:
    def body(group: ProcessGroup) -> None:
        if group.rank == 0:
            with group.called_at(HERE), pytest.raises(mpidist.CollectiveTimeoutError) as error:
                mpidist.barrier(group, timeout=0.2)
            assert "called at /home/user/train.py:42" in str(error.value)

    run_ranks(2, body)


def test_the_files_of_an_adapter_count_as_inside(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "hook.py").write_text("def call(f):\n    f()\n")
    namespace: dict[str, object] = {}
    path = str(adapter / "hook.py")
    exec(compile(Path(path).read_text(), path, "exec"), namespace)

    def body(group: ProcessGroup) -> list[str]:
        namespace["call"](lambda: None)  # type: ignore[operator]
        recorder = group.transport.recorder

        def begin() -> None:
            name = recorder.name("x", recorder.name_group("g", 1), Kind.BLOCKING)
            recorder.begin(name, 1, caller(1))

        namespace["call"](begin)  # type: ignore[operator]
        add_inside(str(adapter))
        namespace["call"](begin)  # type: ignore[operator]
        records = Recording(recorder.memory).records()
        return [record.site.file for record in records if record.what == "x"]

    assert run_ranks(1, body) == [[path, __file__]]
