"""FSDP on arrays of a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pytest

import mpidist
from mpidist.arrays.namespaces import is_device, like_device, to_device, to_host
from mpidist.errors import UnsupportedOperationError
from mpidist.group import ProcessGroup
from mpidist.nn import Mode, cross_entropy
from mpidist.optim import SGD, AdamW
from mpidist.parallel import (
    DDP,
    FSDP,
    Cut,
    Precision,
    ShardedOptimizer,
    ShardingStrategy,
    full_state_dict,
)
from tests.parallel.fsdp import CASES, UNIT, batches
from tests.parallel.training import assert_close

if TYPE_CHECKING:
    from mpidist.testing.contract import DevicePlace

pytestmark = [pytest.mark.ranks(2, full=(1, 4)), pytest.mark.timeout(90)]

FULL = ShardingStrategy.FULL_SHARD
GRADIENTS = ShardingStrategy.SHARD_GRAD_OP
FACTORY = partial(AdamW, lr=0.02, weight_decay=0.1)


@pytest.fixture
def group(xp_with_nccl: ModuleType, rank_count: int) -> Iterator[ProcessGroup]:
    if rank_count > xp_with_nccl.cuda.runtime.getDeviceCount():
        pytest.skip(f"fewer GPUs than {rank_count}")
    with mpidist.init("hybrid") as world:
        yield world


def train(group, case, kind, backwards=1):
    """Train on a device, or by a DDP on the host."""
    model = CASES[case].build(np.random.default_rng(group.rank), np.float64)
    if kind == "host":
        strategy, optimizer = DDP(model, group), FACTORY(model.named_parameters())
    else:
        model.to("gpu")
        if kind == "after ddp":
            strategy = DDP(model, group)
            optimizer = ShardedOptimizer(strategy, group, optimizer=FACTORY)
        else:
            strategy = FSDP(model, group, strategy=kind[0], units=UNIT, cut=kind[1])
            optimizer = ShardedOptimizer(strategy, optimizer=FACTORY)
    here = next(model.parameters()).like
    norms = []
    for step, (x, target) in enumerate(batches(np.float64)):
        start, stop = len(x) * group.rank // group.size, len(x) * (group.rank + 1) // group.size
        optimizer.zero_grad()
        for cut in np.array_split(np.arange(start, stop), backwards):
            mode = Mode(True, seed=5, step=step, sample_offset=int(cut[0]))
            y, ctx = strategy.forward(like_device(here, x[cut]), mode)
            dy = cross_entropy(y, like_device(here, target[cut]), denominator=stop - start)[1]
            strategy.backward(ctx, dy)
        norms.append(strategy.clip_grad_norm(0.3))
        optimizer.step()
    with strategy.whole() if isinstance(strategy, FSDP) else nullcontext():
        state = {name: to_host(array).copy() for name, array in model.state_dict().items()}
    if kind != "host":
        assert all(is_device(p.like) for p in model.parameters())
        whole = full_state_dict(optimizer)
        state |= {key: value for key, value in whole.items() if key.endswith("/mean")}
    return state, norms


@pytest.mark.parametrize("case", ["plain", "tied", "frozen", "recomputed", "awkward sizes"])
def test_training_is_that_of_ddp_on_the_host(group: ProcessGroup, case: str, full: bool) -> None:
    expected, norms = train(group, case, "host")
    kinds = [
        *((FULL, Cut.ROWS), (GRADIENTS, Cut.ROWS), "after ddp"),
        *((ShardingStrategy.NO_SHARD, Cut.ROWS), (ShardingStrategy.HYBRID_SHARD, Cut.ROWS)),
        *((FULL, Cut.PARAMETERS), (GRADIENTS, Cut.ELEMENTS)),
    ]
    for kind in kinds if full else kinds[:2]:
        got, theirs = train(group, case, kind)
        assert_close({name: got[name] for name in expected}, expected, rtol=1e-9)
        np.testing.assert_allclose(theirs, norms, rtol=1e-9)
    for kind in kinds[:2]:
        twice, _ = train(group, case, kind, backwards=2)
        assert_close({name: twice[name] for name in expected}, expected, rtol=1e-9)


def test_states_go_from_the_host_to_a_device_and_back(group: ProcessGroup) -> None:
    def made(device):
        model = CASES["plain"].build(np.random.default_rng(group.rank), np.float64)
        model.to(device)
        fsdp = FSDP(model, group, strategy=GRADIENTS, units=UNIT)
        return fsdp, ShardedOptimizer(fsdp, optimizer=FACTORY)

    host, device = made("cpu"), made("gpu")
    values = {name: array + 1 for name, array in host[0].module.state_dict().items()}
    host[0].load_state_dict(values)
    for source, target in ((host, device), (device, host)):
        for taken, given in zip(target, source, strict=True):
            taken.load_state_dict(given.state_dict())
        for name, array in target[0].module.state_dict().items():
            np.testing.assert_array_equal(to_host(array), values[name])


def test_with_halves_beside_single_precision_it_trains_as_on_the_host(group: ProcessGroup) -> None:
    def steps(device):
        model = CASES["plain"].build(np.random.default_rng(group.rank), np.float32)
        model.to(device)
        precision = Precision(np.float16, np.float32, np.float32)
        fsdp = FSDP(model, group, strategy=GRADIENTS, units=UNIT, precision=precision)
        optimizer = ShardedOptimizer(fsdp, optimizer=partial(SGD, lr=0.1))
        here = next(model.parameters()).like
        assert here.dtype == np.float16
        for step, (x, target) in enumerate(batches(np.float32)):
            own = slice(group.rank, None, group.size)
            y, ctx = fsdp.forward(like_device(here, x[own]), Mode(True, step=step))
            optimizer.backward(ctx, cross_entropy(y, like_device(here, target[own]))[1])
            optimizer.step()
        return {n: to_host(shard.data).copy() for n, shard in fsdp.parameter_shards.shards.items()}

    expected = steps("cpu")
    for name, array in steps("gpu").items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, expected[name], atol=2e-3)


@pytest.mark.parametrize("precision", [Precision(), Precision(np.float32, np.float16)])
def test_offloaded_to_the_host_it_has_the_same_bits(group: ProcessGroup, precision) -> None:
    check_offloaded(group, GRADIENTS, precision)


@pytest.mark.parametrize(
    "strategy", [FULL, pytest.param(ShardingStrategy.HYBRID_SHARD, marks=pytest.mark.full)]
)
def test_over_nodes_it_is_offloaded_to_the_host_of_each(
    shared_device: DevicePlace, monkeypatch: pytest.MonkeyPatch, strategy: ShardingStrategy
) -> None:
    monkeypatch.setenv("MPIDIST_RANKS_PER_NODE", "1")  # the first device is that of each rank
    with mpidist.init("hybrid") as nodes:
        assert nodes.num_nodes == nodes.size
        check_offloaded(nodes, strategy, Precision())


def check_offloaded(group: ProcessGroup, strategy: ShardingStrategy, precision: Precision) -> None:
    """Compare parameters, state and the ledger with those of training on the device alone."""

    def steps(offload):
        model = CASES["tied"].build(np.random.default_rng(group.rank), np.float64)
        model.to("gpu")
        fsdp = FSDP(
            model, group, strategy=strategy, units=UNIT, precision=precision, offload=offload
        )
        optimizer = ShardedOptimizer(fsdp, optimizer=partial(SGD, lr=0.125, momentum=0.5))
        for step, (x, target) in enumerate(batches(np.float64)):
            own = slice(group.rank, None, group.size)
            for _ in range(2):  # the second reduction is added to the first
                y, ctx = fsdp.forward(to_device(x[own]), Mode(True, step=step))
                optimizer.backward(ctx, cross_entropy(y, to_device(target[own]))[1])
            optimizer.step()
        held = [*optimizer.state_dict().values(), *fsdp.parameter_shards.held.values()]
        held = [piece for v in held if hasattr(v, "pieces") for piece in v.pieces.values()]
        assert {is_device(piece) for piece in held} == {offload is None}
        whole = full_state_dict(optimizer)
        found = {key: to_host(value) for key, value in whole.items() if "/v" in key}
        with fsdp.whole():
            found |= {name: to_host(p.data).copy() for name, p in fsdp.named_parameters()}
        return fsdp, optimizer.memory_use(), found

    _, before, expected = steps(None)
    fsdp, use, got = steps("host")
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-12, atol=1e-15, err_msg=name)
    masters = sum(array.nbytes for array in fsdp.parameter_shards.own)
    assert (use.gradients, use.optimizer_state) == (0, 0)
    assert use.offloaded == before.gradients + before.optimizer_state + masters
    assert use.total < before.total


def test_what_layers_on_a_device_cannot_do_is_refused(group: ProcessGroup) -> None:
    model = CASES["plain"].build(np.random.default_rng(0), np.float32)
    model.to("gpu")
    with pytest.raises(UnsupportedOperationError, match="do not compute in bfloat16; use"):
        FSDP(model, group, strategy=GRADIENTS, precision=Precision("bfloat16"))
    with pytest.raises(UnsupportedOperationError, match="these lie on a device; use offload='host"):
        FSDP(model, group, strategy=GRADIENTS, offload="/tmp")


def test_a_model_on_two_kinds_of_memory_is_refused(group: ProcessGroup) -> None:
    model = CASES["plain"].build(np.random.default_rng(0), np.float64)
    model.to("gpu")
    first = model.layers[0].weight
    first.data = to_host(first.data)
    with pytest.raises(UnsupportedOperationError, match="some parameters lie on a device"):
        FSDP(model, group, strategy=GRADIENTS)
