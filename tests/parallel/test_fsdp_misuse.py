"""What FSDP refuses: before anything is changed, on all ranks, with the cure."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from mpidist._types import MAX, SUM
from mpidist.errors import CollectiveMismatchError, UnsupportedOperationError
from mpidist.nn import EVAL, Linear, Mode, Parameter, ReLU, Sequential
from mpidist.optim import SGD, AdamW
from mpidist.parallel import (
    DDP,
    FSDP,
    BucketSizes,
    Cut,
    ShardedOptimizer,
    ShardingStrategy,
)
from mpidist.testing import run_ranks

RULE = partial(SGD, lr=0.5)
TRAIN = Mode(training=True)
X, DY = np.ones((2, 4)), np.ones((2, 3))


def model(rows=5):
    rng = np.random.default_rng(0)
    return Sequential(
        Linear(4, rows, rng=rng, dtype=np.float64),
        ReLU(),
        Linear(rows, 3, rng=rng, dtype=np.float64),
    )


def refused(error, match, act, size=2, **options):
    """Let every rank of a group do what must raise, and check the words."""

    def body(group):
        with pytest.raises(error, match=match):
            act(group)

    run_ranks(size, body, node_memory=True, **options)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda g: FSDP(model(5 + g.rank), g),
            (
                r"FSDP over group 'world' \(2 ranks\): parameter '0\.weight' is \(6, 4\) "
                r"float64 on rank 1 and \(5, 4\) float64 on rank 0"
            ),
        ),
        (
            lambda g: FSDP(model(), g, strategy=list(ShardingStrategy)[g.rank]),
            (
                r"argument 'strategy' is ShardingStrategy.SHARD_GRAD_OP on rank 1 and "
                r"ShardingStrategy.FULL_SHARD on rank 0"
            ),
        ),
        (lambda g: FSDP(model(), g, cut=list(Cut)[g.rank]), "argument 'cut' is Cut.ELEMENTS on"),
        (lambda g: FSDP(model(), g, units=100 + g.rank), "'units' is 101 on rank 1 and 100 on"),
        (lambda g: FSDP(model(), g, units=[str(g.rank)]), r"'units' is \['1'\] on rank 1"),
        (
            lambda g: FSDP(model(), g, units=lambda name, _: name == str(2 * g.rank)),
            r"unit '2'|unit '0'|unit '\(outermost\)'",
        ),
        (lambda g: FSDP(_frozen("0.bias", g.rank), g), "frozen parameter '0.bias'"),
        (
            lambda g: FSDP(_halved() if g.rank else model(), g),
            r"parameter '0\.bias' is \(5,\) float32 on rank 1 and \(5,\) float64 on rank 0",
        ),
        (
            lambda g: FSDP(Sequential(model()) if g.rank else model(), g),
            r"rank 1 lacks parameter '0\.weight', .* and rank 1 has parameter '0\.0\.weight'",
        ),
        (
            lambda g: FSDP(model(), g, strategy="no_shard" if g.rank else None),
            "'strategy' is no_shard on rank 1 and ShardingStrategy.FULL_SHARD on rank 0",
        ),
        (
            lambda g: FSDP(model(), g, units=lambda *_: 1 / (1 - g.rank)),
            r"what 'units' gives is ZeroDivisionError\('division by zero'\) on rank 1 and 2 units",
        ),
    ],
    ids=[
        "shapes",
        "strategy",
        "cut",
        "bytes",
        "names of units",
        "functions",
        "frozen",
        "dtypes",
        "names",
        "wrong on one",
        "raises on one",
    ],
)
def test_ranks_that_differ_are_named(make, match):
    refused(CollectiveMismatchError, match, make)


def _halved():
    made = model()
    made.layers[0].bias.data = made.layers[0].bias.data.astype(np.float32)
    return made


def _frozen(name, when=True):
    made = model()
    dict(made.named_parameters())[name].trainable = not when
    return made


@pytest.mark.parametrize(
    ("error", "match", "make"),
    [
        (TypeError, r"expected FSDP\(model, group\), got a ProcessGroup", lambda g: FSDP(g, g)),
        (TypeError, "got a DDP", lambda g: FSDP(DDP(model(), g), g)),
        (ValueError, "a positive number of bytes, got 0", lambda g: FSDP(model(), g, units=0)),
        (TypeError, "units must be a number.*got True", lambda g: FSDP(model(), g, units=True)),
        (TypeError, "units must be a number.*got nan", lambda g: FSDP(model(), g, units=np.nan)),
        (
            ZeroDivisionError,
            "division by zero",
            lambda g: FSDP(model(), g, units=lambda *_: 1 / 0),
        ),
        (TypeError, "a list of names of modules.*got '0'", lambda g: FSDP(model(), g, units="0")),
        (
            ValueError,
            r"no module is named 'block\.\*'; the modules are 0, 1, 2",
            lambda g: FSDP(model(), g, units=["0", "block.*"]),
        ),
        (TypeError, r"of names of modules.*got \[0, 2\]", lambda g: FSDP(model(), g, units=[0, 2])),
        (TypeError, r"such as lambda.*got <class", lambda g: FSDP(model(), g, units=Linear)),
        (
            TypeError,
            r"strategy must be one of ShardingStrategy\.FULL_SHARD, .*; got 'no_shard'",
            lambda g: FSDP(model(), g, strategy="no_shard"),
        ),
        (
            TypeError,
            r"cut must be one of Cut\.ROWS, .*; got 'parameters'",
            lambda g: FSDP(model(), g, cut="parameters"),
        ),
        (UnsupportedOperationError, "MEAN or SUM, got", lambda g: FSDP(model(), g, op=MAX)),
        (
            UnsupportedOperationError,
            "'0.weight' has dtype int64; gradients are float",
            lambda g: FSDP(_integers(), g),
        ),
    ],
)
def test_arguments_that_cannot_be(error, match, make):
    refused(error, match, make)


def _integers():
    made = model()
    made.layers[0].weight.data = made.layers[0].weight.data.astype(int)
    return made


def test_a_model_of_which_nothing_is_trained():
    def act(group):
        made = model()
        for parameter in made.parameters():
            parameter.trainable = False
        FSDP(made, group)

    refused(ValueError, "no trainable parameter", act)


@pytest.mark.parametrize("second", [FSDP, DDP, partial(ShardedOptimizer, optimizer=RULE)])
def test_parameters_have_one_strategy(second):
    def act(group):
        made = model()
        FSDP(made, group)
        second(made, group)

    refused(ValueError, r"parameter '0\.weight' is read-only, as an.* FSDP", act)


def test_a_ddp_whose_parameters_an_fsdp_has_taken():
    def act(group):
        made = model()
        ddp = DDP(made, group)
        FSDP(made, group)
        _, ctx = ddp.forward(X, TRAIN)
        ddp.backward(ctx, DY)

    refused(RuntimeError, r"'0\.weight' does not live in this DDP's bucket any more", act)


def started(group, **options):
    fsdp = FSDP(model(), group, units=100, **options)
    return fsdp, ShardedOptimizer(fsdp, optimizer=RULE)


def forward(fsdp):
    return fsdp.forward(X, TRAIN)[1]


def test_a_backward_while_gradients_are_under_way():
    def act(group):
        fsdp, _ = started(group)
        ctx = forward(fsdp)
        fsdp.ibackward(ctx, DY)
        fsdp.ibackward(ctx, DY)

    refused(RuntimeError, r"FSDP on .* still under way; wait\(\) for its Work", act)


def test_a_parameter_that_came_later():
    def act(group):
        fsdp, _ = started(group)
        fsdp.module.layers[0].bias = Parameter(np.zeros(5), name="0.bias")
        fsdp.backward(forward(fsdp), DY)

    refused(RuntimeError, r"FSDP .*'0\.bias' was used, but was not part of the module", act)


def test_parameters_that_are_frozen_or_thawed_later():
    def frozen(group):
        fsdp, _ = started(group)
        fsdp.module.layers[0].bias.trainable = False
        fsdp.backward(forward(fsdp), DY)

    def thawed(group):
        fsdp = FSDP(_frozen("0.bias"), group)
        fsdp.module.layers[0].bias.trainable = True
        fsdp.backward(forward(fsdp), DY)

    refused(RuntimeError, r"'0\.bias' has been frozen since the FSDP was made", frozen)
    refused(RuntimeError, r"'0\.bias' was used, but .* or was frozen, when FSDP was made", thawed)


def test_a_step_with_gradients_of_this_rank_alone():
    def act(group):
        fsdp, optimizer = started(group)
        with fsdp.no_sync():
            fsdp.backward(forward(fsdp), DY)
        optimizer.step()

    refused(RuntimeError, r"'0\.weight' holds a gradient of this rank alone; run the last", act)


@pytest.mark.parametrize("wrap", [FSDP, DDP, None])
def test_a_parameter_that_was_given_another_array(wrap):
    """It would be read and never updated."""

    def act(group):
        made = model()
        sharded = wrap(made, group) if wrap else made
        optimizer = ShardedOptimizer(sharded, None if wrap is FSDP else group, optimizer=RULE)
        made.layers[0].bias.data = np.zeros(5)
        optimizer.backward(made.forward(X, TRAIN)[1], DY)
        optimizer.step()

    words = r"ShardedOptimizer\.step on .*, rank . of 2: parameter '0\.bias' has been given another"
    refused(RuntimeError, words, act)


def test_a_step_without_gradients_changes_nothing():
    """As with an optimizer of a whole model."""

    def body(group):
        fsdp, optimizer = started(group)
        before = {name: p.data.copy() for name, p in fsdp.named_parameters()}
        optimizer.step()
        forward(fsdp)
        optimizer.step()
        for name, p in fsdp.named_parameters():
            np.testing.assert_array_equal(p.data, before[name])

    run_ranks(2, body, node_memory=True)


def test_parameters_are_not_written_while_they_are_read():
    class Writing(ReLU):
        """Writes in its pass, as it is told."""

        def forward(self, x, mode):
            self.write()
            return super().forward(x, mode)

    def within_a_pass(group, write):
        made = model()
        made.layers = (made.layers[0], Writing(), made.layers[2])
        fsdp = FSDP(made, group)
        optimizer = ShardedOptimizer(fsdp, optimizer=RULE)
        made.layers[1].write = lambda: write(fsdp, optimizer)
        forward(fsdp)

    def within_whole(group, write):
        fsdp, optimizer = started(group)
        with fsdp.whole():
            write(fsdp, optimizer)

    def step(_, optimizer):
        optimizer.step()

    def load(fsdp, _):
        fsdp.load_state_dict(fsdp.state_dict())

    for write, name in ((step, r"ShardedOptimizer\.step"), (load, r"FSDP\.load_state_dict")):
        for act, where in (
            (within_a_pass, "within a pass of the model"),
            (within_whole, r"inside FSDP\.whole\(\)"),
        ):
            words = (
                rf"{name} on group 'world/fsdp', rank \d of 2: called {where}, .* leave it first"
            )
            refused(RuntimeError, words, partial(act, write=write))


def test_whole_within_a_pass():
    class Curious(ReLU):
        def forward(self, x, mode):
            with self.fsdp.whole():
                return super().forward(x, mode)

    def within_a_pass(group):
        made = model()
        made.layers = (made.layers[0], Curious(), made.layers[2])
        made.layers[1].fsdp = fsdp = FSDP(made, group)
        forward(fsdp)

    class CuriousBackwards(ReLU):
        def backward_input(self, ctx, dy):
            with self.fsdp.whole():
                return super().backward_input(ctx, dy)

    def within_backward(group, backward):
        made = model()
        made.layers = (made.layers[0], CuriousBackwards(), made.layers[2])
        made.layers[1].fsdp = fsdp = FSDP(made, group)
        getattr(fsdp, backward)(forward(fsdp), DY)

    refused(RuntimeError, r"FSDP\.whole on .*: called within a pass", within_a_pass)
    for name in ("backward", "ibackward", "backward_input"):
        refused(RuntimeError, "called within a pass", partial(within_backward, backward=name))


def test_an_optimizer_of_the_modules_own_parameters():
    def sharded(group):
        fsdp = FSDP(model(), group)
        ShardedOptimizer(fsdp, optimizer=lambda _: SGD(fsdp.named_parameters(), lr=1))

    def plain(group):
        fsdp, _ = started(group)
        optimizer = AdamW(fsdp.named_parameters())
        fsdp.backward(forward(fsdp), DY)
        optimizer.step()

    refused(ValueError, r"made an optimizer of \['0\.bias'.*slices.*those of the module", sharded)
    refused(RuntimeError, r"'0\.weight' has been reduced.*update .*by a ShardedOptimizer", plain)


def test_a_second_optimizer_of_one_fsdp():
    """The first one's step uses the gradients up, so that the other one would have none."""

    def act(group):
        fsdp, _ = started(group)
        ShardedOptimizer(fsdp, optimizer=RULE)

    refused(ValueError, r"world/fsdp', rank . of 2: the FSDP has one already.*several optim", act)

    def one_after_the_other(group):
        fsdp = FSDP(model(), group)
        with pytest.raises(ValueError, match="made no optimizer"):
            ShardedOptimizer(fsdp, optimizer=lambda _: [])
        for _ in range(2):
            with ShardedOptimizer(fsdp, optimizer=RULE) as optimizer:
                fsdp.backward(forward(fsdp), DY)
                optimizer.step()

    run_ranks(2, one_after_the_other, node_memory=True)


class OfMatrices(SGD):
    needs_whole = True


def test_an_optimizer_that_needs_whole_parameters():
    def act(group):
        fsdp = FSDP(model(), group)
        ShardedOptimizer(fsdp, optimizer=partial(OfMatrices, lr=1))

    refused(ValueError, r"OfMatrices needs whole parameters.*cut=Cut\.PARAMETERS", act)
    run_ranks(
        2,
        lambda g: ShardedOptimizer(
            FSDP(model(), g, cut=Cut.PARAMETERS), optimizer=partial(OfMatrices, lr=1)
        ),
    )


def test_what_an_fsdp_has_is_not_given_twice():
    def op(group):
        ShardedOptimizer(FSDP(model(), group), group, optimizer=RULE, op=SUM)

    def ranks(group):
        ShardedOptimizer(FSDP(model(), group), group.split(group.rank), optimizer=RULE)

    def sizes(group):
        ShardedOptimizer(FSDP(model(), group), optimizer=RULE, sizes=BucketSizes())

    def none(group):
        ShardedOptimizer(model(), optimizer=RULE)

    refused(ValueError, "op belongs to the FSDP", op)
    refused(ValueError, r"sizes are those of .* FSDP\(model, group, units=\.\.\.\)", sizes)
    refused(ValueError, "give the group that the FSDP was made over", ranks)
    refused(UnsupportedOperationError, "ShardedOptimizer: the group must be a Process", none)


class Failing(ReLU):
    """Raises where and when it is told to."""

    failing: tuple[str, ...] = ()

    def forward(self, x, mode):
        self._fail("forward")
        return super().forward(x, mode)

    def backward_input(self, ctx, dy):
        self._fail("backward")
        return super().backward_input(ctx, dy)

    def _fail(self, name):
        if name in self.failing:
            raise MemoryError(name)


def failing(group):
    made = model()
    made.layers = (made.layers[0], Failing(), made.layers[2])
    fsdp = FSDP(made, group, units=100)
    return made.layers[1], fsdp, ShardedOptimizer(fsdp, optimizer=RULE)


def test_after_an_exception_in_forward_all_goes_on():
    def body(group, fails):
        layer, fsdp, optimizer = failing(group)
        for _ in range(2):
            layer.failing = ("forward",) if fails and group.rank == 0 else ()
            cuts = (slice(0, 2),)
            if fails:
                if group.rank == 0:
                    with pytest.raises(MemoryError):
                        fsdp.forward(X, TRAIN)
                else:
                    fsdp.forward(X, TRAIN)  # its context is dropped
                layer.failing, cuts = (), (slice(0, 1), slice(1, 2))
            for cut in cuts:
                _, ctx = fsdp.forward(X[cut], TRAIN)
                optimizer.backward(ctx, DY[cut])
                fsdp.shards()
            optimizer.step()
        return {name: p.data.copy() for name, p in fsdp.named_parameters()}

    expected = run_ranks(2, body, False)[0]
    for found in run_ranks(2, body, True):
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-13, err_msg=name)


def test_after_an_exception_in_backward_the_job_is_over():
    def act(group):
        layer, fsdp, _ = failing(group)
        layer.failing = ("backward",)
        for _ in range(2):
            ctx = forward(fsdp)
            try:
                fsdp.backward(ctx, DY)
            except MemoryError:
                continue

    refused(RuntimeError, r"FSDP on .*failed half way \(MemoryError\('backward'\)\).*end the", act)


@pytest.mark.parametrize("strategy", [DDP, FSDP])
def test_after_an_exception_inside_no_sync_gradients_have_to_be_forgotten(strategy):
    """Else the contributions made before it would be added twice."""

    def body(group, fails):
        made, layer = model(), Failing()
        made.layers = (made.layers[0], layer, made.layers[2])
        wrapped = strategy(made, group)
        forget = made.zero_grad if strategy is DDP else wrapped.zero_grad
        if fails and group.rank == 1:
            layer.failing = ("backward",)
            with wrapped.no_sync(), pytest.raises(MemoryError):
                wrapped.backward(forward(wrapped), DY)
            layer.failing = ()
            with wrapped.no_sync(), pytest.raises(RuntimeError, match=r"MemoryError.*zero_grad"):
                wrapped.backward(forward(wrapped), DY)
            forget()
        with wrapped.no_sync():
            wrapped.backward(forward(wrapped), DY)
        wrapped.backward(forward(wrapped), DY)
        parameters = made.parameters() if strategy is DDP else wrapped.shards()
        return [np.array(p.grad) for p in parameters]

    for found, expected in zip(run_ranks(2, body, True), run_ranks(2, body, False), strict=True):
        for grad, right in zip(found, expected, strict=True):
            np.testing.assert_array_equal(grad, right)


def test_evaluation_is_possible_at_any_time():
    def body(group):
        fsdp, optimizer = started(group)
        outputs = []
        for _ in range(2):
            _, unused = fsdp.forward(X, TRAIN)
            del unused
            optimizer.backward(forward(fsdp), DY)
            outputs.append(fsdp.forward(X, EVAL)[0])
            optimizer.step()
            with fsdp.whole():
                outputs.append(fsdp.module.forward(X, EVAL)[0])
        return outputs

    first, second = run_ranks(2, body, node_memory=True)
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first[0], first[1])
    np.testing.assert_array_equal(first[1], first[2])
