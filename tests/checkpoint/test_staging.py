"""Memory for copies: used again, and pinned for what comes from a device."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mpidist import checkpoint
from mpidist.arrays.boxes import Box
from mpidist.arrays.shards import ShardedArray
from mpidist.checkpoint.saving.writing import HostBox, Stager
from mpidist.group import ProcessGroup
from mpidist.testing import run_ranks


class DeviceArray:
    """What mpidist needs of a cupy array; its elements can only be had by copies."""

    def __init__(self, elements: np.ndarray[Any, Any]) -> None:
        self._elements = elements
        self.shape, self.dtype, self.nbytes = elements.shape, elements.dtype, elements.nbytes
        self.size, self.ndim = elements.size, elements.ndim

    def get(self, out: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
        out = np.empty(self.shape, self.dtype) if out is None else out
        assert out.flags.c_contiguous
        out[...] = self._elements
        return out

    def __getitem__(self, index: Any) -> DeviceArray:
        return DeviceArray(self._elements[index])

    def __setitem__(self, index: Any, value: DeviceArray) -> None:
        self._elements[index] = value._elements


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray[Any, Any]]:
    """Put a stand-in for cupy in its place, and return the pinned memory that it gives."""
    made: list[np.ndarray[Any, Any]] = []

    def empty_pinned(nbytes: int, dtype: Any) -> np.ndarray[Any, Any]:
        made.append(np.empty(nbytes, dtype))
        return made[-1]

    cupy: Any = ModuleType("cupy")
    cupy.ndarray, cupy.asarray = DeviceArray, DeviceArray
    cupyx: Any = ModuleType("cupyx")
    cupyx.empty_pinned = empty_pinned
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupyx", cupyx)
    return made


def whole(name: str, array: Any) -> HostBox:
    return HostBox.of(name, Box.whole(array.shape), array)


def test_copies_are_made_into_the_memory_of_the_last_ones() -> None:
    staging, x = Stager(), np.arange(1000.0)
    first = staging.copy([whole("x", x), whole("y", x[::-1])])
    x += 1
    np.testing.assert_array_equal(first[0].data, x - 1)
    np.testing.assert_array_equal(first[1].data, x[::-1] - 1)
    second = staging.copy([whole("x", x)])  # while the first ones are being written
    assert not np.shares_memory(first[0].data, second[0].data)
    staging.release(first)
    third = staging.copy([whole("x", x), whole("y", x)])
    assert np.shares_memory(first[0].data, third[0].data)
    assert np.shares_memory(first[1].data, third[1].data)


def test_what_comes_from_a_device_goes_into_pinned_memory(
    pinned: list[np.ndarray[Any, Any]],
) -> None:
    staging, x = Stager(), np.arange(10, dtype=np.float32)
    device: Any = DeviceArray(x)
    copies = {p.name: p.data for p in staging.copy([whole("a", device), whole("b", x)])}
    assert [np.shares_memory(copies["a"], memory) for memory in pinned] == [True]
    assert not np.shares_memory(copies["b"], pinned[0])
    np.testing.assert_array_equal(copies["a"], x)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_arrays_on_a_device_are_saved_and_loaded(
    tmp_path: Path, pinned: list[np.ndarray[Any, Any]], asynchronous: bool
) -> None:
    x = np.arange(60, dtype=np.float32).reshape(6, 10)

    def body(group: ProcessGroup) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        rows = slice(3 * group.rank, 3 * group.rank + 3)
        box = Box((3 * group.rank, 0), (3, 10))
        saved: Any = DeviceArray(x[rows].copy())
        state = {"rows": ShardedArray((6, 10), np.float32, {box: saved}), "all": DeviceArray(x)}
        if asynchronous:
            checkpoint.save_async(tmp_path, state, group, step=1).wait()
        else:
            checkpoint.save(tmp_path, state, group, step=1)
        mine, all_of_it = np.zeros((3, 10), np.float32), np.zeros((6, 10), np.float32)
        device: Any = DeviceArray(mine)
        loaded = ShardedArray((6, 10), np.float32, {box: device})
        checkpoint.load(tmp_path, {"rows": loaded, "all": DeviceArray(all_of_it)}, group)
        return mine, all_of_it

    for rank, (mine, all_of_it) in enumerate(run_ranks(2, body)):
        np.testing.assert_array_equal(mine, x[3 * rank : 3 * rank + 3])
        np.testing.assert_array_equal(all_of_it, x)
    assert bool(pinned) == asynchronous
