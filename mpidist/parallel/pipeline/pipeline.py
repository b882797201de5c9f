"""`Pipeline`: a model whose layers are spread over ranks, and the loop that runs any schedule."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np

from mpidist._closing import Closing
from mpidist._types import SUM, Array
from mpidist.arrays.namespaces import is_host
from mpidist.backends.work import Work
from mpidist.collectives import all_gather, all_gather_object, all_reduce
from mpidist.errors import DistributedError, ScheduleError, UnsupportedOperationError
from mpidist.group.group import ProcessGroup, check_group
from mpidist.nn.containers import Sequential
from mpidist.nn.losses import cross_entropy
from mpidist.nn.mode import EVAL, Mode
from mpidist.nn.parameter import Parameter
from mpidist.nn.skips import connections
from mpidist.nn.surround import after_passes
from mpidist.parallel.clip import check_max_norm, check_whole, clip_to_norm, squares_of
from mpidist.parallel.data.data_parallel import BUCKET_ORDER, DataParallel, HasState
from mpidist.parallel.data.verify import Description, describe, verify_same
from mpidist.parallel.pipeline.costs import measure_costs
from mpidist.parallel.pipeline.edges import Edges
from mpidist.parallel.pipeline.generators import SCHEDULES
from mpidist.parallel.pipeline.run import Contributions, Loss, MicroBatches, StageRun
from mpidist.parallel.pipeline.schedule import Pass, Schedule
from mpidist.parallel.pipeline.stages import Cuts, check_model, links_of, starts_of, warn_of_norms
from mpidist.parallel.pipeline.ties import Tie, Ties, check_replicated, ties_of
from mpidist.parallel.pipeline.timeline import Costs, Span, Timeline
from mpidist.parallel.pipeline.waits import describe_waits

__all__ = ["Evaluation", "Pipeline", "StepResult"]

_MISSING, _OTHER = -1, -2
"""What is said instead of a number of samples: there is no array, or none of the host."""


class StepResult(NamedTuple):
    """What a step gave.

    Attributes
    ----------
    loss : float
        Of the whole batch, on the rank of the last stage; NaN on the others.
    samples : int
        Of the batch, on the rank of the last stage; 0 on the others. The weight of `loss` in a
        `Metrics`.
    spans : tuple of Span
        When each action of this rank computed, in seconds from the beginning of the step, which is
        that of all ranks but for the time of a short message.
    """

    loss: float
    samples: int
    spans: tuple[Span, ...]


class Evaluation(NamedTuple):
    """What an evaluation gave.

    Attributes
    ----------
    loss : float
        Of the whole batch, on the rank of the last stage; NaN on the others, and without a target.
    samples : int
        Of the batch, on the rank of the last stage; 0 on the others.
    outputs : Array or None
        What the model gives for the batch, on the rank of the last stage; None on the others.
    """

    loss: float
    samples: int
    outputs: Array | None


class Pipeline(Closing):
    """A model whose layers are spread over ranks, which work on parts of a batch at the same time.

    ::

        pipe = Pipeline(build_model(), group, micro_batches=8, schedule="1f1b")
        optimizer = AdamW(pipe.named_parameters(), lr=1e-3)
        for step, (x, target) in enumerate(batches):     # the same batch, not a share, on each rank
            optimizer.zero_grad()
            result = pipe.step(x, target, Mode(training=True, step=step))
            pipe.clip_grad_norm(1.0)
            optimizer.step()
            metrics.add("loss", result.loss, result.samples)

    Each rank trains its stages: it has their parameters, gradients and optimizer state only. The
    gradients have the bits of one process that runs the same micro-batches one after the other,
    under every schedule, cut and number of ranks.

    Parameters
    ----------
    model : Sequential
        The whole model, built alike on every rank. The pipeline keeps the layers of its stages;
        what else refers to the model keeps all of them in memory.
    group : ProcessGroup
        The ranks. The pipeline uses a duplicate of it.
    micro_batches : int
        How many parts each batch is cut into, of sizes that differ by one sample at most. Some
        are empty where there are fewer samples.
    schedule : str or Schedule, optional
        ``"gpipe"``, ``"1f1b"``, ``"interleaved"``, ``"zb-h1"``, ``"zbv"``, ``"dualpipev"``,
        or any schedule of `micro_batches` for as many ranks as the group has.
    loss : callable, optional
        As `cross_entropy`, the default: ``loss(y, target, denominator=n)`` returns the sum over the
        samples divided by `n`, and its gradient by `y`.
    cut : sequence of int, "layers", "parameters" or Costs, optional
        The numbers of the layers with which all stages but the first begin; or what the stages
        have about equally many of; or what each layer costs, as `costs` has measured it, so that
        the slowest stage is as fast as it can be.
    data_parallel : callable, optional
        Makes the `DDP` or `FSDP` of a stage, over the ranks that have the same stage of other
        pipelines: ``lambda stage: DDP(stage, mesh["dp"].group, op=SUM)``. Each pipeline then has
        its share of the batch, and gradients are summed over all of them, once per step. What an
        `FSDP` gathers is whole from the first action of its stage in a step to the last one.

    Attributes
    ----------
    schedule : Schedule
        What a step runs.
    stages : mapping of int to Sequential
        The stages of this rank. Their layers and parameters have the names of the whole model.
    starts : tuple of int
        The first layer of each stage, of all ranks.
    loss : callable
        The loss.
    replicas : mapping of int to DDP or FSDP
        What `data_parallel` has made of the stages; empty without it.
    group : ProcessGroup
        The pipeline's own.

    Raises
    ------
    TypeError
        If `model` is no `Sequential`, or one that runs its layers in a way of its own.
    CollectiveMismatchError
        On every rank, naming a rank, if names, shapes, dtypes or arguments differ between ranks.
    ScheduleError
        If there is no such schedule, or it is of other numbers of ranks or micro-batches.
    ValueError
        If there are fewer layers than stages, or `cut` does not fit.
    UnsupportedOperationError
        If a parameter is on a device, or one of a `DDP` or `FSDP` already; if layers of two stages
        hold one buffer, or two parameters over one array, or, with `data_parallel`, those of two
        stages on one rank hold one parameter, or those of any two stages with an `FSDP`; if an
        `FSDP` has a `Precision` of parameters or output, since layers then take and give another
        dtype than the neighbours of their stage; if the messages of a step would need more tags
        than the transport has.

    Notes
    -----
    Collective over `group`; blocks. Costs the group, two small exchanges, and a message of each
    parameter that is tied over ranks. Initial values are those that the rank of a stage has drawn,
    of a tied one that of its first stage: give all ranks the same seed.

    A `Parameter` that layers of several stages hold is one parameter with the gradient of one
    process, and on each of their ranks under its name in the whole model.

    Batch normalisation has the statistics of one micro-batch, as it has in one process that runs
    micro-batches; rank 0 logs a warning of it.

    References
    ----------
    Huang et al. (2019), GPipe: Efficient Training of Giant Neural Networks using Pipeline
    Parallelism, section 2.
    """

    def __init__(
        self,
        model: Sequential,
        group: ProcessGroup,
        *,
        micro_batches: int,
        schedule: str | Schedule = "1f1b",
        loss: Loss = cross_entropy,
        cut: Cuts = "parameters",
        data_parallel: Callable[[Sequential], DataParallel] | None = None,
    ) -> None:
        check_group(group, "Pipeline")
        check_model(model, "Pipeline")
        arguments = {
            "micro_batches": micro_batches,
            "schedule": schedule,
            "loss": getattr(loss, "__qualname__", type(loss).__name__),
            "cut": cut,
            "data_parallel": "None" if data_parallel is None else "given",
        }
        verify_same(_description(model, arguments), group, operation="Pipeline")
        self.schedule = _schedule(schedule, group, micro_batches)
        self.starts = starts_of(model, cut, self.schedule.stages)
        parts = [model.part(a, b) for a, b in pairwise((*self.starts, len(model.layers)))]
        links, ties = links_of(model, self.starts), ties_of(parts)
        for tie in ties:
            for stage, name in zip(tie.stages, tie.names, strict=True):
                parts[stage].tied = {**parts[stage].tied, name: tie.names[0]}
        if data_parallel is not None:
            check_replicated(ties, self.schedule)
        _check_tags(2 * len(links) + Ties.lines(ties), self.schedule, group)
        warn_of_norms(model, micro_batches, group)
        self.group = group.duplicate(f"{group.name}/pipeline")
        self.stages: Mapping[int, Sequential] = {
            stage: part
            for stage, part in enumerate(parts)
            if self.schedule.rank_of_stage[stage] == group.rank
        }
        self._ties = Ties(ties, self.schedule, self.group, 2 * len(links))
        self._ties.share_values()
        self.replicas: dict[int, DataParallel] = {}
        if data_parallel is not None:
            self.replicas = {
                stage: _replica(data_parallel, part, ties) for stage, part in self.stages.items()
            }
        self.loss = loss
        leaves = [
            module
            for part in self.stages.values()
            for _, module in part.named_modules()
            if not any(module.named_children())
        ]
        # [Note: progress] A message makes progress while its sender or receiver is inside of a
        # call: over TCP the larger ones wait for it. Layers are where a stage can be interrupted.
        self._between_layers = after_passes(leaves, self.group.transport.progress)
        actions = self.schedule.actions[group.rank]
        forward = [action for action in actions if action.kind is Pass.FORWARD]
        self._layers, self._links = len(model.layers), links
        self._edges = {
            verb: Edges(self.schedule, of_verb, links, self.group)
            for verb, of_verb in (("step", actions), ("evaluate", forward))
        }
        self._failure: str | None = None

    def __repr__(self) -> str:
        """Return the group, the schedule and the stages of this rank."""
        stages = "\n".join(f"stage {stage}: {part!r}" for stage, part in self.stages.items())
        return (
            f"Pipeline over {self.group!r}, schedule '{self.schedule.name}', "
            f"{self.schedule.micro_batches} micro-batches:\n{stages}"
        )

    # -- a step ------------------------------------------------------------------------------------

    def step(
        self,
        x: Array | None,
        target: Array | None,
        mode: Mode,
        *,
        denominator: float | None = None,
    ) -> StepResult:
        """Run a batch forward and backward, and add to the gradients of this rank's parameters.

        Parameters
        ----------
        x : Array, shape (samples, ...), or None
            The batch, on the host. Only the rank of the first stage uses it.
        target : Array, shape (samples, ...), or None
            What the loss compares with. Only the rank of the last stage uses it.
        mode : Mode
            The same on all ranks. Micro-batches draw what their samples would draw in one batch.
        denominator : float, optional
            What the sum of the losses is divided by; the same on all ranks. When omitted, the
            number of elements of `target`, so that the loss is that of the joined batch, whatever
            the sizes of the micro-batches.

        Returns
        -------
        StepResult
            Loss and number of samples, on the rank of the last stage.

        Raises
        ------
        ValueError
            On all ranks, before anything moves, if there is no `x` where it is used, or no
            `target`, or they have different numbers of samples, or `denominator` is not positive.
        CollectiveMismatchError
            On all ranks, before anything moves, if modes or denominators differ.
        CollectiveTimeoutError, PeerLostError
            Naming the action of this rank, and the one it waits for: ``pipeline 2F3, waits for 1F3
            of rank 1``.
        RuntimeError
            If an earlier step has failed half way, or, on all ranks and before anything moves, if
            gradients that have been summed over the data axis were not zeroed.

        Notes
        -----
        Collective over the group, and over the ranks of the data axis; blocks. Costs one all-gather
        of 32 bytes per rank, and for each micro-batch, between two stages on different ranks, a
        message of an activation and one of its gradient. A connection from a `Stash` to a `Pop` on
        another rank costs the same. A tied parameter costs a message of its size for each
        micro-batch, from each stage that holds it on another rank than the first one, and one back
        per step. Shapes may change from step to step; where a shape is that of the last step, its
        message has no envelope. What a layer raises has a note that names the action.
        """
        result, work = self.istep(x, target, mode, denominator=denominator)
        work.wait()
        return result

    def istep(
        self,
        x: Array | None,
        target: Array | None,
        mode: Mode,
        *,
        denominator: float | None = None,
    ) -> tuple[StepResult, Work[list[None]]]:
        """Run a batch forward and backward, and return while sums over the data axis are under way.

        Parameters
        ----------
        x, target, mode, denominator : Array, Array, Mode, float
            As for `step`.

        Returns
        -------
        result : StepResult
            As that of `step`.
        work : Work
            To be waited for before a gradient is read; `zero_grad`, `clip_grad_norm` and the next
            step wait, too.

        Raises
        ------
        ValueError, CollectiveMismatchError, CollectiveTimeoutError, PeerLostError, RuntimeError
            As `step`.

        Notes
        -----
        Collective as `step`; blocks for everything but the last gradients of the data axis.
        """
        run, works = self._run("step", x, target, mode, denominator)
        return StepResult(run.loss, run.samples, tuple(run.spans)), Work.all(works)

    def evaluate(
        self,
        x: Array | None,
        target: Array | None = None,
        mode: Mode = EVAL,
        *,
        denominator: float | None = None,
        outputs: bool | None = None,
    ) -> Evaluation:
        """Run a batch forward only.

        Parameters
        ----------
        x : Array, shape (samples, ...), or None
            The batch, on the host. Only the rank of the first stage uses it.
        target : Array, shape (samples, ...), or None
            Only the rank of the last stage uses it; without it there is no loss.
        mode : Mode, optional
            The same on all ranks.
        denominator : float, optional
            As for `step`.
        outputs : bool, optional
            Whether the rank of the last stage keeps what the model gives for the whole batch. By
            default only without a target.

        Returns
        -------
        Evaluation
            Loss, number of samples, and outputs, on the rank of the last stage.

        Raises
        ------
        ValueError, CollectiveMismatchError, CollectiveTimeoutError, PeerLostError, RuntimeError
            As `step`.

        Notes
        -----
        Collective over the group, and with a data axis and no `denominator` also over the ranks of
        the last stage; blocks. Runs the forward passes of the schedule in their order, and keeps
        nothing of them. At any time between two steps.
        """
        keeps = target is None if outputs is None else outputs
        run, _ = self._run("evaluate", x, target, mode, denominator, outputs=keeps)
        joined = np.concatenate(run.outputs) if run.outputs else None
        return Evaluation(run.loss, run.samples, joined)

    def _run(
        self,
        verb: str,
        x: Array | None,
        target: Array | None,
        mode: Mode,
        denominator: float | None,
        *,
        outputs: bool = False,
    ) -> tuple[StageRun, list[Work[None]]]:
        """Agree with the other ranks on what is run, run it, and return what it has given.

        The works are the sums of gradients that are still under way.
        """
        samples = self._agree(verb, x, target, mode, denominator)
        bounds = _bounds(samples, self.schedule.micro_batches)
        last = self.schedule.stages - 1
        edges = self._edges[verb]
        contributions = Contributions(self.replicas, edges.actions, self._ties)
        try:
            if denominator is None:
                denominator = self._denominator(target)
            batch = self._batch(bounds, x, target, mode, denominator)
            run = StageRun(self.stages, last, batch, self.loss, contributions, outputs=outputs)
            with self._between_layers:
                run.run(edges)
        except BaseException as error:
            self._failure = repr(error)
            contributions.release()
            raise
        return run, contributions.works

    def _batch(
        self,
        bounds: tuple[int, ...],
        x: Array | None,
        target: Array | None,
        mode: Mode,
        denominator: float,
    ) -> MicroBatches:
        """Return what is run, with the arrays that this rank's stages use."""
        x = x if 0 in self.stages else None
        target = target if self.schedule.stages - 1 in self.stages else None
        return MicroBatches(bounds, x, target, mode, denominator)

    def _denominator(self, target: Array | None) -> float:
        """Return the size of the whole target, over the data axis where gradients are summed."""
        last = self.schedule.stages - 1
        size = target.size if last in self.stages and target is not None else 0
        replica = self.replicas.get(last)
        if replica is not None and replica.op is SUM:
            size = int(all_reduce(np.array(size), replica.group))
        return float(max(size, 1))

    def _agree(
        self,
        verb: str,
        x: Array | None,
        target: Array | None,
        mode: Mode,
        denominator: float | None,
    ) -> int:
        """Return the number of samples of the batch, or raise on all ranks alike.

        Waits for the gradients of an earlier step, which a pass might add to.
        """
        if self._failure is not None:
            raise RuntimeError(
                f"Pipeline.{verb} on {self.group}: an earlier step failed half way "
                f"({self._failure}), so the ranks do not agree any more on what is under way; end "
                "the job"
            )
        for replica in self.replicas.values():
            replica.wait()
        described = (("call", verb), ("mode", str(mode)), ("denominator", str(denominator)))
        digest = hashlib.sha256(repr(described).encode()).digest()[:8]
        own = [
            _samples(x),
            _samples(target),
            int.from_bytes(digest, "little", signed=True),
            verb == "step" and any(replica.holds_sums() for replica in self.replicas.values()),
        ]
        facts = all_gather(np.array([own], np.int64), self.group)
        if (facts[:, 2] != facts[0, 2]).any():
            verify_same(described, self.group, operation=f"Pipeline.{verb}")
        if denominator is not None and not 0 < denominator < math.inf:
            raise ValueError(
                f"Pipeline.{verb} on {self.group}: expected a positive denominator, got "
                f"{denominator}; leave it out, or give the number of samples of the joined batch"
            )
        if facts[:, 3].any():
            raise RuntimeError(
                f"Pipeline.step on {self.group}: gradients of an earlier step are sums over the "
                "data axis, and would be summed again; zero_grad() on all ranks before each step"
            )
        first, last = self.schedule.rank_of_stage[0], self.schedule.rank_of_stage[-1]
        given = {"x": (first, int(facts[first, 0])), "target": (last, int(facts[last, 1]))}
        if verb == "evaluate" and given["target"][1] == _MISSING:
            del given["target"]
        for name, (rank, samples) in given.items():
            if samples < 0:
                got = "none" if samples == _MISSING else "something else"
                raise ValueError(
                    f"Pipeline.{verb} on {self.group}: expected {name} on rank {rank}, an array on "
                    f"the host whose first axis counts the samples, got {got}"
                )
        if len({samples for _, samples in given.values()}) > 1:
            raise ValueError(
                f"Pipeline.{verb} on {self.group}: x on rank {first} has {facts[first, 0]} "
                f"samples, and target on rank {last} has {facts[last, 1]}; give both the same "
                "batch"
            )
        return given["x"][1]

    def timeline(self, result: StepResult) -> Timeline:
        """Return when each rank computed and waited in a step.

        Parameters
        ----------
        result : StepResult
            Of this rank; of the same step on all.

        Returns
        -------
        Timeline
            In seconds; the same on all ranks. Beside it, ``simulate(pipe.schedule,
            timeline.costs())`` says how the step would be without messages and other programs.

        Notes
        -----
        Collective over the group; blocks. One exchange of the spans.
        """
        return Timeline(tuple(all_gather_object(result.spans, self.group)))

    def describe(self, timeline: Timeline) -> str:
        """Say in words who waited for whom in a step, and whether another cut would be better.

        Parameters
        ----------
        timeline : Timeline
            As `timeline` returns it.

        Returns
        -------
        str
            The span of the step, and what it would be without messages; a line for each rank; and
            between which neighbouring stages to move a layer, if that makes the step shorter by
            more than 2 %: as simulated, with each stage's time divided equally among its layers.
        """
        return describe_waits(self.schedule, timeline, (*self.starts, self._layers))

    def costs(self, x: Array | None, target: Array | None, mode: Mode) -> Costs:
        """Measure what each layer costs, for ``cut=``, `simulate` and `fitted`.

        Parameters
        ----------
        x, target : Array or None
            One micro-batch, as for `step`.
        mode : Mode
            As for `step`.

        Returns
        -------
        Costs
            Of each layer of the whole model, in seconds: medians of three passes after a first one.
            ``costs.joined(pipe.starts)`` are those of the stages. The same on all ranks.

        Raises
        ------
        ValueError, CollectiveMismatchError, CollectiveTimeoutError, PeerLostError, RuntimeError
            As `step`.

        Notes
        -----
        Collective over the group, and with an `FSDP` over the data axis; blocks. Sends what four
        steps of one micro-batch send, and one small exchange. One rank works at a time, so it is
        timed alone. Changes no parameter, gradient or buffer. A layer that stands in several places
        of a rank costs at each of them what it takes at them on average.
        """
        samples = self._agree("costs", x, target, mode, None)
        batch = self._batch((0, samples), x, target, mode.replayed(), 1.0)
        try:
            with ExitStack() as whole:
                for replica in self.replicas.values():
                    whole.enter_context(replica.whole())
                return measure_costs(
                    self.stages,
                    self.starts,
                    self.schedule.rank_of_stage,
                    self._links,
                    batch,
                    self.loss,
                    self.group,
                )
        except BaseException as error:
            self._failure = repr(error)
            raise

    # -- parameters and states ---------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Yield this rank's parameters under their names in the whole model, for an optimizer."""
        seen: set[Parameter] = set()
        for part in self.stages.values():
            for name, parameter in part.named_parameters():
                if parameter not in seen:
                    seen.add(parameter)
                    yield name, parameter

    def parameters(self) -> Iterator[Parameter]:
        """Yield this rank's parameters."""
        return (parameter for _, parameter in self.named_parameters())

    def zero_grad(self) -> None:
        """Forget the gradients of this rank's parameters; waits for those under way."""
        for _, held, _ in self._held():
            held.zero_grad()

    def clip_grad_norm(self, max_norm: float) -> float:
        """Scale the gradients of all ranks down so that their norm together is at most `max_norm`.

        Parameters
        ----------
        max_norm : float
            Positive.

        Returns
        -------
        float
            The norm before clipping, the same on all ranks; with the bits of `clip_grad_norm` of
            the whole model in one process, unless gradients are split over the data axis.

        Raises
        ------
        ValueError
            If `max_norm` is not positive; on every rank, if one has a parameter that is a part of
            a whole one.
        RuntimeError
            On every rank, if one has a gradient that an `FSDP` has not reduced.

        Notes
        -----
        Collective over the group; blocks. One exchange of 8 bytes per parameter; where gradients
        are split over the data axis another one there.
        """
        check_max_norm(max_norm)
        own: list[float] = []
        grads: list[Array] = []
        refusal: ValueError | RuntimeError | None = None
        try:
            gradients = list(self._gradients())
        except DistributedError:
            raise
        except (ValueError, RuntimeError) as error:
            refusal = error  # the ranks of other stages may have none, and wait
        else:
            for shards, over in gradients:
                grads += [shard.grad for shard in shards if shard.grad is not None]
                roots = [shard for shard in shards if self._ties.is_root(shard)]
                with np.errstate(all="ignore"):
                    own += squares_of(roots, over)
        everyone = all_gather_object((own, refusal), self.group)
        for rank, (_, theirs) in enumerate(everyone):
            if theirs is not None:
                raise type(theirs)(
                    f"Pipeline on {self.group}: rank {rank} refuses: {theirs}"
                ) from refusal
        squares = chain.from_iterable(own for own, _ in everyone)
        return clip_to_norm(grads, [], list(squares), max_norm)

    def _gradients(self) -> Iterator[tuple[list[Parameter], ProcessGroup | None]]:
        """Yield what each stage updates, and over which ranks it is split; raise if it cannot."""
        seen: set[Parameter] = set()  # two stages of this rank may hold the same parameter
        for stage, part in self.stages.items():
            replica = self.replicas.get(stage)
            held = part.parameters() if replica is None else replica.shards()
            shards = [shard for shard in held if shard not in seen]
            seen.update(shards)
            if replica is not None and replica.splits_gradients:
                yield shards, replica.group
            else:
                check_whole(list(part.named_parameters()))
                yield shards, None

    def state_dict(self) -> dict[str, Any]:
        """Return parameters and buffers of this rank's stages, under their names in the model.

        Returns
        -------
        dict of str to (Array, ShardedArray, list of str or None)
            The living arrays, or this rank's slices of them, where an `FSDP` or a
            `ShardedOptimizer` splits them over the data axis. A checkpoint that all ranks save
            together holds the whole model, and loads into any other cut of it, or one process.
            With `data_parallel` also the order of each stage's buckets, under
            ``"buckets/order/<stage>"``.
        """
        return {
            _key(stage, name): value
            for stage, _, inner in self._held()
            for name, value in inner.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy values into the parameters and buffers of this rank's stages.

        Parameters
        ----------
        state : mapping of str to Array
            As `state_dict` returns it, or of the whole model. The order of a stage's buckets is
            taken where the stage had the same parameters, so that the next step has the bits of a
            run that has not stopped.

        Raises
        ------
        ValueError
            Listing names that are missing and shapes or dtypes that differ; nothing has been
            changed then.

        Notes
        -----
        Local, unless parameters are split over the data axis: then collective over it; blocks.
        """
        parts = []
        for stage, held, inner in self._held():
            keys = {name: _key(stage, name) for name in inner.state_dict()}
            own = {name: state[key] for name, key in keys.items() if key in state}
            order = own.get(BUCKET_ORDER)
            trained = {name for name, p in held.named_parameters() if p.trainable}
            if order is not None and {*order} != trained:  # that of another cut
                del own[BUCKET_ORDER]
            parts.append((held, inner, own))
        for held, _, own in parts:
            held.check_state_dict(own)
        for _, inner, own in parts:
            inner.load_state_dict(own)

    def _held(self) -> Iterator[tuple[int, Sequential | DataParallel, HasState]]:
        """Yield the stages of this rank; each, or its replica, and what has its state."""
        for stage, part in self.stages.items():
            replica = self.replicas.get(stage)
            if replica is None:
                yield stage, part, part
            else:
                yield stage, replica, replica.model_state

    def close(self) -> None:
        """Release the pipeline's groups; the stages stay as they are."""
        for replica in self.replicas.values():
            replica.close()
        self.group.close()


def _description(model: Sequential, arguments: Mapping[str, Any]) -> Description:
    return (
        *(describe("parameter", name, p.data) for name, p in model.named_parameters()),
        *(describe("buffer", name, array) for name, array in model.named_buffers()),
        ("number of layers", str(len(model.layers))),
        *((f"connection '{k}'", str(ends)) for k, ends in connections(model.layers).items()),
        *((f"argument '{name}'", str(value)) for name, value in arguments.items()),
    )


def _schedule(given: str | Schedule, group: ProcessGroup, micro_batches: int) -> Schedule:
    """Return the schedule of this name, or the given one if it fits."""
    if isinstance(given, Schedule):
        if (given.ranks, given.micro_batches) != (group.size, micro_batches):
            raise ScheduleError(
                f"Pipeline on {group}: expected a schedule of {group.size} ranks and "
                f"{micro_batches} micro-batches, got '{given.name}' of {given.ranks} and "
                f"{given.micro_batches}"
            )
        return given
    if given not in SCHEDULES:
        raise ScheduleError(
            f"Pipeline on {group}: expected a schedule, or one of the names "
            f"{', '.join(SCHEDULES)}; got {given!r}"
        )
    return SCHEDULES[given](group.size, micro_batches)


def _check_tags(lines: int, schedule: Schedule, group: ProcessGroup) -> None:
    """Raise unless there are tags for so many messages of each micro-batch."""
    most = group.capabilities.max_tag
    largest = lines * schedule.micro_batches - 1
    if largest > most:
        raise UnsupportedOperationError(
            f"Pipeline on {group}: the messages of {schedule.stages} stages and "
            f"{schedule.micro_batches} micro-batches need tags up to {largest}, and there are "
            f"{most}; take at most {(most + 1) // lines} micro-batches"
        )


def _replica(
    data_parallel: Callable[[Sequential], DataParallel], stage: Sequential, ties: Sequence[Tie]
) -> DataParallel:
    """Return the DDP or FSDP that was made of a stage."""
    made = data_parallel(stage)
    if not isinstance(made, DataParallel) or made.module is not stage:
        raise TypeError(
            "Pipeline: expected data_parallel to return a DDP or FSDP of the stage that it is "
            f"given, as lambda stage: DDP(stage, group, op=SUM); got {made!r}"
        )
    if made.casts:
        raise UnsupportedOperationError(
            f"Pipeline: {type(made).__name__} on {made.group} has a Precision of parameters or "
            "output, with which a stage would take and give another dtype than its neighbours; "
            "give it Precision(reduction=...) alone, and build the model in the dtype in which it "
            "is to compute"
        )
    if made.splits_gradients and ties:
        raise UnsupportedOperationError(
            f"Pipeline: '{ties[0].names[0]}' is held by stages {ties[0].stages}, and its gradient "
            f"cannot be summed over them where {type(made).__name__} has it in slices; make a DDP "
            "of each stage, or cut the model so that one stage has all layers that hold it"
        )
    return made


def _key(stage: int, name: str) -> str:
    """Return the name in the pipeline's state of what a stage's state has under a name."""
    return f"{name}/{stage}" if name == BUCKET_ORDER else name


def _samples(array: Array | None) -> int:
    """Return the number of samples, or why there is none."""
    if array is None:
        return _MISSING
    return len(array) if is_host(array) and array.ndim > 0 else _OTHER


def _bounds(samples: int, micro_batches: int) -> tuple[int, ...]:
    """Return where the micro-batches begin, and the end of the last; the first ones are larger."""
    size, larger = divmod(samples, micro_batches)
    return tuple(m * size + min(m, larger) for m in range(micro_batches + 1))
