"""Train a small network on real data, on one rank or many.

    python jobs/train.py --task digits
    mpirun -n 4 python jobs/train.py --task digits
    mpirun -n 4 python jobs/train.py --task text --out runs/text
    mpirun -n 2 python jobs/train.py --task text --strategy full_shard
    mpirun -n 4 python jobs/train.py --strategy hybrid_shard --mesh replicate=2,shard=-1
    mpirun -n 4 python jobs/train.py --task text --mesh dp=2,pp=2 --schedule zb-h1
    mpirun -n 2 python jobs/train.py --task text --device gpu
    sbatch jobs/ddp-one-node.sbatch --task text --out runs/text

Writes metrics.jsonl, loss.png and a directory of checkpoints into --out. The curve does not depend
on the number of ranks, apart from rounding: --batch-size counts the samples of all ranks together,
and samples, initial values and dropout follow from --seed alone. The loop itself is
mpidist/train/loop.py.

At SIGUSR1, SIGTERM or SIGHUP (a terminal that is closed) on any rank all ranks finish their step,
save, and end with exit code 75: run it again with --resume. Started by nohup, it goes on when the
terminal is closed. Training that diverges ends with exit code 1.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from train_options import make_parser

from mpidist._formatting import format_count
from mpidist._stdout import accept_any_text
from mpidist.usage import write_once

if TYPE_CHECKING:
    from task import Task

    from mpidist.group import ProcessGroup
    from mpidist.parallel import MemoryLedger
    from mpidist.train import Checkpoints, MetricsFile, Plan, Record, Run, StopSignal

DIVERGED = 1
"""Exit code after a loss or gradient that is not finite."""

STOPPED = 75
"""Exit code after a signal and a save, EX_TEMPFAIL of sysexits.h: not done, no failure, try again.
Batch scripts start the job again after this one and no other."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell reports it: 128 + SIGINT."""

REFUSED = 2
"""Exit code after options that cannot be followed, as argparse has it."""

OUTPUT_BYTES = 1 << 19
"""What metrics.jsonl and loss.png take, about."""

METRICS, PICTURE, CHECKPOINTS = "metrics.jsonl", "loss.png", "checkpoints"


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    return make_parser(__doc__ or "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    p = parser()
    options = p.parse_args(arguments)
    if options.compression != "none" and options.strategy not in ("ddp", "zero"):
        p.error(f"--compression goes with --strategy ddp or zero, not with {options.strategy}")
    refuse_options(p, options)
    if options.units is not None and options.strategy in ("ddp", "zero"):
        p.error(f"--units goes with the strategies of FSDP, not with {options.strategy}")
    options.out = options.out or Path("runs", options.task)
    options.checkpoint_dir = options.checkpoint_dir or options.out / CHECKPOINTS
    limit_threads()
    accept_any_text()
    try:
        return run(options)
    except KeyboardInterrupt:
        if sys.excepthook is not sys.__excepthook__:
            raise  # to mpidist's hook, which ends all ranks with the same code, without a traceback
        return INTERRUPTED
    except FloatingPointError:  # on all ranks together; rank 0 has said so
        return DIVERGED


def refuse_options(p: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program if options of a mesh do not go together."""
    piped = options.mesh is not None and "pp" in options.mesh
    if options.mesh is not None and not piped and options.strategy != "hybrid_shard":
        p.error(
            f"--mesh replicate=N,shard=M goes with --strategy hybrid_shard, not with "
            f"{options.strategy}"
        )
    if not piped and (options.schedule or options.micro_batches):
        p.error("--schedule and --micro-batches go with --mesh dp=N,pp=M")
    if piped and options.device == "gpu":
        p.error("--mesh dp=N,pp=M goes with --device cpu: pipelines carry host arrays only")
    if options.schedule in ("interleaved", "zbv") and options.strategy != "ddp":
        p.error(
            f"--schedule {options.schedule}, of two stages per rank, goes with --strategy ddp, not "
            f"with {options.strategy}"
        )


def limit_threads() -> None:
    """Give each rank one thread for its matrix products, unless the user has chosen a number.

    The ranks already keep the cores busy, one each. BLAS would start a thread per core in every
    rank, and the matrices here are too small to gain by it even on one rank.
    """
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    if not any(name in os.environ for name in names):
        os.environ.update(dict.fromkeys(names, "1"))


def run(options: argparse.Namespace) -> int:
    """Train as the options say; called by every rank of the job. Return the exit code."""
    # The first import of numpy fixes the number of threads, so it comes after limit_threads().
    import mpidist
    from mpidist.train import StopSignal

    with StopSignal() as stop:
        try:
            world = mpidist.init("hybrid" if options.device == "gpu" else None)
        except mpidist.BackendUnavailableError as error:  # on all ranks
            if options.device != "gpu":
                raise
            write_once(f"train.py: error: --device gpu: {error}\n")
            return REFUSED
        with world:
            return run_on(world, options, stop)


def run_on(world: ProcessGroup, options: argparse.Namespace, stop: StopSignal) -> int:
    """Train on these ranks. Return the exit code."""
    from strategies import make_optimizer, make_strategy, measure_memory

    from mpidist.errors import (
        CheckpointIncompatibleError,
        InvalidWorldSizeError,
        UnsupportedOperationError,
    )
    from mpidist.train import Checkpoints, Run, make_sampler

    task = make_task(options)
    task.model.to(options.device)
    plan = make_plan(options, task)
    try:
        model, data = make_strategy(options, task, world)
    except (InvalidWorldSizeError, UnsupportedOperationError, ValueError) as error:  # on all ranks
        if world.rank == 0:
            say(f"train.py: error: --strategy {options.strategy}: {error}", sys.stderr)
        return REFUSED
    optimizer = make_optimizer(options, task, plan, model, data)
    checkpoints = Checkpoints(options.checkpoint_dir, world, keep=options.keep)
    run = Run(model, optimizer, make_sampler(task.train, plan, data))
    newest = checkpoints.newest()
    if newest is not None and (answer := refuse(options, plan, newest, world)) is not None:
        return answer
    try:
        check_output(options, plan, run, checkpoints, newest or 0, world)
        if newest is not None and options.resume is not None:
            if not go_on(options, run, checkpoints, world):
                return REFUSED
        else:
            checkpoints.discard()  # a later --resume must not go on from an earlier run
        file = open_metrics(options, plan, optimizer.step_count, world)
    except OSError as error:  # on all ranks
        if world.rank == 0:
            say(f"train.py: error: cannot write {error.filename}: {error.strerror}", sys.stderr)
        return REFUSED
    except CheckpointIncompatibleError as error:  # on all ranks
        if world.rank == 0:
            say(f"train.py: error: --resume takes the options of the run: {error}", sys.stderr)
        return REFUSED
    if world.rank == 0:
        do_without(options)
        announce(options, task, plan, world, step=optimizer.step_count)
    with file:
        train_and_record(options, task, plan, run, checkpoints, file, stop, (world, data))
    ledger = measure_memory(model, optimizer, world)
    return conclude(options, task, plan, run, stop, world, ledger)


def conclude(
    options: argparse.Namespace,
    task: Task,
    plan: Plan,
    run: Run,
    stop: StopSignal,
    world: ProcessGroup,
    ledger: MemoryLedger,
) -> int:
    """Print what the ranks have held and the result, or where to go on. Return the exit code."""
    steps = run.optimizer.step_count
    done = steps == plan.steps
    if world.rank == 0:
        say(f"{ledger}")
    if world.rank == 0 and done:
        report(options, task, ranks=world.size)
    elif world.rank == 0:
        say(
            f"stopped by {signal.Signals(stop.stopping).name} after step {steps} of "
            f"{plan.steps}; --resume goes on from {options.checkpoint_dir}"
        )
    return 0 if done else STOPPED


def say(text: str, file: TextIO | None = None) -> None:
    """Print, also where nobody reads any more: a run must not be lost with its terminal."""
    stream = sys.stdout if file is None else file
    try:
        print(text, file=stream, flush=True)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())  # or the exit would fail of what is left in the buffer
        os.close(null)


def refuse(options: argparse.Namespace, plan: Plan, newest: int, world: ProcessGroup) -> int | None:
    """Return the exit code where checkpoints are that this run cannot go on from, and say why."""
    if options.resume is None and not options.overwrite:
        if world.rank == 0:
            say(
                f"train.py: error: {options.checkpoint_dir} has checkpoints of a run up to step "
                f"{newest}: go on from there with --resume, begin anew with --overwrite, which "
                "removes them, or choose another --out or --checkpoint-dir",
                sys.stderr,
            )
        return REFUSED
    newest = newest if options.resume in (None, "latest") else options.resume
    if options.resume is not None and newest > plan.steps:
        if world.rank == 0:
            say(
                f"nothing to do: the run in {options.checkpoint_dir} has {newest:,} steps, and "
                f"this one is to end after {plan.steps:,}"
            )
        return 0  # and not STOPPED, with which a batch script would start the job again
    return None


def go_on(
    options: argparse.Namespace, run: Run, checkpoints: Checkpoints, world: ProcessGroup
) -> bool:
    """Load the checkpoint to go on from; where that is damaged, say which are whole.

    A job that Slurm has started again takes the newest whole one by itself, also if the first start
    was told a step: it must not begin there again and again.
    """
    from mpidist.collectives import broadcast_object
    from mpidist.errors import (
        CheckpointCorruptError,
        CheckpointMissingShardError,
        CheckpointNotFoundError,
    )

    again = broadcast_object(os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0"), world)
    try:
        checkpoints.load(run, step="latest" if again else options.resume, fall_back=again)
    except (
        CheckpointCorruptError,
        CheckpointMissingShardError,
        CheckpointNotFoundError,
    ) as error:  # on all ranks
        steps = ", ".join(map(str, checkpoints.whole())) or "none"
        if world.rank == 0:
            say(
                f"train.py: error: {type(error).__name__}: {error}. Whole, as far as the sizes of "
                f"their files tell, are steps: {steps}; --resume STEP goes on from one of them",
                sys.stderr,
            )
        return False
    return True


def check_output(
    options: argparse.Namespace,
    plan: Plan,
    run: Run,
    checkpoints: Checkpoints,
    newest: int,
    world: ProcessGroup,
) -> None:
    """Raise OSError on all ranks if the results cannot be written, before the work."""
    from mpidist.train import check_space

    needs = {}
    if world.rank == 0:
        steps = plan.steps - newest * (options.resume is not None)
        saves = math.ceil(steps / (options.checkpoint_every or plan.steps))
        needs[options.out] = OUTPUT_BYTES
        needs[options.checkpoint_dir] = checkpoints.space(run, saves=saves, anew=options.overwrite)
    check_space(needs, world)


def open_metrics(
    options: argparse.Namespace, plan: Plan, begin: int, world: ProcessGroup
) -> MetricsFile:
    """Begin metrics.jsonl on rank 0; raise OSError on all ranks if it cannot be written."""
    from mpidist.train import MetricsFile, raise_from_rank_0

    file, problem = MetricsFile(None), None
    if world.rank == 0:
        header = {"kind": "resume", "step": begin} if begin else {"kind": "run"}
        try:
            file = MetricsFile(options.out / METRICS, after=begin)
            file.write({**header, "ranks": world.size, **describe(options, plan)})
        except OSError as error:
            problem = error
    raise_from_rank_0(problem, world)
    return file


def do_without(options: argparse.Namespace) -> None:
    """Leave out the progress bar or the picture, and say so, if what draws it is not installed."""
    for module, option, what in (
        ("tqdm", "no_progress", "progress bar"),
        ("matplotlib", "no_plot", "picture"),
    ):
        if getattr(options, option):
            continue
        try:
            importlib.import_module(module)
        except ImportError as error:
            setattr(options, option, True)
            say(f"no {what}: {error}; to get it: pip install 'mpidist[train]'")


def announce(
    options: argparse.Namespace, task: Task, plan: Plan, world: ProcessGroup, *, step: int
) -> None:
    """Print what is going to happen."""
    name, nats = task.baseline
    going_on = f", going on after step {step:,}" if step else ""
    mesh = options.mesh and ", ".join(f"{name}={size}" for name, size in options.mesh.items())
    strategy = f"{options.strategy} over ({mesh})" if mesh else options.strategy
    say(
        f"{options.task}: {len(task.train):,} samples to learn from and {len(task.held_out):,} "
        f"held out, {sum(p.size for p in task.model.parameters()):,} parameters\n"
        f"{format_count(plan.steps, 'step')} of {format_count(plan.batch_size, 'sample')}"
        f"{going_on}, ranks: {world.size}, "
        f"strategy: {strategy}; {name}: {nats:.3f} nats per target"
    )


def make_task(options: argparse.Namespace) -> Task:
    """Load the data and build the model."""
    if options.task == "text":
        from text_task import text_task

        return text_task(options.seed)
    from digits_task import digits_task

    return digits_task(options.seed)


def make_plan(options: argparse.Namespace, task: Task) -> Plan:
    """Turn epochs into steps, and choose when to evaluate.

    That is once per epoch and at least ten times per run, but never on more samples than the steps
    since the last time were trained on.
    """
    from mpidist.train import Plan

    batch_size = options.batch_size or task.defaults.batch_size
    per_epoch = math.ceil(len(task.train) / batch_size)
    epochs = options.epochs or task.defaults.epochs
    steps = options.steps or math.ceil(epochs * per_epoch)
    return Plan(
        steps=steps,
        batch_size=batch_size,
        seed=options.seed,
        log_every=options.log_every,
        checkpoint_every=options.checkpoint_every,
        evaluate_every=max(
            min(per_epoch, math.ceil(steps / 10)), math.ceil(len(task.held_out) / batch_size)
        ),
    )


def train_and_record(
    options: argparse.Namespace,
    task: Task,
    plan: Plan,
    run: Run,
    checkpoints: Checkpoints,
    file: MetricsFile,
    stop: StopSignal,
    groups: tuple[ProcessGroup, ProcessGroup],
) -> None:
    """Run the loop; rank 0 shows its progress and writes metrics.jsonl.

    The groups are those of all ranks, and of those that share each batch.
    """
    from mpidist.train import ProgressBar, train

    world, sharing = groups
    first, optimizer = world.rank == 0, run.optimizer
    show = first and not options.no_progress
    data = (task.train, task.held_out)
    try:
        with ProgressBar(
            plan.steps, name=options.task, show=show, done=optimizer.step_count
        ) as bar:
            for record in train(
                run.model,
                optimizer,
                *data,
                plan,
                world,
                data=sharing,
                checkpoints=checkpoints,
                stop=stop,
            ):
                write_record(file, record, stop)
                bar.show(record)
    except (KeyboardInterrupt, FloatingPointError) as error:
        if first:
            at = f"after step {optimizer.step_count} of {plan.steps}"
            why = f"interrupted {at}" if isinstance(error, KeyboardInterrupt) else f"error: {error}"
            say(f"{why}; the records so far are in {options.out / METRICS}")
        raise


def write_record(file: MetricsFile, record: Record, stop: StopSignal) -> None:
    """Write a record; where the disk is full, let the ranks save the run and end it."""
    try:
        file.write(record.as_json())
    except OSError as error:
        if not stop.requested:
            say(
                f"train.py: error: cannot write {error.filename}: {error.strerror}; the run is "
                "saved and stopped",
                sys.stderr,
            )
        stop.request()


def describe(options: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """Return what a reader of metrics.jsonl needs to repeat the run."""
    import numpy as np

    return {
        "task": options.task,
        "device": options.device,
        "steps": plan.steps,
        "batch_size": plan.batch_size,
        "seed": plan.seed,
        "optimizer": options.optimizer,
        "strategy": options.strategy,
        "mesh": options.mesh,
        "schedule": options.schedule,
        "compression": options.compression,
        "python": sys.version.split()[0],
        "numpy": np.__version__,
    }


def report(options: argparse.Namespace, task: Task, *, ranks: int) -> None:
    """Print the result and draw the picture."""
    from mpidist.train import plot_records, read_records

    records = read_records(options.out / METRICS)  # with those of the jobs before this one
    last, name, nats = records[-1], *task.baseline
    speeds = [r.samples_per_second for r in records if r.kind == "train"]
    say(
        f"held-out accuracy {100 * last.accuracy:.1f} %, loss {last.loss:.3f} nats "
        f"= {last.loss / math.log(2):.3f} bits per target ({name}: {nats:.3f} nats); "
        f"{statistics.median(speeds):,.0f} samples/s"
    )
    written = str(options.out / METRICS)
    if not options.no_plot:
        picture = options.out / PICTURE
        job = f"{options.task}, seed {options.seed}, {ranks} rank{'s' * (ranks > 1)}"
        title = f"{job}: held-out accuracy {100 * last.accuracy:.1f} %"
        plot_records(records, picture, title=title, baseline=task.baseline)
        written += f" and {picture}"
    say(f"wrote {written}")


if __name__ == "__main__":
    sys.exit(main())
