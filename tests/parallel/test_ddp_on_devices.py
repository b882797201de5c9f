"""DDP over NCCL: the training of one process, the same bits on all ranks, and no waiting host."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import mpidist
from mpidist.arrays.namespaces import is_device, to_host
from mpidist.collectives import all_gather_object
from mpidist.errors import CollectiveMismatchError
from mpidist.group import ProcessGroup
from mpidist.nn import BatchNorm2d, Conv2d, Flatten, Linear, Mode, ReLU, Sequential, cross_entropy
from mpidist.optim import AdamW
from mpidist.parallel import (
    DDP,
    Compression,
    GradScaler,
    NaiveDataParallel,
    clip_grad_norm,
    synchronize_batch_norms,
)
from tests.nccl_stub import stand_in
from tests.parallel.joined_batch import SHARES, check_joined
from tests.parallel.training import CASES, SMALL, assert_close, train_alone, train_rank

pytestmark = [pytest.mark.ranks(1, 2, 4), pytest.mark.timeout(90)]


@pytest.fixture
def group(xp_with_nccl: ModuleType, rank_count: int) -> Iterator[ProcessGroup]:
    if rank_count > xp_with_nccl.cuda.runtime.getDeviceCount():
        pytest.skip(f"fewer GPUs than {rank_count}")
    with mpidist.init("hybrid") as world:
        assert world.size == rank_count
        yield world


def equal_on_all(group: ProcessGroup, thing: Any) -> bool:
    return len({repr(one) for one in all_gather_object(thing, group)}) == 1


@pytest.mark.parametrize("name", ["plain", "unused branch", "everything"])
def test_training_is_that_of_one_process(group: ProcessGroup, name: str) -> None:
    trained = train_rank(group, CASES[name], "adamw", device="gpu")
    assert equal_on_all(group, trained.digests)
    assert_close(trained.state, train_alone(CASES[name], "adamw"), rtol=1e-10)


def test_compressed_gradients_train_almost_the_same(group: ProcessGroup) -> None:
    case = CASES["plain"]
    for compression, rtol in ((Compression.FP16, 0.02), (Compression.BF16, 0.1)):
        trained = train_rank(group, case, "sgd", device="gpu", compression=compression)
        assert equal_on_all(group, trained.digests)
        assert_close(trained.state, train_alone(case, "sgd"), rtol=rtol)


def images() -> Sequential:
    rng = np.random.default_rng(0)
    return Sequential(
        Conv2d(1, 4, 3, rng=rng), BatchNorm2d(4), ReLU(), Flatten(), Linear(144, 5, rng=rng)
    )


def one_step(ddp: Any, optimizer: AdamW, xp: Any, x: Any, target: Any) -> Any:
    y, ctx = ddp.forward(xp.asarray(x), Mode(training=True))
    loss, dy = cross_entropy(y, xp.asarray(target))
    optimizer.zero_grad()
    ddp.backward(ctx, dy)
    optimizer.step()
    return loss


def test_buffers_are_rank_0s_and_ddp_agrees_with_its_oracle(
    group: ProcessGroup, xp_with_nccl: ModuleType
) -> None:
    results = []
    for wrap in (DDP, NaiveDataParallel):
        model = images()
        model.to("gpu")
        model.layers[1].running_mean += group.rank  # type: ignore[attr-defined]
        ddp, optimizer = wrap(model, group), AdamW(model.named_parameters())
        rng = np.random.default_rng(group.rank)
        for _ in range(2):
            x, target = rng.normal(size=(3, 1, 8, 8)).astype(np.float32), rng.integers(0, 5, 3)
            one_step(ddp, optimizer, xp_with_nccl, x, target)
        state = {name: to_host(array) for name, array in model.state_dict().items()}
        assert all(is_device(array) for array in model.state_dict().values())
        assert equal_on_all(group, {name: array.tobytes() for name, array in state.items()})
        results.append(state)
    assert_close(*results, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SHARES)
def test_a_synchronised_norm_normalises_the_joined_batch(
    group: ProcessGroup, xp_with_nccl: ModuleType, name: str, dtype: str
) -> None:
    check_joined(group, name, dtype, xp=xp_with_nccl)


@pytest.mark.parametrize("synchronised", [False, True])
def test_the_host_reads_nothing_in_a_step(
    group: ProcessGroup,
    xp_with_nccl: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    synchronised: bool,
) -> None:
    cupy = xp_with_nccl
    if hasattr(cupy, "__file__"):
        pytest.skip("the methods of CuPy's own types cannot be watched")
    model = images()
    if synchronised:
        synchronize_batch_norms(model, group)
    model.to("gpu")
    ddp, optimizer = DDP(model, group, sizes=SMALL), AdamW(model.named_parameters())
    scaler = GradScaler(group)
    x, target = np.zeros((3, 1, 8, 8), np.float32), np.arange(3)
    one_step(ddp, optimizer, cupy, x, target)  # lays the buckets out, and connects the ranks
    waits: list[str] = []

    def watched(kind: Any, name: str) -> None:
        method = getattr(kind, name)

        def watching(self: Any, *args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_globals["__name__"]
            if name == "get" or not caller.startswith(stand_in.__name__):
                waits.append(f"{kind.__name__}.{name}")
            return method(self, *args, **kwargs)

        monkeypatch.setattr(kind, name, watching)

    # Of get() are item(), float(), bool() and the like made; the stand-in itself waits at times.
    watched(cupy.ndarray, "get")
    for kind in (cupy.cuda.Stream, cupy.cuda.Event, cupy.cuda.Device):
        watched(kind, "synchronize")
    loss = one_step(ddp, optimizer, cupy, x, target)
    assert waits == []
    float(loss)
    assert "ndarray.get" in waits
    waits.clear()
    assert scaler.unscale(model.parameters())
    assert waits.count("ndarray.get") == 1
    waits.clear()
    clip_grad_norm(model.parameters(), 1.0)
    assert waits.count("ndarray.get") == 1
    monkeypatch.undo()
    ddp.close()


def test_what_does_not_fit_is_refused_on_all_ranks(group: ProcessGroup) -> None:
    model = images()
    model.to("gpu")
    if group.rank == group.size - 1:
        model.to("cpu")
    if group.size > 1:
        with pytest.raises(CollectiveMismatchError, match="float32 on a device on rank"):
            DDP(model, group)
