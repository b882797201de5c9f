"""Registered memory: found by address, and made by others."""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np
import pytest

import mpidist
from mpidist._types import Array
from mpidist.backends.node.registered_memory import Registry
from mpidist.backends.node.sequencer import supported
from mpidist.errors import BackendUnavailableError, CollectiveMismatchError
from mpidist.group import ProcessGroup
from mpidist.testing import run_ranks

COUNT = 50_000

direct_only = pytest.mark.skipif(not supported(), reason="this processor has no direct path")


def second_view(x: Array) -> Array:
    """Return an array of the same memory of which numpy does not know that it is."""
    memory = (ctypes.c_char * x.nbytes).from_address(x.ctypes.data)
    return np.frombuffer(memory, x.dtype)


def registry_of(group: ProcessGroup) -> Registry:
    assert group.transport.node_memory is not None
    return group.transport.node_memory.registered


def test_arrays_are_found_by_address_and_prepared_once() -> None:
    registry = Registry()
    x = registry.add([bytearray(4096), bytearray(4096)], 0, 4000)
    found = registry.find(x[8:808].view(np.float64))
    assert found is not None
    assert (found.block_number, found.offset, found.count) == (1, 8, 100)
    assert registry.find(second_view(x)[8:808].view(np.float64)) is found
    assert registry.find(np.zeros(100)) is None
    assert registry.find(np.zeros(200)[100:]) is None
    assert registry.find(second_view(np.zeros(100))) is None
    y = registry.add([bytearray(4096)], 0, 4096)
    assert registry.block_of(y) == 2
    del x, found
    assert list(registry._blocks) == [2]


def check_second_views(group: ProcessGroup) -> None:
    x = group.empty(COUNT, np.float64)
    view = second_view(x)
    assert registry_of(group).find(view) is registry_of(group).find(x)
    for other in (x, view):
        x[...] = group.rank + 1
        # A rank's array is registered, however it is reached: this is no mismatch.
        reduced = other if group.rank else x
        mpidist.all_reduce(reduced, group, out=reduced)
        assert (x == sum(range(1, group.size + 1))).all()


def check_foreign_memory(group: ProcessGroup) -> None:
    nbytes = 8 * COUNT
    descriptor = os.memfd_create("foreign")
    os.ftruncate(descriptor, nbytes)
    foreign = np.frombuffer(mmap.mmap(descriptor, nbytes), np.float64)
    memory = group.register(descriptor, nbytes)
    os.close(descriptor)
    assert memory.shape == (nbytes,)
    assert memory.dtype == np.uint8
    found = registry_of(group).find(foreign)
    assert found is not None
    assert registry_of(group).find(memory.view(np.float64)) is found
    for start in (lambda: None, lambda: mpidist.iall_reduce(foreign, group, out=foreign).wait()):
        foreign[...] = group.rank
        mpidist.all_reduce(foreign, group, out=foreign)
        assert (foreign == sum(range(group.size))).all()
        start()
    mpidist.barrier(group)
    group.unregister(memory)
    assert registry_of(group).find(foreign) is None
    foreign[...] = group.rank
    mpidist.all_reduce(foreign, group, out=foreign)
    assert (memory.view(np.float64) == sum(range(group.size))).all()


def check_all_or_none(group: ProcessGroup) -> None:
    blocks = len(registry_of(group)._blocks)
    descriptor = os.memfd_create("short")
    os.ftruncate(descriptor, 4096)
    with pytest.raises(CollectiveMismatchError, match=r"register uint8.*Bytes by rank: \["):
        group.register(descriptor, 4096 - group.rank)
    if group.rank == group.size - 1:
        os.ftruncate(descriptor, 100)
    with pytest.raises(BackendUnavailableError, match="Nothing has been registered") as caught:
        group.register(descriptor, 4096)
    assert ("has 100 bytes" in str(caught.value)) == (group.rank == group.size - 1)
    os.close(descriptor)
    x = group.empty(COUNT)
    with pytest.raises(BackendUnavailableError, match="not in registered memory"):
        group.unregister(x if group.rank else np.zeros(3))
    y = group.empty(COUNT)
    with pytest.raises(BackendUnavailableError, match="not in that of the others"):
        group.unregister(x if group.rank else y)
    assert len(registry_of(group)._blocks) == blocks + 2
    for each in (x, y):
        each[...] = 1
        assert mpidist.all_reduce(each, group, out=each)[0] == group.size


CHECKS = [check_second_views, check_foreign_memory, check_all_or_none]


@direct_only
@pytest.mark.parametrize("check", CHECKS)
def test_between_simulated_ranks(check) -> None:
    run_ranks(2, check, node_memory=True)
    run_ranks(3, check, node_memory=True, ranks_per_node=2)


@direct_only
@pytest.mark.any_mpi
@pytest.mark.ranks(2, 3)
def test_between_processes(world: ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    for check in CHECKS:
        with world.duplicate("registered") as group:
            check(group)
    if world.size > 2:
        monkeypatch.setenv("MPIDIST_RANKS_PER_NODE", "2")
        with world.duplicate("on two nodes") as group:
            check_foreign_memory(group)


def test_memory_is_ordinary_where_ranks_share_none() -> None:
    def body(group: ProcessGroup) -> None:
        descriptor = os.memfd_create("lone")
        os.ftruncate(descriptor, 800)
        x = group.register(descriptor, 800).view(np.float64)
        os.close(descriptor)
        x[...] = group.rank
        assert mpidist.all_reduce(x, group, out=x)[0] == sum(range(group.size))
        group.unregister(x)

    run_ranks(2, body)
    run_ranks(1, body)
