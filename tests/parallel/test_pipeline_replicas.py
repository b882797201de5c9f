"""Pipelines beside each other: gradients are summed over the data axis while stages still run."""

from __future__ import annotations

from collections import ChainMap, Counter
from functools import partial

import numpy as np
import pytest

from mpidist import checkpoint
from mpidist._types import MEAN, SUM
from mpidist.collectives import all_gather_object
from mpidist.mesh import DeviceMesh
from mpidist.nn import GELU, Embedding, Linear, Mode, Sequential
from mpidist.optim import AdamW
from mpidist.parallel import DDP, BucketSizes, Pipeline, ShardedOptimizer
from mpidist.parallel.pipeline.generators import SCHEDULES
from mpidist.testing import DeliveryMode, run_ranks
from tests.parallel import test_pipeline_sharded as sharded
from tests.parallel.pipeline import (
    CLASSES,
    SAMPLES,
    TIED,
    WORDS,
    alone,
    assert_same_bits,
    batch,
    build,
    build_connected,
    gradients,
    joined,
    share,
)

TINY = BucketSizes(first=1, rest=600)
"""So that a stage has several buckets."""


def step(group, schedule, *, dp, op=SUM, steps=1, dtype=np.float64, model=build, **options):
    """Run steps of a pipeline per row of a mesh; return the gradients of the last one."""
    with DeviceMesh(group, dp=dp, pp=group.size // dp) as mesh:
        data = mesh["dp"].group

        def replica(stage):
            return DDP(stage, data, op=op, sizes=TINY)

        x, target = batch()
        rows = share(mesh) if op is SUM else slice(0, SAMPLES)
        pipe = Pipeline(
            model(dtype),
            mesh["pp"].group,
            micro_batches=4,
            schedule=schedule,
            data_parallel=replica,
            **options,
        )
        with pipe:
            for _ in range(steps):
                pipe.zero_grad()
                mode = Mode(True, seed=5, step=3, sample_offset=2 + rows.start)
                result = pipe.step(x[rows], target[rows], mode)
            return result, gradients(pipe), mesh["dp"].group.rank


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("dp", "ranks"), [(2, 4), (3, 6), (2, 2)])
def test_uneven_shares_make_the_gradient_of_the_joined_batch(schedule, dp, ranks):
    expected = alone(1, dtype=np.float64)
    got = run_ranks(ranks, partial(step, dp=dp, steps=2), schedule, mode=DeliveryMode.POLLED)
    for row in range(dp):
        grads = ChainMap(*(own for _, own, index in got if index == row))
        assert grads.keys() == expected.grads.keys()
        for name, array in expected.grads.items():
            error = np.abs(grads[name] - array).max()
            assert error <= 1e-12 * np.abs(array).max(), name
    losses = [result.loss for result, _, _ in got if result.samples]
    assert sum(losses) == pytest.approx(expected.loss, rel=1e-12)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize(
    ("dp", "ranks"), [(2, 4), *(pytest.param(*n, marks=pytest.mark.full) for n in ((3, 6), (2, 6)))]
)
def test_tied_gradients_are_summed_over_stages_and_then_over_shares(schedule, dp, ranks):
    expected = alone(1, dtype=np.float64, model=build_connected)
    body = partial(step, dp=dp, steps=2, model=build_connected, cut="layers")
    grads: dict[str, np.ndarray] = {}
    holders: Counter[str] = Counter()
    for _, own, _ in run_ranks(ranks, body, schedule):
        holders.update(own.keys())
        for name, array in own.items():  # the same bits on all ranks that hold it
            np.testing.assert_array_equal(grads.setdefault(name, array), array, err_msg=name)
    assert grads.keys() == expected.grads.keys()
    assert {name for name, count in holders.items() if count > dp} == {*TIED}
    for name, array in expected.grads.items():
        error = np.abs(grads[name] - array).max()
        assert error <= 1e-12 * np.abs(array).max(), name


def test_means_of_equal_shares_are_the_gradient_of_one():
    expected = alone(1, dtype=np.float64)
    got = run_ranks(4, partial(step, dp=2, op=MEAN, steps=2), "zb-h1")
    for name, array in ChainMap(*(own for _, own, _ in got)).items():
        np.testing.assert_allclose(array, expected.grads[name], rtol=1e-11, atol=1e-15)


def test_one_pipeline_alone_has_the_bits_of_one_process_with_ties():
    got = run_ranks(2, partial(step, dp=1, dtype=np.float32, model=build_connected), "zb-h1")
    assert_same_bits(joined([rank[:2] for rank in got]), alone(4, model=build_connected))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_pipeline_alone_has_the_bits_of_one_process(schedule):
    expected = alone(4)
    got = run_ranks(2, partial(step, dp=1, dtype=np.float32), schedule)
    for name, array in ChainMap(*(own for _, own, _ in got)).items():
        np.testing.assert_array_equal(array, expected.grads[name], err_msg=name, strict=True)


def test_buckets_travel_before_the_step_is_over():
    """The last stage is done with its micro-batches while the first ones still run."""

    def body(group):
        with DeviceMesh(group, dp=1, pp=2) as mesh:
            events = []

            def replica(stage):
                ddp = DDP(stage, mesh["dp"].group, op=SUM)
                run = ddp.irun_backward

                def noted(uses, pass_):
                    result = run(uses, pass_)
                    events.append("syncs" if ddp._syncing else "adds")
                    return result

                ddp.irun_backward = noted
                return ddp

            model = build()
            with Pipeline(
                model,
                mesh["pp"].group,
                micro_batches=2,
                schedule="interleaved",
                data_parallel=replica,
            ) as pipe:
                pipe.step(*batch(), Mode(True))
            return events

    # Two stages per rank: that of the end is complete before the other one has begun its last.
    assert run_ranks(2, body) == [["adds", "syncs", "adds", "syncs"]] * 2


def test_an_optimizer_may_be_sharded_over_the_data_axis():
    def body(group, sharded):
        with DeviceMesh(group, dp=2, pp=2) as mesh:
            data = mesh["dp"].group
            pipe = Pipeline(
                build_connected(np.float64),
                mesh["pp"].group,
                micro_batches=3,
                data_parallel=lambda stage: DDP(stage, data, op=SUM),
            )
            (ddp,) = pipe.replicas.values()
            rule = partial(AdamW, lr=0.01)
            optimizer = ShardedOptimizer(ddp, data, optimizer=rule) if sharded else rule(ddp)
            rows, (x, target) = share(mesh), batch()
            for i in range(3):
                optimizer.zero_grad()
                pipe.step(x[rows], target[rows], Mode(True, step=i, sample_offset=rows.start))
                pipe.clip_grad_norm(0.5)
                optimizer.step()
            return {name: p.data.copy() for name, p in pipe.named_parameters()}

    expected, got = (run_ranks(4, body, sharded) for sharded in (False, True))
    for own, other in zip(expected, got, strict=True):
        for name, array in own.items():
            np.testing.assert_allclose(other[name], array, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_that_goes_on_has_the_bits_of_one_that_never_stopped(sharded, tmp_path):
    """With three ranks the buckets decide in which order elements are summed."""

    def wide():
        rng = np.random.default_rng(0)
        hidden = (layer for _ in range(4) for layer in (Linear(48, 48, rng=rng), GELU()))
        return Sequential(Embedding(WORDS, 48, rng=rng), *hidden, Linear(48, CLASSES, rng=rng))

    def run(group, *, load, cut="parameters"):
        with DeviceMesh(group, dp=3, pp=2) as mesh:
            data = mesh["dp"].group
            pipe = Pipeline(
                wide(),
                mesh["pp"].group,
                micro_batches=2,
                cut=cut,
                data_parallel=lambda stage: DDP(stage, data, op=SUM, sizes=TINY),
            )
            (ddp,) = pipe.replicas.values()
            rule = partial(AdamW, lr=0.01)
            optimizer = (
                ShardedOptimizer(ddp, data, optimizer=rule)
                if sharded
                else rule(pipe.named_parameters())
            )
            state = {"model": pipe, "optimizer": optimizer}
            if load:
                checkpoint.load(tmp_path, state, group)
            order = ddp.order
            rows, (x, target) = share(mesh), batch()
            for i in range(2 if load else 0, 3):
                if i == 2 and not load:
                    order = ddp.order
                    checkpoint.save(tmp_path, state, group, step=i)
                optimizer.zero_grad()
                pipe.step(x[rows], target[rows], Mode(True, step=i, sample_offset=rows.start))
                optimizer.step()
            return {name: p.data.copy() for name, p in pipe.named_parameters()}, order

    undisturbed = run_ranks(6, partial(run, load=False))
    for (own, order), (other, loaded) in zip(
        undisturbed, run_ranks(6, partial(run, load=True)), strict=True
    ):
        assert loaded == order is not None
        for name, array in own.items():
            np.testing.assert_array_equal(other[name], array, err_msg=name)
    for _, loaded in run_ranks(6, partial(run, load=True, cut=[3])):
        assert loaded is None


def test_sums_that_were_not_zeroed_are_refused_on_all_ranks():
    def body(group):
        with DeviceMesh(group, dp=2, pp=2) as mesh:
            pipe = Pipeline(
                build(),
                mesh["pp"].group,
                micro_batches=3,
                data_parallel=lambda stage: DDP(stage, mesh["dp"].group, op=SUM),
            )
            pipe.step(*batch(), Mode(True))
            if group.rank == 0:
                pipe.zero_grad()
            with pytest.raises(
                RuntimeError, match=r"sums over the data axis.*zero_grad\(\) on all"
            ):
                pipe.step(*batch(), Mode(True))
            pipe.zero_grad()
            pipe.step(*batch(), Mode(True))

    # Of the pipeline of rank 0 one rank has zeroed; the other one has not.
    run_ranks(4, body)


def test_what_is_no_replica_of_the_stage_is_refused():
    def body(group):
        other = Sequential(Linear(2, 2, rng=0))
        for make in (lambda stage: stage, lambda _: DDP(other, group)):
            with pytest.raises(
                TypeError, match="to return a DDP or FSDP of the stage that it is given"
            ):
                Pipeline(build(), group, micro_batches=2, data_parallel=make)

    run_ranks(2, body)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_two_by_two_real_ranks(world, schedule):
    expected = alone(1, dtype=np.float64)
    everyone = all_gather_object(step(world, schedule, dp=2), world)
    for name, array in ChainMap(*(own for _, own, _ in everyone)).items():
        error = np.abs(array - expected.grads[name]).max()
        assert error <= 1e-12 * np.abs(expected.grads[name]).max(), name


@pytest.mark.ranks(4)
@pytest.mark.parametrize("kind", ["zero", "full_shard"])
def test_two_by_two_real_ranks_that_split_what_they_hold(world, kind):
    expected, norms = sharded.alone()
    everyone = all_gather_object(sharded.train(world, kind, schedule="zb-h1"), world)
    sharded.assert_is(everyone, expected, norms)
