"""`Bucket`: gradients that travel together, who of them is missing, and the work under way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpidist._types import Array, DType, ReduceOp
from mpidist.arrays.flat import FlatBuffer
from mpidist.arrays.namespaces import array_namespace
from mpidist.backends.work import Work
from mpidist.group import ProcessGroup
from mpidist.parallel.data.compression import Compression, Hook, exchange_for

__all__ = [
    "ALIGNMENT_BYTES",
    "BUCKET_BYTES",
    "FIRST_BUCKET_BYTES",
    "Bucket",
    "BucketSizes",
    "assign_buckets",
]

BUCKET_BYTES = 25 << 20
"""Size at which a bucket is closed: large enough for full bandwidth, small enough that many are
under way while backward still runs. PyTorch's default too; Li et al. (2020), section 3.2.2."""

FIRST_BUCKET_BYTES = 1 << 20
"""Size of the first bucket, so that communication begins early; PyTorch's default too."""

ALIGNMENT_BYTES = 64
"""Every gradient begins on a cache line of its own."""


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
        The names in each bucket, in reverse order of registration. The buckets stand in the order
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
    """Gradients in one flat array, all-reduced by one call.

    A bucket is *filling* until nobody is missing, then *complete*; `launch` puts it *in flight*;
    after `wait`, `reset` makes it filling again.

    Parameters
    ----------
    like : sequence of (str, Array)
        Names of the gradients, and arrays of their shapes; one dtype and one kind of device.
    compression : Compression, Hook or None
        How the bucket travels.
    num_flags : int, optional
        Numbers that travel behind the gradients.
    dtype : dtype, optional
        Of a bucket without gradients.
    empty : callable, optional
        Gives memory of a length and a dtype, of the gradients' kind, beginning on a cache line.

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
        Gradients that have not arrived.
    """

    def __init__(
        self,
        like: Sequence[tuple[str, Array]],
        *,
        compression: Compression | Hook | None,
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
        self._exchange = exchange_for(compression, self.data)
        self._work: Work[Any] | None = None

    def arrive(self, name: str) -> None:
        """Count the gradient `name` as complete.

        Raises
        ------
        RuntimeError
            If it has arrived before.
        """
        if name not in self.missing:
            raise RuntimeError(
                f"the gradient of '{name}' is complete already and its bucket may be in "
                "communication; wait() before the next round"
            )
        self.missing.remove(name)

    def launch(self, group: ProcessGroup, op: ReduceOp) -> None:
        """Start the all-reduce of the whole bucket, in place; does not block."""
        self._work = self._exchange(self.data, group, op)

    def done(self) -> bool:
        """Whether the bucket's communication is complete; makes progress."""
        return self._work is not None and self._work.done()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until `grads` and `flags` hold the reduction."""
        if self._work is not None:
            self._work.wait(timeout)

    def reset(self) -> None:
        """Wait for all gradients again."""
        self._work = None
        self.missing = set(self.grads)
