from __future__ import annotations

import numpy as np
import pytest

from mpidist.arrays.flat import FlatBuffer
from mpidist.arrays.namespaces import BFLOAT16
from mpidist.errors import SizeMismatchError

SHAPES = {"w": (2, 3), "scalar": (), "none": (0, 4), "b": (5,)}


@pytest.mark.parametrize("alignment", [1, 4, 16])
def test_parts_share_the_memory_and_gaps_are_zero(alignment: int) -> None:
    storage = np.full(FlatBuffer.length_of(SHAPES, alignment=alignment), -1.0)
    buffer = FlatBuffer(SHAPES, np.float64, alignment=alignment, storage=storage)
    assert buffer.data is storage
    assert {name: view.shape for name, view in buffer.views.items()} == SHAPES
    for value, view in enumerate(buffer.views.values(), 1):
        assert np.shares_memory(view, storage) or view.size == 0
        if view.size:
            offset = (view.ctypes.data - storage.ctypes.data) // 8
            assert offset % alignment == 0
        view[...] = value
    values, counts = np.unique(storage, return_counts=True)
    padding = len(storage) - 12
    expected = {1.0: 6, 2.0: 1, 4.0: 5} | ({0.0: padding} if padding else {})
    assert dict(zip(values, counts, strict=True)) == expected


def test_one_behind_the_other() -> None:
    buffer = FlatBuffer(SHAPES, np.int64)
    buffer.data[:] = np.arange(12)
    np.testing.assert_array_equal(buffer.views["w"], [[0, 1, 2], [3, 4, 5]])
    assert buffer.views["scalar"] == 6
    np.testing.assert_array_equal(buffer.views["b"], np.arange(7, 12))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
def test_pack_and_unpack_cast(dtype: np.dtype) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    buffer = FlatBuffer(SHAPES, dtype)
    buffer.pack(arrays)
    back = {name: np.empty(shape) for name, shape in SHAPES.items()}
    buffer.unpack(back)
    for name, x in arrays.items():
        np.testing.assert_array_equal(back[name], x.astype(dtype).astype(np.float64))


def test_pack_takes_any_layout() -> None:
    w = np.arange(6.0).reshape(3, 2).T
    buffer = FlatBuffer({"w": w.shape}, np.float64)
    buffer.pack({"w": w})
    np.testing.assert_array_equal(buffer.data, w.ravel())


def test_nothing_to_hold() -> None:
    buffer = FlatBuffer({}, np.float32)
    assert buffer.data.shape == (0,)
    buffer.pack({})


@pytest.mark.parametrize(
    "storage",
    [np.empty(3), np.empty((2, 2)), np.empty(4, np.float32)],
    ids=["length", "2-D", "dtype"],
)
def test_storage_that_does_not_fit(storage: np.ndarray) -> None:
    with pytest.raises(SizeMismatchError, match=r"shape \(4,\) and dtype float64, got"):
        FlatBuffer({"x": (4,)}, np.float64, storage=storage)


def test_segments_are_neighbours_with_one_label():
    flat = FlatBuffer({"a": (3,), "b": (2, 2), "c": (), "d": (5,)}, np.float32, alignment=4)
    assert flat.segments(dict.fromkeys("abcd", 1)) == [(1, slice(0, 17))]
    assert flat.segments({"a": 1, "b": 2, "c": 2, "d": 1}) == [
        (1, slice(0, 3)),
        (2, slice(4, 9)),
        (1, slice(12, 17)),
    ]
    assert flat.segments({"d": 1, "a": 1}) == [(1, slice(0, 3)), (1, slice(12, 17))]
    assert flat.segments({}) == []


def test_one_like_another_is_laid_out_as_it_is():
    flat = FlatBuffer({"a": (3,), "b": (2, 2)}, np.float64, alignment=8)
    like = flat.zeros_like()
    assert (like.data.shape, like.data.dtype) == (flat.data.shape, flat.data.dtype)
    assert not like.data.any()
    like.views["b"][...] = 1
    assert like.data[8:12].all()
    assert not np.shares_memory(like.data, flat.data)
