"""The stand-in for libnccl moves and reduces real bytes between processes, as numpy would."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.nccl_stub import raw
from tests.nccl_stub.raw import DTYPES, REDUCTIONS, Array, Communicator, NcclError
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
