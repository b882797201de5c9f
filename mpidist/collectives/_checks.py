"""What every verb checks before the first byte moves, and how it brings arrays into shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from mpidist._arguments import whole_number
from mpidist._types import Array, DType, ReduceOp
from mpidist.arrays.namespaces import (
    DTYPES,
    address_of,
    array_namespace,
    as_native,
    is_device,
    is_host,
)
from mpidist.errors import InvalidRankError, SizeMismatchError, UnsupportedOperationError
from mpidist.group.group import ProcessGroup, check_group


class Landing(NamedTuple):
    """Where a result is received, and what makes it the caller's array.

    `flat` is contiguous memory of native byte order for the transport; `finish` is called when the
    result is there, and returns the caller's array.
    """

    flat: Array
    finish: Callable[[], Array]


def check_array(x: Array, verb: str, group: ProcessGroup, *, name: str = "x") -> Array:
    """Return `x` if it is an array that the group carries.

    A numpy scalar is returned as a 0-d array, and an array of a subclass as a plain view of its
    memory: a matrix, for one, stays two-dimensional whatever is done to it.
    """
    if type(group) is not ProcessGroup:
        check_group(group, verb)
    # One look-up for nearly all arrays; the rest finds out what is wrong, or byte-swapped.
    if type(x) is np.ndarray and x.dtype in DTYPES:
        return x
    if is_device(x):
        group.check_device(x, verb, name)
    elif isinstance(x, np.ma.MaskedArray):
        raise UnsupportedOperationError(
            f"{verb} on {group}: {name} is a masked array, and its mask would be lost; pass "
            f"{name}.filled(value) or {name}.compressed()"
        )
    elif isinstance(x, np.ndarray):
        x = x.view(np.ndarray)
    elif isinstance(x, np.generic):
        x = np.asarray(x)
    try:
        array_namespace(x)
    except UnsupportedOperationError as error:
        raise UnsupportedOperationError(f"{verb} on {group}: {name}: {error}") from None
    if x.dtype.newbyteorder("=") not in DTYPES:
        raise UnsupportedOperationError(
            f"{verb} on {group}: {name} has dtype {x.dtype}; expected a boolean, integer, float or "
            "complex dtype of at most 64 bits per number (the *_object forms take anything)"
        )
    return x


def is_plain(x: Array) -> bool:
    """Whether the transport may work on `x` as it is, as on nearly every array in place."""
    return type(x) is np.ndarray and x.dtype in DTYPES and x.flags.carray and x.size > 0


def check_reduction(x: Array, op: ReduceOp, verb: str, group: ProcessGroup) -> None:
    """Raise unless the transport that carries `x` reduces this dtype with `op`."""
    if type(group) is not ProcessGroup:
        check_group(group, verb)
    if type(op) is not ReduceOp:
        raise UnsupportedOperationError(
            f"{verb} on {group}: op must be a ReduceOp, such as mpidist.SUM, mpidist.MEAN or "
            f"mpidist.MAX; got {op!r}"
        )
    device = group.transport.device
    transport = group.transport if device is None or is_host(x) else device
    reductions = transport.capabilities.reductions
    if (op, x.dtype) in reductions:
        return
    dtype = x.dtype.newbyteorder("=")
    if (op, dtype) not in reductions:
        offered = [o.name for o in ReduceOp if (o, dtype) in reductions]
        raise UnsupportedOperationError(
            f"{verb} on {group}: {op.name} of {dtype} is not offered by the "
            f"{transport.name} backend; of this dtype it offers {', '.join(offered) or 'nothing'}"
        )


def check_rank(rank: int, verb: str, group: ProcessGroup, *, name: str = "root") -> int:
    """Return `rank` as a plain number if it is one of the group's."""
    if type(group) is not ProcessGroup:
        check_group(group, verb)
    try:
        number = whole_number(rank)
    except TypeError:
        number = -1
    if not 0 <= number < group.size:
        raise InvalidRankError(
            f"{verb} on {group}: {name} must be a rank from 0 to {group.size - 1}, got {rank!r}"
        )
    return number


def check_counts(counts: Sequence[int], verb: str, group: ProcessGroup) -> tuple[int, ...]:
    """Return the rows of each rank as a tuple of plain numbers."""
    try:
        numbers = tuple(map(whole_number, counts))
    except TypeError:
        numbers = ()
    if len(numbers) != group.size or min(numbers) < 0:
        raise SizeMismatchError(
            f"{verb} on {group}: counts must hold {group.size} whole numbers of rows, none "
            f"negative; got {counts}"
        )
    return numbers


def check_out(
    out: Array,
    shape: tuple[int, ...],
    like: Array,
    *,
    verb: str,
    group: ProcessGroup,
    name: str = "out",
) -> Array:
    """Return a plain view of `out` if a result of this shape can be written to it.

    Its dtype, and whether it lies on the host or on a device, have to be those of `like`.
    """
    plain = check_writable(out, verb, group, name=name)
    if is_host(plain) != is_host(like):
        out_memory, x_memory = ("host", "device") if is_host(plain) else ("device", "host")
        raise UnsupportedOperationError(
            f"{verb} on {group}: {name} lies on the {out_memory} and x on the {x_memory}; nothing "
            "is moved between them silently: pass both on one side"
        )
    native = native_dtype(like)
    same = plain.dtype == native or plain.dtype.newbyteorder("=") == native
    if plain.shape != shape or not same:
        raise SizeMismatchError(
            f"{verb} on {group}: {name} must have shape {shape} and dtype {native}, "
            f"got {plain.shape} and {plain.dtype}"
        )
    return plain


def check_writable(out: Array, verb: str, group: ProcessGroup, *, name: str = "out") -> Array:
    """Return a plain view of `out` if it may be written."""
    plain = check_array(out, verb, group, name=name)
    # The caller's own flag: a numpy scalar is read-only, and its 0-d array is not.
    if is_host(plain) and not out.flags.writeable:
        raise UnsupportedOperationError(
            f"{verb} on {group}: {name} is read-only; pass an array that may be written"
        )
    return plain


def flat_source(x: Array) -> Array:
    """Return the elements of `x` as a flat, contiguous array of native byte order."""
    if not x.size:
        # Memory of its own: an empty part of `out` may have out's address, which MPICH refuses.
        nothing_in_it: Array = array_namespace(x).empty(0, native_dtype(x))
        return nothing_in_it
    return as_native(x).reshape(-1)


def native_dtype(x: Array) -> DType:
    """Return the dtype of `x` in native byte order."""
    return x.dtype if x.dtype.isnative else x.dtype.newbyteorder("=")


def land(
    out: Array | None,
    shape: tuple[int, ...],
    like: Array,
    *,
    verb: str,
    group: ProcessGroup,
) -> Landing:
    """Prepare memory for a result of this shape, with the dtype of `like` and where `like` lies.

    The caller's `out`, if there is one, need not be contiguous, aligned or of native byte order:
    the result is written back to it then.
    """
    xp, native = array_namespace(like), native_dtype(like)
    if out is None:
        fresh = xp.empty(shape, native)
        return Landing(fresh.reshape(-1), lambda: fresh)
    plain = check_out(out, shape, like, verb=verb, group=group)
    if _takes_bytes(plain):
        return Landing(plain.reshape(-1), lambda: out)
    # Empty results land elsewhere, too: an empty part of `x` may have the address of `x`.
    landed: Any = xp.empty(shape, native)

    def write_back() -> Array:
        xp.copyto(plain, landed)
        if is_device(landed) and group.transport.device is not None:
            group.transport.device.keep(landed)
        return out

    return Landing(landed.reshape(-1), write_back)


def _takes_bytes(x: Array) -> bool:
    """Whether a transport may write into `x` as it is."""
    if is_device(x):
        return bool(x.flags.c_contiguous and x.size)
    return bool(x.flags.carray and x.dtype.isnative and x.size)


def overlap(a: Array, b: Array) -> bool:
    """Whether two arrays, both of the host or both of a device, may share memory."""
    return bool(array_namespace(a).may_share_memory(a, b))


def separate(source: Array, flat: Array, out: Array | None) -> Array:
    """Return `source`, in a form in which the transport may write `flat` while it reads.

    That is `flat` itself where both are the same memory (in place), and a copy where they overlap
    otherwise.
    """
    if out is None or not overlap(source, flat):
        return source
    same = source.size == flat.size and address_of(source) == address_of(flat)
    return flat if same else source.copy()


def nothing() -> None:
    """Finish an operation that has no result."""


# -- rows: along the first dimension, a 0-d array being one row ---------------------------------


def rows_of(x: Array) -> tuple[int, ...]:
    """Return the shape of `x`, a 0-d array being one row."""
    return x.shape or (1,)


def elements_in(rows: Sequence[int], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the number of elements in each number of rows."""
    row = prod(shape[1:])
    return tuple(count * row for count in rows)


def contributed_rows(
    x: Array, group: ProcessGroup, counts: Sequence[int] | None, verb: str
) -> tuple[int, ...]:
    """Return the rows that each rank contributes, checked against this rank's."""
    own_rows = rows_of(x)[0]
    if counts is None:
        return (own_rows,) * group.size
    numbers = check_counts(counts, verb, group)
    if numbers[group.rank] != own_rows:
        raise SizeMismatchError(
            f"{verb} on {group}: counts says {numbers[group.rank]} rows for this rank, "
            f"x has shape {x.shape}"
        )
    return numbers


def cut_rows(
    shape: tuple[int, ...], group: ProcessGroup, counts: Sequence[int] | None, verb: str
) -> tuple[int, ...]:
    """Return the rows that each rank gets of an array that is cut up."""
    if not shape:
        raise SizeMismatchError(f"{verb} on {group}: x is 0-d and has no rows to share out")
    if counts is None:
        if shape[0] % group.size:
            raise SizeMismatchError(
                f"{verb} on {group}: the first dimension of x must be a multiple of {group.size}, "
                f"got shape {shape}; for uneven shares give counts"
            )
        return (shape[0] // group.size,) * group.size
    numbers = check_counts(counts, verb, group)
    if sum(numbers) != shape[0]:
        raise SizeMismatchError(
            f"{verb} on {group}: counts {numbers} add up to {sum(numbers)} rows, "
            f"x has shape {shape}"
        )
    return numbers
