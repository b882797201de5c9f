"""The loop that runs the actions of a rank, whatever their schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol, TypeVar

from mpidist._types import Array
from mpidist.backends.work import Work
from mpidist.nn.containers import Sequential
from mpidist.nn.mode import Mode
from mpidist.nn.module import Context
from mpidist.nn.parameter import Parameter
from mpidist.observe.regions import region
from mpidist.parallel.data.data_parallel import DataParallel
from mpidist.parallel.pipeline.edges import Edges
from mpidist.parallel.pipeline.schedule import Action, Pass
from mpidist.parallel.pipeline.ties import Ties
from mpidist.parallel.pipeline.timeline import Span

__all__ = ["Contributions", "Loss", "MicroBatches", "StageRun"]

T = TypeVar("T")


class Loss(Protocol):
    """A loss that gives its value and its gradient, such as `cross_entropy` and `mse_loss`."""

    def __call__(self, y: Array, target: Array, /, *, denominator: float) -> tuple[Array, Array]:
        """Return the sum over the samples divided by `denominator`, and its gradient by `y`."""


@dataclass(frozen=True)
class MicroBatches:
    """A batch, and how it is cut.

    Attributes
    ----------
    bounds : tuple of int
        The first sample of each micro-batch, and the number of all samples.
    x, target : Array or None
        None on ranks that do not use them.
    mode : Mode
        Of the first sample.
    denominator : float
        For the loss.
    """

    bounds: tuple[int, ...]
    x: Array | None
    target: Array | None
    mode: Mode
    denominator: float

    def part(self, array: Array | None, micro_batch: int) -> Array:
        """Return a micro-batch of `x` or `target`."""
        assert array is not None, "asked only where it is used, and all ranks have compared"
        return array[self.bounds[micro_batch] : self.bounds[micro_batch + 1]]

    def mode_of(self, micro_batch: int) -> Mode:
        """Return the mode of a micro-batch, which draws as the whole batch does."""
        return self.mode.shifted(self.bounds[micro_batch])


class Contributions:
    """The passes that add to gradients, and the sums over stages and over the data axis.

    Parameters
    ----------
    replicas : mapping of int to DataParallel
        Of each stage of this rank, where there is a data axis; else empty.
    actions : sequence of Action
        What this rank runs.
    ties : Ties
        The parameters that several stages hold.

    Attributes
    ----------
    works : list of Work
        The sums over the data axis that have been started.

    Notes
    -----
    What is collective over the data axis comes at the same actions on all of its ranks, whose
    pipelines run the same schedule: so ranks wait for none that the schedule does not let come.
    """

    def __init__(
        self, replicas: Mapping[int, DataParallel], actions: Sequence[Action], ties: Ties
    ) -> None:
        self._replicas = replicas
        self._ends = {action.stage: action for action in actions}
        self._ties = ties
        self._whole: dict[int, ExitStack] = {}
        self.works: list[Work[None]] = []

    def before(self, action: Action) -> None:
        """Have the parameters of a stage whole, before its first action."""
        replica = self._replicas.get(action.stage)
        if replica is not None and action.stage not in self._whole:
            self._whole[action.stage] = ExitStack()
            self._whole[action.stage].enter_context(replica.whole())

    def add(self, action: Action, uses: Mapping[Parameter, int], run: Callable[[], T]) -> T:
        """Run a pass; after the last one of a stage its gradients travel while others run."""
        with self._ties.recording(action):
            replica = self._replicas.get(action.stage)
            if replica is None:
                return run()
            # Gradients that are summed over stages first are not complete before the step's end.
            if action != self._ends[action.stage] or self._ties.holds(action.stage):
                with replica.no_sync():
                    return replica.irun_backward(uses, run)[0]
            result, work = replica.irun_backward(uses, run)
            self.works.append(work)
            return result

    def after(self, action: Action) -> None:
        """Let go of the parameters of a stage, after its last action."""
        if action == self._ends[action.stage] and action.stage in self._whole:
            self._whole[action.stage].close()

    def finish(self) -> None:
        """Have tied gradients summed: over stages, then over the data axis, whose sums are late."""
        self._ties.add()
        tied = [replica for s, replica in self._replicas.items() if self._ties.holds(s)]
        self.works += [replica.irun_backward({}, lambda: None)[1] for replica in tied]
        if tied:
            for work in self.works:
                work.wait()
        self._ties.share_gradients()

    def release(self) -> None:
        """Let go of all parameters, where a run has ended half way."""
        for whole in self._whole.values():
            whole.close()


class StageRun:
    """One step of this rank, or one evaluation, and what is alive between its actions.

    Parameters
    ----------
    stages : mapping of int to Sequential
        Those of this rank.
    last : int
        The last stage of the pipeline, after which the loss comes.
    batch : MicroBatches
        What is run.
    loss : Loss
        As `cross_entropy`.
    contributions : Contributions
        Takes the passes that add to gradients.
    outputs : bool, optional
        Whether a run without backward passes keeps what the last stage gives.

    Attributes
    ----------
    loss : float
        Summed over the micro-batches in their order; NaN where there is none.
    samples : int
        Of the batch, where the last stage is; 0 elsewhere.
    outputs : list of Array
        Of the last stage, if they are kept.
    spans : list of Span
        When each action computed, in seconds from the beginning of the step.
    """

    def __init__(
        self,
        stages: Mapping[int, Sequential],
        last: int,
        batch: MicroBatches,
        loss: Loss,
        contributions: Contributions,
        *,
        outputs: bool = False,
    ) -> None:
        self._stages = stages
        self._keeps_outputs = outputs
        self._last = last
        self._batch = batch
        self._loss = loss
        self._contexts: dict[tuple[int, int], Context] = {}
        self._contributions = contributions
        self._halves: dict[tuple[int, int], tuple[Mapping[Parameter, int], Any]] = {}
        self._gradients: dict[int, Array] = {}
        self.loss = 0.0 if batch.target is not None else float("nan")
        self.samples = batch.bounds[-1] if last in stages else 0
        self.outputs: list[Array] = []
        self.spans: list[Span] = []

    def run(self, edges: Edges) -> None:
        """Run the actions whose messages `edges` has, in their order.

        Forward passes only are an evaluation, of which no context is kept.
        """
        actions = edges.actions
        trains = any(action.kind is not Pass.FORWARD for action in actions)
        start = perf_counter()
        for index, action in enumerate(actions):
            edges.post(index)
            try:
                self._contributions.before(action)
                arrays = edges.receive(action)
                began = perf_counter()
                with region(str(action)):
                    if action.kind is Pass.FORWARD:
                        self._forward(action, arrays, trains=trains)
                    else:
                        self._backward(action, arrays)
                self.spans.append(Span(action, began - start, perf_counter() - start))
                edges.send(action, arrays)
                del arrays  # else they would live until the next action is over
                self._contributions.after(action)
            except Exception as error:
                # `add_note` begins with Python 3.11.
                notes = getattr(error, "__notes__", [])
                note = f"in {edges.describe(action)}"
                error.__notes__ = [*notes, note]  # type: ignore[attr-defined]
                raise
        edges.finish()
        if trains:
            self._contributions.finish()
        left = (self._contexts, self._halves, self._gradients)
        assert not any(left), "a schedule has a backward pass for each forward pass"

    def _forward(self, action: Action, arrays: dict[str, Array], *, trains: bool) -> None:
        """Run a forward pass; `arrays` holds what it takes, and then what it gives.

        The input and the output have the name "", and what is stashed that of its connection.
        """
        stage, _, micro = action
        x = arrays.pop("") if stage > 0 else self._batch.part(self._batch.x, micro)
        y, ctx = self._stages[stage].forward(x, self._batch.mode_of(micro), arrays)
        if trains:
            self._contexts[stage, micro] = ctx
        if stage == self._last:
            self._end(y, micro, trains=trains)
        arrays[""] = y

    def _end(self, y: Array, micro: int, *, trains: bool) -> None:
        """Take an output of the last stage: its loss, or itself."""
        if self._keeps_outputs:
            self.outputs.append(y)
        if self._batch.target is not None:
            target = self._batch.part(self._batch.target, micro)
            loss, dy = self._loss(y, target, denominator=self._batch.denominator)
            self.loss += float(loss)
            if trains:
                self._gradients[micro] = dy

    def _backward(self, action: Action, arrays: dict[str, Array]) -> None:
        """Run a backward pass, or a half; `arrays` holds what it takes, and then what it gives."""
        stage, kind, micro = action
        module, key = self._stages[stage], (stage, micro)
        if kind is Pass.BACKWARD_WEIGHT:
            uses, wctx = self._halves.pop(key)
            self._contributions.add(action, uses, lambda: module.backward_weight(wctx))
            return
        dy = arrays.pop("") if stage < self._last else self._gradients.pop(micro)
        ctx = self._contexts.pop(key)
        if kind is Pass.BACKWARD:
            arrays[""] = self._contributions.add(
                action, ctx.uses, lambda: module.backward(ctx, dy, arrays)
            )
        else:
            arrays[""], wctx = module.backward_input(ctx, dy, arrays)
            self._halves[key] = ctx.uses, wctx
