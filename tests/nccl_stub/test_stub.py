"""The stand-in for libnccl moves and reduces real bytes between processes, as numpy would."""

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
from tests.nccl_stub.raw import DTYPES, REDUCTIONS, Array, Blocked, Communicator, NcclError
from tests.nccl_stub.team import Team

LARGE = 300_007
"""Elements of some chunks and a rest, of whatever data type."""


def values(dtype: np.dtype[Any], count: int, seed: int) -> Array:
    """Return what differs in all bits; floats of a size whose sums must be rounded."""
    rng = np.random.default_rng(seed)
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, count, dtype, endpoint=True)
    return rng.normal(0, 2, count).astype(dtype)


def integer_mean(total: Array, size: int) -> Array:
    """Return the wrapped sum divided as C divides: towards zero."""
    wide = total.astype(object)
    return np.array([abs(v) // size * (1 if v >= 0 else -1) for v in wide], total.dtype)


def reduced(arrays: list[Array], op: str) -> Array:
    """Return the reduction in the order of the ranks, rounded to the data type at each step."""
    dtype = arrays[0].dtype
    fn: Any = {"prod": np.multiply, "max": np.fmax, "min": np.fmin}.get(op, np.add)
    if op == "avg" and dtype.kind not in "iu":
        arrays = [a * dtype.type(1 / len(arrays)) for a in arrays]
    out = arrays[0]
    with np.errstate(over="ignore"):
        for array in arrays[1:]:
            out = fn(out, array)
    assert out.dtype == dtype
    return integer_mean(out, len(arrays)) if op == "avg" and dtype.kind in "iu" else out


def same(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def reduce_all(comm: Communicator, dtype: np.dtype[Any]) -> list[str]:
    """Return which reductions are wrong on this rank."""
    rank, size = comm.rank, comm.size
    sends = [values(dtype, 24 * size, seed) for seed in range(size)]
    wrong = []
    for op in REDUCTIONS:
        expected = reduced(sends, op)
        recv = np.zeros_like(expected)
        comm.all_reduce(sends[rank], recv, op)
        wrong += [] if same(recv, expected) else [f"AllReduce {op}"]
        root = size // 2
        comm.reduce(sends[rank], recv[::-1].copy() if rank == root else None, op, root)
        recv = np.zeros_like(expected)
        comm.reduce(sends[rank], recv, op, root)
        wrong += [] if same(recv, expected if rank == root else recv * 0) else [f"Reduce {op}"]
        mine = np.zeros(24, dtype)
        comm.reduce_scatter(sends[rank], mine, op)
        expected = expected[24 * rank : 24 * (rank + 1)]
        wrong += [] if same(mine, expected) else [f"ReduceScatter {op}"]
    return wrong


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_reductions_have_numpys_bits(team: Team, size: int, dtype: np.dtype[Any]) -> None:
    assert team.run(size, reduce_all, dtype) == [[]] * size


def reduce_nans(comm: Communicator, dtype: np.dtype[Any]) -> list[list[float]]:
    send = np.array([[np.nan, 1, np.nan, -np.inf], [2, np.nan, np.nan, np.inf]], dtype)[comm.rank]
    answers = []
    for op in ("min", "max"):
        recv = np.zeros_like(send)
        comm.all_reduce(send, recv, op)
        answers.append(recv.astype(float).tolist())
    return answers


@pytest.mark.parametrize("dtype", DTYPES[6:], ids=str)
def test_minimum_and_maximum_lose_nan_as_a_gpu_does(team: Team, dtype: np.dtype[Any]) -> None:
    for answer in team.run(2, reduce_nans, dtype):
        np.testing.assert_equal(answer, [[2, 1, np.nan, -np.inf], [2, 1, np.nan, np.inf]])


def every_half() -> Array:
    return np.arange(1 << 16, dtype=np.uint16)


def add_halves(comm: Communicator, dtype: np.dtype[Any]) -> bool:
    sends = [every_half().view(dtype), np.roll(every_half(), 12345).view(dtype)]
    recv = np.zeros_like(sends[0])
    comm.all_reduce(sends[comm.rank], recv)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (sends[0].astype(np.float32) + sends[1].astype(np.float32)).astype(dtype)
    nan = np.isnan(expected)
    return same(recv[~nan], expected[~nan]) and bool(np.isnan(recv[nan]).all())


@pytest.mark.parametrize("dtype", [DTYPES[6], DTYPES[9]], ids=str)
def test_every_half_is_converted_and_rounded(team: Team, dtype: np.dtype[Any]) -> None:
    assert team.run(2, add_halves, dtype) == [True, True]


def move(comm: Communicator, count: int) -> list[str]:
    rank, size = comm.rank, comm.size
    wrong = []
    for dtype in DTYPES:
        sends = [values(dtype, count, seed) for seed in range(size)]
        all_of_them = np.concatenate(sends)
        gathered = np.zeros_like(all_of_them)
        comm.all_gather(sends[rank], gathered)
        wrong += [] if same(gathered, all_of_them) else [f"AllGather {dtype}"]
        for root in range(size):
            recv = np.zeros_like(sends[0])
            comm.broadcast(sends[rank] if rank == root else None, recv, root)
            wrong += [] if same(recv, sends[root]) else [f"Broadcast {dtype} from {root}"]
            buffer = sends[rank].copy()
            comm.bcast(buffer, root)
            wrong += [] if same(buffer, sends[root]) else [f"Bcast {dtype} from {root}"]
        recv = np.zeros_like(sends[0])
        with raw.group():
            comm.send(sends[rank], (rank + 1) % size)
            comm.recv(recv, (rank - 1) % size)
        wrong += [] if same(recv, sends[rank - 1]) else [f"Send and Recv {dtype}"]
    return wrong


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_moves_keep_all_bytes(team: Team, size: int) -> None:
    assert team.run(size, move, 33) == [[]] * size


def in_place(comm: Communicator, count: int) -> list[bool]:
    rank, size = comm.rank, comm.size
    sends = [values(np.dtype(np.float32), count * size, seed) for seed in range(size)]
    total = reduced(sends, "sum")
    whole, scattered, gathered = (sends[rank].copy() for _ in range(3))
    mine = slice(count * rank, count * (rank + 1))
    comm.all_reduce(whole, whole)
    comm.reduce_scatter(scattered, scattered[mine])
    comm.all_gather(gathered[mine], gathered)
    pieces = [sends[r][count * r : count * (r + 1)] for r in range(size)]
    return [
        same(whole, total),
        same(scattered[mine], total[mine]),
        same(gathered, np.concatenate(pieces)),
    ]


@pytest.mark.parametrize("count", [1, LARGE])
def test_collectives_in_place(team: Team, count: int) -> None:
    assert team.run(3, in_place, count) == [[True] * 3] * 3


def large(comm: Communicator) -> list[str]:
    rank, size = comm.rank, comm.size
    sends = [values(np.dtype(np.float64), LARGE * size, seed) for seed in range(size)]
    total = reduced(sends, "sum")
    recv = np.zeros_like(total)
    comm.all_reduce(sends[rank], recv)
    mine = np.zeros(LARGE)
    comm.reduce_scatter(sends[rank], mine)
    wrong = [] if same(recv, total) else ["AllReduce"]
    wrong += [] if same(mine, total[LARGE * rank : LARGE * (rank + 1)]) else ["ReduceScatter"]
    gathered = np.zeros(LARGE * size)
    comm.all_gather(mine, gathered)
    wrong += [] if same(gathered, total) else ["AllGather"]
    comm.broadcast(sends[rank], recv, 1)
    wrong += [] if same(recv, sends[1]) else ["Broadcast"]
    with raw.group():
        comm.send(sends[rank], (rank + 1) % size)
        comm.recv(recv, (rank - 1) % size)
    return wrong + ([] if same(recv, sends[rank - 1]) else ["Send and Recv"])


def test_large_arrays_go_in_chunks(team: Team) -> None:
    assert team.run(3, large) == [[]] * 3


def nothing(comm: Communicator) -> bool:
    none = np.zeros(0, np.float32)
    comm.all_reduce(none, none)
    comm.all_gather(none, none)
    comm.reduce_scatter(none, none)
    comm.bcast(none, 0)
    with raw.group():
        comm.send(none, (comm.rank + 1) % comm.size)
        comm.recv(none, (comm.rank - 1) % comm.size)
    return True


def test_no_elements(team: Team) -> None:
    assert team.run(2, nothing) == [True, True]


# Groups


def exchange_all(comm: Communicator, count: int) -> bool:
    rank, size = comm.rank, comm.size
    sends = [
        values(np.dtype(np.int32), count * size, seed).reshape(size, count) for seed in range(size)
    ]
    recv = np.zeros((size, count), np.int32)
    total = np.zeros((2, size, count), np.int32)
    with raw.group():
        for peer in range(size):
            comm.send(sends[rank][peer], peer)
        comm.all_reduce(sends[rank], total[0])
        for peer in reversed(range(size)):
            comm.recv(recv[peer], peer)
        with raw.group():  # an inner end does not execute
            comm.broadcast(sends[rank], total[1], size - 1)  # not the function before it
            executed = total.any() or recv.any()
    expected = np.stack([sends[r][rank] for r in range(size)])
    results = same(total[0], reduced(sends, "sum")), same(total[1], sends[-1])
    return all(results) and same(recv, expected) and not executed


@pytest.mark.parametrize("count", [5, LARGE])
def test_a_group_of_messages_and_collectives_does_not_deadlock(team: Team, count: int) -> None:
    assert team.run(3, exchange_all, count) == [True] * 3


def messages_in_order(comm: Communicator) -> list[int]:
    peer = 1 - comm.rank
    send = 10 * comm.rank + np.arange(3).reshape(3, 1)
    recv = np.zeros_like(send)
    with raw.group():
        for i in range(3):
            comm.send(send[i], peer)
            comm.recv(recv[i], peer)
    return recv.ravel().tolist()


def test_messages_of_a_pair_keep_their_order(team: Team) -> None:
    assert team.run(2, messages_in_order) == [[10, 11, 12], [0, 1, 2]]


def two_communicators(comm: Communicator) -> list[int]:
    other = comm.split(0, 0)
    assert other is not None
    sends, results = np.array([[1], [10]]), np.zeros((2, 1), np.int64)
    with raw.group():
        for i in [0, 1] if comm.rank else [1, 0]:
            [comm, other][i].all_reduce(sends[i], results[i])
    other.destroy()
    return results.ravel().tolist()


def test_a_group_on_two_communicators_named_in_different_orders(team: Team) -> None:
    assert team.run(2, two_communicators) == [[2, 20]] * 2


def half_of_a_message_to_oneself(comm: Communicator) -> int:
    with pytest.raises(NcclError) as caught:
        comm.send(np.zeros(1), comm.rank)
    return caught.value.code


def test_a_message_to_oneself_needs_both_halves(team: Team) -> None:
    assert team.run(1, half_of_a_message_to_oneself) == [raw.INVALID_USAGE]


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
    with raw.group():  # or one thread, in a group
        for comm, send, recv in zip(comms, recvs, sends, strict=True):
            comm.all_reduce(send, recv)
    for comm in comms:
        comm.destroy()
    return [float(x) for recv in sends for x in (recv.min(), recv.max())]


def test_ranks_may_be_threads_or_one_group(team: Team) -> None:
    assert team.call(1, threads_of_one_process) == [[9.0] * 6]


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
