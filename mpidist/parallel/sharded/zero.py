"""`ShardedOptimizer`: each rank keeps the optimizer's state of its slice of the parameters only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import numpy as np

from mpidist._closing import Closing
from mpidist._types import MEAN, Array, ReduceOp
from mpidist.arrays.shards import ShardedArray, check_held, copy_in
from mpidist.collectives import all_gather
from mpidist.group.group import ProcessGroup, check_group
from mpidist.nn.module import Context, Module
from mpidist.nn.names import with_present_names
from mpidist.nn.parameter import Parameter
from mpidist.observe.regions import region
from mpidist.optim import Optimizer
from mpidist.optim.optimizer import check_same_state
from mpidist.parallel.data.buckets import BucketSizes
from mpidist.parallel.data.ddp import DDP
from mpidist.parallel.sharded.flat_parameters import NodeStore, by_node, lay_out, make_store
from mpidist.parallel.sharded.gradients import check_model, make_gradients
from mpidist.parallel.sharded.memory import MemoryUse, array_bytes
from mpidist.parallel.sharded.state import (
    ModelState,
    check_names,
    load_numbers,
    merged_state,
    parameter_of,
    read_only,
)

__all__ = ["OptimizerFactory", "ShardedOptimizer", "full_state_dict"]

OptimizerFactory: TypeAlias = Callable[
    [list[tuple[str, Parameter]]], Optimizer | Sequence[Optimizer]
]
"""A function from named parameters to the optimizer of them, or to several, for groups of
parameters that are updated differently. What it gets are this rank's slices, flattened, under the
names of the whole parameters; some may be empty."""


class ShardedOptimizer(Closing):
    """An optimizer whose state is split over the ranks, with the parameters once per node.

    ::

        model = build_model()                        # as if it were alone
        optimizer = ShardedOptimizer(model, group, optimizer=partial(AdamW, lr=1e-3))
        for step, (x, target) in enumerate(batches_of_this_rank):
            mode = Mode(training=True, step=step, sample_offset=group.rank * len(x))
            y, ctx = model.forward(x, mode)
            loss, dy = cross_entropy(y, target)
            optimizer.backward(ctx, dy)              # reduce-scatters while it runs
            clip_grad_norm(optimizer.shards(), 1.0, group=group)
            optimizer.step()                         # all ranks have the new parameters

    Each rank updates one slice of every bucket of parameters, with that slice of the gradient, and
    then all have all of them. The result is that of the same optimizer unsharded.

    Parameters
    ----------
    model : Module or DDP
        A module, built alike on every rank: parameters and buffers are overwritten with rank 0's,
        gradients live in buckets from now on, and each rank receives the reduction of its slices
        only (half of what an all-reduce moves). Or a `DDP`, which all-reduces the gradients as
        ever, so that they can be looked at between backward and step.
    group : ProcessGroup
        The ranks taking part; those of the DDP. A group of its own is made of them.
    optimizer : OptimizerFactory
        For instance ``partial(AdamW, lr=1e-3)``. Its rule must treat each element by itself, as all
        rules of `mpidist.optim` do.
    op : ReduceOp, optional
        `MEAN`, when omitted, or `SUM` over the ranks' gradients; see `DDP`, which has its own.
    sizes : BucketSizes, optional
        How many parameters are reduced and sliced together.

    Attributes
    ----------
    group : ProcessGroup
        The optimizer's own, of the same ranks, in the order of their slices.
    optimizers : tuple of Optimizer
        What the factory made; the optimizers of this rank's slices.
    module : Module
        The model; of a DDP, the one inside.
    model_state : ModelState
        The model's state, for checkpoints and to load values into its parameters.
    shared : bool
        Whether there is one copy of the parameters per node; if not, there is one per rank.

    Raises
    ------
    CollectiveMismatchError
        On every rank, if names, shapes, dtypes or arguments differ between ranks.
    UnsupportedOperationError
        If a parameter lies on a device.
    ValueError
        If a parameter is read-only, as another `ShardedOptimizer` leaves it; if the factory uses a
        parameter twice, or one that it was not given; if `op` is given together with a DDP, or the
        DDP has other ranks.

    Notes
    -----
    Collective over `group`; blocks. So are `step` and `ModelState.load_state_dict`; `backward` is,
    and does not block.

    `Parameter.data` becomes read-only; see [Note: parameters once per node] in
    `mpidist.parallel.sharded.flat_parameters`. To load values into the model, use `model_state`.

    Per step and rank, of P bytes of parameters on N ranks: a reduce-scatter of P (with a DDP, its
    all-reduce), then two barriers on one node; all_gathers of the slices otherwise.

    References
    ----------
    Rajbhandari, Rasley, Ruwase, He (2020), ZeRO: Memory Optimizations Toward Training Trillion
    Parameter Models, section 5.1 (optimizer state partitioning).
    """

    def __init__(
        self,
        model: Module | DDP,
        group: ProcessGroup,
        *,
        optimizer: OptimizerFactory,
        op: ReduceOp | None = None,
        sizes: BucketSizes = BucketSizes(),  # noqa: B008 - frozen
    ) -> None:
        self.module = model.module if isinstance(model, DDP) else model
        self._named = {n: p for n, p in self.module.named_parameters() if p.trainable}
        check_group(group, "ShardedOptimizer")
        check_model(model, group, op)
        self.group = by_node(group, f"{group.name}/shards")
        self._gradients = make_gradients(model, self.group, op or MEAN, sizes)
        arrays = {name: parameter.data for name, parameter in self._named.items()}
        self._store = make_store(self.group, lay_out(arrays, sizes))
        self._flat_of = {name: flat for flat in self._store.flats for name in flat.views}
        self._shards = {
            name: Parameter(self._flat_of[name].part(name, self._flat_of[name].own), name=name)
            for name in self._named
        }
        self._write(arrays)
        made = optimizer(list(self._shards.items()))
        self.optimizers = (made,) if isinstance(made, Optimizer) else tuple(made)
        check_names(self.optimizers, self._shards)
        self._store.end_write()
        for name, parameter in self._named.items():
            parameter.data = read_only(self._flat_of[name].views[name])
        self._gradients.connect(self._store.flats, self._shards)
        self.model_state = ModelState(self._gradients.ddp, self._store)

    @property
    def shared(self) -> bool:
        """Whether there is one copy of the parameters per node; if not, there is one per rank."""
        return isinstance(self._store, NodeStore)

    @property
    def step_count(self) -> int:
        """Number of steps made so far."""
        return self.optimizers[0].step_count

    @property
    def lr(self) -> float:
        """Learning rate of the next step; of the first optimizer, where there are several."""
        return self.optimizers[0].lr

    # -- a step --------------------------------------------------------------------------------

    def backward(self, ctx: Context, dy: Array) -> Array:
        """Run backward, and return while the last gradients may still be under way.

        Parameters
        ----------
        ctx : Context
            What ``model.forward`` returned for these samples.
        dy : Array, shape of the output
            Gradient of this rank's loss by the output.

        Returns
        -------
        Array, shape of the input
            Gradient of this rank's loss by its input.

        Raises
        ------
        RuntimeError
            On misuse, as `DDP.ibackward`; and if an earlier backward's gradients were neither used
            by `step` nor dropped by `zero_grad`.

        Notes
        -----
        Collective over the group; does not block. One reduce-scatter per bucket, started while
        backward is still running (with a DDP, its all-reduces). What uses the gradients waits for
        them. Until then, and until `step` or `zero_grad` if they are scattered, ``parameter.grad``
        raises: no rank has all of it; see `shards`. Inside `no_sync` it is local.
        """
        return self._gradients.backward(ctx, dy)

    def no_sync(self) -> AbstractContextManager[None]:
        """Add up gradients locally; the first `backward` outside reduces them all.

        Notes
        -----
        Local; see `DDP.no_sync`.
        """
        return self._gradients.no_sync()

    def shards(self) -> list[Parameter]:
        """Return this rank's slices of the parameters, with their reduced gradients.

        Returns
        -------
        list of Parameter
            One per parameter, in order, flattened to one dimension; some may be empty. ``grad``
            is None where no rank had one. Only `step` may write ``data``: others are reading.

        Notes
        -----
        Waits for the gradients; else local. For `clip_grad_norm` and `GradScaler.unscale`.
        """
        self._gradients.wait()
        return list(self._shards.values())

    def step(self) -> None:
        """Update every parameter that some rank has a gradient of, on all ranks.

        Raises
        ------
        RuntimeError
            If a parameter has a gradient that was never reduced.

        Notes
        -----
        Collective over the group; blocks. Waits for the gradients; then, on one node, a barrier,
        the update of this rank's slices, and a barrier; on several nodes an all_gather per bucket
        between ranks of the same local rank before the second one. Scattered gradients are used up:
        ``parameter.grad`` is None afterwards. Those of a DDP stay until they are zeroed.
        """
        self._gradients.wait()
        self._store.begin_write()
        for optimizer in self.optimizers:
            optimizer.step()
        with region("publish"):
            self._store.end_write()
        self._gradients.consume()

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters; touches no array.

        Notes
        -----
        Waits for gradients under way, so that a step may be left out; else local.
        """
        self._gradients.zero()

    # -- states --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's part of the optimizer's state.

        Returns
        -------
        dict of str to (str, int or ShardedArray)
            The names and numbers of `Optimizer.state_dict` of the same optimizer unsharded, the
            same on all ranks. In place of its arrays, this rank's slices of them: the living ones,
            not copies. They may be written between two steps; no other rank sees them.

        Notes
        -----
        Local; copies nothing. The whole: `full_state_dict`. The parameters: `model_state`.
        """
        state = merged_state(self.optimizers)
        for key, value in state.items():
            name = parameter_of(key)
            if not isinstance(value, (str, int)):
                start = self._flat_of[name].box(name).offsets[0]
                state[key] = ShardedArray.of_range(self._named[name].shape, start, value)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; this rank's part of the arrays is copied in.

        Parameters
        ----------
        state : mapping
            As `state_dict` returns it, on any number of ranks, or `Optimizer.state_dict` of the
            same optimizer unsharded: whole arrays, or ShardedArrays with at least the slices of
            this rank, in any pieces. The same numbers on all ranks.

        Raises
        ------
        ValueError
            If kind, names, shapes or dtypes differ, or a slice is not there; nothing has been
            changed then.

        Notes
        -----
        Local; to be called on all ranks.
        """
        own = self.state_dict()
        state = with_present_names(state, own)
        check_same_state(own, state)
        check_held("ShardedOptimizer.load_state_dict", own, state)
        copy_in(own, state)
        load_numbers(self.optimizers, state)

    def memory_use(self) -> MemoryUse:
        """Count what this rank holds; an equal share of parameters that are shared.

        Returns
        -------
        MemoryUse
            For `memory_ledger`. With the padding of parameters to cache lines, and, of scattered
            gradients, the reduced slices.

        Notes
        -----
        Local.
        """
        return MemoryUse(
            parameters=self._store.nbytes + self._frozen_nbytes(),
            gradients=self._gradients.nbytes,
            optimizer_state=array_bytes(self.state_dict()),
        )

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for what is under way, and release the optimizer's groups.

        The parameters stay readable, as they are. To write them again, give each memory of its own:
        ``parameter.data = parameter.data.copy()``.
        """
        self._gradients.close()
        self.group.close()

    def _frozen_nbytes(self) -> int:
        return sum(p.nbytes for p in self.module.parameters() if not p.trainable)

    def _write(self, values: Mapping[str, Array]) -> None:
        """Copy this rank's slices out of whole arrays."""
        for name, shard in self._shards.items():
            shard.data[...] = values[name].reshape(-1)[self._flat_of[name].box(name).slices]


def full_state_dict(optimizer: ShardedOptimizer) -> dict[str, Any]:
    """Gather a sharded optimizer's whole state on every rank.

    Parameters
    ----------
    optimizer : ShardedOptimizer
        The optimizer whose state is gathered.

    Returns
    -------
    dict of str to (str, int or Array)
        What `Optimizer.state_dict` of the same optimizer unsharded returns; new arrays. It can be
        loaded there, and by `ShardedOptimizer.load_state_dict` on any number of ranks.

    Notes
    -----
    Collective over the optimizer's group; blocks. An all_gather of the lengths of the slices, and
    one per array of state. Every rank must have memory for all of it: to write it to files, each
    rank writes its own `state_dict`.
    """
    shapes = {name: parameter.shape for name, parameter in optimizer.module.named_parameters()}
    state = merged_state(optimizer.optimizers)
    keys = [key for key, value in state.items() if isinstance(value, np.ndarray)]
    lengths = all_gather(np.array([state[key].size for key in keys], np.int64), optimizer.group)
    for key, counts in zip(keys, lengths.reshape(optimizer.group.size, -1).T.tolist(), strict=True):
        gathered = all_gather(state[key], optimizer.group, counts=counts)
        state[key] = gathered.reshape(shapes[parameter_of(key)])
    return state
