"""What a pipeline refuses, on all ranks and before anything moves; and what failures say."""

from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
import pytest

from mpidist.backends.capabilities import Capabilities
from mpidist.collectives import all_reduce
from mpidist.errors import (
    CollectiveMismatchError,
    CollectiveTimeoutError,
    PeerLostError,
    ScheduleError,
    UnsupportedOperationError,
)
from mpidist.nn import (
    BatchNorm2d,
    Context,
    Linear,
    Mode,
    Module,
    Pop,
    ReLU,
    Residual,
    Sequential,
    Stash,
    cross_entropy,
    mse_loss,
)
from mpidist.parallel import DDP, FSDP, Costs, Pipeline, interleaved, one_f_one_b
from mpidist.parallel.pipeline.generators import SCHEDULES
from mpidist.testing import run_ranks
from tests.parallel.pipeline import MODE

X = np.ones((3, 2), np.float32)


def model(*widths):
    return Sequential(*(Linear(a, b, rng=0) for a, b in pairwise(widths)))


def make(group, module=None, micro_batches=4, **options):
    module = model(2, 2, 2, 2, 2, 2) if module is None else module
    return Pipeline(module, group, micro_batches=micro_batches, **options)


def refused(make, error):
    """Return the message that both ranks raise; the group can be used afterwards."""

    def body(group):
        with pytest.raises(error) as caught:
            make(group)
        assert all_reduce(np.array(1), group) == group.size
        return str(caught.value).replace(f"rank {group.rank} of", "rank . of")

    first, second = run_ranks(2, body)
    assert first == second
    return first


REFUSED = {
    "no micro-batch": ({"micro_batches": 0}, ScheduleError, "micro_batches of at least 1, got 0"),
    "no multiple": (
        {"micro_batches": 5, "schedule": "interleaved"},
        ScheduleError,
        "expected a multiple of the 2 ranks as the number of micro-batches, got 5; take 4 or 6",
    ),
    "fewer than stages": (
        {"micro_batches": 3, "schedule": "dualpipev"},
        ScheduleError,
        "expected at least 4 micro-batches, one for each stage, got 3; take 4",
    ),
    "no such schedule": (
        {"schedule": "1F1B"},
        ScheduleError,
        "one of the names gpipe, 1f1b, interleaved, zb-h1, zbv, dualpipev; got '1F1B'",
    ),
    "for other ranks": (
        {"schedule": one_f_one_b(3, 4)},
        ScheduleError,
        "expected a schedule of 2 ranks and 4 micro-batches, got '1f1b' of 3 and 4",
    ),
    "for other micro-batches": (
        {"schedule": one_f_one_b(2, 8)},
        ScheduleError,
        "expected a schedule of 2 ranks and 4 micro-batches, got '1f1b' of 2 and 8",
    ),
    "fewer layers than stages": (
        {"schedule": interleaved(2, 4, chunks=3)},
        ValueError,
        "at least as many layers as the 6 stages, got 5; take at most 5 stages",
    ),
    "a cut that descends": (
        {"cut": (3, 1, 4), "schedule": interleaved(2, 4)},
        ValueError,
        "expected as cut 3 ascending numbers of layers from 1 to 4",
    ),
    "a stage without layers": ({"cut": (5,)}, ValueError, "numbers of layers from 1 to 4"),
    "costs of other layers": (
        {"cut": Costs.unit(4)},
        ValueError,
        "expected as cut costs of the 5 layers, as Pipeline.costs measures them, got costs of 4",
    ),
    "another cut": (
        {"cut": "flops"},
        ValueError,
        "'layers', 'parameters', numbers of layers or costs",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_do_not_fit(name):
    options, error, words = REFUSED[name]
    assert words in refused(lambda group: make(group, **options), error)


def test_more_messages_than_tags():
    def few_tags(group):
        group.transport.capabilities = Capabilities(max_tag=6)
        make(group)

    words = refused(few_tags, UnsupportedOperationError)
    assert "need tags up to 7, and there are 6; take at most 3 micro-batches" in words


class Own(Sequential):
    def forward(self, x, mode):
        return super().forward(x, mode)


def test_models_that_cannot_be_cut():
    same_array = model(2, 2, 2, 2, 2)
    same_array.layers[3].weight.data = same_array.layers[0].weight.data
    words = refused(lambda group: make(group, same_array), UnsupportedOperationError)
    assert "'3.weight' of stage 1 is the same array as '0.weight' of stage 0" in words
    assert "hold one Parameter object in both layers" in words
    norm = BatchNorm2d(2)
    words = refused(
        lambda group: make(group, Sequential(norm, ReLU(), norm), cut="layers"),
        UnsupportedOperationError,
    )
    assert "'2.running_mean' of stage 1 is the same array as '0.running_mean' of stage 0" in words
    assert "give each its own, or cut the model so that one stage has both layers" in words
    words = refused(lambda group: make(group, ReLU()), TypeError)
    assert "expected a Sequential, whose layers are cut into stages, got a ReLU" in words
    words = refused(lambda group: make(group, Own(ReLU(), ReLU())), TypeError)
    assert "Own has a forward of its own" in words


def test_models_of_another_strategy():
    def held(wrap):
        def make_of(group):
            module = model(2, 2, 2)
            with wrap(module, group):
                make(group, module, loss=mse_loss)

        return make_of

    for wrap in (DDP, FSDP):
        words = refused(held(wrap), UnsupportedOperationError)
        assert "parameter '0.weight' is one of a DDP, an FSDP or a sharded optimizer" in words
        assert "data_parallel=, which makes one of each stage" in words
    with pytest.raises(TypeError, match="layer 0 is a DDP, not a Module"):
        run_ranks(1, lambda group: Sequential(DDP(model(2, 2), group)))


def test_a_tie_within_one_rank_has_no_replicas():
    tied = model(2, 2, 2, 2, 2)
    tied.layers[3].weight = tied.layers[0].weight

    def replicated(group):
        make(group, tied, schedule="zbv", data_parallel=lambda stage: DDP(stage, group))

    words = refused(replicated, UnsupportedOperationError)
    assert "'0.weight' is held by stage 0 and another one of rank 0" in words
    assert "take a schedule of one stage per rank, such as '1f1b' or 'zb-h1'" in words


def test_connections_without_two_ends():
    stash, pop = Stash("a"), Pop("a")
    for layers, words in (
        ((ReLU(), stash), "layer 1 is Stash('a'), and no layer is Pop('a')"),
        ((ReLU(), pop), "layer 1 is Pop('a'), and no layer is Stash('a')"),
        ((pop, stash), "layer 0, Pop('a'), is before layer 1, Stash('a')"),
        ((stash, Stash("a")), "the layers 0 and 1 both are Stash('a')"),
    ):
        # Such a model cannot be built; but layers can be exchanged.
        def exchanged(group, layers=layers):
            module = model(2, 2, 2)
            module.layers = layers
            make(group, module)

        assert words in refused(exchanged, ValueError)
    words = refused(lambda group: make(group, Sequential(Residual(stash), ReLU())), TypeError)
    assert "Stash('a'), '0.inner', is in a Residual, which does not know what is stashed" in words


def test_ranks_that_differ_are_told_in_what():
    def other_connection(group):
        layers = [ReLU(), ReLU(), Pop("a")]
        layers.insert(group.rank, Stash("a"))
        make(group, Sequential(*layers))

    words = refused(other_connection, CollectiveMismatchError)
    assert "connection 'a' is (1, 3) on rank 1 and (0, 3) on rank 0" in words

    def other_shape(group):
        make(group, model(2, 2, 2 + group.rank, 2))

    words = refused(other_shape, CollectiveMismatchError)
    assert "parameter '1.bias' is (3,) float32 on rank 1 and (2,) float32 on rank 0" in words or (
        "parameter '1.weight' is (3, 2) float32 on rank 1 and (2, 2) float32 on rank 0" in words
    )

    def other_schedule(group):
        make(group, schedule=list(SCHEDULES)[group.rank])

    words = refused(other_schedule, CollectiveMismatchError)
    assert "argument 'schedule' is 1f1b on rank 1 and gpipe on rank 0" in words

    def other_loss(group):
        make(group, loss=(mse_loss, cross_entropy)[group.rank])

    words = refused(other_loss, CollectiveMismatchError)
    assert "argument 'loss' is cross_entropy on rank 1 and mse_loss on rank 0" in words

    def other_mode(group):
        with make(group, loss=mse_loss) as pipe:
            pipe.step(X, X, Mode(True, step=group.rank))

    words = refused(other_mode, CollectiveMismatchError)
    assert "mode is Mode(training=True, seed=0, step=1" in words


@pytest.mark.parametrize("denominator", [0, -1.0, float("nan"), float("inf")])
def test_a_denominator_that_is_not_positive(denominator):
    def step(group):
        with make(group, loss=mse_loss) as pipe:
            with pytest.raises(ValueError, match=r"Pipeline\.step on .*: expected a positive"):
                pipe.step(X, X, MODE, denominator=denominator)
            assert pipe.step(X, X, MODE).samples in (0, 3)
            pipe.evaluate(X, X, denominator=denominator)

    assert "Pipeline.evaluate" in refused(step, ValueError)


BATCHES = {
    "no x": (None, X, "expected x on rank 0, an array on the host"),
    "no target": (X, None, "expected target on rank 1, an array on the host"),
    "a list": ([1, 2], X, "expected x on rank 0, an array on the host whose first axis counts"),
    "no axis": (X, np.float32(1), "expected target on rank 1"),
    "other numbers": (X, X[:2], "x on rank 0 has 3 samples, and target on rank 1 has 2"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_that_do_not_fit(name):
    x, target, words = BATCHES[name]

    def body(group):
        with make(group, loss=mse_loss) as pipe:
            with pytest.raises(ValueError, match=words):
                pipe.step(x, target, MODE)
            return pipe.step(X, X, MODE).samples  # nothing has begun, so it can be used

    assert run_ranks(2, body) == [0, 3]


def test_models_and_batches_on_a_device(xp):
    def on_device(group):
        module = model(2, 2, 2)
        module.to("gpu")
        make(group, module)

    words = refused(on_device, UnsupportedOperationError)
    assert "parameter '0.weight' is on a device, and pipelines carry host arrays only" in words

    def batch_on_device(group):
        make(group, loss=mse_loss).step(xp.asarray(X), X, MODE)

    words = refused(batch_on_device, ValueError)
    assert "expected x on rank 0, an array on the host" in words


# -- what goes wrong -----------------------------------------------------------------------------


class Faulty(Module):
    """Passes arrays on, but calls a function in the forward pass of one micro-batch."""

    def __init__(self, call, micro_batch):
        vars(self).update(call=call, micro_batch=micro_batch, seen=0)

    def forward(self, x, mode):
        self.seen += 1
        return (self.call(x) if self.seen == self.micro_batch + 1 else x), Context(None)

    def backward_input(self, ctx, dy):
        return dy, None

    def backward_weight(self, wctx):
        pass


def faulty(group, call, *, stage=1):
    """Make a pipeline of a stage per rank, of which one calls a function in micro-batch 2."""
    layers = [Faulty(call, 2) if i == stage else Linear(2, 2, rng=0) for i in range(group.size)]
    return make(group, Sequential(*layers), cut="layers", loss=mse_loss)


def fail(x):
    raise KeyError("broken layer")


def test_an_exception_in_a_layer_has_a_note_with_the_action():
    def body(group):
        with pytest.raises((KeyError, PeerLostError)) as caught:
            faulty(group, fail).step(X, X, MODE)
        raise caught.value

    with pytest.raises(KeyError, match="broken layer") as caught:
        run_ranks(3, body)
    assert "in pipeline 1F2, after 0F2 of rank 0" in caught.value.__notes__


def test_after_a_failure_no_step_can_be_made():
    def body(group):
        pipe = faulty(group, fail, stage=0)
        with pytest.raises(KeyError):
            pipe.step(X, X, MODE)
        for call in (pipe.step, pipe.costs):
            with pytest.raises(RuntimeError, match=r"an earlier step failed half way \(KeyError"):
                call(X, X, MODE)

    run_ranks(1, body)


def test_a_shape_that_does_not_fit_is_named_where_it_arrives():
    def body(group):
        faulty(group, lambda x: np.ones((len(x), 5), x.dtype), stage=0).step(X, X, MODE)

    with pytest.raises(ValueError, match=r"expected an input of shape \(..., 2\)") as caught:
        run_ranks(2, body)
    assert "in pipeline 1F2, after 0F2 of rank 0" in caught.value.__notes__


def test_a_missed_deadline_names_the_actions_of_both_ranks():
    late = threading.Event()
    others = threading.Barrier(2, action=late.set)

    def sleep(x):
        assert late.wait(20)
        return x

    def body(group):
        pipe = faulty(group, sleep)
        pipe.group.timeout = 0.5
        with pytest.raises(CollectiveTimeoutError) as caught:
            pipe.step(X, X, MODE)
        if group.rank != 1:
            others.wait(20)
        return str(caught.value)

    first, _, third = run_ranks(3, body)
    assert "pipeline 0B1, waits for 1B1 of rank 1, #" in first
    assert "pipeline 2F2, waits for 1F2 of rank 1, #" in third
    assert "not complete after 0.5 s" in third
