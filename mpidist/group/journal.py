"""What a group writes into its rank's recorder: operations by names that are made once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np

from mpidist._types import ReduceOp
from mpidist.arrays.namespaces import is_array, is_device, is_host
from mpidist.observe.recorder import Kind, Name, Recorder

if TYPE_CHECKING:
    from mpidist._types import Array
    from mpidist.backends.node.sums import Sum

__all__ = ["Journal", "describe", "describe_counts"]

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
        self,
        kind: Kind,
        verb: str,
        args: tuple[Any, ...],
        shape: tuple[int, ...] | None = None,
        rows: tuple[int, ...] | None = None,
        listed: str = "",
    ) -> Name:
        """Return how a collective is recorded; see `describe`."""
        # What of an argument makes a difference to the name; this is part of every call.
        keys = [(x.dtype, x.size) if type(x) is np.ndarray else _key(x) for x in args]
        key = (verb, kind, shape, rows, listed, *keys)
        found = self._names.get(key)
        if found is None:
            what = "i" * (kind is Kind.IMMEDIATE) + describe(verb, args, shape, rows, listed)
            on_device = verb == "together" or any(is_device(x) for x in args)
            name = self._recorder.name(what, self._group, kind, on_device=on_device)
            found = self._remember(key, name)
        return found

    def _remember(self, key: object, name: Name) -> Name:
        if len(self._names) >= _REMEMBERED:
            self._names.clear()
        self._names[key] = name
        return name

    def name_sum(self, prepared: Sum, x: Array, op: ReduceOp) -> Name:
        """Return the name of an all_reduce in place of a 1-D array, and remember it there."""
        args = (x, x, op)
        prepared.name = name = self.name_collective(Kind.BLOCKING, "all_reduce", args, x.shape)
        return name

    def name_device_sum(self, x: Array, op: ReduceOp) -> Name:
        """Return the name of an all_reduce in place of a device array."""
        key = (x.dtype, x.shape, op)
        found = self._names.get(key)
        if found is None:
            found = self.name_collective(Kind.BLOCKING, "all_reduce", (x, x, op), x.shape)
            self._remember(key, found)
        return found


def _key(x: Any) -> Any:
    """Return what of an argument makes a difference to the name of a collective."""
    if isinstance(x, tuple | list):
        return tuple(map(_key, x))
    return (x.dtype, x.size, is_host(x)) if is_array(x) else x


def describe(
    verb: str,
    args: tuple[Any, ...],
    shape: tuple[int, ...] | None = None,
    rows: tuple[int, ...] | None = None,
    listed: str = "",
) -> str:
    """Return what has to be the same on all ranks of a collective.

    Parameters
    ----------
    verb, args : str, tuple
        As a transport gets them: flat arrays, counts, op, root.
    shape : tuple of int, optional
        Of the caller's array; where `rows` are given, of one row.
    rows : tuple of int, optional
        Rows of each rank's part; none for all_to_all, whose rows differ by rank.
    listed : str, optional
        All arrays of a list of which these are packed.

    Returns
    -------
    str
        Such as ``"all_reduce SUM float32[10, 100]"``.
    """
    if verb == "together":
        return f"{' + '.join(describe(*each) for each in args)} of a list of {listed}"
    words = [verb]
    words += [op.name for op in args if isinstance(op, ReduceOp)]
    arrays = [x for x in args if is_array(x)]
    if arrays:
        words.append(f"{arrays[0].dtype}{_lengths(arrays[0], args, shape, rows)}")
    if verb in _ROOTED:
        words.append(f"root {args[-1]}")
    if listed:
        words.append(f"of a list of {listed}")
    if arrays and not is_host(arrays[0]):
        words.append("on the device")
    return " ".join(words)


def describe_counts(verb: str, args: tuple[Any, ...]) -> str:
    """Return what of an all_to_all may differ by rank, but has to fit; nothing for other verbs."""
    if verb != "all_to_all":
        return ""
    sends, receives = (_few(counts) for counts in args[2:])
    return f"sends {sends} elements, expects {receives}"


def _lengths(
    x: Array, args: tuple[Any, ...], shape: tuple[int, ...] | None, rows: tuple[int, ...] | None
) -> str:
    """Return the shape that is the same on all ranks."""
    if rows is None:
        counts = [count for count in args if isinstance(count, tuple | list)]
        if counts:  # of the package's own calls
            return f" in parts of {_few(counts[0])}"
        return str(list(x.shape if shape is None else shape))
    row = f" rows of {list(shape)}" if shape else ""
    if not rows:
        return row
    return f" in parts of {rows[0] if min(rows) == max(rows) else _few(rows)}{row}"


def _few(counts: Sequence[int]) -> str:
    """Return numbers in words of bounded length that differ if they do."""
    if len(counts) <= _MOST_COUNTS:
        return f"{list(counts)}"
    digest = crc32(np.array(counts, np.int64).tobytes())
    return f"{counts[0]}, {counts[1]}, ... (sum {sum(counts)}, checksum {digest:08x})"
