"""What a checkpoint holds of a sharded model and its optimizers: this rank's slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpidist._types import Array
from mpidist.arrays.shards import ShardedArray, check_held, copy_in
from mpidist.nn.names import with_present_names
from mpidist.nn.parameter import Parameter
from mpidist.optim import Optimizer
from mpidist.parallel.data.ddp import DDP
from mpidist.parallel.sharded.flat_parameters import ParameterStore

__all__ = [
    "ModelState",
    "check_names",
    "load_numbers",
    "merged_state",
    "parameter_of",
    "read_only",
]


class ModelState:
    """The state of a `ShardedOptimizer`'s model: of parameters, this rank's slices.

    It is `ShardedOptimizer.model_state`. A checkpoint holds it where a run without a sharded
    optimizer has its `DDP` or its module; each of them loads what another has saved.

    Parameters
    ----------
    ddp : DDP
        The `DDP` around the model.
    store : ParameterStore
        The memory of its parameters.
    """

    def __init__(self, ddp: DDP, store: ParameterStore) -> None:
        self._ddp = ddp
        self._store = store

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's part of the model's state.

        Returns
        -------
        dict of str to (ShardedArray, Array, list of str or None)
            What `DDP.state_dict` returns, but for the parameters: of those the slices that this
            rank owns, the living ones, which the next step changes. They cannot be written, since
            other ranks read this memory: put other arrays in their place, and give the mapping to
            `load_state_dict`. Buffers and parameters that are not trained are this rank's own, and
            may be written.

        Notes
        -----
        Local; copies nothing. The slices of all ranks are the parameters, each element once.
        """
        slices = self._slices()
        state = {**self._ddp.state_dict(), **slices}
        for name, held in slices.items():
            pieces = {box: read_only(piece) for box, piece in held.pieces.items()}
            state[name] = ShardedArray(held.shape, held.dtype, pieces)
        return state

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
        Collective over the optimizer's group; blocks. As much communication as a step, without
        gradients: no rank writes before all ranks of its node have called this, and all see the new
        values when it returns.
        """
        self._ddp.check_state_dict(state)
        slices = self._slices()
        state = with_present_names(state, self._ddp.module.state_dict())
        check_held("ModelState.load_state_dict", slices, state)
        self._store.begin_write()
        copy_in(slices, state)
        for name, array in self._ddp.module.state_dict().items():
            if name not in slices:  # a buffer, or a parameter that is not trained
                array[...] = state[name]
        self._store.end_write()
        self._ddp.lay_out(state)

    def _slices(self) -> dict[str, ShardedArray]:
        """Return what this rank owns of each parameter, to be written."""
        return {
            name: ShardedArray.of_range(shape, flat.box(name).offsets[0], flat.part(name, flat.own))
            for flat in self._store.flats
            for name, shape in flat.layout.shapes.items()
        }


def read_only(view: Array) -> Array:
    """Return a view that cannot be written by mistake."""
    protected: Array = view.view()
    protected.flags.writeable = False
    return protected


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
        numbers = {k: state[k] for k, value in own.items() if not isinstance(value, np.ndarray)}
        optimizer.load_state_dict(own | numbers | {"kind": type(optimizer).__name__})


def check_names(optimizers: Sequence[Optimizer], shards: Mapping[str, Parameter]) -> None:
    """Refuse optimizers of other parameters than they were given, or of one twice."""
    seen: set[str] = set()
    for optimizer in optimizers:
        names = {parameter_of(k) for k in optimizer.state_dict() if k.endswith("/updates")}
        wrong = sorted(names - shards.keys()) or sorted(names & seen)
        if wrong:
            raise ValueError(
                f"ShardedOptimizer: the factory made an optimizer of {wrong[:5]}; each of the "
                "parameters that it is given may be used once, under its name"
            )
        seen |= names
    if not seen:
        raise ValueError("ShardedOptimizer: the factory made no optimizer")
