"""The direct path on real ranks: where arrays lie in memory that the ranks share."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import numpy as np
import pytest

import mpidist
from mpidist._types import ReduceOp
from mpidist.arrays.namespaces import BFLOAT16, HALVES, REDUCTIONS, ufunc_of
from mpidist.backends.crossovers import NEVER, Crossovers
from mpidist.backends.node.sequencer import ArrivalCounters, supported
from mpidist.backends.work import Condition, WaitTimeout
from mpidist.errors import CollectiveMismatchError, CollectiveTimeoutError, SizeMismatchError

PAIRS = sorted(REDUCTIONS, key=lambda pair: (pair[0].name, pair[1].name))

LEAST = 512 << 10

direct_only = pytest.mark.skipif(not supported(), reason="this processor has no direct path")


def values(seed, dtype, count):
    return np.random.default_rng(seed).integers(0, 3, count).astype(dtype)


def noise(seed, dtype, count):
    return np.random.default_rng(seed).standard_normal(count).astype(dtype)


def in_rank_order(parts, op):
    """Combine as the documentation promises, in plain numpy."""
    wide = np.float32 if parts[0].dtype in HALVES else parts[0].dtype
    total = parts[0].astype(wide)
    for part in parts[1:]:
        total = ufunc_of(op)(total, part.astype(wide)).astype(wide)
    if op is ReduceOp.MEAN:
        total = (total / np.asarray(len(parts), wide)).astype(wide)
    return total.astype(parts[0].dtype)


def lies_shared(x, world):
    return world.transport.node_memory.registered.find(x.reshape(-1)) is not None


@pytest.mark.any_mpi
@direct_only
@pytest.mark.ranks(3, full=(2, 4))
def test_every_reduction_equals_numpy_bit_for_bit(world):
    for op, dtype in PAIRS:
        count = LEAST // dtype.itemsize + 1 + PAIRS.index((op, dtype))
        parts = [values([count, rank], dtype, count) for rank in range(world.size)]
        buffer = world.empty(count, dtype)
        buffer[...] = parts[world.rank]
        assert lies_shared(buffer, world)
        result = mpidist.all_reduce(buffer, world, op=op, out=buffer)
        assert result is buffer
        np.testing.assert_array_equal(result, in_rank_order(parts, op), err_msg=f"{op} {dtype}")


@pytest.mark.any_mpi
@direct_only
@pytest.mark.ranks(3, full=(2, 4))
def test_sums_are_made_in_rank_order(world):
    for dtype in (np.float32, np.float64, np.float16, BFLOAT16, np.complex64):
        count = 300_001
        parts = [noise([1, rank], np.float64, count).astype(dtype) for rank in range(world.size)]
        buffer = world.empty(count, dtype)
        buffer[...] = parts[world.rank]
        mpidist.all_reduce(buffer, world, out=buffer)
        assert buffer.tobytes() == in_rank_order(parts, ReduceOp.SUM).tobytes(), dtype


@pytest.mark.any_mpi
@direct_only
@pytest.mark.ranks(3, full=(2, 4))
def test_short_immediate_sums_are_made_in_rank_order_among_all_others(world):
    draw = np.random.default_rng(7)  # the same calls on all ranks, which wait in another order
    order = np.random.default_rng(world.rank)
    large, small = world.empty(LEAST // 8, np.float64), world.empty(50, np.float64)
    for round_number in range(12):
        works = []
        for number in range(20):
            kind = draw.integers(6)
            count = int(draw.integers(1, 4097))
            dtype = (np.float32, np.float16)[draw.integers(2)]
            parts = [
                noise([round_number, number, rank], dtype, count) for rank in range(world.size)
            ]
            x = parts[world.rank].copy()
            expected = in_rank_order(parts, ReduceOp.SUM)
            if kind < 3:
                out = x if kind else np.empty_like(x)
                works.append((mpidist.iall_reduce(x, world, out=out), out, expected))
            elif kind == 3:
                assert mpidist.all_reduce(x, world).tobytes() == expected.tobytes()
            elif kind == 4:
                big = np.full(50_000, world.rank, np.float64)  # by way of scratch
                assert (mpidist.all_reduce(big, world) == sum(range(world.size))).all()
            else:
                for memory in (small, large):
                    memory[...] = world.rank
                    mpidist.iall_reduce(memory, world, out=memory).wait()
                    assert (memory == sum(range(world.size))).all()
        for index in order.permutation(len(works)):
            work, out, expected = works[index]
            assert work.wait() is out
            assert out.tobytes() == expected.tobytes()


@direct_only
@pytest.mark.ranks(2, 3, 4)
def test_the_other_verbs(world):
    rows = 64 * world.size
    columns = LEAST // (8 * rows) + 3
    parts = [noise([2, rank], np.float64, rows * columns) for rank in range(world.size)]
    parts = [part.reshape(rows, columns) for part in parts]
    mine = slice(64 * world.rank, 64 * (world.rank + 1))

    buffer = world.empty((rows, columns), np.float64)
    buffer[...] = parts[world.rank]
    shared = mpidist.reduce_scatter(buffer, world)
    np.testing.assert_array_equal(shared, in_rank_order(parts, ReduceOp.SUM)[mine])
    np.testing.assert_array_equal(buffer, parts[world.rank])

    mpidist.all_gather(buffer[mine], world, out=buffer)
    expected = np.concatenate(
        [parts[rank][64 * rank : 64 * (rank + 1)] for rank in range(world.size)]
    )
    np.testing.assert_array_equal(buffer, expected)

    buffer[...] = parts[world.rank]
    mpidist.broadcast(buffer, world, root=world.size - 1, out=buffer)
    np.testing.assert_array_equal(buffer, parts[-1])


@direct_only
@pytest.mark.ranks(2, 3, 4)
def test_many_are_outstanding_and_waited_for_in_any_order(world):
    count, many = LEAST // 8, 150  # more than the ring of records holds
    buffers = [world.empty(count, np.float64) for _ in range(10)]
    order = np.random.default_rng(world.rank)
    for _ in range(3):
        for place, buffer in enumerate(buffers):
            buffer[...] = place + world.rank
        works = [
            mpidist.iall_reduce(buffers[i % 10], world, op=mpidist.MAX, out=buffers[i % 10])
            for i in range(many)
        ]
        for place in order.permutation(many):
            for _ in range(int(order.integers(3))):
                works[order.integers(many)].done()
            works[place].wait()
        for place, buffer in enumerate(buffers):
            np.testing.assert_array_equal(buffer, place + world.size - 1)


@direct_only
@pytest.mark.ranks(2, 4)
def test_each_rank_sees_what_the_others_wrote(world):
    """Fails if a meeting is left out: every round's values differ, and nobody waits in between."""
    rounds, count = 300, LEAST // 8 + 5
    buffer = world.empty(count, np.float64)
    expected = float(sum(range(world.size)))
    for number in range(rounds):
        buffer[...] = number + world.rank
        mpidist.all_reduce(buffer, world, out=buffer)
        assert (buffer == number * world.size + expected).all(), number


@direct_only
@pytest.mark.ranks(2, 3)
def test_a_mismatch_raises_on_all_ranks_and_changes_nothing(world):
    buffer = world.empty(LEAST, np.float64)
    buffer[...] = world.rank
    x = buffer if world.rank else buffer[: LEAST // 2]
    with pytest.raises(CollectiveMismatchError, match="rank 0 called all_reduce"):
        mpidist.all_reduce(x, world, out=x)
    assert (buffer == world.rank).all()
    op = mpidist.MAX if world.rank else mpidist.MIN
    with pytest.raises(CollectiveMismatchError, match="all_reduce MIN"):
        mpidist.iall_reduce(buffer, world, op=op, out=buffer).wait()
    mpidist.all_reduce(buffer, world, out=buffer)
    assert (buffer == world.size * (world.size - 1) / 2).all()


@direct_only
@pytest.mark.ranks(2, 3)
def test_memory_that_is_registered_on_some_ranks_only_is_a_mismatch(world):
    count = LEAST // 8 * world.size
    part = count // world.size
    x, plain = world.empty(count, np.float64), np.full(count, 7.0)
    x[...] = 7
    mine = slice(world.rank * part, (world.rank + 1) * part)
    last = world.rank == world.size - 1
    out = plain if last else x
    calls = (
        lambda verb: verb("all_reduce")(x, world, out=None if last else x),
        lambda verb: verb("broadcast")(x, world, out=None if last else x),
        lambda verb: verb("reduce_scatter")(out, world),
        lambda verb: verb("all_gather")(out[mine], world, out=out),
    )
    told = r"(rank 0(-1)?: at byte 0 of registered block 1.*|not in registered memory.*){2}"
    for call in calls:
        with pytest.raises(
            CollectiveMismatchError,
            match=told,
        ):
            call(lambda name: getattr(mpidist, name))
        work = call(lambda name: getattr(mpidist, f"i{name}"))
        with pytest.raises(
            CollectiveMismatchError,
            match=told,
        ):
            work.wait()
        assert (x == 7).all()
        # The group is usable, and the lanes of messages are in step.
        assert (mpidist.iall_reduce(plain, world).wait() == 7 * world.size).all()


@direct_only
@pytest.mark.ranks(2, 3)
def test_counts_that_differ_are_a_mismatch(world):
    out = world.empty(LEAST, np.float64)
    out[...] = -1
    counts = [LEAST // 2] * 2 + [0] * (world.size - 2)
    if world.rank == 0:
        counts[:2] = [LEAST // 2 + 10, LEAST // 2 - 10]
    start = sum(counts[: world.rank])
    mine = out[start : start + counts[world.rank]]
    with pytest.raises(CollectiveMismatchError, match=r"all_gather float64 in parts of "):
        mpidist.all_gather(mine, world, out=out, counts=counts)
    with pytest.raises(CollectiveMismatchError, match="reduce_scatter"):
        mpidist.reduce_scatter(out, world, counts=counts)
    assert (out == -1).all()


@direct_only
@pytest.mark.ranks(2, 3)
def test_other_memory_goes_by_messages_also_between_operations_on_registered(world):
    count = LEAST // 8 * world.size
    buffers = [world.empty(count, np.float64) for _ in range(3)]
    order, total = np.random.default_rng(world.rank), float(sum(range(world.size)))
    works, expected = [], []
    for number in range(12):
        x = np.full(count, float(number + world.rank))
        buffer = buffers[number % 3]
        if number < 3:
            buffer[...] = x
            works.append(mpidist.iall_reduce(buffer, world, out=buffer))
            expected.append(np.full(count, number * world.size + total))
        works.append(mpidist.iall_reduce(x, world))
        expected.append(np.full(count, number * world.size + total))
        works.append(mpidist.ibroadcast(x, world, root=number % world.size))
        expected.append(np.full(count, float(number + number % world.size)))
        works.append(mpidist.ireduce_scatter(x, world))
        expected.append(np.full(count // world.size, number * world.size + total))
        works.append(mpidist.iall_gather(x, world))
        expected.append(np.repeat(np.arange(world.size) + float(number), count))
    blocking = mpidist.all_reduce(np.full(count, world.rank, np.int8), world)
    assert (blocking == total).all()
    for place in order.permutation(len(works)):
        works[order.integers(len(works))].done()
        np.testing.assert_array_equal(works[place].wait(), expected[place])


@pytest.mark.ranks(2, 3)
def test_sizes_that_differ_are_a_mismatch_and_nothing_is_made(world):
    made = len(world.transport.node_memory.registered._blocks)
    for shape in (40960 if world.rank else 10240, (0, 5) if world.rank else (1, 5)):
        with pytest.raises(
            CollectiveMismatchError, match=r"empty float64\[[\d, ]+\] #\d+ on group .*by rank: \["
        ):
            world.empty(shape, np.float64)
    assert len(world.transport.node_memory.registered._blocks) == made
    with pytest.raises(SizeMismatchError, match="-3"):
        world.empty((2, -3))
    with pytest.raises(TypeError):
        world.empty((2.5, 1))
    assert world.empty((np.int64(0), 3)).shape == (0, 3)
    for shape in (np.int64(6), [np.int32(6)], np.array([6])):
        x = world.empty(shape)
        x[...] = world.rank
        assert x.shape == (6,)
        np.testing.assert_array_equal(
            mpidist.all_reduce(x, world, op=mpidist.MAX), np.full(6, world.size - 1)
        )


@pytest.mark.ranks(2)
def test_arrays_outlive_their_group_and_blocks_their_arrays(world):
    group = world.duplicate("short-lived")
    x = group.empty((100, 100))
    x[...] = 7
    view = x[50:].T
    registry = group.transport.node_memory.registered
    del x
    group.close()
    assert (view == 7).all()
    del view
    gc.collect()
    assert not registry._blocks


def mapped():
    """How many pieces of shared memory this process has."""
    return sum("/dev/shm/" in line for line in Path("/proc/self/maps").read_text().splitlines())


@direct_only
@pytest.mark.ranks(2, 3)
def test_memory_goes_with_its_last_array_without_the_garbage_collector(world):
    group = world.duplicate("tidy")
    count = LEAST // 8 * world.size
    mpidist.all_reduce(np.ones(count), group)  # makes the room for arrays that lie elsewhere
    gc.collect()  # what earlier tests have left
    before = mapped()

    def use(verb):
        x = group.empty(count, np.float64)
        x[...] = 1
        assert mapped() == before + 1
        if verb == "all_reduce":
            for op in (mpidist.SUM, mpidist.MEAN):
                for array in (x, x[: count // 2], x[:3]):
                    mpidist.all_reduce(array, group, op=op, out=array)
                    mpidist.iall_reduce(array, group, op=op, out=array).wait()
                    mpidist.all_reduce(array, group, op=op)
        elif verb == "broadcast":
            mpidist.broadcast(x, group, out=x)
        elif verb == "reduce_scatter":
            mpidist.reduce_scatter(x, group)
        else:
            mine = np.array_split(x, group.size)[group.rank]
            mpidist.all_gather(mine, group, out=x)

    gc.disable()
    try:
        for verb in ("all_reduce", "all_gather", "broadcast", "reduce_scatter"):
            use(verb)
            assert mapped() == before, verb
            assert not group.transport.node_memory.registered._blocks, verb
    finally:
        gc.enable()
    group.close()


@pytest.mark.ranks(2)
def test_short_and_empty_and_odd_arrays_are_like_any_other(world):
    for shape in ((), (0,), (3,), (LEAST // 4, 3)):
        x = world.empty(shape, np.float32)
        assert x.shape == shape
        x[...] = world.rank + 1
        mpidist.all_reduce(x, world, out=x)
        np.testing.assert_array_equal(x, np.full(shape, 3, np.float32))
    x = world.empty((200, 200))
    x[...] = world.rank
    out = mpidist.all_reduce(x[:, ::2], world)  # not contiguous: by way of a copy
    np.testing.assert_array_equal(out, np.ones((200, 100)))
    np.testing.assert_array_equal(x, np.full((200, 200), world.rank))


@pytest.mark.ranks(2)
def test_arrays_that_are_not_aligned_are_like_any_other(world):
    for crossovers in (Crossovers(), Crossovers(small=0, registered=NEVER, scratch=NEVER)):
        group = world.duplicate("odd")
        group.crossovers = crossovers
        for memory in (np.empty(80_001, np.uint8), group.empty(80_001, np.uint8)):
            x = memory[1:].view(np.float64)
            assert not x.flags.aligned
            x[...] = group.rank + 1
            assert (mpidist.all_reduce(x, group) == 3).all()
            assert mpidist.all_reduce(x, group, out=x) is x
            assert (x == 3).all()
            mpidist.broadcast(x + group.rank, group, root=1, out=x)
            assert (x == 4).all()
            gathered = mpidist.all_gather(x, group)
            assert (gathered == 4).all()
        group.close()


@pytest.mark.ranks(3)
@direct_only
def test_both_halves_of_the_scratch_memory_are_aligned_alike(world):
    x = np.ones(1 << 20, np.float64)
    total = mpidist.all_reduce(x, world)
    assert total.min() == total.max() == world.size
    first, second = (world.transport.sums._scratch.arrays(half, x.dtype, 100) for half in (0, 1))
    for before, after in zip(first, second, strict=True):
        assert before.flags.aligned
        assert (after.ctypes.data - before.ctypes.data) % 4096 == 0


@pytest.mark.ranks(2)
def test_without_shared_memory_arrays_are_ordinary(world, monkeypatch):
    def refuse(*_):
        raise OSError("no space left, says the test")

    group = world.duplicate("poor")
    monkeypatch.setattr("mpidist.backends.node.shared_memory.os.ftruncate", refuse)
    x = group.empty(LEAST, np.float64)
    x[...] = 1
    assert not group.transport.node_memory.registered._blocks
    np.testing.assert_array_equal(mpidist.all_reduce(x, group, out=x), np.full(LEAST, 2.0))
    group.close()


@pytest.mark.ranks(2, 3)
def test_memory_refused_to_one_rank_is_ordinary_on_all_and_leaves_nothing(
    world, monkeypatch, tmp_path
):
    def refuse(*_):
        raise OSError("no space left for this part, says the test")

    group = world.duplicate("poor")
    monkeypatch.setattr("mpidist.backends.node.shared_memory.DIRECTORY", tmp_path)
    for poor in range(world.size):
        with monkeypatch.context() as patch:
            if world.rank == poor:
                patch.setattr("os.posix_fallocate", refuse)
            x = group.empty(LEAST, np.float64)
        assert not group.transport.node_memory.registered._blocks
        assert not list(tmp_path.iterdir())
        x[...] = 1
        assert (mpidist.all_reduce(x, group, out=x) == world.size).all()
    group.close()


def test_a_meeting_is_waited_for():
    polled = iter([False, False, True])
    Condition(lambda: next(polled), list).wait()
    assert next(polled, None) is None
    with pytest.raises(WaitTimeout):
        Condition(lambda: False, list).wait(timeout=0.01)


def test_the_next_operation_does_not_begin_before_the_board_says_that_one_is_done():
    seen = []

    class Values:
        def __setitem__(self, index, number):
            # Another thread may begin, and end, the next operation from here on.
            seen.append((number, counters.finished))

    counters = ArrivalCounters(bytearray(ArrivalCounters.nbytes(2)), 0, 2)
    counters._values = Values()
    counters.finish(1)
    assert seen == [(1, 0)]
    assert counters.finished == 1


@direct_only
@pytest.mark.ranks(3)
def test_a_missed_deadline_names_who_did_not_come(world):
    for blocking in (False, True):
        group = world.duplicate("late")
        x = group.empty(LEAST, np.uint8)
        if group.rank == 1:
            time.sleep(0.8)  # and never comes
        else:
            group.timeout = 0.3
            work = mpidist.iall_reduce(x, group, out=x)
            with pytest.raises(CollectiveTimeoutError, match=r"all_reduce.*Missing: rank 1 \("):
                mpidist.all_reduce(np.ones(3), group) if blocking else work.wait()
