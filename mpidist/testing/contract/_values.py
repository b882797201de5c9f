"""Inputs that every rank can make for every other, and comparisons that say what differs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from mpidist._types import LAND, LOR, LXOR, MEAN, PROD, SUM, Array, DType, ReduceOp
from mpidist.arrays.namespaces import HALVES, is_host
from mpidist.collectives import all_gather
from mpidist.group import ProcessGroup

_REDUCERS: dict[ReduceOp, np.ufunc] = {
    ReduceOp.SUM: np.add,
    ReduceOp.MEAN: np.add,
    ReduceOp.PROD: np.multiply,
    ReduceOp.MIN: np.minimum,
    ReduceOp.MAX: np.maximum,
    ReduceOp.BAND: np.bitwise_and,
    ReduceOp.BOR: np.bitwise_or,
    ReduceOp.BXOR: np.bitwise_xor,
    ReduceOp.LAND: np.logical_and,
    ReduceOp.LOR: np.logical_or,
    ReduceOp.LXOR: np.logical_xor,
}

_WIDER: dict[str, Any] = {"f": np.longdouble, "c": np.clongdouble}


def values(shape: tuple[int, ...], dtype: DType, *seed: int) -> Array:
    """Draw an array; the same on every rank for the same arguments.

    One of the numbers of the seed is usually the rank to which it belongs. Integers are from their
    whole range (sums wrap, as numpy's do), floats from -2 to 2. Booleans are bytes of which some
    are neither 0 nor 1, as in views of other arrays.
    """
    rng = np.random.default_rng([number + 1 for number in seed])
    if dtype.kind == "b":
        return np.asarray(rng.choice([0, 0, 1, 2, 255], shape), np.uint8).view(np.bool_)
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, shape, dtype, endpoint=True)
    real = rng.uniform(-2, 2, shape)
    if dtype.kind == "c":
        return np.asarray(real + 1j * rng.uniform(-2, 2, shape), dtype)
    return np.asarray(real, dtype)


def combined(inputs: Sequence[Array], op: ReduceOp) -> Array:
    """Reduce the inputs of all ranks with plain numpy.

    Halves: in float32, in rank order, rounded once. Other floats: in a wider type.
    """
    dtype = inputs[0].dtype.newbyteorder("=")
    wide: Any = dtype
    if dtype in HALVES:
        wide = np.float32
    elif op in (SUM, MEAN, PROD):
        wide = _WIDER.get(dtype.kind, dtype)
    with np.errstate(all="ignore"):
        total = inputs[0].astype(wide)
        if op in (LAND, LOR, LXOR):
            total = total != 0
        for x in inputs[1:]:
            total = _REDUCERS[op](total, x.astype(wide))
        if op is MEAN:
            total = total / np.asarray(len(inputs), wide)
        return np.asarray(total, dtype)


def tolerance(inputs: Sequence[Array], op: ReduceOp, *, round_once: bool) -> Array | None:
    """Return how far a sum may be off, elementwise; None where it must be exact.

    p eps sum(abs(x)), the bound of a sum in any order. Halves are exact where they are rounded
    once: their order is fixed, too.
    """
    dtype = inputs[0].dtype.newbyteorder("=")
    exact = dtype in HALVES and round_once
    if (dtype.kind not in "fc" and dtype not in HALVES) or exact or op not in (SUM, MEAN, PROD):
        return None
    sizes = [np.abs(x).astype(np.float64) for x in inputs]
    bound: Array = np.prod(sizes, axis=0) if op is PROD else np.sum(sizes, axis=0)
    # A complex product is four real ones and two sums.
    factor = 4 if dtype.kind == "c" else 1
    known: Any = ml_dtypes.finfo if dtype in HALVES else np.finfo
    numbers = known(dtype)
    # Products of halves may be so small that they have few digits.
    least = float(numbers.smallest_subnormal) if dtype in HALVES else 0.0
    return np.asarray(factor * len(inputs) * (float(numbers.eps) * bound + least))


def expect(actual: Any, expected: Any, where: str, *, within: Array | None = None) -> None:
    """Raise AssertionError unless a host array is what it should be; None has to be None.

    The byte order may differ. `within` is the largest difference of each element; without it all
    have to be equal, NaN being equal to NaN.
    """
    if expected is None or actual is None:
        if expected is not None or actual is not None:
            raise AssertionError(f"{where}: expected {expected}, got {actual}")
        return
    check_that(
        isinstance(actual, np.ndarray) and is_host(actual),
        f"{where}: expected a host array, got {type(actual)}",
    )
    got, wanted = actual.dtype.newbyteorder("="), expected.dtype.newbyteorder("=")
    if actual.shape != expected.shape or got != wanted:
        raise AssertionError(
            f"{where}: expected shape {expected.shape} and dtype {wanted}, "
            f"got {actual.shape} and {got}"
        )
    with np.errstate(all="ignore"):
        equal = (actual == expected) | (_is_nan(actual) & _is_nan(expected))
        if within is not None:
            equal |= np.abs(actual - expected) <= within
    if not np.all(equal):
        first = tuple(int(i) for i in np.argwhere(~np.atleast_1d(equal))[0])
        raise AssertionError(
            f"{where}: {np.sum(~equal)} of {equal.size} elements differ, the first at {first}: "
            f"expected {np.atleast_1d(expected)[first]}, got {np.atleast_1d(actual)[first]}"
        )


def _is_nan(x: Array) -> Array:
    # numpy.isnan does not know every dtype; only NaN differs from itself.
    result: Array = x != x  # noqa: PLR0124
    return result


def check_that(condition: object, message: str) -> None:
    """Raise AssertionError with these words unless the condition holds."""
    if not condition:
        raise AssertionError(message)


def same_bits(x: Array, group: ProcessGroup, where: str) -> None:
    """Raise AssertionError on all ranks unless all hold the same bits; collective."""
    plain = np.ascontiguousarray(x)
    digest = np.frombuffer(hashlib.sha256(plain.tobytes()).digest(), np.uint8)
    digests = all_gather(digest[None], group)
    different = [rank for rank in range(group.size) if np.any(digests[rank] != digests[0])]
    if different:
        raise AssertionError(f"{where}: ranks {different} hold other bits than rank 0")


def expect_error(
    kind: type[Exception], call: Callable[[], Any], where: str, *parts: str
) -> Exception:
    """Return the error of this kind that `call` raises, if its message contains all parts.

    Else raise AssertionError; `where` says what the call is.
    """
    try:
        result = call()
    except kind as error:
        missing = [word for word in parts if word not in str(error)]
        if missing:
            raise AssertionError(f"{where}: {missing} not in the message {str(error)!r}") from error
        return error
    except Exception as error:
        raise AssertionError(f"{where}: expected {kind.__name__}, got {error!r}") from error
    raise AssertionError(f"{where}: expected {kind.__name__}, got the result {result!r}")


def byte_swapped(x: Array) -> Array:
    """Return a copy of the other byte order; booleans and bytes have only one."""
    return x if x.dtype.itemsize == 1 else x.astype(x.dtype.newbyteorder())
