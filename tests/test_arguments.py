"""Arguments that are not what they should be: each error says what was expected, and the cure."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from datetime import timedelta

import numpy as np
import pytest

import mpidist
from mpidist import checkpoint, nn
from mpidist._types import SUM
from mpidist.errors import CollectiveTimeoutError, UnsupportedOperationError
from mpidist.nn import Mode
from mpidist.parallel import (
    DDP,
    GradientReducer,
    GradScaler,
    Metrics,
    ShardedOptimizer,
    clip_grad_norm,
)
from mpidist.testing import run_ranks
from mpidist.train import Checkpoints

X = np.ones(3)


def linear():
    return nn.Linear(3, 2, rng=np.random.default_rng(0))


def with_gradient():
    p = nn.Parameter(X.copy())
    p.add_grad(X)
    return p


@pytest.fixture
def alone():
    with mpidist.init("simulated") as group:
        yield group


TAKE_A_GROUP = {
    **{
        verb: lambda g, verb=verb: getattr(mpidist, verb)(X, g)
        for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
        for verb in (kind, f"i{kind}")
    },
    **{
        verb: lambda g, verb=verb: getattr(mpidist, verb)(X, g)
        for kind in ("reduce", "gather", "scatter")
        for verb in (kind, f"i{kind}", f"{kind}_object")
        if verb != "reduce_object"
    },
    **{
        f"{kind}_coalesced": lambda g, kind=kind: getattr(mpidist, f"{kind}_coalesced")([X], g)
        for kind in ("all_reduce", "all_gather", "reduce_scatter", "broadcast")
    },
    "all_reduce in place": lambda g: mpidist.all_reduce(X, g, out=X),
    "all_gather_object": lambda g: mpidist.all_gather_object(1, g),
    "broadcast_object": lambda g: mpidist.broadcast_object(1, g),
    "barrier": mpidist.barrier,
    "ibarrier": mpidist.ibarrier,
    "gpu_all_reduce": lambda g: mpidist.gpu_all_reduce(X, g),
    "send": lambda g: mpidist.send(X, g, dst=0),
    "isend": lambda g: mpidist.isend(X, g, dst=0),
    "send_object": lambda g: mpidist.send_object(1, g, dst=0),
    "recv": lambda g: mpidist.recv(g, src=0),
    "irecv": lambda g: mpidist.irecv(g, src=0),
    "recv_object": lambda g: mpidist.recv_object(g, src=0),
    "sendrecv": lambda g: mpidist.sendrecv(X, g, dst=0, src=0),
    "exchange": lambda g: mpidist.exchange(g, sends=[mpidist.Send(X, 0)], receives=[]),
    "DDP": lambda g: DDP(linear(), g),
    "GradientReducer": lambda g: GradientReducer({"a": X}, g),
    "ShardedOptimizer": lambda g: ShardedOptimizer(linear(), g, optimizer=mpidist.optim.SGD),
    "GradScaler": GradScaler,
    "Metrics": Metrics,
    "Checkpoints": lambda g: Checkpoints("unused", g),
    "save": lambda g: checkpoint.save("unused", {"x": X}, g, step=1),
    "save_async": lambda g: checkpoint.save_async("unused", {"x": X}, g, step=1),
    "load": lambda g: checkpoint.load("unused", {"x": X}, g),
    "trace": lambda g: mpidist.trace("unused", g).__enter__(),
}

FOR_GROUPS = [(None, "not members"), (SUM, "ReduceOp"), (X, "numpy.ndarray")]


@pytest.mark.parametrize("name", TAKE_A_GROUP)
def test_what_is_no_group_is_told_how_to_be_made_one(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for bad, word in FOR_GROUPS:
        with pytest.raises(
            UnsupportedOperationError, match=r"as mpidist\.init\(\) returns"
        ) as info:
            TAKE_A_GROUP[name](bad)
        assert word in str(info.value)
    assert not list(tmp_path.iterdir())


def test_an_operation_in_the_place_of_the_group_is_given_by_name():
    with pytest.raises(UnsupportedOperationError, match=r"all_reduce\(x, group, op=SUM\)"):
        mpidist.all_reduce(X, SUM)
    with pytest.raises(UnsupportedOperationError, match="the group must be"):
        clip_grad_norm([with_gradient()], 1.0, group=SUM)


@pytest.mark.parametrize("op", ["sum", np.add, [SUM], None])
@pytest.mark.parametrize("verb", ["all_reduce", "ireduce", "reduce_scatter", "in place"])
def test_an_operation_that_is_none_is_told_reduce_op(alone, op, verb):
    call = mpidist.all_reduce if verb == "in place" else getattr(mpidist, verb)
    x = X.copy()
    with pytest.raises(UnsupportedOperationError, match=r"op must be a ReduceOp, such as mpidist"):
        call(x, alone, op=op, out=x if verb == "in place" else None)


@pytest.mark.parametrize("bad", [None, "5", float("nan"), float("inf"), 0, -1, True, timedelta(0)])
@pytest.mark.parametrize("name", ["timeout", "warn_after"])
def test_init_takes_seconds(name, bad):
    with pytest.raises(UnsupportedOperationError, match=f"init: {name} must be a positive number"):
        mpidist.init("simulated", **{name: bad})


def test_init_takes_a_timedelta():
    with mpidist.init("simulated", timeout=timedelta(minutes=2)) as group:
        assert group.timeout == 120.0


def test_a_wait_takes_seconds_and_a_timedelta():
    def wait(group):
        works = [mpidist.iall_reduce(X, group), mpidist.irecv(group, src=1 - group.rank)]
        works.append(mpidist.exchange(group, sends=[mpidist.Send(X, 1 - group.rank)], receives=[]))
        for work in works:
            for bad in ("5", float("nan"), -1, True):
                for call in (work.wait, work.synchronize):
                    with pytest.raises(UnsupportedOperationError, match=r"timeout must be .* got"):
                        call(bad)
            work.wait(timedelta(seconds=20))
        late = mpidist.irecv(group, src=1 - group.rank)
        with pytest.raises(CollectiveTimeoutError, match=r"not complete after 0\.05 s"):
            late.wait(timedelta(milliseconds=50))

    run_ranks(2, wait)


def test_what_connects_processes_is_not_copied(alone):
    ddp = DDP(linear(), alone)
    y, ctx = ddp.forward(np.ones((1, 3), np.float32), Mode(training=True))
    _, step = ddp.ibackward(ctx, np.ones_like(y))
    sums = alone.operations.run  # as an adapter may hold it
    for thing in (alone, sums, ddp, Metrics(alone), mpidist.iall_reduce(X, alone), step):
        for call in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                call(thing)
    during = pickle.loads(pickle.dumps(ddp.module))  # which takes no part in the reduction
    step.wait()
    for copied in (during, copy.deepcopy(ddp.module)):
        np.testing.assert_array_equal(copied.weight.data, ddp.module.weight.data)
        assert not np.shares_memory(copied.weight.data, ddp.module.weight.data)


MPI = """
import sys
import mpidist
import numpy as np
from mpi4py import MPI
from mpidist.backends.mpi.backend import _translate

for bad, word in ((MPI.COMM_NULL, "COMM_NULL"), (5, "got 5")):
    try:
        mpidist.init(comm=bad)
    except mpidist.LaunchError as error:
        assert "comm must be a communicator of mpi4py" in str(error) and word in str(error), error
    else:
        sys.exit(f"took {bad}")
world = mpidist.init("mpi")
x = np.ones(3)
for call in (lambda: mpidist.all_reduce(x, MPI.COMM_WORLD), lambda: mpidist.barrier(MPI.COMM_SELF)):
    try:
        call()
    except mpidist.UnsupportedOperationError as error:
        assert "mpidist.init(comm=...)" in str(error), error
try:
    mpidist.all_reduce(x, world, op=MPI.SUM)
except mpidist.UnsupportedOperationError as error:
    assert "op must be a ReduceOp" in str(error), error
error = _translate(MPI, "gather #1", MPI.Exception(MPI.ERR_IN_STATUS))
assert error.code == MPI.ERR_IN_STATUS, error.code
assert "gather #1: a message that is part of the call failed" in str(error), error
MPI.Finalize()
for call in (mpidist.barrier, lambda g: mpidist.iall_reduce(x, g), lambda g: g.split(0)):
    try:
        call(world)
    except mpidist.GroupBrokenError as error:
        assert "MPI has been finalised" in str(error), error
    else:
        sys.exit("called after MPI.Finalize")
world.close()
print("as expected")
"""


@pytest.mark.mpirun
@pytest.mark.usefixtures("mpirun")  # it needs an MPI library
def test_what_is_mpi4py_s_own_and_an_mpi_that_is_finalised():
    told = subprocess.run(
        [sys.executable, "-c", MPI], capture_output=True, text=True, timeout=60, check=False
    )
    assert told.stdout == "as expected\n", told.stdout + told.stderr
