"""Bytes in files, also where the system moves fewer of them than it was asked to.

An array of more than 4 GiB, which takes 9 GiB of memory and 4 of disk::

    MPIDIST_TEST_ELEMENTS=1073754169 python -m pytest tests/checkpoint/test_files.py -k elements
"""

from __future__ import annotations

import os
from functools import partial

import numpy as np
import pytest

from mpidist import checkpoint
from mpidist.checkpoint.format.files import read_at, rename_synced, temporary, write_at
from mpidist.testing import run_ranks
from tests.checkpoint.cases import small_sizes


def at_most(monkeypatch, count):
    """Let the system move few bytes in a call, as Linux does from 2 GiB on."""
    pwrite, preadv, write = os.pwrite, os.preadv, os.write

    def short_preadv(descriptor, buffers, offset):
        views, left = [], count
        for buffer in buffers:
            views.append(memoryview(buffer)[:left])
            left -= len(views[-1])
        return preadv(descriptor, views, offset)

    monkeypatch.setattr(os, "pwrite", lambda d, data, at: pwrite(d, memoryview(data)[:count], at))
    monkeypatch.setattr(os, "preadv", short_preadv)
    monkeypatch.setattr(os, "write", lambda d, data: write(d, memoryview(data)[:count]))


@pytest.fixture
def descriptor(tmp_path):
    number = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield number
    os.close(number)


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_all_bytes_are_moved(descriptor, monkeypatch, count):
    at_most(monkeypatch, count)
    data = np.arange(100, dtype=np.uint8)
    assert write_at(descriptor, data, 7) == 107
    sizes = [0, 1, 4, 50, 0, 45, 0]
    parts = [np.zeros(size, np.uint8) for size in sizes]
    assert read_at(descriptor, parts, 7) == 100
    np.testing.assert_array_equal(np.concatenate(parts), data)


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_where_a_file_ends(descriptor, monkeypatch, count):
    write_at(descriptor, np.arange(10, dtype=np.uint8), 0)
    at_most(monkeypatch, count)
    parts = [np.full(4, 99, np.uint8), np.full(4, 99, np.uint8)]
    assert read_at(descriptor, parts, 5) == 5
    assert np.concatenate(parts).tolist() == [5, 6, 7, 8, 9, 99, 99, 99]
    assert read_at(descriptor, parts, 10) == 0
    assert read_at(descriptor, [], 0) == 0


@pytest.mark.parametrize("link", [False, True])
def test_a_name_that_is_taken_is_not_given_to_another_file(tmp_path, link):
    path, target = tmp_path / "name", tmp_path / "target"
    target.write_bytes(b"precious")
    if link:
        path.symlink_to(target)
    else:
        path.hardlink_to(target)
    temporary(path).write_bytes(b"new")
    with pytest.raises(FileExistsError, match="Another process has made this file"):
        rename_synced(temporary(path), path)
    assert path.read_bytes() == target.read_bytes() == b"precious"
    path.unlink()
    rename_synced(temporary(path), path)
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("count", [5, 7, 1 << 20])
def test_a_state_in_few_bytes_at_a_time(tmp_path, monkeypatch, count):
    """What arrays of more than 2 GiB do, in small."""
    at_most(monkeypatch, count)
    array = np.arange(40 * 30, dtype=np.float32).reshape(40, 30)

    def body(group):
        checkpoint.save(tmp_path, {"x": array, "t": array.T.copy().T}, group, step=1)
        loaded = {"x": np.zeros_like(array), "t": np.zeros_like(array)}
        checkpoint.load(tmp_path, loaded, group)
        np.testing.assert_array_equal(loaded["x"], array)
        np.testing.assert_array_equal(loaded["t"], array)

    with small_sizes(256, 16, 512):
        run_ranks(2, body)
        np.testing.assert_array_equal(checkpoint.load_full(tmp_path)["x"], array)


def save_large(group, path, length):
    column = np.arange(length, dtype=np.uint32)
    checkpoint.save(path, {"x": column}, group, step=1)


def load_large(group, path, length):
    here = np.zeros(length, np.uint32)
    checkpoint.load(path, {"x": here}, group)
    for start in range(0, length, 1 << 26):
        stop = min(start + (1 << 26), length)
        assert (here[start:stop] == np.arange(start, stop, dtype=np.uint32)).all()


LENGTH = int(os.environ.get("MPIDIST_TEST_ELEMENTS", "1000003"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_array_of_as_many_elements_as_asked(tmp_path, ranks):
    save = partial(save_large, path=tmp_path, length=LENGTH)
    run_ranks(1, save, timeout=400.0)
    run_ranks(ranks, partial(load_large, path=tmp_path, length=LENGTH), timeout=400.0)
