"""The stand-in runs lazily, and tells all ranks where they do not do the same."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np
import pytest

from tests.nccl_stub import raw
from tests.nccl_stub.raw import Communicator, NcclError, Tickets
from tests.nccl_stub.team import Team

# Ranks of one thread, so that the order of everything is known.


def try_(ticket: int) -> int:
    done: int = raw.library().nccl_stub_try(ticket)
    return done


def late_data(rank: int, size: int) -> list[Any]:
    comms = Communicator.all_of(2)
    sends, recvs = np.ones((2, 3)), np.zeros((2, 3))
    answers: list[Any] = []
    with Tickets() as taken:
        for comm, send, recv in zip(comms, sends, recvs, strict=True):
            comm.stream = 0x100 + comm.rank
            comm.all_reduce(send, recv)
        sends += 1  # after the call, before it runs
        (a, first), (b, second) = taken
        answers += [(a, b), recvs.tolist()]
        answers += [try_(first), recvs.tolist(), try_(second), try_(first), try_(first)]
    return [*answers, recvs.tolist()]


def test_data_are_read_and_written_by_try_and_not_by_the_call(team: Team) -> None:
    untouched, total = [[0.0] * 3] * 2, [[4.0] * 3] * 2
    expected = [(0x100, 0x101), untouched, 0, untouched, 1, 1, 1, total]
    assert team.call(1, late_data) == [expected]


def late_message(rank: int, size: int) -> list[Any]:
    a, b = Communicator.all_of(2)
    count = 100_000  # of several chunks
    send, recv = np.zeros(count), np.zeros(count)
    tries = []
    with Tickets() as taken:
        a.send(send, 1)
        b.recv(recv, 0)
        send[:] = np.arange(count)
        (_, sent), (_, received) = taken
        while len(tries) < 100 and (1, 1) not in tries:
            tries.append((try_(received), try_(sent)))
    return [sorted(set(tries)), np.array_equal(send, recv)]


def test_a_message_is_sent_when_all_of_it_was_taken(team: Team) -> None:
    assert team.call(1, late_message) == [[[(0, 0), (1, 1)], True]]


def orders(rank: int, size: int) -> list[int]:
    a, b = Communicator.all_of(2)
    x, y = np.ones(2), np.zeros((4, 2))
    with Tickets() as taken:
        a.all_reduce(x, y[0])
        a.all_reduce(x, y[1])
        b.all_reduce(x, y[2])
        b.all_reduce(x, y[3])
        (_, a1), (_, a2), (_, b1), (_, b2) = taken
        return [try_(ticket) for ticket in (b2, a2, b2, a1, b1, a2)]


def test_a_later_ticket_advances_the_earlier_ones(team: Team) -> None:
    # b comes to its first; a ends its first and comes to its second; b ends both.
    assert team.call(1, orders) == [[0, 0, 1, 1, 1, 1]]


def grouped(rank: int, size: int) -> list[Any]:
    a, b = Communicator.all_of(2)
    x, y = np.ones(2), np.zeros((3, 2))
    with Tickets() as taken:
        for comm in (a, b):
            with raw.group():
                for i in range(3):
                    comm.stream = 1 + i // 2
                    comm.all_reduce(x, y[i])
                during = list(taken)
        while 0 in [try_(ticket) for _, ticket in taken]:
            pass
    return [during == taken[:2], [stream for stream, _ in taken], y.tolist()]


def test_a_group_gives_a_ticket_for_each_stream(team: Team) -> None:
    assert team.call(1, grouped) == [[True, [1, 2, 1, 2], [[2.0, 2.0]] * 3]]


def crossed(rank: int, size: int) -> list[int]:
    """Two ranks name two communicators in different orders; each drives its stream in order."""
    a, b = Communicator.all_of(2)
    other_a, other_b = Communicator.all_of(2)
    x, y = np.ones(1), np.zeros(1)
    streams = []
    for pair in ((a, other_a), (other_b, b)):
        with Tickets() as taken, raw.group():
            for comm in pair:
                comm.all_reduce(x, y)
        streams.append([ticket for _, ticket in taken])
    for _ in range(4):
        for stream in streams:
            while stream and try_(stream[0]):
                stream.pop(0)
    return [len(stream) for stream in streams]


def test_a_groups_communicators_on_one_stream_get_on_together(team: Team) -> None:
    assert team.call(1, crossed) == [[0, 0]]


def split_too_early(rank: int, size: int) -> list[Any]:
    a, b = Communicator.all_of(2)
    x = np.ones(1)
    with Tickets() as taken:
        a.all_reduce(x, x)
        with pytest.raises(NcclError) as caught:
            a.split(0, 0)
        return [caught.value.code, caught.value.text, b.async_error, try_(taken[0][1])]


def test_a_split_with_something_outstanding_is_refused_everywhere(team: Team) -> None:
    ((code, text, other, ticket),) = team.call(1, split_too_early)
    assert (code, other, ticket) == (raw.INVALID_USAGE, raw.INVALID_USAGE, -raw.INVALID_USAGE)
    assert "CommSplit with 1 operations outstanding on rank 0" in text


def destroy_too_early(rank: int, size: int) -> list[Any]:
    a, _ = Communicator.all_of(2)
    x = np.ones(1)
    with Tickets() as taken:
        a.all_reduce(x, x)
        codes = []
        for end in (a.finalize, a.destroy):
            with pytest.raises(NcclError) as caught:
                end()
            codes.append(caught.value.code)
        return [*codes, try_(taken[0][1])]


def test_an_end_with_something_outstanding_is_told(team: Team) -> None:
    assert team.call(1, destroy_too_early) == [[raw.INVALID_USAGE] * 2 + [-raw.INVALID_USAGE]]


def unknown_ticket(rank: int, size: int) -> list[int]:
    (comm,) = Communicator.all_of(1)
    with Tickets() as taken:
        comm.bcast(np.ones(1), 0)
    return [try_(0), try_(taken[0][1] + 1), try_(taken[0][1])]


def test_an_unknown_ticket_fails(team: Team) -> None:
    refused = -raw.INVALID_ARGUMENT
    assert team.call(1, unknown_ticket) == [[refused, refused, 1]]


# Ranks that do not do the same


def issue(comm: Communicator, what: str) -> None:
    x, y = np.zeros(12, np.float32), np.zeros(36, np.float32)
    calls = {
        "AllReduce(count 10, float32, sum)": lambda: comm.all_reduce(x[:10], x[:10]),
        "AllReduce(count 12, float32, sum)": lambda: comm.all_reduce(x, x),
        "AllReduce(count 10, int32, sum)": lambda: comm.all_reduce(
            x[:10].view(np.int32), x[:10].view(np.int32)
        ),
        "AllReduce(count 10, float32, avg)": lambda: comm.all_reduce(x[:10], x[:10], "avg"),
        "Reduce(count 10, float32, sum, root 2)": lambda: comm.reduce(x[:10], x[:10], "sum", 2),
        "AllGather(count 10, float32)": lambda: comm.all_gather(x[:10], y[:30]),
        "Broadcast(count 12, float32, root 0)": lambda: comm.bcast(x, 0),
        "Broadcast(count 12, float32, root 1)": lambda: comm.bcast(x, 1),
        "CommSplit": lambda: comm.split(0, 0),
    }
    calls[what]()


def differ(comm: Communicator, common: str, odd: str) -> tuple[int, int, str, str]:
    x = np.zeros(1)
    for _ in range(6):
        comm.all_reduce(x, x)
    with tempfile.TemporaryFile("w+") as told:
        kept = os.dup(2)
        os.dup2(told.fileno(), 2)
        try:
            issue(comm, odd if comm.rank == 2 else common)
        except NcclError as error:
            code, text = error.code, error.text
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        told.seek(0)
        with pytest.raises(NcclError, match="has failed before"):
            comm.bcast(x, 0)
        return code, comm.async_error, text, told.read()


@pytest.mark.parametrize(
    ("common", "odd"),
    [
        ("AllReduce(count 10, float32, sum)", "AllReduce(count 12, float32, sum)"),
        ("AllReduce(count 10, float32, sum)", "AllReduce(count 10, int32, sum)"),
        ("AllReduce(count 10, float32, sum)", "AllReduce(count 10, float32, avg)"),
        ("AllReduce(count 10, float32, sum)", "Reduce(count 10, float32, sum, root 2)"),
        ("AllGather(count 10, float32)", "AllReduce(count 10, float32, sum)"),
        ("Broadcast(count 12, float32, root 1)", "Broadcast(count 12, float32, root 0)"),
        ("CommSplit", "AllReduce(count 10, float32, sum)"),
    ],
)
def test_a_difference_fails_on_all_ranks(team: Team, common: str, odd: str) -> None:
    expected = f"operation 7: rank 0 issued {common}, rank 2 issued {odd}"
    for code, async_error, text, told in team.run(3, differ, common, odd):
        assert (code, async_error) == (raw.INVALID_USAGE, raw.INVALID_USAGE)
        assert text == expected
        assert told == f"nccl stub: {text}\n"


def send_another(comm: Communicator, dtype: str, count: int) -> tuple[int, str]:
    try:
        if comm.rank == 0:
            comm.send(np.zeros(4), 1)
        else:
            comm.recv(np.zeros(count, dtype), 0)
    except NcclError as error:
        return error.code, error.text
    return 0, ""


@pytest.mark.parametrize(("dtype", "count"), [("float64", 5), ("int64", 4)])
def test_the_halves_of_a_message_must_agree(team: Team, dtype: str, count: int) -> None:
    issued = f"Send(count 4, float64, to 1), rank 1 issued Recv(count {count}, {dtype}, from 0)"
    text = f"message at step 1: rank 0 issued {issued}"
    assert team.run(2, send_another, dtype, count) == [(raw.INVALID_USAGE, text)] * 2


def abort_tickets(rank: int, size: int) -> list[int]:
    a, b = Communicator.all_of(2)
    x, y = np.ones(1), np.zeros((2, 1))
    with Tickets() as taken:
        a.all_reduce(x, y[0])
        b.all_reduce(x, y[1])
        a.all_reduce(x, y[0])
        (_, first), (_, other), (_, second) = taken
        while not try_(other):
            try_(first)
        try_(first)
        a.abort()
        return [try_(first), try_(second), b.async_error]


def test_an_abort_fails_what_is_not_done_and_tells_nobody(team: Team) -> None:
    assert team.call(1, abort_tickets) == [[1, -raw.INTERNAL, 0]]
