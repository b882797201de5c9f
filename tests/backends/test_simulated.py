"""What is particular to simulated ranks: modes, faults, deaths, pretended nodes."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import numpy as np
import pytest

from mpidist import collectives, point_to_point
from mpidist._types import Array
from mpidist.backends.simulated.backend import SimulatedBackend
from mpidist.backends.simulated.faults import JobAborted
from mpidist.backends.simulated.network import Network
from mpidist.backends.work import ANY_SOURCE, Message, Work
from mpidist.errors import (
    BackendUnavailableError,
    CollectiveTimeoutError,
    PeerLostError,
    TransportError,
)
from mpidist.group import ProcessGroup
from mpidist.testing import Death, Drop, Faults, Mode, run_ranks
from mpidist.testing.contract import HostPlace, _groups

MODES = pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.value)


def pair(mode: Mode) -> tuple[SimulatedBackend, SimulatedBackend]:
    """Return two ranks that this one thread plays both."""
    network = Network(2, mode=mode)
    return SimulatedBackend(network, 0), SimulatedBackend(network, 1)


def to(peer: int, array: Array, lane: int = 0) -> list[Message]:
    return [Message(array, peer, lane)]


def settle(*works: Work[Any]) -> None:
    """Poll until all are complete, those of every rank."""
    while not all([work.done() for work in works]):  # noqa: C419  # every one has to be polled
        pass


def test_eager_send_is_complete_at_once_and_copied() -> None:
    a, b = pair(Mode.EAGER)
    x, out = np.arange(5.0), np.zeros(5)
    assert a.exchange(to(1, x), []).done()
    x[:] = -1
    receive = b.exchange([], to(0, out))
    assert receive.done()
    assert receive.wait() == (0,)
    np.testing.assert_array_equal(out, np.arange(5.0))


def test_rendezvous_send_is_complete_when_its_receive_is_posted() -> None:
    a, b = pair(Mode.RENDEZVOUS)
    x, out = np.arange(5.0), np.zeros(5)
    send = a.exchange(to(1, x), [])
    assert not send.done()
    x[0] = 7  # the bytes are copied when both sides are there
    receive = b.exchange([], to(0, out))
    np.testing.assert_array_equal(out, [7, 1, 2, 3, 4])
    x[:] = -1
    assert send.done()
    assert receive.done()
    np.testing.assert_array_equal(out, [7, 1, 2, 3, 4])


def test_polled_message_moves_only_in_calls_of_the_rank_whose_turn_it_is() -> None:
    a, b = pair(Mode.POLLED)
    x, out = np.arange(5.0), np.zeros(5)
    send, receive = a.exchange(to(1, x), []), b.exchange([], to(0, out))
    for _ in range(3):
        assert not send.done()  # the sender alone gets nowhere
    assert not receive.done()  # sees the request, says that it is ready
    for _ in range(3):
        assert not receive.done()  # the receiver alone gets no farther
    np.testing.assert_array_equal(out, np.zeros(5))
    assert send.done()  # sends the data
    np.testing.assert_array_equal(out, np.zeros(5))
    x[:] = -1
    assert receive.done()
    np.testing.assert_array_equal(out, np.arange(5.0))


@MODES
def test_matching_by_lane_source_and_order(mode: Mode) -> None:
    network = Network(3, mode=mode)
    ranks = [SimulatedBackend(network, rank) for rank in range(3)]

    sends = [
        ranks[source].exchange(to(0, np.array([100 * source + 10 * lane + number]), lane), [])
        for source, lane, number in itertools.product((1, 2), (0, 1), range(3))
    ]
    outs = np.full((12, 1), -1)
    wanted = [(2, 1), (1, 0), (2, 1), (1, 1), (2, 0), (1, 0), (2, 1), (2, 0), (1, 1), (1, 1)]
    works = [
        ranks[0].exchange([], to(source, outs[place], lane))
        for place, (source, lane) in enumerate(wanted)
    ]
    works += [ranks[0].exchange([], to(ANY_SOURCE, outs[place], 0)) for place in (10, 11)]
    settle(*sends, *works)
    seen: dict[tuple[int, int], int] = {}
    for (source, lane), out in zip(wanted, outs, strict=False):
        number = seen.get((source, lane), 0)
        assert out[0] == 100 * source + 10 * lane + number
        seen[source, lane] = number + 1
    assert sorted(outs[10:, 0]) == [102, 202]
    assert sorted(work.wait()[0] for work in works[10:]) == [1, 2]


@MODES
@pytest.mark.parametrize("receive_first", [False, True])
def test_message_and_room_of_other_lengths(mode: Mode, receive_first: bool) -> None:
    a, b = pair(mode)
    room = np.full(8, 9, np.uint8)
    small, large = np.ones(3, np.uint8), np.ones(9, np.uint8)

    def move(x: Array) -> tuple[Work[Any], Work[Any]]:
        if not receive_first:
            return a.exchange(to(1, x), []), b.exchange([], to(0, room))
        receive = b.exchange([], to(0, room))
        return a.exchange(to(1, x), []), receive

    send, receive = move(small)
    settle(send, receive)
    np.testing.assert_array_equal(room, [1, 1, 1, 9, 9, 9, 9, 9])
    send, receive = move(large)
    with pytest.raises(TransportError, match="rank 0 has 9 bytes, the array that takes it 8"):
        settle(send, receive)
    assert send.done()
    np.testing.assert_array_equal(room, [1, 1, 1, 9, 9, 9, 9, 9])


@MODES
def test_a_message_to_itself(mode: Mode) -> None:
    (alone,) = [SimulatedBackend(Network(1, mode=mode), 0)]
    out = np.zeros(2)
    work = alone.exchange(to(0, np.ones(2)), to(0, out))
    assert work.wait(5) == (0,)
    np.testing.assert_array_equal(out, np.ones(2))


def sums(group: ProcessGroup) -> list[float]:
    """Do a bit of everything, for runs in which something is wrong with the network."""
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    got = []
    for number in range(4):
        work = collectives.iall_reduce(np.full(600, float(group.rank)), group)
        got.append(
            float(point_to_point.sendrecv(np.array([number]), group, dst=after, src=before)[0])
        )
        got.append(float(work.wait()[5]))
    return got


@MODES
def test_delays_change_times_and_nothing_else(mode: Mode) -> None:
    began = time.monotonic()
    results = run_ranks(4, sums, mode=mode, faults=Faults(delay=0.004), seed=3)
    assert results == [[0.0, 6.0, 1.0, 6.0, 2.0, 6.0, 3.0, 6.0]] * 4
    assert time.monotonic() - began > 0.02


def test_delayed_messages_keep_their_order() -> None:
    def flood(group: ProcessGroup) -> list[int]:
        if group.rank == 0:
            for number in range(30):
                point_to_point.send(np.array(number), group, dst=1)
            return []
        return [int(point_to_point.recv(group, src=0)) for _ in range(30)]

    assert run_ranks(2, flood, faults=Faults(delay=0.003))[1] == list(range(30))


def test_delays_are_drawn_from_the_seed() -> None:
    def order(seed: int) -> list[int]:
        """Return in which order single messages of five ranks reach a sixth."""
        network = Network(6, faults=Faults(delay=0.2), seed=seed)
        ranks = [SimulatedBackend(network, rank) for rank in range(6)]
        for rank in ranks[1:]:
            rank.exchange(to(0, np.zeros(1)), [])
        works = [ranks[0].exchange([], to(ANY_SOURCE, np.zeros(1))) for _ in range(5)]
        return [work.wait(5)[0] for work in works]

    assert order(1) == order(1) != order(2)


@MODES
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_dropped_message_never_comes(mode: Mode, number: int) -> None:
    received = threading.Event()

    def three(group: ProcessGroup) -> list[int]:
        if group.rank == 1:
            works = [point_to_point.irecv(group, src=0, tag=tag) for tag in range(3)]
            time.sleep(0.02)
            got = []
            for tag, work in enumerate(works):
                if tag != number - 1:
                    got.append(int(work.wait()))
            assert not works[number - 1].done()
            with pytest.raises(CollectiveTimeoutError, match="recv"):
                works[number - 1].wait(0.05)
            received.set()
            return got
        works = [point_to_point.isend(np.array(tag), group, dst=1, tag=tag) for tag in range(3)]
        while not received.wait(0.001):
            group.progress()
        done = [work.done() for work in works]
        lost_is_done = mode is Mode.EAGER
        assert done == [tag != number - 1 or lost_is_done for tag in range(3)]
        group.operations.state.break_by(
            CollectiveTimeoutError("the test is over")
        )  # close() must not wait for it
        return []

    faults = Faults(drops=(Drop(0, 1, number),))
    assert run_ranks(2, three, mode=mode, faults=faults)[1] == [
        t for t in range(3) if t != number - 1
    ]


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead rank's last messages are not waited for as long as where there is a network."""
    monkeypatch.setattr("mpidist.group.pending.GRACE", 0.3)


def outcome(group: ProcessGroup) -> str:
    try:
        for _ in range(3):
            collectives.all_reduce(np.ones(2), group)
    except PeerLostError as error:
        return f"lost: {error}"
    except CollectiveTimeoutError as error:
        return f"late: {error}"
    return "complete"


@pytest.mark.usefixtures("short_grace")
def test_an_announced_death_is_reported_to_the_others() -> None:
    began = time.monotonic()
    results = run_ranks(3, outcome, faults=Faults(deaths=(Death(1, 2),)), timeout=20)
    assert time.monotonic() - began < 10
    assert results[1] is None
    for result in (results[0], results[2]):
        assert result.startswith("lost: all_reduce")
        assert "rank 1" in result
        assert "died at its call 2" in result


def test_a_silent_death_is_left_to_the_deadline() -> None:
    faults = Faults(deaths=(Death(2, 1, announce=False),))
    results = run_ranks(3, outcome, faults=faults, timeout=0.3)
    assert results[2] is None
    assert all(result.startswith("late: all_reduce #1") for result in results[:2])


@pytest.mark.usefixtures("short_grace")
def test_death_while_making_a_group() -> None:
    with pytest.raises(PeerLostError, match="split"):
        run_ranks(3, lambda group: group.split(0), faults=Faults(deaths=(Death(0, 1),)))


def test_who_does_not_come_to_make_a_group_is_named() -> None:
    def incomplete(group: ProcessGroup) -> None:
        members = [3, 1, 0]
        if group.rank in (3, 0):
            with pytest.raises(CollectiveTimeoutError, match=r"new_group.*Missing: rank 1 \("):
                group.new_group(members)

    run_ranks(4, incomplete, timeout=0.1)


def test_no_error_handler_revives_the_dead() -> None:
    lives: list[int] = []

    def stubborn(group: ProcessGroup) -> None:
        for _ in range(3):
            try:
                collectives.broadcast_object("", group.duplicate("more"))
            except Exception:
                lives.append(group.rank)
        lives.append(group.rank)

    faults = Faults(deaths=(Death(0, 1, announce=False),))
    assert run_ranks(1, stubborn, faults=faults) == [None]
    assert lives == []


def test_abort_ends_every_rank() -> None:
    def aborts(group: ProcessGroup) -> None:
        if group.rank == 1:
            group.transport.abort(7)
        collectives.barrier(group)

    with pytest.raises(JobAborted) as caught:
        run_ranks(3, aborts)
    assert caught.value.code == 7


def test_pretended_nodes() -> None:
    run_ranks(5, _groups.nodes, HostPlace(), ranks_per_node=2)

    def facts(group: ProcessGroup) -> tuple[int, ...]:
        cross = group.cross_group()
        ranks = () if cross is None else cross.ranks
        return (group.node_rank, group.num_nodes, group.local_rank, group.local_size, *ranks)

    assert run_ranks(5, facts, ranks_per_node=2) == [
        (0, 3, 0, 2, 0, 2, 4),
        (0, 3, 1, 2),
        (1, 3, 0, 2, 0, 2, 4),
        (1, 3, 1, 2),
        (2, 3, 0, 1, 0, 2, 4),
    ]


def test_no_mpi_communicator() -> None:
    def ask(group: ProcessGroup) -> None:
        with pytest.raises(BackendUnavailableError, match="simulated"):
            _ = group.mpi_comm

    run_ranks(2, ask)


def test_a_barrier_of_eight_takes_little_time() -> None:
    """Threads that wait must not keep each other from the interpreter."""

    def barriers(group: ProcessGroup) -> float:
        collectives.barrier(group)
        began = time.thread_time()
        for _ in range(20):
            collectives.barrier(group)
        return (time.thread_time() - began) / 20

    # Processor time, which other programs on the machine do not stretch.
    assert sum(run_ranks(8, barriers)) < 0.010
