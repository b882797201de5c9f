"""The contract of transports, on MPI: this process is one of the ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpidist._types import BOR, Array
from mpidist.collectives import all_gather, all_reduce, broadcast, broadcast_object
from mpidist.group import ProcessGroup
from mpidist.point_to_point import sendrecv
from mpidist.testing import BackendContract
from mpidist.testing.contract import Run
from mpidist.testing.contract._memory import HOST


@pytest.fixture
def run(world: ProcessGroup) -> Run:
    return lambda case: case(world)


@pytest.mark.ranks(2, 3, full=(4,))
class TestMpi(BackendContract):
    """All cases, on one host."""


@pytest.mark.hosts(2)
class TestHosts:
    """The cases on two hosts in which data goes by shared memory and by a network."""

    place = HOST

    test_every_all_reduce = BackendContract.test_every_all_reduce
    test_uneven_counts = BackendContract.test_uneven_counts
    test_order_and_tags = BackendContract.test_order_and_tags
    test_polled_at_random = BackendContract.test_polled_at_random
    test_deadlines = BackendContract.test_deadlines


@pytest.mark.hosts(2)
@pytest.mark.any_mpi
class TestMoreOnHosts:
    """Some more of them, less about the MPI library."""

    place = HOST

    test_every_reduce_scatter = BackendContract.test_every_reduce_scatter
    test_long_reductions = BackendContract.test_long_reductions
    test_every_root = BackendContract.test_every_root
    test_same_bits = BackendContract.test_same_bits
    test_coalesced = BackendContract.test_coalesced
    test_objects = BackendContract.test_objects
    test_batches = BackendContract.test_batches
    test_flood = BackendContract.test_flood
    test_waited_in_any_order = BackendContract.test_waited_in_any_order
    test_nodes = BackendContract.test_nodes
    test_mistakes = BackendContract.test_mistakes


BEYOND = 2**31 + 24
"""Bytes that a 32-bit count cannot hold."""

PLACES = [0, 1, 2**30, 2**31 - 1, 2**31, BEYOND - 1]
"""Where the marks are: about the numbers at which counts and chunks may wrap."""

NEEDED = 16 * 2**30
"""Bytes of memory: two ranks with two such arrays each, what the library adds, and some air."""


def available_memory() -> int:
    """Return the bytes that this machine can still give, 0 where it does not say."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return 0


@pytest.fixture
def roomy(world: ProcessGroup) -> ProcessGroup:
    """Skip on all ranks unless rank 0 finds enough memory."""
    available = broadcast_object(available_memory(), world)
    if available < NEEDED:
        pytest.skip(f"needs {NEEDED >> 30} GiB of memory, {available >> 30} GiB are available")
    return world


def marked(rank: int) -> Array:
    """Return a long array, zero but for the marks of a rank."""
    x = np.zeros(BEYOND, np.uint8)
    x[PLACES] = marks_of(rank)
    return x


def marks_of(rank: int) -> Array:
    return np.arange(1, 7, dtype=np.uint8) + 10 * rank


def check_marks(x: Array, marks: Array) -> None:
    assert x.shape == (BEYOND,)
    np.testing.assert_array_equal(x[PLACES], marks)
    assert np.count_nonzero(x) == len(PLACES)


@pytest.mark.ranks(2)
@pytest.mark.timeout(120)
class TestBeyondTwoGibibytes:
    """The collectives in a full run: each moves some 10 GiB through memory."""

    @pytest.mark.full
    def test_broadcast(self, roomy: ProcessGroup) -> None:
        x = marked(roomy.rank)
        broadcast(x, roomy, root=1, out=x)
        check_marks(x, marks_of(1))

    @pytest.mark.full
    def test_all_reduce(self, roomy: ProcessGroup) -> None:
        x = marked(roomy.rank)
        all_reduce(x, roomy, op=BOR, out=x)
        check_marks(x, marks_of(0) | marks_of(1))

    def test_sendrecv(self, roomy: ProcessGroup) -> None:
        other = 1 - roomy.rank
        got = sendrecv(marked(roomy.rank), roomy, dst=other, src=other)
        check_marks(got, marks_of(other))

    @pytest.mark.full
    def test_all_gather(self, roomy: ProcessGroup) -> None:
        x = np.full(BEYOND // 2 + 1, roomy.rank + 1, np.uint8)
        got = all_gather(x, roomy)
        assert got.shape == (BEYOND + 2,)
        assert got[: len(x)].max() == got[: len(x)].min() == 1
        assert got[len(x) :].max() == got[len(x) :].min() == 2
