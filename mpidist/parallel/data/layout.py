"""Where gradients lie: all buckets in one piece of memory, in an order that may be changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import ModuleType

import numpy as np

from mpidist._types import Array, DType
from mpidist.arrays.namespaces import array_namespace, is_device, is_host
from mpidist.group import ProcessGroup
from mpidist.parallel.data.bucket import ALIGNMENT_BYTES, Bucket, BucketSizes, assign_buckets
from mpidist.parallel.data.compression import Compression, Hook

__all__ = ["Layout"]

_WIDEST = 16
"""Bytes of the longest number, complex128: what a flag takes at most."""


class Layout:
    """Makes buckets for the same gradients in any order, in the same memory each time.

    The memory is one piece that the ranks of a node share (`ProcessGroup.empty`), made once; of
    arrays on a device, one piece there. So another order needs no further memory and no message,
    and nothing of the old one is left.

    Parameters
    ----------
    arrays : mapping of str to Array
        Whose gradients; names, shapes, dtypes and the kind of device are looked at.
    group : ProcessGroup
        Whose memory; collective over it, blocks.
    compression : Compression, Hook or None
        How buckets travel.
    sizes : BucketSizes
        How large buckets are.
    """

    def __init__(
        self,
        arrays: Mapping[str, Array],
        group: ProcessGroup,
        *,
        compression: Compression | Hook | None,
        sizes: BucketSizes,
    ) -> None:
        self._compression = compression
        self._sizes = sizes
        host = [array for array in arrays.values() if is_host(array)]
        device = [array for array in arrays.values() if is_device(array)]
        # Whichever dtype is last carries the flags.
        nbytes = _lines(host) + (_whole_lines(len(arrays) * _WIDEST) if host else 0)
        self._memory = {np: group.empty(nbytes, np.uint8)}
        if device:
            memory = group.empty(_lines(device), np.uint8, device="gpu")
            self._memory[array_namespace(memory)] = memory
        self._taken = dict.fromkeys(self._memory, 0)

    def assign(self, arrays: Mapping[str, Array], order: Sequence[str]) -> list[list[str]]:
        """Return the names in each bucket if gradients come in this order."""
        return assign_buckets({name: arrays[name] for name in reversed(order)}, self._sizes)

    def buckets(self, arrays: Mapping[str, Array], names: Sequence[Sequence[str]]) -> list[Bucket]:
        """Lay out all buckets; those made earlier must not be used any more.

        Parameters
        ----------
        arrays : mapping of str to Array
            As for the constructor.
        names : sequence of sequence of str
            The names in each bucket, as `assign` gives them.

        Returns
        -------
        list of Bucket
            In the order in which they become complete. Behind the last one travels one flag per
            array, in the order of `arrays`: who had a gradient. The flags cost no message, except
            beside a hook of the user's (what it makes of numbers is its own business) and behind a
            bucket on a device (to read them there would make the host wait): they follow in a
            bucket of their own then, on the host.
        """
        self._taken = dict.fromkeys(self._memory, 0)
        kinds = [array_namespace(arrays[members[0]]) for members in names]
        own_flags = callable(self._compression) or (bool(kinds) and kinds[-1] is not np)
        buckets = [
            Bucket(
                [(name, arrays[name]) for name in members],
                compression=self._compression,
                num_flags=len(arrays) if i == len(names) and not own_flags else 0,
                empty=partial(self._take, kind),
            )
            for i, (kind, members) in enumerate(zip(kinds, names, strict=True), start=1)
        ]
        if buckets and own_flags:
            flags = Bucket([], compression=None, num_flags=len(arrays), dtype=np.dtype(np.float32))
            buckets.append(flags)
        return buckets

    def _take(self, kind: ModuleType, length: int, dtype: DType) -> Array:
        """Return the next `length` elements of a kind of memory."""
        start = self._taken[kind]
        stop = start + length * dtype.itemsize
        self._taken[kind] = _whole_lines(stop)
        return self._memory[kind][start:stop].view(dtype)


def _lines(arrays: Iterable[Array]) -> int:
    """Return the bytes of buckets that hold these: each array begins on a cache line."""
    return sum(_whole_lines(array.nbytes) for array in arrays)


def _whole_lines(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
