"""`DDP`: one model on every rank, trained on each rank's samples as if on all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpidist._types import MEAN, SUM, Array, ReduceOp
from mpidist.group.group import ProcessGroup, check_group
from mpidist.nn.module import Module
from mpidist.parallel.clip import clip_grad_norm
from mpidist.parallel.data.broadcasts import broadcast_in_place
from mpidist.parallel.data.buckets import BucketSizes
from mpidist.parallel.data.compression import Compression, Hook
from mpidist.parallel.data.data_parallel import BUCKET_ORDER, DataParallel, without_order
from mpidist.parallel.data.reducer import GradientReducer, ParameterGradients

__all__ = ["BUCKET_ORDER", "DDP"]


class DDP(DataParallel):
    """Distributed data parallel: gradients are averaged over the ranks during backward.

    ::

        model = build_model()                        # as if it were alone
        ddp = DDP(model, group)
        optimizer = SGD(model.named_parameters(), lr=0.1)
        for step, (x, target) in enumerate(batches_of_this_rank):
            mode = Mode(training=True, step=step, sample_offset=group.rank * len(x))
            y, ctx = ddp.forward(x, mode)
            loss, dy = cross_entropy(y, target)
            optimizer.zero_grad()
            ddp.backward(ctx, dy)
            optimizer.step()

    Parameters
    ----------
    module : Module
        The model, built alike on every rank. Parameters and buffers are overwritten with rank
        0's; gradients live in the buckets from now on.
    group : ProcessGroup
        The ranks taking part. DDP makes and uses a duplicate of it.
    op : ReduceOp, optional
        `MEAN`: the mean of the ranks' gradients, which is the gradient of the joined batch if all
        ranks have equally many samples. `SUM`: their sum, which is the exact gradient of the
        joined batch, whatever each rank's share (none, too), if each rank's loss is a sum over
        its samples divided by the number of all (``denominator=`` of the losses).
    compression : Compression or Hook, optional
        How gradients travel; as they are when omitted.
    sizes : BucketSizes, optional
        How many gradients travel together.

    Attributes
    ----------
    module : Module
        The model, unchanged but for where its gradients lie.
    group : ProcessGroup
        The duplicate of the given group, over which messages go.
    op : ReduceOp
        How the ranks' gradients are joined: `MEAN` or `SUM`.
    order : tuple of str or None
        The order in which the gradients' buckets have been laid out for good; None before that.

    Raises
    ------
    TypeError
        If `module` is no Module.
    ValueError
        If a parameter is read-only.
    CollectiveMismatchError
        On every rank, naming a rank and a parameter or buffer, if names, shapes, dtypes or
        arguments differ between ranks. Nothing has been changed then.

    Notes
    -----
    Collective over `group`; blocks. Costs what a `GradientReducer` does, and a broadcast of every
    parameter and buffer.

    A parameter that no rank used keeps ``grad is None``, and the optimizer skips it; one that some
    ranks used is averaged, the others counting as zeros. Buffers, such as running statistics, are
    rank 0's on every rank after each step; see [Note: buffers] in
    `mpidist.parallel.data.broadcasts`. The first backward outside `no_sync` shows the order in
    which the buckets are laid out from then on, once for all; see [Note: order of arrival] in
    `mpidist.parallel.data.broadcasts`.

    For a model on a device (`Module.to`), the buckets are there and travel over NCCL, concurrently
    with the stream on which backward runs. `backward` then returns when the reduction has been put
    before whatever is put on that stream next; neither it nor the optimizer's step makes the host
    wait for the device. Which parameters were used is exchanged over the host.

    References
    ----------
    Li et al. (2020), PyTorch Distributed: Experiences on Accelerating Data Parallel Training.
    """

    def __init__(
        self,
        module: Module,
        group: ProcessGroup,
        *,
        op: ReduceOp = MEAN,
        compression: Compression | Hook | None = None,
        sizes: BucketSizes = BucketSizes(),  # noqa: B008 - frozen
    ) -> None:
        if not isinstance(module, Module):
            raise TypeError(f"DDP: expected DDP(model, group), got a {type(module).__name__} first")
        check_group(group, "DDP")
        named = dict(module.named_parameters())
        trainable = {name: parameter for name, parameter in named.items() if parameter.trainable}
        buffers = dict(module.named_buffers())
        arrays = {name: parameter.data for name, parameter in named.items()}
        _check_writeable(arrays, group)
        self._reducer = GradientReducer(
            {name: arrays[name] for name in trainable},
            group,
            op=op,
            compression=compression,
            sizes=sizes,
            also_verify={n: a for n, a in arrays.items() if n not in trainable} | buffers,
        )
        broadcast_in_place([*arrays.values(), *buffers.values()], self._reducer.group)
        super().__init__(
            module,
            self._reducer.group,
            op=op,
            gradients=ParameterGradients(trainable, self._reducer),
            fixed=callable(compression),
        )

    def clip_grad_norm(self, max_norm: float) -> float:
        """Scale all gradients down together, as `clip_grad_norm` of the module."""
        return clip_grad_norm(self.module, max_norm)

    def holds_sums(self) -> bool:
        """Whether there are reduced gradients that a further backward would reduce again."""
        return self.op is SUM and any(p.grad is not None for p in self.parameters())

    # -- states --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep to go on with the same bits.

        Returns
        -------
        dict of str to (Array, list of str or None)
            What `Module.state_dict` of the module returns, and `order` under ``"buckets/order"``.
            The arrays are the living ones, not copies; between two steps, all ranks have the same.

        Notes
        -----
        Local. Which elements travel together decides, from three ranks on, in which order some are
        added. So a run that is resumed has the bits of one that was never interrupted only if its
        first step finds the buckets as the other one's did.
        """
        order = None if self.order is None else list(self.order)
        return {**self.module.state_dict(), BUCKET_ORDER: order}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` gave; arrays are copied in.

        Parameters
        ----------
        state : mapping
            As `state_dict` returns it; the same on all ranks. One without an order, as
            `Module.state_dict` returns it, leaves the buckets as they are.

        Raises
        ------
        ValueError
            If it does not fit, or a `ShardedOptimizer` holds the parameters (then its `model_state`
            takes it), as `Module.load_state_dict`; nothing has been changed then.
        RuntimeError
            If gradients are under way.

        Notes
        -----
        Local; to be called on all ranks.
        """
        self.check_state_dict(state)
        self.module.load_state_dict(without_order(state))
        self.lay_out(state)

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for what is under way, and release DDP's duplicate of the group.

        The model stays usable; its gradients stay where they are.
        """
        self.wait()
        self._reducer.close()


def _check_writeable(arrays: Mapping[str, Array], group: ProcessGroup) -> None:
    for name, array in arrays.items():
        if not getattr(array.flags, "writeable", True):  # arrays on a device have no such flag
            raise ValueError(
                f"DDP on {group}: parameter '{name}' is read-only, as an FSDP or a "
                "ShardedOptimizer leaves it; make the DDP first and give it to the "
                "ShardedOptimizer, or give the parameter memory of its own first "
                "(parameter.data = parameter.data.copy())"
            )
