"""`NaiveDataParallel`: data parallelism in its slowest and plainest form."""

from __future__ import annotations

import numpy as np

from mpidist._types import LOR, MEAN, Array, ReduceOp
from mpidist.arrays.namespaces import array_namespace
from mpidist.collectives import all_reduce
from mpidist.group import ProcessGroup
from mpidist.nn.mode import Mode
from mpidist.nn.module import Context, Module
from mpidist.parallel.data.broadcasts import broadcast_in_place

__all__ = ["NaiveDataParallel"]


class NaiveDataParallel:
    """After backward, all-reduce one gradient after the other.

    It is there to be read before `DDP`, and to be believed by its tests.

    Parameters
    ----------
    module : Module
        The model, built alike on every rank. Parameters and buffers are overwritten with rank 0's.
    group : ProcessGroup
        The ranks taking part.
    op : ReduceOp, optional
        `MEAN` or `SUM` of the ranks' gradients.

    Notes
    -----
    Collective over `group`; blocks. Micro-batches but the last go through `module.backward`.
    """

    def __init__(self, module: Module, group: ProcessGroup, *, op: ReduceOp = MEAN) -> None:
        self.module = module
        self.group = group
        self.op = op
        broadcast_in_place(module.state_dict().values(), group)

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Run the model forward on this rank's samples; local."""
        return self.module.forward(x, mode)

    def backward(self, ctx: Context, dy: Array) -> Array:
        """Run the model backward, then reduce the gradients in the order of the names.

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

        Notes
        -----
        Collective over the group; blocks. Two all-reduces per parameter, a broadcast per buffer.
        """
        dx = self.module.backward(ctx, dy)
        for _, parameter in sorted(self.module.named_parameters()):
            if not all_reduce(np.array(parameter.grad is not None), self.group, op=LOR):
                continue
            if parameter.grad is None:
                parameter.add_grad(array_namespace(parameter.data).zeros_like(parameter.data))
            assert parameter.grad is not None, "it has one now"
            all_reduce(parameter.grad, self.group, op=self.op, out=parameter.grad)
        broadcast_in_place(dict(self.module.named_buffers()).values(), self.group)
        return dx
