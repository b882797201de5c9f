"""Files in memory: who can open them, what they take, and what is left of them."""

from __future__ import annotations

import errno
import logging
import os
import resource
from pathlib import Path

import numpy as np
import pytest

import mpidist
from mpidist.backends.node import shared_memory
from mpidist.backends.node.shared_memory import NamedFile, SharedFile, map_part, open_address
from mpidist.job import start

COUNT = 1 << 19


KINDS = pytest.mark.parametrize("kind", [SharedFile, NamedFile])
PART = 4 << 20


@pytest.fixture
def directory(monkeypatch, tmp_path_factory):
    """A directory of this test's own, in memory where there is one."""
    if not os.access(shared_memory.DIRECTORY, os.W_OK):
        pytest.skip("there is no /dev/shm")
    own = shared_memory.DIRECTORY / f"tests-{tmp_path_factory.getbasetemp().name}-{os.getpid()}"
    own.mkdir()
    monkeypatch.setattr(shared_memory, "DIRECTORY", own)
    yield own
    for file in own.iterdir():
        file.unlink()
    own.rmdir()


@KINDS
def test_each_process_allocates_its_own_part_of_a_file(kind, directory):
    file = kind.make(3 * PART)
    assert os.fstat(file.descriptor).st_size == 3 * PART
    assert os.fstat(file.descriptor).st_blocks == 0
    memory = map_part(file.descriptor, slice(PART, 2 * PART))
    assert len(memory) == 3 * PART
    assert os.fstat(file.descriptor).st_blocks * 512 == PART
    memory.release()
    file.unlink()
    os.close(file.descriptor)


@KINDS
def test_an_address_leads_to_the_same_memory(kind, directory):
    file = kind.make(PART)
    descriptor = open_address(file.address())
    file.unlink()
    ours = map_part(file.descriptor, slice(0, PART))
    theirs = map_part(descriptor, slice(0, PART))
    ours[5] = 7
    assert theirs[5] == 7
    for memory in (ours, theirs):
        memory.release()
    for opened in (descriptor, file.descriptor):
        os.close(opened)


def test_a_file_without_a_name_is_never_seen(directory):
    file = SharedFile.make(PART)
    assert list(directory.iterdir()) == []
    file.unlink()
    os.close(file.descriptor)


def test_a_file_with_a_name_loses_it(directory):
    file = NamedFile.make(PART)
    (path,) = directory.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    file.unlink()
    assert list(directory.iterdir()) == []
    os.close(file.descriptor)


@KINDS
def test_a_file_that_cannot_be_is_an_os_error_and_leaves_nothing(kind, directory):
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError, match="bytes"):
        kind.make(2**80)
    assert list(directory.iterdir()) == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_another_file_under_the_same_path_is_not_opened(directory):
    """As where a container has process numbers of its own."""
    file, other = SharedFile.make(PART), SharedFile.make(PART)
    address = file.address()
    wrong = address.replace(file.path.encode(), other.path.encode())
    with pytest.raises(OSError, match="another file here"):
        open_address(wrong)
    for opened in (file, other):
        os.close(opened.descriptor)
    with pytest.raises(OSError, match="No such file"):
        open_address(address)


@pytest.mark.ranks(2, 3)
def test_where_descriptors_of_others_cannot_be_opened_a_name_serves(world, monkeypatch, directory):
    """The last rank cannot, so that all take the way of the name."""
    kinds = []
    real = open_address

    def refuse(address):
        kinds.append(b"/proc/" in address)
        if b"/proc/" in address and world.rank == world.size - 1:
            raise PermissionError("not yours, says the test")
        return real(address)

    group = world.duplicate("contained")
    monkeypatch.setattr(shared_memory, "open_address", refuse)
    x = group.empty(COUNT, np.float64)
    x[...] = group.rank
    assert len(group.transport.node_memory.registered._blocks) == 1
    mpidist.all_reduce(x, group, out=x)
    np.testing.assert_array_equal(x, np.full(COUNT, sum(range(world.size))))
    assert set(kinds) == (set() if world.rank == 0 else {True, False})
    assert list(directory.iterdir()) == []
    group.close()


@pytest.mark.ranks(2)
def test_memory_refused_is_told_once(world, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(f"no space left for {world.ranks}, says the test")

    group = world.duplicate("poor")
    monkeypatch.setattr(shared_memory, "_REASONS", set())
    monkeypatch.setattr("os.posix_fallocate", refuse)
    with caplog.at_level(logging.WARNING, "mpidist"):
        for _ in range(3):
            group.empty(COUNT, np.float64)
    told = [record for record in caplog.records if "no memory shared" in record.message]
    assert len(told) == (1 if world.rank == 0 else 0)
    group.close()


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.ranks(2)
def test_registered_arrays_and_groups_keep_no_descriptor(world):
    before = open_files()
    arrays = [world.empty(COUNT // 64, np.float64) for _ in range(20)]
    groups = [world.duplicate(f"copy {number}") for number in range(5)]
    assert open_files() <= before
    arrays[3][...] = 1
    mpidist.all_reduce(arrays[3], groups[2], out=arrays[3])
    assert (arrays[3] == 2).all()
    for group in groups:
        group.close()


@pytest.mark.ranks(2)
def test_the_limit_of_open_files_is_told(world, monkeypatch, caplog):
    """On whichever rank it is met, and not a small /dev/shm."""
    real = shared_memory.open_address

    def refuse(address):
        if world.rank == 1:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(address)

    monkeypatch.setattr(shared_memory, "open_address", refuse)
    monkeypatch.setattr(shared_memory, "_REASONS", set())
    with caplog.at_level(logging.WARNING, "mpidist"):
        assert world.shared(COUNT) is None
    told = [record.getMessage() for record in caplog.records]
    if world.rank == 0:
        assert len(told) == 1
        assert "Too many open files, on another rank" in told[0]
        assert "ulimit -n" in told[0]
        assert "shm-size" not in told[0]
    else:
        assert told == []


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        ((1024, 4096), (4096, 4096)),
        ((1024, resource.RLIM_INFINITY), (65536, resource.RLIM_INFINITY)),
        ((100000, 200000), None),
        ((4096, 4096), None),
    ],
)
def test_init_raises_the_soft_limit_of_open_files(limits, wanted, monkeypatch):
    set_to = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: set_to.append(new))
    start._raise_open_files()
    assert set_to == ([] if wanted is None else [wanted])
