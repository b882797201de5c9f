"""A rank that ends, or stays away, between the units of an FSDP."""

from __future__ import annotations

from tests.deaths.case import Case
from tests.deaths.endings import MISSING

__all__ = ["CASES"]

TRAINING = """
from functools import partial

from mpidist.nn import Linear, Mode, ReLU, Sequential
from mpidist.optim import SGD
from mpidist.parallel import FSDP, ShardedOptimizer


class Failing(ReLU):
    step = 0

    def backward_input(self, ctx, dy):
        self.step += 1
        if world.rank == guilty and self.step == 4:
            it_happens()
            <fault>
        return super().backward_input(ctx, dy)


rng = np.random.default_rng(0)
layers = [Linear(128, 128, rng=rng, bias=False) for _ in range(4)]
fsdp = FSDP(Sequential(*layers[:2], Failing(), *layers[2:]), world, units=1 << 16)
optimizer = ShardedOptimizer(fsdp, optimizer=partial(SGD, lr=0.1))
while True:
    y, ctx = fsdp.forward(np.ones((2, 128), np.float32), Mode(training=True))
    optimizer.backward(ctx, np.ones_like(y) / 128)  # at: others
    optimizer.step()
"""

CASES = (
    Case(
        name="fsdp-kill",
        fault="is killed while an FSDP reduces gradients",
        body=TRAINING.replace("<fault>", "os.kill(os.getpid(), signal.SIGKILL)"),
        launcher=True,
        dumps=False,
        sites=(),
    ),
    Case(
        name="fsdp-late",
        fault="stays away in the middle of an FSDP's backward",
        body=TRAINING.replace("<fault>", "time.sleep(60)  # at: guilty"),
        sees=("CollectiveTimeoutError", "reduce_scatter"),
        # It may have begun the reduction that the others wait for, which needs it again to end.
        blames=MISSING.format("") + r"|^ *<guilty> .* in backward_input",
        sites=("others", "guilty"),
    ),
)
