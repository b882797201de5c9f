"""The lives of the stand-in's communicators, what it refuses, and how it is built."""

from __future__ import annotations

import ctypes
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.nccl_stub import build, raw
from tests.nccl_stub.raw import Array, Blocked, Communicator, NcclError
from tests.nccl_stub.team import Team

LARGE = 300_007
"""Elements of several chunks."""


# Communicators


def split_by_parity(comm: Communicator, negative: int) -> Any:
    part = comm.split(-1 if comm.rank == negative else comm.rank % 2, -comm.rank)
    if part is None:
        return None
    total = np.zeros(1, np.int32)
    part.all_reduce(np.array([comm.rank], np.int32), total)
    answer = part.size, part.rank, part.device, int(total[0])
    again = part.split(0, 0)  # a child has children
    assert again is not None
    again.destroy()
    part.destroy()
    return answer


def test_split(team: Team) -> None:
    assert team.run(4, split_by_parity, 3) == [(2, 1, 0, 2), (1, 0, 1, 1), (2, 0, 2, 2), None]


def ask(comm: Communicator) -> tuple[int, ...]:
    return comm.size, comm.rank, comm.device, comm.async_error


def test_a_communicator_answers(team: Team) -> None:
    assert team.run(3, ask) == [(3, r, r, 0) for r in range(3)]


def threads_of_one_process(rank: int, size: int) -> list[float]:
    comms = Communicator.all_of(3)
    sends = [np.full(LARGE, float(r)) for r in range(3)]
    recvs = [np.zeros(LARGE) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(Communicator.all_reduce, comms, sends, recvs))
    with raw.group():  # or one thread
        for comm, send, recv in zip(comms, recvs, sends, strict=True):
            comm.all_reduce(send, recv)
    for comm in comms:
        comm.destroy()
    return [float(x) for recv in sends for x in (recv.min(), recv.max())]


def test_ranks_may_be_threads_or_one_group(team: Team) -> None:
    assert team.call(1, threads_of_one_process) == [[9.0] * 6]


def start_one_rank_twice(made: bytes, kept: list[Communicator]) -> None:
    with raw.group():
        kept.append(Communicator.of_rank(2, made, 0))
        kept.append(Communicator.of_rank(2, made, 0))


def group_of_starts_with_a_mistake(rank: int, size: int) -> tuple[int, int, int | None]:
    kept: list[Communicator] = []
    with pytest.raises(NcclError) as caught:
        start_one_rank_twice(raw.unique_id(), kept)
    return caught.value.code, len(kept), kept[0].handle.value


def test_a_mistake_takes_the_starts_of_its_group_back(team: Team) -> None:
    # The first would wait for rank 1 for ever.
    assert team.call(1, group_of_starts_with_a_mistake) == [(raw.INVALID_USAGE, 1, None)]


def one_device(rank: int, size: int) -> tuple[int, str]:
    try:
        for comm in Communicator.all_of(2, [5, 5]):
            comm.destroy()
    except NcclError as error:
        return error.code, error.text
    return 0, ""


@pytest.mark.parametrize(
    ("variables", "code", "cure"),
    [
        ({}, raw.INVALID_USAGE, "device 5; set NCCL_MULTI_RANK_GPU_ENABLE=1"),
        ({"NCCL_MULTI_RANK_GPU_ENABLE": "1"}, 0, ""),
        ({"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_STUB_VERSION": "22809"}, 5, "device 5"),
    ],
)
def test_two_ranks_on_a_device(team: Team, variables: dict[str, str], code: int, cure: str) -> None:
    ((got, text),) = team.call(1, one_device, **variables)
    assert got == code
    assert text.endswith(cure)


def wrong_uses(rank: int, size: int) -> list[tuple[str, int]]:
    (comm,) = Communicator.all_of(1)
    x = np.zeros(4, np.float32)
    pointer, null = x.ctypes.data, None
    lib, handle = raw.library(), comm.handle
    gone = Communicator.all_of(1)[0]
    gone.destroy()
    calls: dict[str, tuple[Any, ...]] = {
        "NULL communicator": (lib.ncclBcast, pointer, 4, 7, 0, null, null),
        "destroyed": (lib.ncclBcast, pointer, 4, 7, 0, gone.handle, null),
        "destroyed twice": (lib.ncclCommDestroy, gone.handle),
        "negative root": (lib.ncclBcast, pointer, 4, 7, -1, handle, null),
        "root too large": (lib.ncclBcast, pointer, 4, 7, 1, handle, null),
        "peer too large": (lib.ncclSend, pointer, 4, 7, 1, handle, null),
        "dtype 10": (lib.ncclBcast, pointer, 4, 10, 0, handle, null),
        "dtype -1": (lib.ncclBcast, pointer, 4, -1, 0, handle, null),
        "reduction 5": (lib.ncclAllReduce, pointer, pointer, 4, 7, 5, handle, null),
        "NULL array": (lib.ncclAllReduce, pointer, null, 4, 7, 0, handle, null),
        "color -2": (lib.ncclCommSplit, handle, -2, 0, ctypes_out(), null),
        "GroupEnd alone": (lib.ncclGroupEnd,),
    }
    answers = [(name, fn(*map(as_argument, args))) for name, (fn, *args) in calls.items()]
    comm.finalize()
    answers.append(
        ("finalized", lib.ncclBcast(as_argument(pointer), as_argument(4), 7, 0, handle, null))
    )
    comm.destroy()
    return answers


def as_argument(value: Any) -> Any:
    return ctypes.c_size_t(value) if isinstance(value, int) and value > 1 << 31 else value


def ctypes_out() -> Any:
    return ctypes.byref(ctypes.c_void_p())


def test_wrong_arguments_are_refused(team: Team) -> None:
    (answers,) = team.call(1, wrong_uses)
    usage = {"GroupEnd alone", "finalized"}
    assert dict(answers) == {
        name: raw.INVALID_USAGE if name in usage else raw.INVALID_ARGUMENT for name, _ in answers
    }


def group_with_a_mistake(comm: Communicator, recv: Array) -> None:
    with raw.group():
        comm.all_reduce(np.ones(1), recv)
        comm.bcast(recv, 7)


def after_a_mistake(comm: Communicator) -> tuple[int, list[float]]:
    recv = np.zeros(1)
    with pytest.raises(NcclError) as caught:
        group_with_a_mistake(comm, recv)
    comm.all_reduce(np.ones(1), recv)  # nothing of the group is left
    return caught.value.code, recv.tolist()


def test_a_mistake_takes_its_group_back(team: Team) -> None:
    assert team.run(2, after_a_mistake) == [(raw.INVALID_ARGUMENT, [2.0])] * 2


def start_wrongly(rank: int, size: int, made: bytes, start_size: int, number: int) -> int:
    try:
        Communicator.of_rank(start_size, made, number)
    except NcclError as error:
        return error.code
    return 0


def test_wrong_starts_are_refused(team: Team) -> None:
    (made,) = team.call(1, make_id)
    assert team.call(1, start_wrongly, made, 2, 2) == [raw.INVALID_ARGUMENT]
    assert team.call(1, start_wrongly, made, 65, 0) == [raw.INVALID_ARGUMENT]
    assert team.call(1, start_wrongly, b"x" * 128, 2, 0) == [raw.INVALID_ARGUMENT]
    assert team.call(1, start_wrongly, made, 1, 0) == [0]
    assert team.call(1, start_wrongly, made, 1, 0) == [raw.SYSTEM]  # an id serves once


def start_beside(
    rank: int, size: int, start_size: int, number: int
) -> tuple[int, bool, int | None]:
    made = raw.unique_id()
    blocked, first = Blocked.start(2, made, 0)
    code = start_wrongly(0, 1, made, start_size, number)
    waiting = blocked.running
    first.abort()
    return code, waiting, blocked.join()


@pytest.mark.parametrize(
    ("size", "rank", "code"), [(2, 0, raw.INVALID_USAGE), (3, 1, raw.INVALID_ARGUMENT)]
)
def test_starts_that_contradict_another_rank(team: Team, size: int, rank: int, code: int) -> None:
    # The other waits for the right one, until it is aborted.
    assert team.call(1, start_beside, size, rank) == [(code, True, raw.INTERNAL)]


def make_id(rank: int, size: int) -> bytes:
    return raw.unique_id()


def ask_version(rank: int, size: int) -> tuple[int, int, bytes]:
    number = ctypes.c_int()
    code = raw.library().ncclGetVersion(ctypes.byref(number))
    return code, number.value, raw.library().ncclGetErrorString(raw.INVALID_USAGE)


def test_version_and_error_strings(team: Team) -> None:
    text = b"invalid usage (run with NCCL_DEBUG=WARN for details)"
    assert team.call(1, ask_version) == [(0, 23203, text)]
    assert team.call(1, ask_version, NCCL_STUB_VERSION="22100") == [(0, 22100, text)]


# What is left


def held() -> tuple[int, int]:
    """Return this process's open descriptors and its mappings of the stand-in's memory."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    return len(list(Path("/proc/self/fd").iterdir())), maps.count("memfd:nccl_stub")


def make_and_destroy(rank: int, size: int) -> list[tuple[int, int]]:
    counts = [held()]
    for comm in Communicator.all_of(3):
        counts.append(held())
        comm.destroy()
    return [*counts, held()]


def test_a_communicator_leaves_no_memory_and_no_descriptor(team: Team) -> None:
    ((before, first, *_, after),) = team.call(1, make_and_destroy)
    assert first == (before[0], before[1] + 3)
    assert after == before


def maps_dev_shm(comm: Communicator) -> bool:
    comm.bcast(np.zeros(1), 0)
    return "/dev/shm/" in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_nothing_lies_in_dev_shm_even_while_ranks_work(team: Team) -> None:
    assert team.run(2, maps_dev_shm) == [False, False]


# CuPy's own extension, and the build


def through_cupy(rank: int, size: int, made: bytes) -> list[Any]:
    raw.library().nccl_stub_set_device(rank)
    from cupy_backends.cuda.libs import nccl

    x, y = np.arange(5, dtype=np.float32) + rank, np.zeros(5, np.float32)
    comm = nccl.NcclCommunicator(size, made, rank)
    comm.allReduce(x.ctypes.data, y.ctypes.data, 5, nccl.NCCL_FLOAT32, nccl.NCCL_SUM, 0)
    part = comm.commSplit(rank % 2, 0)
    nccl.groupStart()
    comm.send(x.ctypes.data, 5, nccl.NCCL_FLOAT32, (rank + 1) % size, 0)
    comm.recv(x.ctypes.data, 5, nccl.NCCL_FLOAT32, (rank - 1) % size, 0)
    nccl.groupEnd()
    try:
        comm.bcast(x.ctypes.data, 5, nccl.NCCL_FLOAT32, 9, 0)
    except nccl.NcclError as error:
        status = error.status
    comm.check_async_error()
    comm.abort()
    return [nccl.get_version(), y.tolist(), part.size(), x[0], status]


@pytest.mark.usefixtures("nccl_extension")
def test_cupys_extension_takes_it(team: Team) -> None:
    (made,) = team.call(1, make_id)
    total = [3.0, 6.0, 9.0, 12.0, 15.0]
    assert team.call(3, through_cupy, made) == [
        [23203, total, 2, 2.0, raw.INVALID_ARGUMENT],
        [23203, total, 1, 0.0, raw.INVALID_ARGUMENT],
        [23203, total, 2, 1.0, raw.INVALID_ARGUMENT],
    ]


def test_several_may_build_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, team: Team
) -> None:
    monkeypatch.setattr(build, "_cache", lambda: tmp_path)
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-O0"))  # to save time
    begin = threading.Barrier(2)

    def build_together(_: int) -> Path:
        begin.wait(10)
        return build.build()

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(build_together, range(2))
    assert first == second
    assert re.fullmatch(r"[0-9a-f]{16}/libnccl\.so\.2", str(first.relative_to(tmp_path)))
    assert list(first.parent.iterdir()) == [first]


def test_without_a_compiler_there_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "no C compiler" in str(build.missing())
    with pytest.raises(RuntimeError, match="no C compiler"):
        build.build()
