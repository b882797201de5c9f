"""`DDP`: one model on every rank, trained on each rank's samples as if on all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mpidist._closing import Closing
from mpidist._types import MEAN, Array, ReduceOp
from mpidist.backends.work import Work
from mpidist.group import ProcessGroup
from mpidist.nn.mode import Mode
from mpidist.nn.module import Context, Module, after_backward
from mpidist.parallel.bucket import BucketSizes
from mpidist.parallel.buffers import BufferSync, broadcast_in_place
from mpidist.parallel.compression import Compression, Hook
from mpidist.parallel.gradients import ParameterGradients, layers_without_parameters
from mpidist.parallel.layout import ArrivalOrder
from mpidist.parallel.reducer import GradientReducer
from mpidist.regions import region

__all__ = ["DDP"]


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

    Attributes
    ----------
    module : Module
        As given.
    group : ProcessGroup
        The duplicate.
    op : ReduceOp
        As given.
    order : tuple of str or None
        The order in which the gradients' buckets have been laid out for good; None before that. A
        checkpoint keeps it for `lay_out`.

    Raises
    ------
    CollectiveMismatchError
        On every rank, naming a rank and a parameter or buffer, if names, shapes, dtypes or
        arguments differ between ranks. Nothing has been changed then.

    Notes
    -----
    Collective over `group`; blocks. Costs what a `GradientReducer` does, and a broadcast of every
    parameter and buffer.

    A parameter that no rank used keeps ``grad is None``, and the optimizer skips it; one that some
    ranks used is averaged, the others counting as zeros. Buffers: see [Note: buffers] in
    `mpidist.parallel.buffers`. The first backward outside `no_sync` shows the order in which the
    buckets are laid out from then on, once for all: see [Note: order of arrival] in
    `mpidist.parallel.layout`.

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
        named = dict(module.named_parameters())
        buffers = dict(module.named_buffers())
        arrays = {name: parameter.data for name, parameter in named.items()}
        self._reducer = GradientReducer(
            arrays, group, op=op, compression=compression, sizes=sizes, also_verify=buffers
        )
        self.module = module
        self.group = self._reducer.group
        self.op = op
        self._buffers = BufferSync(buffers, self.group)
        self._silent = layers_without_parameters(module)
        # A hook of the user's may keep something per bucket.
        self._relayout_due = not callable(compression)
        self.order: tuple[str, ...] | None = None
        self._arriving: ArrivalOrder | None = None
        self._pending: _StepWork | None = None
        self._reduced = False  # the gradients, unless zeroed since, are those of all ranks
        self._syncing = True
        self._failure: str | None = None
        broadcast_in_place([*arrays.values(), *buffers.values()], self.group)
        self._gradients = ParameterGradients(named, self._reducer)

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Run the model forward on this rank's samples.

        Parameters
        ----------
        x : Array, shape (batch, ...)
            This rank's samples; there may be none.
        mode : Mode
            As the model takes it. Its `sample_offset` is the place of this rank's first sample in
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
            From `forward`.
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
            If another rank does not come to its backward in time.

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
            From `forward`.
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
        if self._reduced and self.op is not MEAN:
            self._gradients.check_zeroed()
        self._gradients.check_owned(ctx.uses)
        if not self._syncing:
            self._reduced = False
            with region("backward"):
                return self.module.backward(ctx, dy), _NoWork()
        try:
            self._buffers.start()
            self._gradients.expect(ctx.uses)
            with region("backward"), after_backward(self._silent, self._reducer.progress):
                dx = self.module.backward(ctx, dy)
            self._reducer.check_complete("DDP.backward")
            if self._relayout_due:
                self._arriving = ArrivalOrder(
                    list(self._reducer.grads), self._reducer.arrivals(), self.group
                )
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

    def lay_out(self, order: Sequence[str]) -> None:
        """Lay the gradients' buckets out as in an earlier run of this model.

        Which elements travel together decides, from three ranks on, in which order some are added.
        A run that is resumed has the bits of one that was never interrupted if its first step finds
        the buckets as the other one's did.

        Parameters
        ----------
        order : sequence of str
            The `order` of the earlier run's DDP; the same on all ranks.

        Raises
        ------
        ValueError
            If it does not hold the name of every parameter once.
        RuntimeError
            If gradients are under way.

        Notes
        -----
        Local; to be called on all ranks, before the first backward. Beside a hook of the user's,
        which may keep something per bucket, it changes nothing.
        """
        self._check_idle()
        if self._relayout_due:
            self._settle(order)

    def _settle(self, order: Sequence[str]) -> None:
        """Lay the buckets out in this order for good."""
        self._gradients.relayout(order)
        self.order, self._relayout_due = tuple(order), False

    def close(self) -> None:
        """Wait for what is under way, and release DDP's duplicate of the group.

        The model stays usable; its gradients stay where they are.
        """
        if self._pending is not None:
            self._pending.wait()
        self._reducer.close()

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
        arrived = ddp._arriving is None or ddp._arriving.done()
        if arrived and ddp._buffers.done() and ddp._reducer.done():
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
        order = None if ddp._arriving is None else ddp._arriving.wait(timeout)
        used = ddp._reducer.wait(timeout)
        ddp._buffers.finish(timeout)
        ddp._gradients.take_over(used)
        if order is not None:
            ddp._arriving = None
            ddp._settle(order)
        ddp._pending, ddp._reduced = None, True


class _NoWork(Work[None]):
    """What a local backward leaves to wait for."""

    def done(self) -> bool:
        return True

    def wait(self, timeout: float | None = None) -> None:
        pass
