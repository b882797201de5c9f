"""Collectives on any Python object: pickled, and moved as bytes.

Unpickling runs code that the sender chose. Objects therefore travel between the ranks of one
authenticated job only, which trust each other as threads of one program do.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from mpidist._types import Array
from mpidist.arrays.boxes import part_slices
from mpidist.collectives._checks import check_rank
from mpidist.collectives._gathers import all_gather, gather
from mpidist.collectives._reductions import broadcast
from mpidist.collectives._scatters import scatter
from mpidist.errors import (
    CollectiveMismatchError,
    SizeMismatchError,
    UnsupportedOperationError,
)
from mpidist.group.group import ProcessGroup, check_group
from mpidist.group.operations import Timeout

_MARK = int.from_bytes(b"MpD obj1", "little")
"""The first number of every header, which no array of a program is likely to begin with."""


def pickled(obj: Any, verb: str, group: ProcessGroup) -> Array:
    """Return the pickle of an object as a flat uint8 array; see `_refuse` for the error."""
    packed = _pack([obj])
    if packed.error is not None:
        _refuse([group.rank], packed, verb, group)
    return packed.pieces[0]


def unpickled(data: Array, source: int, verb: str, group: ProcessGroup) -> Any:
    """Return the object of a flat uint8 array from a rank of this job.

    Raises
    ------
    UnsupportedOperationError
        If it cannot be unpickled here; everything has been received then, and the group is usable.
    """
    try:
        return pickle.loads(data.data)  # noqa: S301  # from a rank of this job, see above
    except Exception as error:
        raise UnsupportedOperationError(
            f"{verb} on {group}: the object that rank {source} gave cannot be unpickled here: "
            f"{type(error).__name__}: {error}. Its class must be importable under the same name on "
            "this rank, and must restore itself from its pickle. The group can still be used"
        ) from error


def _cut(data: Array, counts: Sequence[int], verb: str, group: ProcessGroup) -> list[Any]:
    parts = enumerate(part_slices(counts))
    return [unpickled(data[part], rank, verb, group) for rank, part in parts]


def _header(*numbers: int) -> Array:
    """Return what an object form sends first.

    It has four dimensions, so that the comparison of calls does not take it for an array of the
    program.
    """
    return np.array([_MARK, *numbers], np.int64).reshape(1, 1, 1, -1)


def _numbers(header: Array, verb: str, group: ProcessGroup, root: int | None = None) -> Array:
    """Return the numbers of headers, one row each: of every rank, or of `root` alone.

    Raises
    ------
    CollectiveMismatchError
        If a rank has called a collective on arrays instead, whose bytes are not to be unpickled.
    """
    rows = header.reshape(header.shape[0], -1)
    strange = np.flatnonzero(rows[:, 0] != _MARK).tolist()
    if strange:
        ranks = strange if root is None else [root]
        raise CollectiveMismatchError(
            f"{verb} on {group}: rank {', '.join(map(str, ranks))} called a collective on arrays "
            f"instead; all ranks must call {verb}"
        )
    return rows[:, 1:]


class _Packed(NamedTuple):
    """Pickles of this rank's objects, or the error of the one that has none."""

    pieces: list[Array]
    error: Exception | None = None

    @property
    def length(self) -> int:
        """Bytes of the first, or `_FAILED`, which tells the waiting ranks of the error."""
        return _FAILED if self.error is not None else int(self.pieces[0].size)


_FAILED = -1


def _pack(objs: Iterable[Any]) -> _Packed:
    """Pickle objects; an error is kept until all ranks know of it."""
    try:
        pickles = [pickle.dumps(obj, protocol=5) for obj in objs]
        return _Packed([np.frombuffer(data, np.uint8) for data in pickles])
    except Exception as error:  # noqa: BLE001  # an object may raise what it likes
        return _Packed([], error)


def _refuse(ranks: Sequence[int], packed: _Packed, verb: str, group: ProcessGroup) -> NoReturn:
    """Raise on all ranks that these have objects without a pickle."""
    own = "" if packed.error is None else f": {type(packed.error).__name__}: {packed.error}"
    raise UnsupportedOperationError(
        f"{verb} on {group}: what rank {', '.join(map(str, ranks))} gave cannot be pickled{own}"
    ) from packed.error


def _lengths(packed: _Packed, verb: str, group: ProcessGroup, timeout: Timeout) -> list[int]:
    headers = all_gather(_header(packed.length), group, timeout=timeout)
    lengths: list[int] = _numbers(headers, verb, group)[:, 0].tolist()
    failed = [rank for rank, length in enumerate(lengths) if length == _FAILED]
    if failed:
        _refuse(failed, packed, verb, group)
    return lengths


def broadcast_object(
    obj: Any, group: ProcessGroup, *, root: int = 0, timeout: Timeout = None
) -> Any:
    """Give an object of one rank to all.

    Parameters
    ----------
    obj : object
        Anything that can be pickled; counts on `root` only.
    group : ProcessGroup
        The ranks taking part.
    root : int, optional
        Whose object.
    timeout : float or datetime.timedelta, optional
        Seconds for each of the two collectives; the group's when omitted.

    Returns
    -------
    object
        On `root` the object itself, elsewhere a copy.

    Raises
    ------
    UnsupportedOperationError
        On all ranks, if the object cannot be pickled; where it cannot be unpickled, on that rank.
    CollectiveMismatchError
        If `root` calls a collective on arrays instead.
    InvalidRankError, CollectiveTimeoutError
        As `broadcast`.

    Notes
    -----
    Collective over `group`; blocks. A broadcast of the length and one of the bytes.
    """
    root = check_rank(root, "broadcast_object", group)
    is_root = group.rank == root
    packed = _pack([obj] if is_root else [])
    header = broadcast(_header(packed.length if is_root else 0), group, root=root, timeout=timeout)
    length = int(_numbers(header, "broadcast_object", group, root)[0, 0])
    if length == _FAILED:
        _refuse([root], packed, "broadcast_object", group)
    data = packed.pieces[0] if is_root else np.empty(length, np.uint8)
    data = broadcast(data, group, root=root, timeout=timeout)
    return obj if is_root else unpickled(data, root, "broadcast_object", group)


def all_gather_object(obj: Any, group: ProcessGroup, *, timeout: Timeout = None) -> list[Any]:
    """Give the objects of all ranks to all.

    Parameters
    ----------
    obj : object
        Anything that can be pickled.
    group : ProcessGroup
        The ranks taking part.
    timeout : float or datetime.timedelta, optional
        Seconds for each of the two collectives; the group's when omitted.

    Returns
    -------
    list of object
        Copies, by rank.

    Raises
    ------
    UnsupportedOperationError
        On all ranks, if an object cannot be pickled; where it cannot be unpickled, on that rank.
    CollectiveMismatchError
        If another rank calls a collective on arrays instead.
    CollectiveTimeoutError
        If a rank does not arrive within the group's timeout.

    Notes
    -----
    Collective over `group`; blocks. An all_gather of the lengths and one of the bytes.
    """
    check_group(group, "all_gather_object")
    packed = _pack([obj])
    counts = _lengths(packed, "all_gather_object", group, timeout)
    gathered = all_gather(packed.pieces[0], group, counts=counts, timeout=timeout)
    return _cut(gathered, counts, "all_gather_object", group)


def gather_object(
    obj: Any, group: ProcessGroup, *, root: int = 0, timeout: Timeout = None
) -> list[Any] | None:
    """Give the objects of all ranks to one.

    Parameters
    ----------
    obj : object
        Anything that can be pickled.
    group : ProcessGroup
        The ranks taking part.
    root : int, optional
        Who gets them.
    timeout : float or datetime.timedelta, optional
        Seconds for each of the two collectives; the group's when omitted.

    Returns
    -------
    list of object or None
        On `root` copies, by rank; elsewhere None.

    Raises
    ------
    UnsupportedOperationError
        On all ranks, if an object cannot be pickled; where it cannot be unpickled, on that rank.
    CollectiveMismatchError
        If another rank calls a collective on arrays instead.
    InvalidRankError, CollectiveTimeoutError
        As `gather`.

    Notes
    -----
    Collective over `group`; blocks. An all_gather of the lengths and a gather of the bytes.
    """
    root = check_rank(root, "gather_object", group)
    packed = _pack([obj])
    counts = _lengths(packed, "gather_object", group, timeout)
    gathered = gather(packed.pieces[0], group, root=root, counts=counts, timeout=timeout)
    return None if gathered is None else _cut(gathered, counts, "gather_object", group)


def scatter_object(
    objs: Sequence[Any] | None, group: ProcessGroup, *, root: int = 0, timeout: Timeout = None
) -> Any:
    """Give one object of a list to each rank.

    Parameters
    ----------
    objs : sequence of object
        One per rank, on `root`; ignored elsewhere.
    group : ProcessGroup
        The ranks taking part.
    root : int, optional
        Whose list.
    timeout : float or datetime.timedelta, optional
        Seconds for each of the two collectives; the group's when omitted.

    Returns
    -------
    object
        A copy of this rank's.

    Raises
    ------
    UnsupportedOperationError
        On all ranks, if an object cannot be pickled; where it cannot be unpickled, on that rank.
    CollectiveMismatchError
        If another rank calls a collective on arrays instead.
    InvalidRankError, CollectiveTimeoutError
        As `scatter`.
    SizeMismatchError
        On all ranks, if the root's list does not hold one object per rank.

    Notes
    -----
    Collective over `group`; blocks. A broadcast of the lengths and a scatter of the bytes.
    """
    root = check_rank(root, "scatter_object", group)
    is_root = group.rank == root
    packed = _pack((() if objs is None else objs) if is_root else ())
    pieces = packed.pieces
    # The first number tells all ranks how many objects the root has, so that all can raise.
    number = len(pieces) if packed.error is None else _FAILED
    lengths = [piece.size for piece in pieces] if number == group.size else [0] * group.size
    header = broadcast(_header(number, *lengths), group, root=root, timeout=timeout)
    number, *counts = _numbers(header, "scatter_object", group, root)[0].tolist()
    if number == _FAILED:
        _refuse([root], packed, "scatter_object", group)
    if number != group.size:
        raise SizeMismatchError(
            f"scatter_object on {group}: rank {root} must give one object per rank, "
            f"{group.size} in all; got {number}"
        )
    own = np.empty(counts[group.rank], np.uint8)
    joined = np.concatenate(pieces) if is_root else None
    own = scatter(joined, group, root=root, out=own, counts=counts, timeout=timeout)
    return unpickled(own, root, "scatter_object", group)
