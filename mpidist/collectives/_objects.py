"""Collectives on any Python object: pickled, and moved as bytes.

Unpickling runs code that the sender chose. Objects therefore travel between the ranks of one
authenticated job only, which trust each other as threads of one program do.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, NoReturn

import numpy as np

from mpidist._types import Array
from mpidist.collectives._checks import check_rank
from mpidist.collectives._gathers import all_gather, gather
from mpidist.collectives._reductions import broadcast
from mpidist.collectives._scatters import scatter
from mpidist.errors import SizeMismatchError, UnsupportedOperationError
from mpidist.group import ProcessGroup

__all__ = [
    "all_gather_object",
    "broadcast_object",
    "gather_object",
    "pickled",
    "scatter_object",
    "unpickled",
]


def pickled(obj: Any) -> Array:
    """Return the pickle of an object as a flat uint8 array."""
    return np.frombuffer(pickle.dumps(obj, protocol=5), np.uint8)


def unpickled(data: Array) -> Any:
    """Return the object of a flat uint8 array from a rank of this job."""
    return pickle.loads(data.data)  # noqa: S301  # from a rank of this job, see above


def _cut(data: Array, counts: Sequence[int]) -> list[Any]:
    stops = accumulate(counts)
    return [unpickled(data[stop - count : stop]) for stop, count in zip(stops, counts, strict=True)]


class _Packed(NamedTuple):
    """Pickles of this rank's objects, or the error of the one that has none."""

    pieces: list[Array]
    error: Exception | None = None

    @property
    def length(self) -> int:
        """Bytes of the first, or `_FAILED`: the others wait, and are told so."""
        return _FAILED if self.error is not None else int(self.pieces[0].size)


_FAILED = -1


def _pack(objs: Iterable[Any]) -> _Packed:
    """Pickle objects; an error is kept until all ranks know of it."""
    try:
        return _Packed([pickled(obj) for obj in objs])
    except Exception as error:  # noqa: BLE001  # an object may raise what it likes
        return _Packed([], error)


def _refuse(ranks: Sequence[int], packed: _Packed, verb: str, group: ProcessGroup) -> NoReturn:
    """Raise on all ranks that these have objects without a pickle."""
    own = "" if packed.error is None else f": {type(packed.error).__name__}: {packed.error}"
    raise UnsupportedOperationError(
        f"{verb} on {group}: what rank {', '.join(map(str, ranks))} gave cannot be pickled{own}"
    ) from packed.error


def _lengths(packed: _Packed, verb: str, group: ProcessGroup) -> list[int]:
    lengths: list[int] = all_gather(np.array(packed.length), group).tolist()
    failed = [rank for rank, length in enumerate(lengths) if length == _FAILED]
    if failed:
        _refuse(failed, packed, verb, group)
    return lengths


def broadcast_object(obj: Any, group: ProcessGroup, *, root: int = 0) -> Any:
    """Give an object of one rank to all.

    Parameters
    ----------
    obj : object
        Anything that can be pickled; counts on `root` only.
    group : ProcessGroup
        The ranks taking part.
    root : int, optional
        Whose object.

    Returns
    -------
    object
        On `root` the object itself, elsewhere a copy.

    Raises
    ------
    UnsupportedOperationError
        On all ranks, if the object cannot be pickled.
    InvalidRankError, CollectiveTimeoutError
        As `broadcast`.

    Notes
    -----
    Collective over `group`; blocks. A broadcast of the length and one of the bytes.
    """
    root = check_rank(root, "broadcast_object", group)
    here = group.rank == root
    packed = _pack([obj] if here else [])
    told = np.array(packed.length if here else 0)
    length = int(broadcast(told, group, root=root))
    if length == _FAILED:
        _refuse([root], packed, "broadcast_object", group)
    data = packed.pieces[0] if here else np.empty(length, np.uint8)
    data = broadcast(data, group, root=root)
    return obj if here else unpickled(data)


def all_gather_object(obj: Any, group: ProcessGroup) -> list[Any]:
    """Give the objects of all ranks to all.

    Parameters
    ----------
    obj : object
        Anything that can be pickled.
    group : ProcessGroup
        The ranks taking part.

    Returns
    -------
    list of object
        Copies, by rank.

    Raises
    ------
    UnsupportedOperationError
        On all ranks, if an object cannot be pickled.
    CollectiveTimeoutError
        If a rank does not come within the group's timeout.

    Notes
    -----
    Collective over `group`; blocks. An all_gather of the lengths and one of the bytes.
    """
    packed = _pack([obj])
    counts = _lengths(packed, "all_gather_object", group)
    return _cut(all_gather(packed.pieces[0], group, counts=counts), counts)


def gather_object(obj: Any, group: ProcessGroup, *, root: int = 0) -> list[Any] | None:
    """Give the objects of all ranks to one.

    Parameters
    ----------
    obj : object
        Anything that can be pickled.
    group : ProcessGroup
        The ranks taking part.
    root : int, optional
        Who gets them.

    Returns
    -------
    list of object or None
        On `root` copies, by rank; elsewhere None.

    Raises
    ------
    UnsupportedOperationError
        On all ranks, if an object cannot be pickled.
    InvalidRankError, CollectiveTimeoutError
        As `gather`.

    Notes
    -----
    Collective over `group`; blocks. An all_gather of the lengths and a gather of the bytes.
    """
    root = check_rank(root, "gather_object", group)
    packed = _pack([obj])
    counts = _lengths(packed, "gather_object", group)
    whole = gather(packed.pieces[0], group, root=root, counts=counts)
    return None if whole is None else _cut(whole, counts)


def scatter_object(objs: Sequence[Any] | None, group: ProcessGroup, *, root: int = 0) -> Any:
    """Give one object of a list to each rank.

    Parameters
    ----------
    objs : sequence of object
        One per rank, on `root`; ignored elsewhere.
    group : ProcessGroup
        The ranks taking part.
    root : int, optional
        Whose list.

    Returns
    -------
    object
        A copy of this rank's.

    Raises
    ------
    UnsupportedOperationError
        On all ranks, if an object cannot be pickled.
    InvalidRankError, CollectiveTimeoutError
        As `scatter`.
    SizeMismatchError
        On all ranks, if the root's list does not hold one object per rank.

    Notes
    -----
    Collective over `group`; blocks. A broadcast of the lengths and a scatter of the bytes.
    """
    root = check_rank(root, "scatter_object", group)
    here = group.rank == root
    packed = _pack((() if objs is None else objs) if here else ())
    pieces = packed.pieces
    # The first number tells all ranks how many objects the root has, so that all can raise.
    told = np.zeros(group.size + 1, np.int64)
    told[0] = len(pieces) if packed.error is None else _FAILED
    if len(pieces) == group.size:
        told[1:] = [piece.size for piece in pieces]
    told = broadcast(told, group, root=root)
    if told[0] == _FAILED:
        _refuse([root], packed, "scatter_object", group)
    if told[0] != group.size:
        raise SizeMismatchError(
            f"scatter_object on {group}: rank {root} must give one object per rank, "
            f"{group.size} in all; got {told[0]}"
        )
    counts = told[1:].tolist()
    mine = np.empty(counts[group.rank], np.uint8)
    whole = np.concatenate(pieces) if here else None
    return unpickled(scatter(whole, group, root=root, out=mine, counts=counts))
