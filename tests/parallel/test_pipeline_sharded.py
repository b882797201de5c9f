"""Pipelines whose stages are split over the data axis: FSDP, and a sharded optimizer."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import pytest

from mpidist import checkpoint
from mpidist._types import SUM
from mpidist.errors import UnsupportedOperationError
from mpidist.mesh import DeviceMesh
from mpidist.nn import Linear, Mode, cross_entropy
from mpidist.optim import SGD, AdamW
from mpidist.parallel import (
    DDP,
    FSDP,
    Pipeline,
    Precision,
    ShardedOptimizer,
    ShardingStrategy,
    clip_grad_norm,
    memory_ledger,
    memory_use,
)
from mpidist.parallel.pipeline.generators import SCHEDULES
from mpidist.testing import DeliveryMode, run_ranks
from tests.parallel.pipeline import batch, build, build_connected, share

STEPS = 3
RULE = partial(SGD, lr=0.1, momentum=0.9)  # linear: rounding stays what it is
TIED = {"model": build_connected, "rule": partial(AdamW, lr=0.01)}
MAX_NORM = 0.05
"""Shorter than the gradients are."""


def is_unit(name, module):
    """Have several units in a stage, and parameters that stay with none of them."""
    return isinstance(module, Linear)


def mode(step, offset=0):
    return Mode(True, seed=5, step=step, sample_offset=offset)


def alone(steps=STEPS, *, model=build, rule=RULE, load=None):
    """Train one process on the joined batches, perhaps on from a checkpoint of two steps.

    Return parameters and norms.
    """
    whole = model(np.float64)
    optimizer, norms = rule(whole.named_parameters()), []
    if load is not None:
        state = {"model": whole, "optimizer": optimizer}
        run_ranks(1, lambda group: checkpoint.load(load, state, group))
        assert optimizer.step_count == 2
    x, target = batch()
    for i in range(optimizer.step_count, steps):
        optimizer.zero_grad()
        y, ctx = whole.forward(x, mode(i))
        whole.backward(ctx, cross_entropy(y, target)[1])
        norms.append(clip_grad_norm(whole, MAX_NORM))
        optimizer.step()
    return {name: p.data for name, p in whole.named_parameters()}, norms


class Training:
    """A pipeline per row of a mesh whose replicas are of a kind, and the optimizers."""

    def __init__(self, group, kind, *, dp=2, schedule="1f1b", model=build, rule=RULE, **options):
        self.mesh = DeviceMesh(group, dp=dp, pp=group.size // dp)
        data = self.mesh["dp"].group

        def replica(stage):
            if kind in ("ddp", "zero"):
                return DDP(stage, data, op=SUM)
            return FSDP(stage, data, op=SUM, strategy=ShardingStrategy(kind), units=is_unit)

        self.pipe = Pipeline(
            model(np.float64),
            self.mesh["pp"].group,
            micro_batches=4,
            schedule=schedule,
            data_parallel=replica,
            **options,
        )
        replicas = self.pipe.replicas.values()
        if kind == "ddp":
            self.optimizers = [rule(self.pipe.named_parameters())]
        else:
            over = data if kind == "zero" else None
            self.optimizers = [ShardedOptimizer(r, over, optimizer=rule) for r in replicas]

    def run(self, steps, begin=0):
        rows, (x, target) = share(self.mesh), batch()
        norms = []
        for i in range(begin, steps):
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            self.pipe.step(x[rows], target[rows], mode(i, rows.start))
            norms.append(self.pipe.clip_grad_norm(MAX_NORM))
            for optimizer in self.optimizers:
                optimizer.step()
        return norms

    def parameters(self):
        with ExitStack() as whole:
            for replica in self.pipe.replicas.values():
                whole.enter_context(replica.whole())
            return {name: p.data.copy() for name, p in self.pipe.named_parameters()}

    def state(self):
        (optimizer,) = self.optimizers
        return {"model": self.pipe, "optimizer": optimizer}


def train(group, kind, **options):
    training = Training(group, kind, **options)
    norms = training.run(STEPS)
    x, target = batch()
    evaluated = training.pipe.evaluate(x, target, denominator=target.size).loss
    result = training.parameters(), norms, evaluated
    training.pipe.close()
    training.mesh.close()
    return result


def assert_is(everyone, expected, norms):
    """Each parameter, on each rank that has it, is that of one process."""
    seen = set()
    for parameters, got, _ in everyone:
        np.testing.assert_allclose(got, norms, rtol=1e-12)
        for name, array in parameters.items():
            error = np.abs(array - expected[name]).max()
            assert error <= 1e-12 * np.abs(expected[name]).max(), name
            seen.add(name)
    assert seen == expected.keys()


FULL = pytest.mark.full


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        ("zero", "zbv"),
        ("full_shard", "1f1b"),
        pytest.param("full_shard", "zbv", marks=FULL),
        pytest.param("zero", "zb-h1", marks=FULL),
        pytest.param("shard_grad_op", "interleaved", marks=FULL),
        pytest.param("no_shard", "gpipe", marks=FULL),
    ],
)
def test_it_trains_as_one_process_on_the_joined_batch(kind, schedule):
    expected, norms = alone()
    body = partial(train, schedule=schedule)
    assert_is(run_ranks(4, body, kind, mode=DeliveryMode.POLLED), expected, norms)


@pytest.mark.parametrize(
    ("ranks", "per_node", "schedule"),
    [
        (4, 1, "zb-h1"),
        *[pytest.param(*case, s, marks=FULL) for case in ((4, 2), (6, 3)) for s in SCHEDULES],
    ],
)
def test_units_that_have_to_be_gathered(ranks, per_node, schedule):
    """The ranks of a column are on different nodes, where all of a row may be on one."""
    expected, norms = alone()
    body = partial(train, kind="full_shard", dp=ranks // 2, schedule=schedule)
    got = run_ranks(
        ranks, body, ranks_per_node=per_node, node_memory=True, mode=DeliveryMode.POLLED
    )
    assert_is(got, expected, norms)


def test_a_stage_is_whole_once_in_a_step_from_its_first_action_to_its_last():
    def body(group):
        training = Training(group, "full_shard", schedule="interleaved")
        events = []
        for stage, fsdp in training.pipe.replicas.items():

            @contextmanager
            def noted(stage=stage, whole=fsdp.whole):
                events.append(f"{stage} whole")
                with whole():
                    yield
                events.append(f"{stage} split")

            fsdp.whole = noted
            weight = next(p for p in fsdp.parameters() if p.is_sealed)
            with pytest.raises(RuntimeError):
                _ = weight.data
        training.run(1)
        return events, list(training.pipe.replicas)

    for events, (first, last) in run_ranks(4, body, ranks_per_node=1):
        assert events == [f"{first} whole", f"{last} whole", f"{last} split", f"{first} split"]


# -- checkpoints -----------------------------------------------------------------------------------


def saved(group, kind, directory, **options):
    training = Training(group, kind, **options)
    training.run(2)
    checkpoint.save(directory, training.state(), group, step=2)


def resumed(group, kind, directory, **options):
    training = Training(group, kind, **options)
    checkpoint.load(directory, training.state(), group)
    training.run(STEPS, begin=2)
    return training.parameters(), [], None


@pytest.mark.parametrize("kind", ["ddp", "zero", "full_shard"])
def test_a_checkpoint_goes_on_in_one_process_and_on_another_mesh(kind, tmp_path):
    """Saved by two stages on two nodes each; loaded by one, and by four stages, or other kinds."""
    expected, _ = alone()
    run_ranks(4, saved, kind, tmp_path, ranks_per_node=1)
    assert_is([(alone(load=tmp_path)[0], [], None)], expected, [])
    assert_is(run_ranks(4, partial(resumed, dp=1), "ddp", tmp_path), expected, [])
    other = {"ddp": "full_shard", "zero": "ddp", "full_shard": "zero"}[kind]
    assert_is(run_ranks(2, partial(resumed, dp=1), other, tmp_path), expected, [])


@pytest.mark.parametrize(("per_node", "cut"), [(1, (7,)), (4, (13,))])
def test_what_is_tied_is_saved_once_where_its_slices_are_on_two_stages(per_node, cut, tmp_path):
    expected, _ = alone(**TIED)
    body = partial(saved, cut=cut, **TIED)
    run_ranks(4, body, "zero", tmp_path, ranks_per_node=per_node)
    assert_is([(alone(load=tmp_path, **TIED)[0], [], None)], expected, [])
    for dp, kind, other in ((1, "ddp", "parameters"), (2, "zero", "layers")):
        body = partial(resumed, dp=dp, cut=other, **TIED)
        assert_is(run_ranks(4, body, kind, tmp_path), expected, [])


def test_slices_of_what_is_tied_that_would_differ_between_stages_are_refused():
    """Three ranks of the first column are on one node, and two of the second one."""

    def body(group):
        if group.rank % 2:
            Training(group, "zero", dp=4, **TIED)
            return
        with pytest.raises(UnsupportedOperationError, match=r"'0.weight' is held by.*on each node"):
            Training(group, "zero", dp=4, **TIED)

    run_ranks(8, body, ranks_per_node=5)


# -- the rest --------------------------------------------------------------------------------------


def test_the_ledger_counts_the_slices():
    def body(group, kind):
        training = Training(group, kind)
        training.run(1)
        (optimizer,) = training.optimizers
        if kind == "ddp":
            return memory_ledger(memory_use(training.pipe, optimizer), group).node
        return memory_ledger(optimizer.memory_use(), group).node

    ddp, sharded = (run_ranks(4, body, kind)[0] for kind in ("ddp", "full_shard"))
    nbytes = sum(p.nbytes for p in build(np.float64).parameters())
    assert (ddp.parameters, ddp.gradients, ddp.optimizer_state) == (2 * nbytes,) * 3
    for held in (sharded.parameters, sharded.gradients, sharded.optimizer_state):
        assert nbytes <= held <= 1.5 * nbytes  # parameters are padded to cache lines


def test_gradients_may_be_under_way_when_the_step_returns():
    expected, _ = alone(1)

    def body(group, kind):
        training = Training(group, kind)
        rows, (x, target) = share(training.mesh), batch()
        optimizer = training.optimizers[0]
        result, work = training.pipe.istep(x[rows], target[rows], mode(0, rows.start))
        work.wait()
        assert work.done()
        training.pipe.clip_grad_norm(MAX_NORM)
        optimizer.step()
        training.pipe.zero_grad()
        # What is not waited for is waited for by whatever forgets it, or would add to it.
        training.pipe.istep(x[rows], target[rows], mode(1, rows.start))
        again = partial(training.pipe.istep, x[rows], target[rows], mode(2, rows.start))
        if kind == "ddp":
            with pytest.raises(RuntimeError, match=r"zero_grad\(\) on all ranks before each"):
                again()
        else:  # slices of reduced gradients are added to
            again()
        training.pipe.zero_grad()
        return training.parameters(), [], result

    for kind in ("ddp", "full_shard"):
        assert_is(run_ranks(4, body, kind, mode=DeliveryMode.POLLED), expected, [])


def test_a_precision_of_stages_is_refused_by_name():
    def body(group):
        alone = group.split(group.rank)
        for precision in (Precision("float16"), Precision(output="float64")):
            make = partial(FSDP, group=alone, precision=precision)
            with pytest.raises(UnsupportedOperationError, match=r"Precision\(reduction=.*\) alone"):
                Pipeline(build(), group, micro_batches=2, data_parallel=make)

    run_ranks(2, body)


def test_parameters_tied_over_stages_are_refused_where_gradients_are_slices():
    def body(group):
        with pytest.raises(UnsupportedOperationError, match=r"held by stages \(0, 1\).*make a DDP"):
            Pipeline(
                build_connected(),
                group,
                micro_batches=2,
                data_parallel=partial(FSDP, group=group.split(group.rank)),
            )

    run_ranks(2, body)


def test_a_gradient_that_one_stage_has_not_reduced_is_refused_on_all_ranks():
    def body(group):
        with group.new_group([group.rank]) as data:
            pipe = Pipeline(
                build(np.float64),
                group,
                micro_batches=1,
                data_parallel=lambda stage: FSDP(stage, data, op=SUM),
            )
            with pipe:
                x, target = batch()
                pipe.step(x, target, mode(0))
                if group.rank == 0:
                    replica = pipe.replicas[0]
                    with replica.no_sync():
                        y, ctx = replica.forward(x, mode(1))
                        replica.backward(ctx, y)
                with pytest.raises(RuntimeError, match=r"rank 0 refuses: .*of this rank alone"):
                    pipe.clip_grad_norm(1.0)

    run_ranks(2, body)
