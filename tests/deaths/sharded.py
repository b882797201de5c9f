"""A rank that ends, or stays away, while an FSDP gathers or reduces, or between its units."""

from __future__ import annotations

from tests.deaths.case import Case
from tests.deaths.endings import MISSING

__all__ = ["CASES"]

TRAINING = """
from functools import partial

from mpidist.nn import Linear, Mode, ReLU, Sequential
from mpidist.optim import SGD
from mpidist.parallel import FSDP, ShardedOptimizer
from mpidist.parallel.sharded import gradients, unit_store

calls = 0


def fail_at(call):
    global calls
    calls += 1
    if world.rank == guilty and calls == call:
        it_happens()
        <fault>


class Between(ReLU):
    def forward(self, x, mode):
        <forward>
        return super().forward(x, mode)

    def backward_input(self, ctx, dy):
        <backward>
        return super().backward_input(ctx, dy)


def begun(start):
    def failing(*args, **options):
        work = start(*args, **options)
        fail_at(9)
        return work

    return failing


<begun>
rng = np.random.default_rng(0)
layers = [Linear(128, 128, rng=rng, bias=False) for _ in range(4)]
fsdp = FSDP(Sequential(*layers[:2], Between(), *layers[2:]), world, units=1 << 16)
optimizer = ShardedOptimizer(fsdp, optimizer=partial(SGD, lr=0.1))
while True:
    y, ctx = fsdp.forward(np.ones((2, 128), np.float32), Mode(training=True))  # at: forward
    optimizer.backward(ctx, np.ones_like(y) / 128)  # at: others
    optimizer.step()
"""

KILL = "os.kill(os.getpid(), signal.SIGKILL)"
STAY = "time.sleep(60)  # at: guilty"
AWAY = r"Begun, but not waited for: rank <guilty> \([^)]*\), now at \S+ in fail_at"
ON_NODES = {"MPIDIST_RANKS_PER_NODE": "1"}


def training(fault: str, *, forward: str = "pass", backward: str = "pass", begun: str = "") -> str:
    """Return a program in which a fault happens in one of these places."""
    body = TRAINING.replace("<fault>", fault).replace("<begun>", begun)
    return body.replace("<forward>", forward).replace("<backward>", backward)


CASES = (
    Case(
        name="fsdp-kill",
        fault="is killed while an FSDP reduces gradients",
        body=training(KILL, backward="fail_at(4)"),
        launcher=True,
        dumps=False,
        sites=(),
    ),
    Case(
        name="fsdp-kill-inside",
        fault="is killed while an FSDP reduces gradients",
        body=training(KILL, begun="gradients.ireduce_scatter = begun(gradients.ireduce_scatter)"),
        launcher=True,
        dumps=False,
        sites=(),
    ),
    Case(
        name="fsdp-late",
        fault="stays away in the middle of an FSDP's backward",
        body=training(STAY, backward="fail_at(4)"),
        sees=("CollectiveTimeoutError", "reduce_scatter"),
        # It may have begun the reduction that the others wait for, which needs it again to end.
        blames=MISSING.format("") + "|" + AWAY,
        sites=("others", "guilty"),
    ),
    Case(
        name="fsdp-gather-kill",
        fault="is killed while an FSDP gathers parameters",
        body=training(KILL, begun="unit_store.iall_gather = begun(unit_store.iall_gather)"),
        environment=ON_NODES,
        launcher=True,
        dumps=False,
        sites=(),
    ),
    Case(
        name="fsdp-gather-late",
        fault="stays away in the middle of an FSDP's forward over nodes",
        body=training(STAY, forward="fail_at(4)"),
        environment=ON_NODES,
        sees=("CollectiveTimeoutError", "all_gather"),
        blames=MISSING.format("") + "|" + AWAY,
        sites=("forward", "guilty"),
    ),
)
