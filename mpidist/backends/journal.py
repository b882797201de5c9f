"""What a group writes into its rank's recorder: operations by names that are made once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np

from mpidist._types import ReduceOp
from mpidist.arrays import is_array, is_host
from mpidist.recorder import Kind, Name, Recorder

if TYPE_CHECKING:
    from mpidist._types import Array
    from mpidist.backends.node_sums import Sum

__all__ = ["Journal", "describe"]

_ROOTED = ("broadcast", "reduce", "gather", "scatter")

_REMEMBERED = 1024
"""Names that are remembered: a job may call with other counts at every step."""

_MOST_COUNTS = 8
"""Counts that are written out one by one; more of them would fill the record."""


class Journal:
    """The records of one group.

    Parameters
    ----------
    recorder : Recorder
        Of this rank.
    name : str
        Of the group.
    identity : int
        Of the group, the same on all its ranks.
    """

    def __init__(self, recorder: Recorder, name: str, identity: int) -> None:
        self.begin = recorder.begin
        self.end = recorder.end
        self.wait = recorder.wait
        self.waited = recorder.waited
        self._recorder = recorder
        self._group = recorder.name_group(name, identity)
        self._names: dict[object, Name] = {}

    def name(self, what: str, kind: Kind, alike: str | None = None) -> Name:
        """Return how operations of this name are recorded; see `Recorder.name`."""
        key = (what, kind)
        return self._names.get(key) or self._remember(
            key, self._recorder.name(what, self._group, kind, alike)
        )

    def name_collective(
        self, verb: str, args: tuple[Any, ...], shape: tuple[int, ...] | None, kind: Kind
    ) -> Name:
        """Return how a collective is recorded; see `describe`."""
        # What of an argument makes a difference to the name; this is part of every call.
        keys = [(x.dtype, x.size) if type(x) is np.ndarray else _key(x) for x in args]
        key = (verb, kind, shape, *keys)
        found = self._names.get(key)
        if found is None:
            what = "i" * (kind is Kind.IMMEDIATE) + describe(verb, args, shape)
            found = self._remember(key, self._recorder.name(what, self._group, kind))
        return found

    def _remember(self, key: object, name: Name) -> Name:
        if len(self._names) >= _REMEMBERED:
            self._names.clear()
        self._names[key] = name
        return name

    def name_sum(self, prepared: Sum, x: Array, op: ReduceOp) -> Name:
        """Return the name of an all_reduce in place of a 1-D array, and remember it there."""
        args = (x, x, op)
        prepared.name = name = self.name_collective("all_reduce", args, None, Kind.BLOCKING)
        return name

    def name_device_sum(self, x: Array, op: ReduceOp) -> Name:
        """Return the name of an all_reduce in place of a device array."""
        key = (x.dtype, x.shape, op)
        found = self._names.get(key)
        if found is None:
            found = self.name_collective("all_reduce", (x, x, op), x.shape, Kind.BLOCKING)
            self._remember(key, found)
        return found


def _key(x: Any) -> Any:
    """Return what of an argument makes a difference to the name of a collective."""
    if isinstance(x, tuple | list):
        return tuple(map(_key, x))
    return (x.dtype, x.size, is_host(x)) if is_array(x) else x


def describe(verb: str, args: tuple[Any, ...], shape: tuple[int, ...] | None) -> str:
    """Return what has to be the same on all ranks of a collective.

    Parameters
    ----------
    verb, args : str, tuple
        As a transport gets them: flat arrays, counts, op, root.
    shape : tuple of int, optional
        Of the caller's array, where it is the same on all ranks.

    Returns
    -------
    str
        Such as ``"all_reduce SUM float32[10, 100]"``.
    """
    if verb == "together":
        return " + ".join(describe(each, some, None) for each, some in args)
    words = [verb]
    words += [op.name for op in args if isinstance(op, ReduceOp)]
    arrays = [x for x in args if is_array(x)]
    counts = [count for count in args if isinstance(count, tuple | list)]
    if arrays:
        dtype = arrays[0].dtype
        if verb == "all_to_all":  # how much goes where differs by rank
            words.append(f"{dtype}")
        elif counts:
            words.append(f"{dtype} in parts of {_tell_counts(counts[0])}")
        else:
            words.append(f"{dtype}{list(shape) if shape is not None else [arrays[0].size]}")
    if verb in _ROOTED:
        words.append(f"root {args[-1]}")
    if arrays and not is_host(arrays[0]):
        words.append("on the device")
    return " ".join(words)


def _tell_counts(counts: Sequence[int]) -> str:
    if min(counts) == max(counts):
        return f"{counts[0]}"
    if len(counts) <= _MOST_COUNTS:
        return f"{list(counts)}"
    digest = crc32(np.array(counts, np.int64).tobytes())
    return f"{counts[0]}, {counts[1]}, ... (sum {sum(counts)}, checksum {digest:08x})"
