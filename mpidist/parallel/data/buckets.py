"""`Bucket`: gradients that travel together; how they are assigned to buckets, and the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from mpidist._types import Array, DType
from mpidist.arrays.boxes import round_up
from mpidist.arrays.flat import FlatBuffer
from mpidist.arrays.namespaces import array_namespace, is_device, is_host
from mpidist.backends.work import Work
from mpidist.group import ProcessGroup

__all__ = [
    "ALIGNMENT_BYTES",
    "BUCKET_BYTES",
    "FIRST_BUCKET_BYTES",
    "Bucket",
    "BucketMemory",
    "BucketSizes",
    "Exchange",
    "assign_buckets",
]

BUCKET_BYTES = 25 << 20
"""Size at which a bucket is closed: large enough for full bandwidth, small enough that many are
under way while backward still runs. PyTorch's default too; Li et al. (2020), section 3.2.2."""

FIRST_BUCKET_BYTES = 1 << 20
"""Size of the first bucket, so that communication begins early; PyTorch's default too."""

ALIGNMENT_BYTES = 64
"""Every gradient begins on a cache line of its own."""

_WIDEST = 16
"""Bytes of the longest number, complex128: the most that a flag takes."""

Exchange: TypeAlias = Callable[[], Work[Any]]
"""What happens to one full bucket; the call starts it, in the bucket's own memory or from it, and
returns at once. When the `Work` has been waited for, the gradients are what they are to be."""


@dataclass(frozen=True, slots=True)
class BucketSizes:
    """How large buckets are.

    Attributes
    ----------
    first : int
        Bytes at which the first bucket of each dtype is closed.
    rest : int
        Bytes at which every later one is closed.

    Notes
    -----
    The array that crosses the limit stays inside, so a bucket may be larger.
    """

    first: int = FIRST_BUCKET_BYTES
    rest: int = BUCKET_BYTES


def assign_buckets(arrays: Mapping[str, Array], sizes: BucketSizes) -> list[list[str]]:
    """Distribute arrays over buckets.

    Parameters
    ----------
    arrays : mapping of str to Array
        In the order in which forward uses them; backward is taken to go the other way.
    sizes : BucketSizes
        When to close a bucket.

    Returns
    -------
    list of list of str
        The names in each bucket, in reverse order of registration. The buckets are in the order
        in which they become complete if backward does what is expected of it. All arrays of a
        bucket have one dtype and lie on one kind of device.

    References
    ----------
    Li et al. (2020), PyTorch Distributed: Experiences on Accelerating Data Parallel Training,
    sections 3.2.2 and 3.2.3.
    """
    position = {name: i for i, name in enumerate(reversed(list(arrays)))}
    filling: dict[tuple[DType, str], list[str]] = {}
    filled: dict[tuple[DType, str], int] = {}
    limits: dict[tuple[DType, str], int] = {}
    closed: list[list[str]] = []
    for name in position:
        array = arrays[name]
        kind = (array.dtype, array_namespace(array).__name__)
        filling.setdefault(kind, []).append(name)
        filled[kind] = filled.get(kind, 0) + array.nbytes
        if filled[kind] >= limits.get(kind, sizes.first):
            closed.append(filling.pop(kind))
            filled[kind], limits[kind] = 0, sizes.rest
    # A bucket is complete when its last member is.
    return sorted([*closed, *filling.values()], key=lambda bucket: position[bucket[-1]])


class Bucket:
    """Gradients in one flat array, exchanged by one call.

    A bucket is *filling* until no gradient is missing, then *complete*; with `work` it is *in
    flight*; when that has been waited for, all are missing again. The reducer moves it along.

    Parameters
    ----------
    like : sequence of (str, Array)
        Names of the gradients, and arrays of their shapes; one dtype and one kind of device.
    num_flags : int, optional
        Numbers that travel behind the gradients.
    dtype : dtype, optional
        The dtype of a bucket without gradients.
    empty : callable, optional
        Returns memory for a length and a dtype, of the gradients' kind, beginning on a cache line.

    Attributes
    ----------
    data : Array, shape (length,)
        All that travels: the gradients, each padded with zeros to a cache line, and the flags.
    flat : FlatBuffer
        The part of `data` without the flags.
    grads : dict of str to Array
        The gradients: views of `data`.
    flags : Array, shape (num_flags,)
        The flags: a view of `data`.
    missing : set of str
        Names of the gradients that are not complete yet.
    exchange : Exchange or None
        What happens to the full bucket; set once by the `GradientReducer`.
    work : Work or None
        The exchange in flight.
    """

    def __init__(
        self,
        like: Sequence[tuple[str, Array]],
        *,
        num_flags: int = 0,
        dtype: DType | None = None,
        empty: Callable[[int, DType], Array] | None = None,
    ) -> None:
        shapes = {name: array.shape for name, array in like}
        xp: Any = array_namespace(like[0][1]) if like else np
        dtype = like[0][1].dtype if like else np.dtype(dtype)
        alignment = max(ALIGNMENT_BYTES // dtype.itemsize, 1)
        length = FlatBuffer.length_of(shapes, alignment=alignment)
        self.data: Array = (empty or xp.empty)(length + num_flags, dtype)
        self.flags = self.data[length:]
        self.flat = FlatBuffer(shapes, dtype, alignment=alignment, storage=self.data[:length])
        self.grads = self.flat.views
        self.missing = set(self.grads)
        self.exchange: Exchange | None = None
        self.work: Work[Any] | None = None


class BucketMemory:
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
    own_flags : bool
        Whether flags always travel in a bucket of their own.
    """

    def __init__(
        self, arrays: Mapping[str, Array], group: ProcessGroup, *, own_flags: bool
    ) -> None:
        self._own_flags = own_flags
        host = [array for array in arrays.values() if is_host(array)]
        device = [array for array in arrays.values() if is_device(array)]
        # Whichever dtype is last carries the flags.
        nbytes = _aligned_bytes(host) + (_aligned(len(arrays) * _WIDEST) if host else 0)
        self._memory = {np: group.empty(nbytes, np.uint8)}
        if device:
            memory = group.empty(_aligned_bytes(device), np.uint8, device="gpu")
            self._memory[array_namespace(memory)] = memory
        self._used = dict.fromkeys(self._memory, 0)

    def buckets(self, arrays: Mapping[str, Array], names: Sequence[Sequence[str]]) -> list[Bucket]:
        """Lay out all buckets; those made earlier must not be used any more.

        Parameters
        ----------
        arrays : mapping of str to Array
            As for the constructor.
        names : sequence of sequence of str
            The names in each bucket, as `assign_buckets` returns them.

        Returns
        -------
        list of Bucket
            In the order in which they become complete. Behind the last one travels one flag per
            array, in the order of `arrays`: who had a gradient. The flags cost no message, except
            with `own_flags` and behind a bucket on a device, where reading them would make the
            host wait: then they follow in a bucket of their own, on the host.
        """
        self._used = dict.fromkeys(self._memory, 0)
        kinds = [array_namespace(arrays[members[0]]) for members in names]
        own_flags = self._own_flags or (bool(kinds) and kinds[-1] is not np)
        buckets = [
            Bucket(
                [(name, arrays[name]) for name in members],
                num_flags=len(arrays) if i == len(names) and not own_flags else 0,
                empty=partial(self._take, kind),
            )
            for i, (kind, members) in enumerate(zip(kinds, names, strict=True), start=1)
        ]
        if buckets and own_flags:
            buckets.append(Bucket([], num_flags=len(arrays), dtype=np.dtype(np.float32)))
        return buckets

    def _take(self, kind: ModuleType, length: int, dtype: DType) -> Array:
        """Return the next `length` elements of a kind of memory."""
        start = self._used[kind]
        stop = start + length * dtype.itemsize
        self._used[kind] = _aligned(stop)
        return self._memory[kind][start:stop].view(dtype)


def _aligned_bytes(arrays: Iterable[Array]) -> int:
    """Return the bytes of buckets that hold these: each array begins on a cache line."""
    return sum(_aligned(array.nbytes) for array in arrays)


def _aligned(nbytes: int) -> int:
    return round_up(nbytes, ALIGNMENT_BYTES)
