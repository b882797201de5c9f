"""`NaiveFullShard`: fully sharded data parallelism in its slowest and plainest form."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpidist._types import LOR, MEAN, Array, ReduceOp
from mpidist.arrays.boxes import split_evenly
from mpidist.collectives import all_gather, all_reduce
from mpidist.group import ProcessGroup
from mpidist.nn.mode import Mode
from mpidist.nn.module import Context, Module
from mpidist.nn.parameter import Parameter
from mpidist.parallel.data.broadcasts import broadcast_in_place
from mpidist.parallel.sharded.precision import Precision, as_float, inner_pass, input_gradient

__all__ = ["NaiveFullShard"]


class NaiveFullShard:
    """Gather every parameter before each pass; after backward, reduce and keep a slice.

    It is there to be read before `FSDP`, and to be believed by its tests.

    Parameters
    ----------
    module : Module
        The model, built alike on every rank. Parameters and buffers are overwritten with rank 0's.
    group : ProcessGroup
        The ranks taking part.
    op : ReduceOp, optional
        `MEAN` or `SUM` of the ranks' gradients.
    precision : Precision, optional
        In which dtypes the model computes and gradients are reduced; see `FSDP`.

    Attributes
    ----------
    shards : list of Parameter
        This rank's slice of each flattened parameter, for an optimizer whose rule treats each
        element by itself.

    Notes
    -----
    Collective over `group`; blocks.
    """

    def __init__(
        self,
        module: Module,
        group: ProcessGroup,
        *,
        op: ReduceOp = MEAN,
        precision: Precision = Precision(),  # noqa: B008 - frozen
    ) -> None:
        self.module = module
        self.group = group
        self.op = op
        self.precision = precision
        broadcast_in_place(module.state_dict().values(), group)
        self._named = dict(module.named_parameters())
        self.shards = [
            Parameter(self._slice(p.data).copy(), name=name, trainable=p.trainable)
            for name, p in self._named.items()
        ]
        for parameter in self._named.values():
            parameter.attach(np.empty(parameter.shape, precision.reduced(parameter.dtype)))
        self._free()

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Gather all parameters, and run the model forward on this rank's samples."""
        self.gather()
        y, ctx = self.module.forward(self.precision.cast_input(x), mode)
        self._free()
        return self.precision.cast_output(y), self.precision.context(ctx, x, y)

    def backward(self, ctx: Context, dy: Array) -> Array:
        """Gather all parameters, run backward, and keep this rank's slices of reduced gradients.

        Parameters
        ----------
        ctx : Context
            What `forward` returned for these samples.
        dy : Array, shape of the output
            Gradient of this rank's loss by the output.

        Returns
        -------
        Array, shape of the input
            Gradient of this rank's loss by its input.
        """
        self.gather()
        dx = self.module.backward(*inner_pass(ctx, dy))
        self._free()
        for shard, parameter in zip(self.shards, self._named.values(), strict=True):
            grad = parameter.grad
            if all_reduce(np.array(grad is not None), self.group, op=LOR):
                grad = np.zeros_like(parameter.grad_memory) if grad is None else grad
                shard.add_grad(self._slice(all_reduce(grad, self.group, op=self.op)))
            parameter.zero_grad()
        broadcast_in_place(dict(self.module.named_buffers()).values(), self.group)
        return input_gradient(ctx, dx)

    def gather(self) -> None:
        """Give every parameter its values, until the next pass."""
        for shard, parameter in zip(self.shards, self._named.values(), strict=True):
            values = all_gather(shard.data, self.group, counts=self._counts(parameter.size))
            parameter.data = as_float(values, self.precision.parameters).reshape(parameter.shape)

    def _free(self) -> None:
        for parameter in self._named.values():
            parameter.seal()

    def _counts(self, size: int) -> Sequence[int]:
        return [count for _, count in split_evenly(size, self.group.size)]

    def _slice(self, array: Array) -> Array:
        start, count = split_evenly(array.size, self.group.size)[self.group.rank]
        part: Array = array.reshape(-1)[start : start + count]
        return part
