"""`DataParallel`: what `DDP` and `FSDP` share, passes whose gradients are reduced meanwhile."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol, TypeVar

from mpidist._closing import Closing
from mpidist._types import Array, ReduceOp
from mpidist.backends.work import Deadline, Work
from mpidist.group.group import ProcessGroup
from mpidist.nn.mode import Mode
from mpidist.nn.module import Context, Module, check_fits
from mpidist.nn.parameter import Parameter
from mpidist.nn.surround import BACKWARD_PASSES, after_passes
from mpidist.observe.regions import region
from mpidist.parallel.data.broadcasts import BucketOrder, BufferSync, OrderedGradients

__all__ = ["BUCKET_ORDER", "DataParallel", "Gradients", "without_order"]

T = TypeVar("T")


class HasState(Protocol):
    """What a checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]:
        """Return what is saved."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what was saved."""


BUCKET_ORDER = "buckets/order"
"""Key of the order of the buckets in a state; no parameter's name contains a slash."""


class Gradients(OrderedGradients, Protocol):
    """The gradients of all trainable parameters, reduced over the ranks step by step."""

    def check(self, uses: Mapping[Parameter, int]) -> None:
        """Raise what would go wrong in a backward pass with these contributions."""

    def expect(self, uses: Mapping[Parameter, int]) -> None:
        """Count contributions from now on; start the reduction of what is complete."""

    def accumulate(self) -> None:
        """Let the backward that follows add to the gradients of this rank."""

    def progress(self) -> None:
        """Let what is under way make progress."""

    def check_complete(self, operation: str) -> None:
        """Raise unless all contributions that were expected have come."""

    def done(self) -> bool:
        """Whether `wait` will not block."""

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the reduction, and take it over."""

    def release(self) -> None:
        """End the counting, after an error."""


class DataParallel(Closing, ABC):
    """A model on every rank, trained on each rank's samples: the base of `DDP` and `FSDP`.

    Parameters
    ----------
    module : Module
        The model.
    group : ProcessGroup
        The ranks; the strategy's own.
    op : ReduceOp
        How gradients are joined.
    gradients : Gradients
        What becomes of the gradients.
    fixed : bool
        Whether the order in which gradients are expected never changes.
    """

    casts = False
    """Whether the strategy's own forward and backward cast what goes in and comes out."""

    splits_gradients = False
    """Whether each rank has slices of the reduced gradients."""

    def __init__(
        self,
        module: Module,
        group: ProcessGroup,
        *,
        op: ReduceOp,
        gradients: Gradients,
        fixed: bool = False,
    ) -> None:
        self.module = module
        self.group = group
        self.op = op
        self._gradients = gradients
        self._order = BucketOrder(gradients, group, fixed=fixed)
        buffers = dict(module.named_buffers())
        self._buffers = BufferSync(buffers, group) if buffers else None
        # A layer without a gradient would let a bucket in flight wait for the next one that has.
        self._progress_between_layers = after_passes(
            _layers_without_parameters(module), gradients.progress, BACKWARD_PASSES
        )
        self._broadcasts: list[BufferSync | BucketOrder] = []  # those of the step in flight
        self._pending: _StepWork | None = None
        self._syncing = True
        self._state: HasState | None = None
        self._failure: str | None = None
        self._failure_in_no_sync: str | None = None

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Yield the module's parameters as `Module.named_parameters` does, for an optimizer."""
        return self.module.named_parameters()

    def parameters(self) -> Iterator[Parameter]:
        """Yield the module's parameters, a shared one once."""
        return self.module.parameters()

    def __repr__(self) -> str:
        """Return the group and the tree of the module."""
        return f"{type(self).__name__} over {self.group!r}:\n{self.module!r}"

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
        Collective over the group; blocks. Inside `no_sync` it is local. With a `DDP` one all-reduce
        per bucket, with an `FSDP` one reduce-scatter per unit, started while backward is still
        running; the gradients of an FSDP are in its `shards`, and not in ``parameter.grad``.
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
            If an earlier backward has not been waited for; if, with a `DDP`, `op` is SUM and the
            reduced gradients of an earlier backward were not zeroed; if a parameter does not belong
            to the model any more, or is another strategy's; if backward makes other contributions
            than `ctx.uses` announced. The message names the parameter.

        Notes
        -----
        Collective over the group; does not block. Inside `no_sync` it is local.
        """
        return self.irun_backward(ctx.uses, lambda: self.module.backward(ctx, dy))

    def irun_backward(
        self, uses: Mapping[Parameter, int], run: Callable[[], T]
    ) -> tuple[T, Work[None]]:
        """Run a pass that adds to gradients, and return while the last ones are still under way.

        `ibackward` of a pass that is run by somebody else, such as a half of backward.

        Parameters
        ----------
        uses : mapping of Parameter to int
            The contributions that it makes, as ``ctx.uses`` says.
        run : callable
            The pass; takes nothing.

        Returns
        -------
        result : object
            What `run` returns.
        work : Work
            As that of `ibackward`.

        Raises
        ------
        RuntimeError
            As `ibackward`.

        Notes
        -----
        Collective over the group; does not block. Inside `no_sync` it is local.
        """
        return self._run_backward("backward", uses, run)

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        """Run the first half of backward, which touches no parameter's gradient.

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
        wctx : object
            For `backward_weight`, at any later time.

        Notes
        -----
        Local.
        """
        with region("backward"):
            dx, wctx = self.module.backward_input(ctx, dy)
        return dx, (ctx.uses, wctx)

    def backward_weight(self, wctx: Any) -> None:
        """Run the second half of backward, and return when the gradients have been reduced.

        Parameters
        ----------
        wctx : object
            What `backward_input` returned for these samples.

        Raises
        ------
        RuntimeError, CollectiveTimeoutError
            As `backward`.

        Notes
        -----
        Collective over the group; blocks. Inside `no_sync` it is local.
        """
        uses, inner = wctx
        run = functools.partial(self.module.backward_weight, inner)
        _, work = self._run_backward("backward_weight", uses, run)
        work.wait()

    def wait(self) -> None:
        """Wait for the gradients of the last `ibackward`, if they are still under way."""
        if self._pending is not None:
            self._pending.wait()

    def shards(self) -> list[Parameter]:
        """Return what this rank updates: the parameters, or its slices of them.

        Returns
        -------
        list of Parameter
            With their reduced gradients.

        Notes
        -----
        Waits for the gradients; else local.
        """
        self.wait()
        return list(self.parameters())

    def holds_sums(self) -> bool:
        """Whether there are reduced gradients that a further backward would reduce again."""
        return False

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters; touches no array.

        Notes
        -----
        Waits for gradients under way, so that a step may be left out; else local.
        """
        self.wait()
        for parameter in self.parameters():
            parameter.zero_grad()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Have all parameters readable, which some strategies have to gather.

        Notes
        -----
        Passes inside communicate gradients only. Local, unless parameters have to be gathered.
        """
        yield

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Add up gradients locally; the first backward outside reduces them all.

        Notes
        -----
        Local. For accumulation over micro-batches: all but the last inside, with dropout's
        `sample_offset` counting on. Use it on all ranks alike. Buffers are not synchronised inside.
        After an exception in a backward inside, gradients have to be forgotten (`zero_grad`) before
        the next one: which contributions have been added is not known.
        """
        before = self._syncing
        self._syncing = False
        try:
            yield
        finally:
            self._syncing = before

    # -- states --------------------------------------------------------------------------------

    @property
    def model_state(self) -> HasState:
        """What a checkpoint holds of the model: this, or what a `ShardedOptimizer` has put here."""
        return self if self._state is None else self._state

    @model_state.setter
    def model_state(self, state: HasState) -> None:
        self._state = state

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the model, and the order of the buckets."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; arrays are copied in."""

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
        own = without_order(self.state_dict())
        check_fits(type(self.module).__name__, own, without_order(state))
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

    # -- the passes ----------------------------------------------------------------------------

    def _run_backward(
        self, _: str, uses: Mapping[Parameter, int], run: Callable[[], T]
    ) -> tuple[T, Work[None]]:
        """Run the pass of this name, which makes these contributions; start the reduction."""
        self._check_idle()
        self._check_added_whole()
        self._gradients.check(uses)
        if not self._syncing:
            self._gradients.accumulate()
            try:
                with region("backward"):
                    return run(), _NoWork()
            except BaseException as error:
                self._failure_in_no_sync = repr(error)
                raise
        try:
            # Buffers first: their broadcast has the whole of backward to arrive.
            self._broadcasts = []
            if self._buffers is not None:
                self._start(self._buffers)
            self._gradients.expect(uses)
            with region("backward"), self._progress_between_layers:
                dx = run()
            self._gradients.check_complete(f"{type(self).__name__}.backward")
            if self._order.order is None:
                self._start(self._order)
        except BaseException as error:
            self._abandon(error)
            raise
        self._pending = _StepWork(self)
        return dx, self._pending

    def _start(self, broadcast: BufferSync | BucketOrder) -> None:
        broadcast.start()
        self._broadcasts.append(broadcast)

    def _check_added_whole(self) -> None:
        """Raise if a backward that failed may have added some of its contributions."""
        if self._failure_in_no_sync is None:
            return
        if any(parameter.unreduced_grad() is not None for parameter in self.parameters()):
            raise RuntimeError(
                f"{type(self).__name__} on {self.group}: an earlier backward inside no_sync failed "
                f"half way ({self._failure_in_no_sync}), so the gradients of this rank may have "
                "some of its contributions and not others; forget them (zero_grad), and run the "
                "passes of this step again"
            )
        self._failure_in_no_sync = None

    def _abandon(self, error: BaseException) -> None:
        self._gradients.release()
        self._failure = repr(error)

    def _check_idle(self) -> None:
        if self._failure is not None:
            raise RuntimeError(
                f"{type(self).__name__} on {self.group}: an earlier backward failed half way "
                f"({self._failure}), so the ranks do not agree any more on which gradients are "
                "under way; end the job"
            )
        if self._pending is not None:
            raise RuntimeError(
                f"{type(self).__name__} on {self.group}: the gradients of the last ibackward are "
                "still under way; wait() for its Work before the next backward"
            )


class _StepWork(Work[None]):
    """The gradients and buffers of one step, under way."""

    def __init__(self, model: DataParallel) -> None:
        self._model = model

    def done(self) -> bool:
        model = self._model
        if model._pending is not self:
            return True
        if all(broadcast.done() for broadcast in model._broadcasts) and model._gradients.done():
            self.wait()
        return model._pending is not self

    def wait(self, timeout: float | None = None) -> None:
        """Take over the reduced gradients and rank 0's buffers."""
        if self._model._pending is not self:
            return
        with region("gradients"):
            self._finish(timeout)

    def _finish(self, timeout: float | None) -> None:
        model, deadline = self._model, Deadline(timeout)
        for broadcast in model._broadcasts:
            broadcast.wait(deadline.left)
        model._gradients.wait(deadline.left)
        for broadcast in model._broadcasts:
            broadcast.apply()
        model._pending = None


class _NoWork(Work[None]):
    """The work of a local backward: nothing."""

    def done(self) -> bool:
        return True

    def wait(self, timeout: float | None = None) -> None:
        pass


def _layers_without_parameters(module: Module) -> list[Module]:
    """Return the layers in whose backward pass no gradient becomes complete."""
    return [
        layer
        for _, layer in module.named_modules()
        if (type(layer).backward is Module.backward or not any(layer.named_children()))
        and not any(isinstance(value, Parameter) for value in vars(layer).values())
    ]


def without_order(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's state as its module has it."""
    return {name: value for name, value in state.items() if name != BUCKET_ORDER}
