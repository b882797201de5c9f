"""The training loop: read it from top to bottom, copy it, change it.

One step is four verbs (forward, loss, backward, step) on this rank's share of a joined batch. What
makes it exact on any number of ranks, also where the shares differ or a rank has no sample, stands
in two places: the loss is divided by the size of the *joined* batch, and ``op=SUM`` adds
the ranks' gradients. So a run's curve does not depend on the number of ranks, apart from rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from mpidist._types import SUM, Array
from mpidist.arrays.namespaces import is_device, like_device
from mpidist.data import ArrayDataset, Batch, ShardedSampler
from mpidist.group import ProcessGroup
from mpidist.nn import EVAL, Mode, cross_entropy
from mpidist.observe.regions import STEP, region
from mpidist.optim import Optimizer
from mpidist.parallel import Metrics, Pipeline, ShardedOptimizer, Strategy
from mpidist.train.records import Record
from mpidist.train.saving import Checkpoints, Run
from mpidist.train.stopping import StopSignal


class CountedCrossEntropy:
    """The loss of a `Pipeline` that is trained here: `cross_entropy`, which counts right answers.

    A pipeline keeps no outputs of a step, so nobody else can count them.
    """

    def __init__(self) -> None:
        self._targets = self._right = 0

    def __call__(self, y: Array, target: Array, /, *, denominator: float) -> tuple[Array, Array]:
        """Return what `cross_entropy` does."""
        self._targets += target.size
        self._right += int((y.argmax(-1) == target).sum())
        return cross_entropy(y, target, denominator=denominator)

    def take(self) -> tuple[int, int]:
        """Return the numbers of targets and of right answers since the last time."""
        counted, self._targets, self._right = (self._targets, self._right), 0, 0
        return counted


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to train, and how often to record, evaluate and save.

    Parameters
    ----------
    steps : int
        Optimizer steps of the whole run.
    batch_size : int
        Samples per step over all ranks together.
    seed : int, optional
        For the order of the samples and everything random in the model.
    max_norm : float, optional
        Longest gradient: longer ones are scaled down to this 2-norm.
    log_every : int, optional
        Steps between training records.
    evaluate_every : int, optional
        Steps between evaluations of the held-out samples; 0 is only at the end.
    checkpoint_every : int, optional
        Steps between checkpoints; 0 is only at the end, and when the run is stopped.

    Raises
    ------
    ValueError
        If `steps` or `log_every` is not positive.
    """

    steps: int
    batch_size: int
    seed: int = 0
    max_norm: float = 1.0
    log_every: int = 10
    evaluate_every: int = 0
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"Plan: {name} must be at least 1, got {getattr(self, name)}")


def make_sampler(train_set: ArrayDataset, plan: Plan, group: ProcessGroup) -> ShardedSampler:
    """Return what decides the samples of each step of `train`.

    Parameters
    ----------
    train_set, plan, group : ArrayDataset, Plan, ProcessGroup
        The samples, the batch size and seed, and the ranks; as for `train`.

    Returns
    -------
    ShardedSampler
        At the first step. `Run` takes it, too.
    """
    return ShardedSampler(
        len(train_set),
        rank=group.rank,
        size=group.size,
        batch_size=plan.batch_size,
        seed=plan.seed,
    )


def train(  # noqa: PLR0913 - the last three have a default
    model: Strategy | Pipeline,
    optimizer: Optimizer | ShardedOptimizer,
    train_set: ArrayDataset,
    held_out: ArrayDataset,
    plan: Plan,
    group: ProcessGroup,
    *,
    data: ProcessGroup | None = None,
    checkpoints: Checkpoints | None = None,
    stop: StopSignal | None = None,
) -> Iterator[Record]:
    """Train, yielding a record now and then.

    Parameters
    ----------
    model : DDP, FSDP or another Strategy, or Pipeline
        Made with ``op=SUM``; its output has the classes last. A pipeline's DDP or FSDP is made so,
        and its ``loss`` is a `CountedCrossEntropy`.
    optimizer : Optimizer or ShardedOptimizer
        Of the model's parameters, or made with `model`. Training goes on from its `step_count`;
        with that many steps or more than `Plan.steps` there is nothing to do.
    train_set, held_out : ArrayDataset
        What to learn from, and what to judge by; the same on all ranks.
    plan : Plan
        How long and how often.
    group : ProcessGroup
        All ranks.
    data : ProcessGroup, optional
        The ranks that share each batch: `group`, when omitted; with pipelines beside each other
        the data axis, ``mesh["dp"].group``.
    checkpoints : Checkpoints, optional
        Where to save: every `Plan.checkpoint_every` steps, at the end, and when stopped.
    stop : StopSignal, optional
        Asked after every step. Once it says so, the run is saved and the iteration ends, with
        ``optimizer.step_count < plan.steps``.

    Yields
    ------
    Record
        Equal on all ranks, apart from the times. Means are over the steps since the last one. One
        comes before every save, so that the records of a run that goes on from there cover each
        step once.

    Raises
    ------
    ValueError
        If `model` was not made with ``op=SUM``.
    TypeError
        If `model` is a pipeline that was made with another loss.
    FloatingPointError
        On every rank, naming the step, if a gradient or the loss on `held_out` is not finite. The
        record with that loss has been yielded.
    CheckpointError
        On every rank, if a save fails.

    Notes
    -----
    Collective over `group`: every rank must iterate to the end. Per step the ranks communicate the
    gradients, with `stop` 4 bytes more, and per record one all_reduce of a few numbers.

    A run that is stopped, loaded into another job of as many ranks, and trained on ends with the
    same parameters, bit for bit, as one that was never stopped.
    """
    _check_sums(model, "train")
    sampler = make_sampler(train_set, plan, data or group)
    sampler.skip_to(optimizer.step_count)
    run, meter = Run(model, optimizer, sampler), _Meter(group)
    while optimizer.step_count < plan.steps:
        for batch in sampler:
            rate = optimizer.lr
            with region(STEP):
                train_step(model, optimizer, train_set, batch, plan, meter.metrics)
            meter.samples += batch.global_size
            if checkpoints is not None:
                checkpoints.progress()

            done, last = optimizer.step_count, optimizer.step_count == plan.steps
            epoch = done / sampler.steps_per_epoch
            over = (stop is not None and stop.agreed(group)) or last
            saving = checkpoints if over or _due(done, plan.checkpoint_every) else None
            if over or saving is not None or _due(done, plan.log_every):
                yield meter.record("train", step=done, epoch=epoch, lr=rate)
                meter.resume()
            if last or _due(done, plan.evaluate_every):
                meter.pause()
                with region("evaluate"):
                    record = evaluate(
                        model, held_out, plan, group, data=data, step=done, epoch=epoch
                    )
                yield record
                _check_finite("loss on held-out samples", record.loss, after=done)
                meter.resume()
            if saving is not None:
                meter.pause()
                saving.save(run)
                if over:
                    saving.wait()
                meter.resume()
            if over:
                return


def train_step(
    model: Strategy | Pipeline,
    optimizer: Optimizer | ShardedOptimizer,
    data: ArrayDataset,
    batch: Batch,
    plan: Plan,
    metrics: Metrics,
) -> None:
    """Make one step on this rank's share of a batch, which may be empty.

    Parameters
    ----------
    model, optimizer : Strategy or Pipeline, Optimizer or ShardedOptimizer
        The model, made as for `train`, and its optimizer.
    data : ArrayDataset
        Samples and targets, the same on all ranks.
    batch : Batch
        This rank's share of a step, from the sampler.
    plan : Plan
        Gives `seed` and `max_norm`.
    metrics : Metrics
        Receives ``"loss"``, ``"accuracy"`` and ``"grad_norm"``.

    Raises
    ------
    ValueError, TypeError
        As `train`.
    FloatingPointError
        On every rank, if the gradient's norm is not finite; no parameter has been changed then.

    Notes
    -----
    Collective over the model's group; returns when the parameters have been updated. If they lie on
    a device, the batch is copied there, and the host waits once, for the gradient's norm, and not
    for the update.
    """
    _check_sums(model, "train_step")
    x, target = _take(model, data, batch)
    mode = Mode(
        training=True,
        seed=plan.seed,
        step=optimizer.step_count,
        sample_offset=batch.sample_offset,
    )
    denominator = batch.global_size * data.targets_per_sample

    optimizer.zero_grad()
    loss: Any
    if isinstance(model, Pipeline):
        y, loss = None, model.step(x, target, mode, denominator=denominator).loss
    else:
        y, ctx = model.forward(x, mode)
        loss, dy = cross_entropy(y, target, denominator=denominator)
        model.backward(ctx, dy)  # returns when the gradients are the sum over the ranks
    grad_norm = model.clip_grad_norm(plan.max_norm)
    # Equal on all ranks, so all of them stop here or none does.
    _check_finite("gradient's norm", grad_norm, after=optimizer.step_count)
    optimizer.step()

    if isinstance(model, Pipeline):
        count, right = _counted(model).take()
        loss = loss if count else 0.0  # NaN where the last stage is not
    else:
        count, right, loss = target.size, _right(y, target), _wide(loss)
    _add(metrics, count, right, loss * denominator)
    metrics.add("grad_norm", float(grad_norm), 1.0)


def evaluate(
    model: Strategy | Pipeline,
    held_out: ArrayDataset,
    plan: Plan,
    group: ProcessGroup,
    *,
    data: ProcessGroup | None = None,
    step: int = 0,
    epoch: float = 0.0,
) -> Record:
    """Judge the model by samples that it was not trained on.

    Parameters
    ----------
    model : DDP, FSDP or another Strategy, or Pipeline
        The model; its output has the classes last.
    held_out : ArrayDataset
        Samples and targets, the same on all ranks.
    plan, group, data : Plan, ProcessGroup, ProcessGroup
        The batch size, all ranks, and those that share each batch, as for `train`.
    step : int, optional
        Written into the record.
    epoch : float, optional
        Written into the record.

    Returns
    -------
    Record
        Means over all samples of `held_out`, equal on all ranks.

    Notes
    -----
    Collective over `group`; blocks. At the end `Metrics.reduce` agrees on the names and adds up:
    an exchange of objects, and an all-reduce of 32 bytes. Before, forward passes communicate where
    those of `model` do: with an `FSDP` that gathers parameters.
    """
    data = data or group
    sampler = ShardedSampler(
        len(held_out), rank=data.rank, size=data.size, batch_size=plan.batch_size, shuffle=False
    )
    meter = _Meter(group)
    for batch in sampler:
        x, target = _take(model, held_out, batch)
        y: Array | None
        if isinstance(model, Pipeline):
            y = model.evaluate(x).outputs
        else:
            y, _ = model.forward(x, EVAL)
        if y is None:  # on the ranks of other stages than the last one
            _add(meter.metrics, 0, 0, 0.0)
        else:
            loss, _ = cross_entropy(y, target, denominator=1.0)
            _add(meter.metrics, target.size, _right(y, target), _wide(loss))
        meter.samples += batch.global_size
    return meter.record("held-out", step=step, epoch=epoch)


def _due(done: int, every: int) -> bool:
    """Return whether it is time for what is done every so many steps, or never if that is 0."""
    return every > 0 and done % every == 0


def _check_sums(model: Strategy | Pipeline, operation: str) -> None:
    """Refuse a mean of gradients that are shares of the joined batch's gradient already."""
    if isinstance(model, Pipeline):
        _counted(model)
    for inner in model.replicas.values() if isinstance(model, Pipeline) else [model]:
        if inner.op is not SUM:
            raise ValueError(
                f"{operation}: model was made with op={inner.op.name}; the loss is divided by the "
                "size of the joined batch here, so the ranks' gradients have to be added: make it "
                f"with {type(inner).__name__}(..., op=SUM)"
            )


def _counted(model: Pipeline) -> CountedCrossEntropy:
    """Return the loss of a pipeline, which has counted."""
    if not isinstance(model.loss, CountedCrossEntropy):
        raise TypeError(
            "train: expected a Pipeline made with loss=CountedCrossEntropy(), which counts the "
            f"right answers for the records, got the loss {model.loss!r}"
        )
    return model.loss


def _check_finite(what: str, value: float, *, after: int) -> None:
    """Stop where training has diverged: no later step would bring a number back."""
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the {what} is {value} after step {after}: training has diverged, or a sample holds "
            "such a number; lower the learning rate or look at the data (gradients sent as float16 "
            "overflow above 65504)"
        )


class _Meter:
    """Means, samples and seconds since the last record."""

    def __init__(self, group: ProcessGroup) -> None:
        self.metrics = Metrics(group)
        self.samples = 0
        self._seconds = 0.0
        self._begin = perf_counter()

    def pause(self) -> None:
        """Stop the clock: what follows is not training."""
        self._seconds += perf_counter() - self._begin

    def resume(self) -> None:
        """Let the clock run again."""
        self._begin = perf_counter()

    def record(self, kind: str, *, step: int, epoch: float, lr: float | None = None) -> Record:
        """Return the means over all ranks, and begin anew with the clock stopped."""
        means = self.metrics.reduce()
        self.pause()
        speed = self.samples / self._seconds
        self.samples, self._seconds = 0, 0.0
        return Record(
            kind=kind,
            step=step,
            epoch=epoch,
            loss=means["loss"],
            accuracy=means["accuracy"],
            samples_per_second=speed,
            lr=lr,
            grad_norm=means.get("grad_norm"),
        )


def _take(model: Strategy | Pipeline, data: ArrayDataset, batch: Batch) -> tuple[Array, Array]:
    """Return this rank's samples where the model's parameters are."""
    x, target = data.take(batch.indices)
    if isinstance(model, Pipeline):
        return x, target
    for parameter in model.module.parameters():
        return like_device(parameter.like, x), like_device(parameter.like, target)
    return x, target


def _wide(number: Array) -> Any:
    """Return a float; of a number on a device, that number: to read it, the host would wait."""
    return number.astype(np.float64) if is_device(number) else float(number)


def _right(y: Any, target: Array) -> Any:
    """Return how many targets have been answered; on a device, a number there."""
    return _wide((y.argmax(-1) == target).sum())


def _add(metrics: Metrics, count: int, right: Any, loss: Any) -> None:
    """Count the targets of a share, `loss` being the sum over them; an empty share weighs 0."""
    metrics.add("loss", loss / max(count, 1), float(count))
    metrics.add("accuracy", right / max(count, 1), float(count))
