"""`ModelState`: what a checkpoint holds of a model whose parameters stand once per node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpidist._types import Array
from mpidist.arrays.shards import ShardedArray
from mpidist.parallel.data.ddp import DDP
from mpidist.parallel.sharded.shard_state import check_held, copy_in
from mpidist.parallel.sharded.stores import ParameterStore

__all__ = ["ModelState", "read_only"]


class ModelState:
    """The state of a `ShardedOptimizer`'s model: of parameters, this rank's slices.

    It is `ShardedOptimizer.model_state`. In the state of a checkpoint it stands in the place where
    a run without a sharded optimizer has its `DDP` or its module; what one of them has saved, the
    others load.

    Parameters
    ----------
    ddp : DDP
        Of the model.
    store : ParameterStore
        Where its parameters stand.
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
            `load_state_dict`. Buffers are this rank's own, and may be written.

        Notes
        -----
        Local; copies nothing. The slices of all ranks are the parameters, each element once.
        """
        slices = self._slices()
        state = {**self._ddp.state_dict(), **slices}
        for name, mine in slices.items():
            pieces = {box: read_only(piece) for box, piece in mine.pieces.items()}
            state[name] = ShardedArray(mine.shape, mine.dtype, pieces)
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
        gradients: no rank writes before all ranks of its node have come here, and all see the new
        values when it returns.
        """
        self._ddp.check_state_dict(state)
        slices = self._slices()
        check_held("ModelState.load_state_dict", slices, state)
        self._store.settle()
        copy_in(slices, state)
        for name, buffer in self._ddp.module.named_buffers():
            buffer[...] = state[name]
        self._store.publish()
        self._ddp.lay_out(state)

    def _slices(self) -> dict[str, ShardedArray]:
        """Return what this rank owns of each parameter, to be written."""
        return {
            name: ShardedArray.of_range(shape, slab.box(name).offsets[0], slab.part(name, slab.own))
            for slab in self._store.slabs
            for name, shape in slab.layout.shapes.items()
        }


def read_only(view: Array) -> Array:
    """Return a view that cannot be written by mistake."""
    looked_at: Array = view.view()
    looked_at.flags.writeable = False
    return looked_at
