from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest

from mpidist._types import SUM
from mpidist.errors import CollectiveMismatchError
from mpidist.nn import Parameter
from mpidist.optim import SGD, Optimizer, SGDRule
from mpidist.parallel import DDP, ShardedOptimizer
from mpidist.testing import run_ranks
from tests.parallel.sharded import RULES, Given, assert_same, give, mixture, values, whole_numbers


def refused(error, match, act, size=2):
    """Let every rank of a group do what must raise, and check the words."""

    def body(group):
        with pytest.raises(error, match=match):
            act(group)

    run_ranks(size, body)


@dataclass(frozen=True)
class Clipped(SGDRule):
    """A rule of a user's, with a function whose repr is that of this process."""

    limit: Callable[[float], float] = abs


def test_equal_rules_with_functions_of_their_own_are_no_mismatch():
    def body(group):
        def made(parameters):
            return Optimizer(parameters, rule=Clipped(limit=lambda x: x), lr=0.1)

        ShardedOptimizer(mixture(), group, optimizer=made).close()

    run_ranks(2, body)


def test_gradients_are_closed_until_the_step():
    def body(group):
        model = mixture()
        with ShardedOptimizer(model, group, optimizer=RULES["adam"]) as optimizer:
            give(optimizer, whole_numbers(model, group.rank, 0))
            optimizer.shards()
            with pytest.raises(RuntimeError, match=r"'a' has been reduced.*shards\(\)"):
                model.a.grad  # noqa: B018
            with pytest.raises(RuntimeError, match=r"'a' has been reduced.*shards\(\)"):
                model.a.add_grad(model.a.data)
            optimizer.step()
            assert model.a.grad is None
            before = values(model)
            give(optimizer, whole_numbers(model, group.rank, 1))
            optimizer.zero_grad()
            optimizer.step()
            assert_same(values(model), before)

    run_ranks(2, body)


def test_local_gradients_are_not_stepped_with():
    def act(group):
        model = mixture()
        optimizer = ShardedOptimizer(model, group, optimizer=RULES["adam"])
        with optimizer.no_sync():
            give(optimizer, whole_numbers(model, group.rank, 0))
        optimizer.step()

    refused(RuntimeError, "'a' holds a gradient of this rank alone", act)


def test_a_module_has_one_sharded_optimizer():
    def act(group):
        model = mixture()
        for _ in range(2):
            ShardedOptimizer(model, group, optimizer=RULES["adam"])

    refused(ValueError, "'a' is read-only, as another FSDP or ShardedOptimizer leaves", act)


@pytest.mark.parametrize(
    ("factory", "match"),
    [
        (lambda named: [SGD(named, lr=1), SGD(named[:1], lr=1)], r"made an optimizer of \['a'\]"),
        (lambda named: SGD([("x", named[0][1])], lr=1), r"made an optimizer of \['x'\]"),
        (lambda _: [], "made no optimizer"),
    ],
)
def test_a_factory_uses_what_it_is_given_once(factory, match):
    refused(ValueError, match, lambda g: ShardedOptimizer(mixture(), g, optimizer=factory))


@pytest.mark.parametrize(
    ("model", "factory", "match"),
    [
        (mixture, 3, r"optimizer must be a function .* partial\(AdamW, lr=1e-3\); got 3"),
        (mixture, SGD({"w": Parameter(np.ones(1))}.items(), lr=1), "a function.*got SGD of 1 para"),
        (mixture, lambda _: None, "a function that makes an Optimizer.*got None"),
        (mixture, lambda named: {"a": SGD(named, lr=1)}, "a function .*got {'a': SGD of 6 param"),
        (lambda: 3, RULES["adam"], "expected a Module, an FSDP or a DDP, got one of type int"),
        (lambda: Given, RULES["adam"], "expected a Module.* got one of type ABCMeta"),
    ],
)
def test_what_is_no_model_or_no_factory(model, factory, match):
    refused(TypeError, match, lambda g: ShardedOptimizer(model(), g, optimizer=factory))


@pytest.mark.parametrize(
    ("factories", "match"),
    [
        (("sgd", "adam"), "optimizer 0 is Adam of 6 .* on rank 1 and SGD of 6 .* on rank 0"),
        (("sgd", "momentum"), r"SGDRule\(momentum=0\.9, .* on rank 1 and SGD of .*momentum=0\.0"),
        (
            (partial(SGD, lr=0.25), partial(SGD, lr=0.5)),
            r"optimizer 0 is .*, lr=0\.5 on rank 1 and .*, lr=0\.25 on rank 0",
        ),
        (
            (lambda n: [SGD(n[:1], lr=1), SGD(n[1:], lr=1)], lambda n: SGD(n, lr=1)),
            "rank 1 lacks optimizer 1|optimizer 0 is SGD of 6 parameters",
        ),
    ],
)
def test_ranks_with_different_optimizers_are_told(factories, match):
    """Each would update its slices in its own way."""

    def act(group):
        factory = factories[group.rank]
        ShardedOptimizer(mixture(), group, optimizer=RULES.get(factory, factory))

    refused(CollectiveMismatchError, rf"ShardedOptimizer over group .*{match}", act)


def test_adam_refuses_halves_here_too():
    model = {"w": np.ones(3, np.float16)}
    refused(
        ValueError,
        "too coarse",
        lambda g: ShardedOptimizer(Given(**model), g, optimizer=RULES["adam"]),
    )


def test_the_op_of_a_ddp_is_its_own():
    def act(group):
        ShardedOptimizer(DDP(mixture(), group), group, optimizer=RULES["adam"], op=SUM)

    refused(ValueError, "op belongs to the DDP", act)


def test_a_ddp_has_the_same_ranks():
    def act(group):
        part = group.split(group.rank)
        ShardedOptimizer(DDP(mixture(), group), part, optimizer=RULES["adam"])

    refused(ValueError, "give the group that the DDP was made over", act)


def test_ranks_with_different_models_are_told():
    def act(group):
        model = Given(w=np.ones(3 + group.rank))
        ShardedOptimizer(model, group, optimizer=RULES["adam"])

    refused(CollectiveMismatchError, r"parameter 'w' is \(4,\)", act)
