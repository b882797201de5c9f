"""What a checkpoint holds of a sharded model and its optimizers: this rank's slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpidist._types import Array
from mpidist.arrays.namespaces import like_device
from mpidist.arrays.shards import check_held, copy_in
from mpidist.nn.names import with_present_names
from mpidist.nn.parameter import Parameter
from mpidist.optim import Optimizer
from mpidist.parallel.data.data_parallel import BUCKET_ORDER, DataParallel
from mpidist.parallel.sharded.parameter_shards import ParameterShards

__all__ = [
    "ModelState",
    "check_elementwise",
    "check_parameters",
    "load_numbers",
    "merged_state",
    "parameter_of",
]


class ModelState:
    """The state of a model whose parameters are sharded: this rank's slices of them.

    It is ``model_state`` of a `ShardedOptimizer`, and what an `FSDP` gives a checkpoint. A
    checkpoint holds it where a run that shards nothing has its `DDP` or its module; each of them
    loads what another has saved.

    Parameters
    ----------
    model : DataParallel
        The `DDP` or `FSDP` around the model.
    parameters : ParameterShards
        Its parameters.
    """

    def __init__(self, model: DataParallel, parameters: ParameterShards) -> None:
        self._model = model
        self._parameters = parameters

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's part of the model's state.

        Returns
        -------
        dict of str to (ShardedArray, Array, list of str or None)
            What `DDP.state_dict` returns, but for the parameters: of those the slices that this
            rank owns, the living ones, which the next step changes. They cannot be written, since
            other ranks read this memory: put other arrays in their place, and give the mapping to
            `load_state_dict`. Buffers are this rank's own, and may be written.

        Notes
        -----
        Local; copies nothing. The slices of all ranks are the parameters, each element once; with
        `ShardingStrategy.HYBRID_SHARD` once per node, with `NO_SHARD` once per rank.
        """
        state: dict[str, Any] = {**self._parameters.state_dict(), **self._buffers()}
        order = self._model.order
        return state | {BUCKET_ORDER: None if order is None else list(order)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy values into the model's parameters and buffers, each rank into its slices.

        Parameters
        ----------
        state : mapping
            As `state_dict` returns it: the same names, shapes and dtypes. Of parameters, whole
            arrays, or ShardedArrays with at least the slices of this rank, in any pieces. Without
            an order of the buckets, as `Module.state_dict` returns it, these stay as they are.
            Buffers and the order are the same on all ranks.

        Raises
        ------
        ValueError
            If names, shapes or dtypes differ, or a slice is not there; nothing has been changed
            then.
        RuntimeError
            If gradients are under way.

        Notes
        -----
        Collective over the model's group; blocks. As much communication as a step, without
        gradients: no rank writes before all ranks of its node have called this, and all see the new
        values when it returns.
        """
        self._model.check_state_dict(state)
        held = self._parameters.held
        buffers = self._buffers()
        state = with_present_names(state, [*held, *buffers])
        check_held("ModelState.load_state_dict", held, state)
        self._parameters.begin_write()
        copy_in(held, state)
        for name, buffer in buffers.items():
            buffer[...] = like_device(buffer, state[name])
        self._parameters.end_write()
        self._model.lay_out(state)

    def _buffers(self) -> dict[str, Array]:
        return dict(self._model.module.named_buffers())


def parameter_of(key: str) -> str:
    """Return the name of the parameter that an array of state belongs to."""
    return key.rpartition("/")[0]


def merged_state(optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Return the state of several optimizers of different parameters as one."""
    kinds = "+".join(type(optimizer).__name__ for optimizer in optimizers)
    state: dict[str, Any] = {"kind": kinds, "step": optimizers[0].step_count}
    for optimizer in optimizers:
        state.update({k: v for k, v in optimizer.state_dict().items() if k not in state})
    return state


def load_numbers(optimizers: Sequence[Optimizer], state: Mapping[str, Any]) -> None:
    """Give several optimizers the numbers of what `merged_state` returned; arrays stay."""
    for optimizer in optimizers:
        own = optimizer.state_dict()
        numbers = {k: state[k] for k, value in own.items() if isinstance(value, (str, int))}
        optimizer.load_state_dict(own | numbers | {"kind": type(optimizer).__name__})


def check_parameters(optimizers: Sequence[Optimizer], shards: Mapping[str, Parameter]) -> None:
    """Refuse optimizers of other parameters than they were given, or of one twice."""
    seen: set[str] = set()
    for optimizer in optimizers:
        updated = optimizer.parameters()
        wrong = sorted(name for name, p in updated.items() if shards.get(name) is not p)
        wrong = wrong or sorted(updated.keys() & seen)
        if wrong:
            raise ValueError(
                f"ShardedOptimizer: the factory made an optimizer of {wrong[:5]}; each of the "
                "parameters that it is given, which are this rank's slices, may be used once, "
                "under its name; those of the module may not"
            )
        seen |= updated.keys()
    if not seen:
        raise ValueError("ShardedOptimizer: the factory made no optimizer")


def check_elementwise(optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers that need whole parameters, where a rank has slices of them."""
    for optimizer in optimizers:
        if optimizer.needs_whole:
            raise ValueError(
                f"ShardedOptimizer: {type(optimizer).__name__} needs whole parameters, and these "
                "are cut into slices; make the model FSDP(model, group, cut=Cut.PARAMETERS)"
            )
