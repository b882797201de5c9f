"""The gradients of a sharded optimizer: from a reduce-scatter, or from a DDP's all-reduce."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from mpidist._types import Array, ReduceOp
from mpidist.arrays.namespaces import is_host
from mpidist.backends.work import Work
from mpidist.collectives import ireduce_scatter
from mpidist.errors import UnsupportedOperationError
from mpidist.group import ProcessGroup
from mpidist.nn.module import Context, Module
from mpidist.nn.parameter import Parameter
from mpidist.parallel.data.buckets import Bucket, BucketSizes
from mpidist.parallel.data.ddp import DDP
from mpidist.parallel.sharded.flat_parameters import FlatParameters

__all__ = [
    "ReducedGradients",
    "ScatteredGradients",
    "ShardGradients",
    "check_model",
    "make_gradients",
]


class ShardGradients(ABC):
    """Gives each shard its part of the reduced gradient.

    Parameters
    ----------
    ddp : DDP
        Runs backward and starts the exchange of full buckets.
    group : ProcessGroup
        The group of the optimizer; named in errors.
    """

    def __init__(self, ddp: DDP, group: ProcessGroup) -> None:
        self.ddp = ddp
        self._group = group
        self._named = {n: p for n, p in ddp.module.named_parameters() if p.trainable}
        self._shards: Mapping[str, Parameter] = {}
        self._flats: Sequence[FlatParameters] = ()
        self._work: Work[None] | None = None
        self._syncing = True

    def connect(self, flats: Sequence[FlatParameters], shards: Mapping[str, Parameter]) -> None:
        """Set the shards, and the flat arrays that they are slices of."""
        self._flats, self._shards = flats, shards

    def backward(self, ctx: Context, dy: Array) -> Array:
        """Run backward, starting the reduction of what becomes complete."""
        dx, work = self.ddp.ibackward(ctx, dy)
        if self._syncing:
            self._work = work
        return dx

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let `backward` add up gradients locally."""
        before, self._syncing = self._syncing, False
        try:
            with self.ddp.no_sync():
                yield
        finally:
            self._syncing = before

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's gradients."""
        return sum(parameter.grad_nbytes for parameter in self._named.values())

    @abstractmethod
    def wait(self) -> None:
        """Wait for the reduction, and give each shard its part; may be called again."""

    @abstractmethod
    def consume(self) -> None:
        """Release what a step has used."""

    @abstractmethod
    def zero(self) -> None:
        """Forget all gradients."""

    def close(self) -> None:
        """Wait for what is under way."""
        if self._work is not None:
            self._work.wait()

    def _drop(self) -> None:
        for parameter in (*self._named.values(), *self._shards.values()):
            parameter.zero_grad()
        self._work = None


class ReducedGradients(ShardGradients):
    """Gradients that are already the same on all ranks; each shard looks at its part of them."""

    def wait(self) -> None:
        """Let each shard's gradient be its part of the parameter's."""
        if self._work is not None:
            self._work.wait()
        for flat in self._flats:
            for name in flat.layout.shapes:
                shard, grad = self._shards[name], self._named[name].grad
                shard.zero_grad()
                if grad is not None:
                    part = grad.reshape(-1)[flat.box(name).slices]
                    shard.attach(part)
                    shard.add_grad(part)

    def consume(self) -> None:
        """Do nothing: they stay until they are zeroed, as with any optimizer."""

    def zero(self) -> None:
        """Forget the gradients of all parameters."""
        if self._work is not None:
            self._work.wait()
        self._drop()


class ScatteredGradients(ShardGradients):
    """Gradients of which each rank receives the reduction of its own slices only.

    They are a DDP's, but for what happens to its full buckets, so overlap, order and misuse are
    its business. The parameters' flat arrays are laid out as its buckets are, and a rank's slice of
    a bucket is that of the flat array.

    Between the reduction and the step a parameter's gradient is neither this rank's nor everyone's,
    and so it stays closed (`Parameter.expect`).

    Parameters
    ----------
    module : Module
        The model; a `DDP` is made around it.
    group : ProcessGroup
        The ranks, in the order of their slices.
    op : ReduceOp
        `MEAN` or `SUM` of the ranks' gradients.
    sizes : BucketSizes
        How many gradients travel together.

    Notes
    -----
    Collective over `group`; blocks.
    """

    def __init__(
        self, module: Module, group: ProcessGroup, *, op: ReduceOp, sizes: BucketSizes
    ) -> None:
        self._scatters: list[_ReduceScatter] = []
        ddp = DDP(module, group, op=op, sizes=sizes, exchange=self._make_scatter)
        super().__init__(ddp, group)
        self._received = False

    def connect(self, flats: Sequence[FlatParameters], shards: Mapping[str, Parameter]) -> None:
        """Make memory for the reduced slices, and let the shards' gradients live there."""
        super().connect(flats, shards)
        scatter_of = {name: scatter for scatter in self._scatters for name in scatter.bucket.grads}
        for flat in flats:
            reduced = np.empty_like(flat.own)
            for name in flat.layout.shapes:
                shards[name].attach(flat.part(name, reduced))
                scatter_of[name].connect(reduced, flat.counts)

    def _make_scatter(self, bucket: Bucket, group: ProcessGroup, op: ReduceOp) -> _ReduceScatter:
        scatter = _ReduceScatter(bucket, group, op)
        self._scatters.append(scatter)
        return scatter

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's gradients, the reduced slices included."""
        return super().nbytes + sum(flat.own.nbytes for flat in self._flats)

    def backward(self, ctx: Context, dy: Array) -> Array:
        """Run backward, starting the reduce-scatter of what becomes complete."""
        if self._work is not None:
            raise RuntimeError(
                f"ShardedOptimizer.backward on {self._group}: the gradients of the last backward "
                "have been reduced and not used; step() or zero_grad() first, and for several "
                "backward passes per step run all but the last one inside no_sync()"
            )
        return super().backward(ctx, dy)

    def wait(self) -> None:
        """Wait for this rank's slices, and count them as the shards' gradients."""
        if self._work is None:
            self._check_reduced()
            return
        if self._received:
            return
        self._work.wait()
        self._received = True
        for name, parameter in self._named.items():
            shard = self._shards[name]
            if parameter.grad is not None:
                memory = shard.first_grad()
                if memory is not None:
                    shard.add_grad(memory)
            parameter.expect(0)

    def consume(self) -> None:
        """Forget them: the ranks hold no whole reduced gradient that could be used again."""
        self.zero()

    def zero(self) -> None:
        """Wait for the slices, if they are under way, and forget all gradients."""
        if self._work is not None:
            self._work.wait()
            if self._received:
                for parameter in self._named.values():
                    parameter.release()
        self._received = False
        self._drop()

    def close(self) -> None:
        """Wait for what is under way, and release the DDP's group."""
        self.zero()
        self.ddp.close()

    def _check_reduced(self) -> None:
        for name, parameter in self._named.items():
            if parameter.grad is not None:
                raise RuntimeError(
                    f"ShardedOptimizer on {self._group}: parameter '{name}' holds a gradient of "
                    "this rank alone; run the last backward of a step by optimizer.backward(ctx, "
                    "dy), outside no_sync(), which reduces them"
                )


class _ReduceScatter:
    """What happens to a full bucket: each rank receives the reduction of its slice.

    Parameters
    ----------
    bucket : Bucket
        The bucket whose gradients are reduced.
    group : ProcessGroup
        The ranks, in the order of their slices.
    op : ReduceOp
        `MEAN` or `SUM` of the ranks' gradients.
    """

    def __init__(self, bucket: Bucket, group: ProcessGroup, op: ReduceOp) -> None:
        self.bucket = bucket
        self._group = group
        self._op = op
        self._reduced: Array | None = None
        self._counts: tuple[int, ...] = ()

    def connect(self, reduced: Array, counts: tuple[int, ...]) -> None:
        """Set where this rank's reduced slice goes, and how long each rank's is."""
        self._reduced = reduced
        self._counts = counts

    def __call__(self) -> Work[Any]:
        return ireduce_scatter(
            self.bucket.data, self._group, op=self._op, out=self._reduced, counts=self._counts
        )


def make_gradients(
    model: Module | DDP, group: ProcessGroup, op: ReduceOp, sizes: BucketSizes
) -> ShardGradients:
    """Take a DDP's gradients, or scatter those of a module; collective over `group`."""
    if isinstance(model, DDP):
        return ReducedGradients(model, group)
    return ScatteredGradients(model, group, op=op, sizes=sizes)


def check_model(model: Module | DDP, group: ProcessGroup, op: ReduceOp | None) -> None:
    """Raise unless the model's parameters can be sharded over the group."""
    if isinstance(model, DDP):
        _check_ddp(model, group, op)
    module = model.module if isinstance(model, DDP) else model
    for name, parameter in module.named_parameters():
        if not is_host(parameter.data):
            raise UnsupportedOperationError(
                f"ShardedOptimizer on {group}: parameter '{name}' lies on a device; only host "
                "arrays are sharded"
            )
        if not parameter.data.flags.writeable:
            raise ValueError(
                f"ShardedOptimizer on {group}: parameter '{name}' is read-only, as another "
                "ShardedOptimizer leaves it; for parameters that are updated differently let the "
                "factory return several optimizers, or first give it memory of its own "
                "(parameter.data = parameter.data.copy())"
            )


def _check_ddp(ddp: DDP, group: ProcessGroup, op: ReduceOp | None) -> None:
    if op is not None:
        raise ValueError(
            f"ShardedOptimizer on {group}: op belongs to the DDP, which reduces the gradients; "
            "give it there"
        )
    if sorted(ddp.group.ranks) != sorted(group.ranks):
        raise ValueError(
            f"ShardedOptimizer on {group}: its ranks of the world are {group.ranks}, the DDP's "
            f"are {ddp.group.ranks}; give the group that the DDP was made over"
        )
