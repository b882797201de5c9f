"""`DDP`: one model on every rank, trained on each rank's samples as if on all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from mpidist._closing import Closing
from mpidist._types import MEAN, Array, ReduceOp
from mpidist.backends.work import Work
from mpidist.group.group import ProcessGroup, check_group
from mpidist.nn.mode import Mode
from mpidist.nn.module import Context, Module
from mpidist.nn.parameter import Parameter
from mpidist.nn.surround import after_backward
from mpidist.observe.regions import region
from mpidist.parallel.data.broadcasts import BucketOrder, BufferSync, broadcast_in_place
from mpidist.parallel.data.buckets import BucketSizes
from mpidist.parallel.data.compression import Compression, Hook
from mpidist.parallel.data.reducer import ExchangeFactory, GradientReducer, ParameterGradients

__all__ = ["BUCKET_ORDER", "DDP"]

BUCKET_ORDER = "buckets/order"
"""Key of the order of the buckets in a state; no parameter's name contains a slash."""


class DDP(Closing):
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
    exchange : ExchangeFactory, optional
        What happens to full buckets instead of an all-reduce; for strategies built on this one.

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
        exchange: ExchangeFactory | None = None,
    ) -> None:
        if not isinstance(module, Module):
            raise TypeError(f"DDP: expected DDP(model, group), got a {type(module).__name__} first")
        check_group(group, "DDP")
        named = dict(module.named_parameters())
        trainable = {name: parameter for name, parameter in named.items() if parameter.trainable}
        buffers = dict(module.named_buffers())
        arrays = {name: parameter.data for name, parameter in named.items()}
        self._reducer = GradientReducer(
            {name: arrays[name] for name in trainable},
            group,
            op=op,
            compression=compression,
            sizes=sizes,
            also_verify={n: a for n, a in arrays.items() if n not in trainable} | buffers,
            exchange=exchange,
        )
        self.module = module
        self.group = self._reducer.group
        self.op = op
        self._buffers = BufferSync(buffers, self.group) if buffers else None
        # A layer without a gradient would let a bucket in flight wait for the next one that has.
        self._progress_between_layers = after_backward(
            _layers_without_parameters(module), self._reducer.progress
        )
        self._broadcasts: list[BufferSync | BucketOrder] = []  # those of the step in flight
        self._pending: _StepWork | None = None
        self._reduced = False  # the gradients, unless zeroed since, are those of all ranks
        self._syncing = True
        self._failure: str | None = None
        broadcast_in_place([*arrays.values(), *buffers.values()], self.group)
        self._gradients = ParameterGradients(trainable, self._reducer)
        self._order = BucketOrder(self._reducer, self._gradients, fixed=callable(compression))

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Yield the module's parameters as `Module.named_parameters` does, for an optimizer."""
        return self.module.named_parameters()

    def parameters(self) -> Iterator[Parameter]:
        """Yield the module's parameters, a shared one once."""
        return self.module.parameters()

    def __repr__(self) -> str:
        """Return the group and the tree of the module."""
        return f"DDP over {self.group!r}:\n{self.module!r}"

    @property
    def order(self) -> tuple[str, ...] | None:
        """The order in which the gradients' buckets have been laid out for good, if they have."""
        return self._order.order

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        """Say what to write, as a module does; always raises `TypeError`."""
        self.module(*args, **kwargs)

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Run the model forward on this rank's samples.

        Parameters
        ----------
        x : Array, shape (batch, ...)
            This rank's samples; there may be none.
        mode : Mode
            As the model takes it. Its `sample_offset` is the index of this rank's first sample in
            the joined batch, so that random layers draw there what one process would draw.

        Returns
        -------
        y : Array
            The output.
        ctx : Context
            For `backward`.

        Notes
        -----
        Local.
        """
        with region("forward"):
            return self.module.forward(x, mode)

    def backward(self, ctx: Context, dy: Array) -> Array:
        """Run backward, and return when the gradients of all ranks have been averaged.

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

        Raises
        ------
        RuntimeError
            On misuse, naming a parameter; see `ibackward`.
        CollectiveTimeoutError
            If another rank does not reach its backward in time.

        Notes
        -----
        Collective over the group; blocks. Inside `no_sync` it is local. One all-reduce per bucket,
        started while backward is still running.
        """
        dx, work = self.ibackward(ctx, dy)
        work.wait()
        return dx

    def ibackward(self, ctx: Context, dy: Array) -> tuple[Array, Work[None]]:
        """Run backward, and return while the last gradients are still under way.

        Parameters
        ----------
        ctx : Context
            What `forward` returned for these samples.
        dy : Array, shape of the output
            Gradient of this rank's loss by the output.

        Returns
        -------
        dx : Array, shape of the input
            Gradient of this rank's loss by its input.
        work : Work
            To be waited for before the next backward, and before a gradient is read or zeroed,
            as an optimizer's step does; until then that raises. Inside `no_sync` it is complete.

        Raises
        ------
        RuntimeError
            If an earlier backward has not been waited for; if `op` is SUM and the reduced
            gradients of an earlier backward were not zeroed; if a parameter does not belong to this
            DDP any more; if backward makes other contributions than `ctx.uses` announced. The
            message names the parameter.

        Notes
        -----
        Collective over the group; does not block. Inside `no_sync` it is local.
        """
        self._check_idle()
        # A mean of equal gradients is the same again; a sum would count them once per rank.
        if self._reduced and self.op is not MEAN:
            self._gradients.check_zeroed()
        self._gradients.check_owned(ctx.uses)
        if not self._syncing:
            self._reduced = False
            with region("backward"):
                return self.module.backward(ctx, dy), _NoWork()
        try:
            # Buffers first: their broadcast has the whole of backward to arrive.
            self._broadcasts = []
            if self._buffers is not None:
                self._start(self._buffers)
            self._gradients.expect(ctx.uses)
            with region("backward"), self._progress_between_layers:
                dx = self.module.backward(ctx, dy)
            self._reducer.check_complete("DDP.backward")
            if self._order.order is None:
                self._start(self._order)
        except BaseException as error:
            self._abandon(error)
            raise
        self._pending = _StepWork(self)
        return dx, self._pending

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Add up gradients locally; the first backward outside reduces them all.

        Notes
        -----
        Local. For accumulation over micro-batches: all but the last inside, with dropout's
        `sample_offset` counting on. Use it on all ranks alike. Buffers are not synchronised inside.
        """
        before = self._syncing
        self._syncing = False
        try:
            yield
        finally:
            self._syncing = before

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
        self.module.load_state_dict(_without_order(state))
        self.lay_out(state)

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise unless a state fits, and no gradients are in flight.

        Parameters
        ----------
        state : mapping
            As `state_dict` returns it.

        Raises
        ------
        ValueError
            As `load_state_dict`.
        RuntimeError
            If gradients are under way.
        """
        self._check_idle()
        self.module.check_state_dict(_without_order(state))
        self._order.check(state.get(BUCKET_ORDER))

    def lay_out(self, state: Mapping[str, Any]) -> None:
        """Take the order of the buckets alone out of a state that fits.

        Parameters
        ----------
        state : mapping
            What `load_state_dict` would take; only the order is looked at.

        Notes
        -----
        Local; to be called on all ranks. The gradients move along. With a hook of the user's,
        which may keep something per bucket, it changes nothing.
        """
        if BUCKET_ORDER in state:
            self._order.lay_out(state[BUCKET_ORDER])

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for what is under way, and release DDP's duplicate of the group.

        The model stays usable; its gradients stay where they are.
        """
        if self._pending is not None:
            self._pending.wait()
        self._reducer.close()

    def _start(self, broadcast: BufferSync | BucketOrder) -> None:
        broadcast.start()
        self._broadcasts.append(broadcast)

    def _abandon(self, error: BaseException) -> None:
        self._gradients.release()
        self._failure = repr(error)

    def _check_idle(self) -> None:
        if self._failure is not None:
            raise RuntimeError(
                f"DDP on {self.group}: an earlier backward failed half way ({self._failure}), so "
                "the ranks do not agree any more on which gradients are under way; end the job"
            )
        if self._pending is not None:
            raise RuntimeError(
                f"DDP on {self.group}: the gradients of the last ibackward are still under way; "
                "wait() for its Work before the next backward"
            )


class _StepWork(Work[None]):
    """The gradients and buffers of one step, under way."""

    def __init__(self, ddp: DDP) -> None:
        self._ddp = ddp

    def done(self) -> bool:
        ddp = self._ddp
        if ddp._pending is not self:
            return True
        if all(broadcast.done() for broadcast in ddp._broadcasts) and ddp._reducer.done():
            self.wait()
        return ddp._pending is not self

    def wait(self, timeout: float | None = None) -> None:
        """Take over the reduced gradients and rank 0's buffers."""
        ddp = self._ddp
        if ddp._pending is not self:
            return
        with region("gradients"):
            self._finish(timeout)

    def _finish(self, timeout: float | None) -> None:
        ddp = self._ddp
        for broadcast in ddp._broadcasts:
            broadcast.wait(timeout)
        used = ddp._reducer.wait(timeout)
        ddp._gradients.take_over(used)
        for broadcast in ddp._broadcasts:
            broadcast.apply()
        ddp._pending, ddp._reduced = None, True


class _NoWork(Work[None]):
    """The work of a local backward: nothing."""

    def done(self) -> bool:
        return True

    def wait(self, timeout: float | None = None) -> None:
        pass


def _without_order(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != BUCKET_ORDER}


def _layers_without_parameters(module: Module) -> list[Module]:
    """Return the layers in whose backward pass no gradient becomes complete."""
    return [
        layer
        for _, layer in module.named_modules()
        if (type(layer).backward is Module.backward or not any(layer.named_children()))
        and not any(isinstance(value, Parameter) for value in vars(layer).values())
    ]
