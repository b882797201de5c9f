"""`Strategy`: what a training loop asks of `DDP`, `FSDP` and others."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from mpidist._types import Array, ReduceOp
from mpidist.group.group import ProcessGroup
from mpidist.nn.mode import Mode
from mpidist.nn.module import Context, Module

__all__ = ["Strategy"]


class Strategy(Protocol):
    """A model on several ranks, of which each has some of the samples.

    A loop that is written for it trains under each of them: forward, a loss, backward, and the step
    of an optimizer of the model.

    Attributes
    ----------
    module : Module
        The model inside.
    group : ProcessGroup
        The ranks.
    op : ReduceOp
        How their gradients are joined.
    """

    module: Module
    group: ProcessGroup
    op: ReduceOp

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Run the model forward on this rank's samples."""

    def backward(self, ctx: Context, dy: Array) -> Array:
        """Run backward, and return when the gradients of all ranks have been joined."""

    def no_sync(self) -> AbstractContextManager[None]:
        """Let `backward` add up gradients of this rank only."""

    def clip_grad_norm(self, max_norm: float) -> float:
        """Scale all gradients down together; return their norm, the same on all ranks."""
