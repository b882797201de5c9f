"""`ShardedOptimizer`: each rank keeps the optimizer's state of its slice of the parameters only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from mpidist._closing import Closing
from mpidist._types import MEAN, Array, ReduceOp
from mpidist.arrays.namespaces import to_host
from mpidist.arrays.shards import ShardedArray, check_held, copy_in
from mpidist.collectives import all_gather
from mpidist.errors import UnsupportedOperationError
from mpidist.group.group import ProcessGroup, check_group
from mpidist.nn.module import Context, Module
from mpidist.nn.names import with_present_names
from mpidist.nn.parameter import Parameter
from mpidist.observe.regions import region
from mpidist.optim import Optimizer
from mpidist.optim.optimizer import check_same_state
from mpidist.parallel.data.buckets import BucketSizes
from mpidist.parallel.data.ddp import DDP
from mpidist.parallel.data.verify import verify_same
from mpidist.parallel.sharded.flat_parameters import Cut
from mpidist.parallel.sharded.fsdp import FSDP
from mpidist.parallel.sharded.mapped_files import mapped_arrays
from mpidist.parallel.sharded.memory import MemoryUse, array_bytes
from mpidist.parallel.sharded.options import ShardingStrategy
from mpidist.parallel.sharded.parameter_shards import HOST, ParameterShards, check_can_be_sharded
from mpidist.parallel.sharded.state import (
    ModelState,
    check_elementwise,
    check_parameters,
    load_numbers,
    merged_state,
    parameter_of,
)
from mpidist.parallel.sharded.stores import by_node, owners_by_node
from mpidist.parallel.sharded.units import find_units, tied_over_parts

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
    model : Module, FSDP or DDP
        An `FSDP`, whose shards are updated. Or a module, built alike on every rank, of which an
        `FSDP` is made that has buckets for units and is cut at any element: parameters and buffers
        are overwritten with rank 0's, and each rank receives the reduction of its slices only (half
        of what an all-reduce moves). Or a `DDP`, which all-reduces the gradients as ever, so that
        they can be looked at between backward and step.
    group : ProcessGroup, optional
        The ranks taking part; those of the DDP. A group of its own is made of them. An FSDP has
        one already.
    optimizer : OptimizerFactory
        For instance ``partial(AdamW, lr=1e-3)``. Its rule must treat each element by itself, as all
        rules of `mpidist.optim` do, unless the model is an FSDP with ``cut=Cut.PARAMETERS``.
    op : ReduceOp, optional
        `MEAN`, when omitted, or `SUM` over the ranks' gradients; DDP and FSDP have their own.
    sizes : BucketSizes, optional
        How many parameters are reduced and sliced together, of a module or a DDP; an FSDP has its
        units.

    Attributes
    ----------
    group : ProcessGroup
        The ranks, in the order of their slices.
    parameter_shards : ParameterShards
        The memory of the parameters, and the slices of this rank.
    optimizers : tuple of Optimizer
        What the factory made; the optimizers of this rank's slices.
    module : Module
        The model; of a DDP or an FSDP, the one inside.
    model_state : ModelState
        The model's state, for checkpoints and to load values into its parameters.
    shared : bool
        Whether there is one copy of the parameters per node; if not, there is one per rank.

    Raises
    ------
    TypeError
        If `model` is none, or `optimizer` no such function.
    CollectiveMismatchError
        On every rank, if names, shapes, dtypes or arguments differ between ranks, or what the
        factory makes: kinds, rules, learning rates.
    UnsupportedOperationError
        If some parameters lie on a device and some do not; if a parameter is tied over stages of a
        pipeline, and the nodes have different numbers of the ranks.
    ValueError
        If a parameter is read-only, as another `ShardedOptimizer` leaves it, or the FSDP has one;
        if the factory uses a parameter twice, or one that it was not given; if its optimizer needs
        whole parameters that are cut; if `op` is given together with a DDP or an FSDP, or that has
        other ranks; if `sizes` is given together with an FSDP.

    Notes
    -----
    Collective over `group`; blocks. So are `step` and `ModelState.load_state_dict`; `backward` is,
    and does not block.

    `Parameter.data` becomes read-only; see [Note: parameters once per node] in
    `mpidist.parallel.sharded.stores`. To load values into the model, use `model_state`.

    Per step and rank, of P bytes of parameters on N ranks: a reduce-scatter of P and a byte per
    parameter (with a DDP, its all-reduce), then two barriers on one node; all_gathers of the slices
    otherwise.

    References
    ----------
    Rajbhandari, Rasley, Ruwase, He (2020), ZeRO: Memory Optimizations Toward Training Trillion
    Parameter Models, section 5.1 (optimizer state partitioning).
    """

    def __init__(
        self,
        model: Module | DDP | FSDP,
        group: ProcessGroup | None = None,
        *,
        optimizer: OptimizerFactory,
        op: ReduceOp | None = None,
        sizes: BucketSizes | None = None,
    ) -> None:
        if not callable(optimizer):
            raise _no_factory(optimizer)
        self._owns_model = not isinstance(model, FSDP)
        self._model = _sharded(model, group, op, sizes)
        self.module = self._model.module
        self.group = self._model.group
        self.parameter_shards = self._model.parameter_shards
        self.model_state = self._model.model_state
        shards = self.parameter_shards.shards
        self.optimizers = _made_by(optimizer, shards)
        check_parameters(self.optimizers, shards)
        if self._model.cut is not Cut.PARAMETERS:
            check_elementwise(self.optimizers)
        verify_same(
            tuple((f"optimizer {i}", repr(made)) for i, made in enumerate(self.optimizers)),
            self.group,
            operation="ShardedOptimizer",
        )
        if self.parameter_shards.offload not in (None, HOST):
            self._move_state(self.parameter_shards.offload)
        self._model.has_optimizer = True

    def _move_state(self, directory: str) -> None:
        """Keep the state in a file."""
        sizes = [array.nbytes for o in self.optimizers for array in o.state_arrays()]
        arrays = iter(mapped_arrays(sizes, directory, self.group))

        def moved(array: Array) -> Array:
            memory: Array = next(arrays).view(array.dtype).reshape(array.shape)
            if array.any():  # else pages of zeros need not be written
                memory[...] = array
            return memory

        for optimizer in self.optimizers:
            optimizer.move_state(moved)

    @property
    def shared(self) -> bool:
        """Whether there is one copy of the parameters per node; if not, there is one per rank."""
        return self.parameter_shards.store.shared

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
            On misuse, as `DDP.ibackward`.

        Notes
        -----
        Collective over the group; blocks only for the gradients of an earlier backward. One
        reduce-scatter per unit, started while backward is still running (with a DDP, its
        all-reduces). What uses the gradients waits for them. Until then, and until `step` or
        `zero_grad` if they are scattered, ``parameter.grad`` raises: no rank has all of it; see
        `shards`. A second backward adds to them. Inside `no_sync` no gradient is sent.
        """
        self._model.wait()
        return self._model.ibackward(ctx, dy)[0]

    def no_sync(self) -> AbstractContextManager[None]:
        """Add up gradients locally; the first `backward` outside reduces them all.

        Notes
        -----
        Local; see `DDP.no_sync`. `FSDP.no_sync` can leave out the sum over nodes alone.
        """
        return self._model.no_sync()

    def shards(self) -> list[Parameter]:
        """Return this rank's slices of the parameters, with their reduced gradients.

        Returns
        -------
        list of Parameter
            One per parameter, in order; some may be empty. Flattened to one dimension, unless the
            model is an FSDP that is cut elsewhere. ``grad`` is None where no rank had one. Only
            `step` may write ``data``: others are reading.

        Notes
        -----
        Waits for the gradients; else local. For `clip_grad_norm` and `GradScaler.unscale`.
        """
        return self._model.shards()

    def step(self) -> None:
        """Update every parameter that some rank has a gradient of, on all ranks.

        Raises
        ------
        RuntimeError
            If a parameter has a gradient that was never reduced, or has been given another array;
            if it is called within a pass of an FSDP, or inside `FSDP.whole`.

        Notes
        -----
        Collective over the group; blocks. Waits for the gradients; then, on one node, a barrier,
        the update of this rank's slices, and a barrier; on several nodes an all_gather per bucket
        between ranks of the same local rank before the second one. Scattered gradients are used up:
        ``parameter.grad`` is None afterwards. Those of a DDP stay until they are zeroed.
        """
        self._model.check_can_write("ShardedOptimizer.step")
        self.parameter_shards.check_in_place("ShardedOptimizer.step")
        self._model.shards()
        self.parameter_shards.begin_write()
        for optimizer in self.optimizers:
            optimizer.step()
        with region("publish"):
            self.parameter_shards.end_write()
        if isinstance(self._model, FSDP):
            self._model.zero_grad()  # the ranks hold no whole gradient that could be used again

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters; touches no array.

        Notes
        -----
        Waits for gradients under way, so that a step may be left out; else local.
        """
        self._model.zero_grad()

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
        return merged_state(self.optimizers)

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
        use, state = self._model.memory_use(), array_bytes(self.state_dict())
        if self.parameter_shards.offload is not None:
            return replace(use, offloaded=use.offloaded + state)
        return replace(use, optimizer_state=state)

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for what is under way, and release the groups that were made here.

        The parameters stay readable, as they are. To write them again, give each memory of its own:
        ``parameter.data = parameter.data.copy()``. An `FSDP` or a `DDP` that was given stays open.
        """
        self._model.has_optimizer = False
        if self._owns_model:
            self._model.close()


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
    group = optimizer.parameter_shards.group
    state = merged_state(optimizer.optimizers)
    own = {key: _flattened(v) for key, v in state.items() if isinstance(v, ShardedArray)}
    lengths = all_gather(np.array([array.size for array in own.values()], np.int64), group)
    for (key, array), counts in zip(own.items(), lengths.reshape(group.size, -1).T, strict=True):
        gathered = all_gather(array, group, counts=counts.tolist())
        state[key] = gathered.reshape(shapes[parameter_of(key)])
    return state


def _flattened(sharded: ShardedArray) -> Array:
    """Return a slice of an array, a range of its elements in C order, on the host."""
    pieces = [to_host(piece).reshape(-1) for piece in sharded.pieces.values()]
    return np.concatenate([np.empty(0, sharded.dtype), *pieces])


class _ShardedDDP:
    """A `DDP` whose parameters are sharded: of whole gradients, each shard looks at its part.

    It has what a `ShardedOptimizer` asks of an `FSDP`.
    """

    cut = Cut.ELEMENTS
    has_optimizer = False  # another one is refused, since the parameters are read-only

    def __init__(self, ddp: DDP, group: ProcessGroup, sizes: BucketSizes) -> None:
        self._ddp = ddp
        self.module = ddp.module
        self.no_sync = ddp.no_sync
        self.wait = ddp.wait
        self.ibackward = ddp.ibackward
        self._named = dict(ddp.module.named_parameters())
        check_can_be_sharded(self._named, "ShardedOptimizer", group)
        _check_same_slices(ddp.module, group)
        self.group = by_node(group, f"{group.name}/shards")
        arrays = {name: parameter.data for name, parameter in self._named.items()}
        layouts = [unit.layout(arrays, self.cut) for unit in find_units(ddp.module, sizes)]
        self.parameter_shards = ParameterShards(self._named, layouts, self.group)
        self.model_state = ddp.model_state = ModelState(ddp, self.parameter_shards)

    def shards(self) -> list[Parameter]:
        self.wait()
        for name, shard in self.parameter_shards.shards.items():
            shard.zero_grad()
            grad = self._named[name].grad
            if grad is not None:
                part = self.parameter_shards.part_of(name, grad)
                shard.attach(part)
                shard.add_grad(part)
        return list(self.parameter_shards.shards.values())

    def check_can_write(self, operation: str) -> None:
        """They can always be written."""

    def zero_grad(self) -> None:
        self.wait()
        for parameter in (*self._named.values(), *self.parameter_shards.shards.values()):
            parameter.zero_grad()

    def memory_use(self) -> MemoryUse:
        gradients = sum(parameter.grad_nbytes for parameter in self._named.values())
        return MemoryUse(self.parameter_shards.nbytes, gradients, 0)

    def close(self) -> None:
        self.wait()
        self.group.close()


def _check_same_slices(module: Module, group: ProcessGroup) -> None:
    """Raise unless all stages that hold a tied parameter cut it alike; collective."""
    tied = sorted(tied_over_parts(module))
    if tied and owners_by_node(group) < group.size:
        raise UnsupportedOperationError(
            f"ShardedOptimizer on {group}: parameter '{tied[0]}' is held by other stages of the "
            "pipeline, too, whose ranks would cut it into other slices, since nodes have different "
            "numbers of ranks of the data axis; place equally many on each node, or take an "
            "optimizer of pipe.named_parameters()"
        )


def _made_by(factory: OptimizerFactory, shards: Mapping[str, Parameter]) -> tuple[Optimizer, ...]:
    """Return what the factory makes of this rank's slices."""
    made = factory(list(shards.items()))
    optimizers = tuple(made) if isinstance(made, (list, tuple)) else (made,)
    if not all(isinstance(optimizer, Optimizer) for optimizer in optimizers):
        raise _no_factory(made)
    return optimizers


def _no_factory(got: object) -> TypeError:
    return TypeError(
        "ShardedOptimizer: optimizer must be a function that makes an Optimizer, or several, of "
        f"this rank's slices, such as partial(AdamW, lr=1e-3); got {got!r}"
    )


def _sharded(
    model: Module | DDP | FSDP,
    group: ProcessGroup | None,
    op: ReduceOp | None,
    sizes: BucketSizes | None,
) -> FSDP | _ShardedDDP:
    """Return the model with its parameters sharded."""
    if not isinstance(model, (Module, DDP, FSDP)):
        raise TypeError(
            "ShardedOptimizer: expected a Module, an FSDP or a DDP, got one of type "
            f"{type(model).__name__}"
        )
    if group is not None or not isinstance(model, FSDP):
        check_group(group, "ShardedOptimizer")
    if isinstance(model, (DDP, FSDP)):
        _check_strategy(model, group, op)
    if isinstance(model, FSDP):
        _check_free(model, sizes)
        return model
    sizes = BucketSizes() if sizes is None else sizes
    assert group is not None, "it has been checked"
    if isinstance(model, DDP):
        return _ShardedDDP(model, group, sizes)
    return FSDP(
        model,
        group,
        strategy=ShardingStrategy.SHARD_GRAD_OP,
        units=sizes,
        op=op or MEAN,
        cut=Cut.ELEMENTS,
    )


def _check_free(model: FSDP, sizes: BucketSizes | None) -> None:
    if sizes is not None:
        raise ValueError(
            f"ShardedOptimizer on {model.group}: sizes are those of the buckets of a module or a "
            "DDP; what travels together in an FSDP is said by FSDP(model, group, units=...)"
        )
    if model.has_optimizer:
        raise ValueError(
            f"ShardedOptimizer on {model.group}: the FSDP has one already, whose step uses the "
            "gradients up; for parameters that are updated differently let its factory return "
            "several optimizers, or close() the first ShardedOptimizer"
        )


def _check_strategy(model: DDP | FSDP, group: ProcessGroup | None, op: ReduceOp | None) -> None:
    name = type(model).__name__
    if op is not None:
        raise ValueError(
            f"ShardedOptimizer on {model.group}: op belongs to the {name}, which reduces the "
            "gradients; give it there"
        )
    if group is not None and sorted(model.group.ranks) != sorted(group.ranks):
        raise ValueError(
            f"ShardedOptimizer on {group}: its ranks of the world are {group.ranks}, the {name}'s "
            f"are {model.group.ranks}; give the group that the {name} was made over"
        )
