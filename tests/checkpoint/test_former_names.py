"""Checkpoints of models in which `Recompute` was a part of names."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpidist import checkpoint
from mpidist.errors import CheckpointIncompatibleError
from mpidist.group import ProcessGroup
from mpidist.nn import BatchNorm2d, Flatten, Linear, Mode, Recompute, Residual, Sequential
from mpidist.optim import AdamW
from mpidist.parallel import DDP, ShardedOptimizer
from mpidist.testing import run_ranks

FORMER = {
    "0.weight": "0.inner.weight",
    "0.bias": "0.inner.bias",
    "0.running_mean": "0.inner.running_mean",
    "0.running_var": "0.inner.running_var",
    "2.inner.weight": "2.inner.inner.weight",
    "2.inner.bias": "2.inner.inner.bias",
}


def model(seed: int) -> Sequential:
    return Sequential(
        Recompute(BatchNorm2d(2)),
        Flatten(),
        Residual(Recompute(Linear(2, 2, rng=seed))),
    )


def former(state: dict[str, Any]) -> dict[str, Any]:
    """Write a state under the names of before."""
    renamed = {}
    for key, value in state.items():
        name, slash, slot = key.partition("/")
        renamed[FORMER.get(name, name) + slash + slot] = value
    order = renamed.get("buckets/order")
    if order is not None:
        renamed["buckets/order"] = [FORMER.get(name, name) for name in order]
    return renamed


def trained(group: ProcessGroup, *, sharded: bool) -> tuple[Any, Any, dict[str, Any]]:
    """Return what is saved of a model, its optimizer, and the parameters after a step."""
    net = model(group.rank)
    ddp = DDP(net, group)
    factory = partial(AdamW, lr=0.1)
    optimizer: Any = factory(ddp)
    target: Any = ddp
    if sharded:
        optimizer = ShardedOptimizer(ddp, group, optimizer=factory)
        target = optimizer.model_state
    y, ctx = net.forward(np.ones((3, 2, 1, 1), np.float32), Mode(training=True))
    ddp.backward(ctx, y)
    optimizer.step()
    return target, optimizer, {name: array.copy() for name, array in net.state_dict().items()}


@pytest.mark.parametrize("sharded", [False, True])
def test_they_load_into_models_of_today(tmp_path: Path, sharded: bool) -> None:
    def body(group: ProcessGroup) -> None:
        target, optimizer, before = trained(group, sharded=sharded)
        saved = {
            "model": former(target.state_dict()),
            "optimizer": former(optimizer.state_dict()),
        }
        checkpoint.save(tmp_path, saved, group, step=1)
        again, other, _ = trained(group, sharded=sharded)
        for _ in range(2):
            other.step()
        checkpoint.load(tmp_path, {"model": again, "optimizer": other}, group)
        assert other.step_count == 1
        assert again.state_dict()["buckets/order"] == target.state_dict()["buckets/order"]
        net = other.module if sharded else again.module
        for name, array in net.state_dict().items():
            np.testing.assert_array_equal(array, before[name], err_msg=name)
        assert optimizer.state_dict().keys() == other.state_dict().keys()

    run_ranks(2, body)


def test_what_was_not_saved_is_still_missing(tmp_path: Path) -> None:
    def body(group: ProcessGroup) -> None:
        state = former(model(0).state_dict())
        del state["0.inner.weight"]
        checkpoint.save(tmp_path, {"model": state}, group, step=1)
        with pytest.raises(CheckpointIncompatibleError, match=r"model/0\.weight: not in it"):
            checkpoint.load(tmp_path, {"model": model(1)}, group)

    run_ranks(2, body)
