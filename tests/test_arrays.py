from __future__ import annotations

import itertools
import sys
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest

from mpidist._types import LAND, MAX, MEAN, MIN, PROD, SUM, DType, ReduceOp
from mpidist.arrays.namespaces import (
    BFLOAT16,
    DTYPES,
    HALVES,
    REDUCTIONS,
    array_namespace,
    as_bytes,
    as_native,
    is_host,
    reduce_in_rank_order,
)
from mpidist.errors import UnsupportedOperationError

COMBINE = {
    "SUM": np.add,
    "MEAN": np.add,
    "PROD": np.multiply,
    "MIN": np.minimum,
    "MAX": np.maximum,
    "BAND": np.bitwise_and,
    "BOR": np.bitwise_or,
    "BXOR": np.bitwise_xor,
    "LAND": np.logical_and,
    "LOR": np.logical_or,
    "LXOR": np.logical_xor,
}
REAL = {np.dtype(code) for code in ("f2", "f4", "f8")} | {BFLOAT16}
WHOLE = {np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)}
COMPLEX = {np.dtype("c8"), np.dtype("c16")}
BOOL = {np.dtype(bool)}


def test_dtypes_are_those_of_the_design() -> None:
    assert DTYPES == REAL | WHOLE | COMPLEX | BOOL
    assert {np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)} == HALVES


@pytest.mark.parametrize("op", ReduceOp, ids=lambda op: op.name)
def test_where_an_operation_has_a_meaning(op: ReduceOp) -> None:
    expected = {
        "SUM": DTYPES,
        "PROD": DTYPES,
        "MEAN": REAL | COMPLEX,
        "MIN": DTYPES - COMPLEX,
        "MAX": DTYPES - COMPLEX,
    }.get(op.name, WHOLE | BOOL)
    assert {dtype for o, dtype in REDUCTIONS if o is op} == expected


def test_namespace_of_numpy_and_of_nothing() -> None:
    assert array_namespace(np.ones(2)) is np
    assert is_host(np.ones(2))
    with pytest.raises(UnsupportedOperationError, match=r"numpy or cupy array, got builtins\.list"):
        array_namespace([1.0])  # type: ignore[arg-type]


def test_namespace_of_a_cupy_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """cupy is found where it has been imported, and only there."""
    fake = ModuleType("cupy")
    fake.ndarray = type("ndarray", (), {})  # type: ignore[attr-defined]
    x = fake.ndarray()
    with pytest.raises(UnsupportedOperationError):
        array_namespace(x)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    assert array_namespace(x) is fake
    assert not is_host(x)


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
def test_native_copies_only_where_it_must(dtype: DType) -> None:
    x = np.arange(6).reshape(2, 3).astype(dtype)
    assert as_native(x) is x
    for other in (x.T, x[:, ::2], x[::-1], x.astype(dtype.newbyteorder())):
        native = as_native(other)
        assert native.flags.c_contiguous
        assert native.dtype == dtype
        np.testing.assert_array_equal(native, other)


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 2)], ids=str)
def test_bytes_are_the_memory_itself(dtype: DType, shape: tuple[int, ...]) -> None:
    x = np.ones(shape, dtype)
    data = as_bytes(x)
    assert (data.dtype, data.shape) == (np.uint8, (x.nbytes,))
    assert data.tobytes() == x.tobytes()
    data[...] = 0
    np.testing.assert_array_equal(x, np.zeros(shape, dtype))


def inputs(dtype: DType, ranks: int, count: int = 50) -> list[np.ndarray]:
    rng = np.random.default_rng(ranks)
    if dtype.kind in "biu":
        return [
            rng.integers(0, 2 if dtype.kind == "b" else 120, count).astype(dtype)
            for _ in range(ranks)
        ]
    real = [rng.uniform(-2, 2, count).astype(dtype) for _ in range(ranks)]
    return [x + x[::-1] * dtype.type(1j) for x in real] if dtype.kind == "c" else real


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_reduction_is_numpy_from_left_to_right(ranks: int) -> None:
    for op, dtype in REDUCTIONS:
        parts = inputs(dtype, ranks)
        wide = np.dtype(np.float32) if dtype in HALVES else dtype
        with np.errstate(all="ignore"):
            expected = parts[0].astype(wide)
            if op.name in ("LAND", "LOR", "LXOR"):
                expected = expected != 0
            for x in parts[1:]:
                expected = COMBINE[op.name](expected, x.astype(wide))
            if op is MEAN:
                expected = expected / wide.type(ranks)
        out = np.empty(50, dtype)
        reduce_in_rank_order(parts, op, out)
        np.testing.assert_array_equal(out, expected.astype(dtype), err_msg=f"{op} {dtype}")


@pytest.mark.parametrize("op", [SUM, MEAN, PROD, MIN, MAX], ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", [np.float64, np.float16], ids=["float64", "float16"])
def test_reduction_into_its_first_part(op: ReduceOp, dtype: type) -> None:
    parts = inputs(np.dtype(dtype), 3)
    apart = np.empty(50, dtype)
    reduce_in_rank_order(parts, op, apart)
    reduce_in_rank_order(parts, op, parts[0])
    np.testing.assert_array_equal(parts[0], apart)


def test_halves_are_rounded_once() -> None:
    tiny = 2.0**-11  # vanishes beside 1 in float16, but not two of them
    parts = [np.array([x], np.float16) for x in (1.0, tiny, tiny)]
    out = np.empty(1, np.float16)
    reduce_in_rank_order(parts, SUM, out)
    assert out[0] == np.float16(1.0 + 2 * tiny) != np.float16(1.0)


def test_logic_gives_zero_or_one() -> None:
    out = np.empty(3, np.int8)
    reduce_in_rank_order([np.array([0, 5, -3], np.int8)], LAND, out)
    np.testing.assert_array_equal(out, [0, 1, 1])


def test_nan_and_overflow_are_results_without_warnings() -> None:
    for (op, value), dtype in itertools.product(
        [(SUM, 6e4), (PROD, 3e38), (MIN, np.nan)], [np.float16, np.float32]
    ):
        with np.errstate(over="ignore"):
            parts = [np.array([value], dtype), np.array([value], dtype), np.array([1], dtype)]
        out = np.empty(1, dtype)
        reduce_in_rank_order(parts, op, out)
        if op is MIN:
            assert np.isnan(out[0])
