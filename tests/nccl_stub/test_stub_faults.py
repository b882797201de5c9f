"""The stand-in's faults to order, and what ranks see of each other's ends."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.nccl_stub import raw
from tests.nccl_stub.raw import Array, Blocked, Communicator
from tests.nccl_stub.team import Team


def operate(comm: Communicator, times: int) -> list[int]:
    """Return the codes of some operations; one that hangs is aborted and is the last one."""
    codes = []
    for _ in range(times):
        x = np.zeros(1)
        blocked = Blocked(comm.all_reduce, x, x)
        if blocked.running:
            codes.append(-1)
            break
        codes.append(blocked.code)
    asynchronous = comm.async_error
    if codes[-1] == -1:
        comm.abort()
        codes.append(blocked.join())
    return [*codes, asynchronous]


def inject(rank: int, size: int, made: bytes, faults: str | None, times: int) -> list[int]:
    raw.library().nccl_stub_set_device(rank)
    comm = Communicator.of_rank(size, made, rank)
    if faults is not None:
        operate(comm, 2)  # operations are counted from there
        raw.check(raw.library().nccl_stub_faults(faults.encode()))
    try:
        return operate(comm, times)
    finally:
        raw.library().nccl_stub_faults(None)


def make_id(rank: int, size: int) -> bytes:
    return raw.unique_id()


HUNG = [-1, raw.INTERNAL]


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        # The rank that has failed goes on, and its next operation meets the other's second.
        ("fail:1:2", [[0, 0, *HUNG, 0], [0, raw.SYSTEM, 0, 0]]),
        ("async:1:2", [[0, *HUNG, 0], [0, raw.REMOTE, raw.REMOTE, raw.REMOTE]]),
        ("async:1:1:3", [[*HUNG, 0], [raw.INTERNAL] * 4]),
        ("hang:0:3", [[0, 0, *HUNG, 0]] * 2),
        ("fail:5:1", [[0, 0, 0, 0]] * 2),
    ],
)
@pytest.mark.parametrize("how", ["environment", "run time"])
def test_faults(team: Team, faults: str, expected: list[list[int]], how: str) -> None:
    (made,) = team.call(1, make_id)
    if how == "environment":
        answers = team.call(2, inject, made, None, 3, NCCL_STUB_FAULTS=faults)
    else:
        answers = team.call(2, inject, made, faults, 3)
    assert answers == expected


def poll(comm: Communicator) -> list[int]:
    return [comm.async_error for _ in range(4)]


def test_progress_is_reported_some_times(team: Team) -> None:
    answers = team.run(2, poll, NCCL_STUB_FAULTS="progress:1:3")
    assert answers == [[0] * 4, [raw.IN_PROGRESS] * 3 + [0]]


def start(rank: int, size: int, made: bytes) -> int | None:
    raw.library().nccl_stub_set_device(rank)
    blocked, comm = Blocked.start(size, made, rank)
    if not blocked.running:
        return blocked.code
    comm.abort()
    code = blocked.join()
    return -100 if code is None else -code


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ("hang-init:1", [-raw.INTERNAL, -raw.INTERNAL]),
        ("fail-init:1", [raw.REMOTE, raw.SYSTEM]),
        ("fail-init:1,hang:0:1", [raw.REMOTE, raw.SYSTEM]),
        ("fail-init:9", [0, 0]),
        ("fail-init", [raw.INVALID_ARGUMENT] * 2),
        ("explode:1:1", [raw.INVALID_ARGUMENT] * 2),
        ("fail:1:0", [raw.INVALID_ARGUMENT] * 2),
    ],
)
def test_faults_of_initialisation(team: Team, faults: str, expected: list[int]) -> None:
    (made,) = team.call(1, make_id)
    assert team.call(2, start, made, NCCL_STUB_FAULTS=faults) == expected


def outlive(rank: int, size: int, made: bytes, folder: str) -> list[Any]:
    raw.library().nccl_stub_set_device(rank)
    comm = Communicator.of_rank(size, made, rank)
    x: Array = np.zeros(1)
    comm.all_reduce(x, x)
    if rank == 1:
        (Path(folder) / "ready").touch()
        time.sleep(60)
    blocked = Blocked(comm.all_reduce, x, x)
    running, error = blocked.running, comm.async_error
    comm.abort()
    return [running, error, blocked.join()]


def test_a_killed_peer_is_not_noticed(tmp_path: Path) -> None:
    team = Team(2)
    try:
        (made,) = team.call(1, make_id)
        team.post(2, outlive, made, str(tmp_path))
        end = time.monotonic() + 20
        while not (tmp_path / "ready").exists() and time.monotonic() < end:
            time.sleep(0.01)
        team.processes[1].kill()
        assert team.answer(0) == [True, 0, raw.INTERNAL]
    finally:
        team.close()
