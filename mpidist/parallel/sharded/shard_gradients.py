"""Where a sharded optimizer's gradients come from: a reduce-scatter, or a DDP's all-reduce."""

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
from mpidist.parallel.data.bucket import BucketSizes
from mpidist.parallel.data.ddp import DDP
from mpidist.parallel.sharded.slabs import Slab

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
        Runs backward.
    group : ProcessGroup
        For messages.
    """

    def __init__(self, ddp: DDP, group: ProcessGroup) -> None:
        self.ddp = ddp
        self._group = group
        self._named = dict(ddp.module.named_parameters())
        self._shards: Mapping[str, Parameter] = {}
        self._slabs: Sequence[Slab] = ()
        self._work: Work[None] | None = None
        self._syncing = True

    def bind(self, slabs: Sequence[Slab], shards: Mapping[str, Parameter]) -> None:
        """Take note of who gets what."""
        self._slabs, self._shards = slabs, shards

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
    def take(self) -> None:
        """Wait for the reduction, and give each shard its part; may be called again."""

    @abstractmethod
    def spend(self) -> None:
        """Take note that a step has been made with them."""

    @abstractmethod
    def forget(self) -> None:
        """Let there be no gradient."""

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

    def take(self) -> None:
        """Let each shard's gradient be its part of the parameter's."""
        if self._work is not None:
            self._work.wait()
        for slab in self._slabs:
            for name in slab.layout.shapes:
                shard, grad = self._shards[name], self._named[name].grad
                shard.zero_grad()
                if grad is not None:
                    part = grad.reshape(-1)[slab.box(name).slices]
                    shard.attach(part)
                    shard.add_grad(part)

    def spend(self) -> None:
        """Do nothing: they stay until they are zeroed, as with any optimizer."""

    def forget(self) -> None:
        """Forget the gradients of all parameters."""
        if self._work is not None:
            self._work.wait()
        self._drop()


class ScatteredGradients(ShardGradients):
    """Gradients of which each rank receives the reduction of its own slices only.

    They are a DDP's, but for the hook by which its buckets travel, so overlap, order and misuse are
    its business. Slabs are laid out as its buckets are, and a rank's slice of a bucket is that of
    the slab.

    Between the reduction and the step a parameter's gradient is neither this rank's nor everyone's,
    and so it stays closed (`Parameter.expect`).

    Parameters
    ----------
    module : Module
        The model.
    group : ProcessGroup
        The ranks, in the order of their slices.
    op : ReduceOp
        MEAN or SUM.
    sizes : BucketSizes
        How many gradients travel together.

    Notes
    -----
    Collective over `group`; blocks.
    """

    def __init__(
        self, module: Module, group: ProcessGroup, *, op: ReduceOp, sizes: BucketSizes
    ) -> None:
        self._scatter = _Scatter()
        super().__init__(DDP(module, group, op=op, compression=self._scatter, sizes=sizes), group)
        self._taken = False

    def bind(self, slabs: Sequence[Slab], shards: Mapping[str, Parameter]) -> None:
        """Make memory for the reduced slices, and let the shards' gradients live there."""
        super().bind(slabs, shards)
        for slab in slabs:
            reduced = np.empty_like(slab.own)
            first = self._named[next(iter(slab.layout.shapes))]
            home = first.first_grad() if first.grad is None else first.grad
            if slab.layout.length and home is not None:
                self._scatter.routes[home.ctypes.data] = (slab, reduced)
            for name in slab.layout.shapes:
                shards[name].attach(slab.part(name, reduced))

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's gradients, the reduced slices included."""
        return super().nbytes + sum(slab.own.nbytes for slab in self._slabs)

    def backward(self, ctx: Context, dy: Array) -> Array:
        """Run backward, starting the reduce-scatter of what becomes complete."""
        if self._work is not None:
            raise RuntimeError(
                f"ShardedOptimizer.backward on {self._group}: the gradients of the last backward "
                "have been reduced and not used; step() or zero_grad() first, and for several "
                "backward passes per step run all but the last one inside no_sync()"
            )
        return super().backward(ctx, dy)

    def take(self) -> None:
        """Wait for the slices."""
        if self._work is None:
            self._check_reduced()
            return
        if self._taken:
            return
        self._work.wait()
        self._taken = True
        for name, parameter in self._named.items():
            shard = self._shards[name]
            if parameter.grad is not None:
                home = shard.first_grad()
                if home is not None:
                    shard.add_grad(home)
            parameter.expect(0)

    def spend(self) -> None:
        """Forget them: the ranks hold no whole reduced gradient that could be used again."""
        self.forget()

    def forget(self) -> None:
        """Wait for the slices, if they are under way, and forget all gradients."""
        if self._work is not None:
            self._work.wait()
            if self._taken:
                for parameter in self._named.values():
                    parameter.release()
        self._taken = False
        self._drop()

    def close(self) -> None:
        """Wait for what is under way, and release the DDP's group."""
        self.forget()
        self.ddp.close()

    def _check_reduced(self) -> None:
        for name, parameter in self._named.items():
            if parameter.grad is not None:
                raise RuntimeError(
                    f"ShardedOptimizer on {self._group}: parameter '{name}' holds a gradient of "
                    "this rank alone; run the last backward of a step by optimizer.backward(ctx, "
                    "dy), outside no_sync(), which reduces them"
                )


class _Scatter:
    """The hook by which buckets travel: each rank gets the reduction of its slice."""

    def __init__(self) -> None:
        self.routes: dict[int, tuple[Slab, Array]] = {}

    def __call__(self, bucket: Array, group: ProcessGroup, op: ReduceOp) -> Work[Any]:
        if not bucket.size:
            return ireduce_scatter(bucket, group, op=op, counts=(0,) * group.size)
        slab, reduced = self.routes[bucket.ctypes.data]
        return ireduce_scatter(bucket, group, op=op, out=reduced, counts=slab.counts)


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
