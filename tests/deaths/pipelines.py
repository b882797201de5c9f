"""A rank that ends, stays away, or sends something else, in the middle of a pipeline's step."""

from __future__ import annotations

import sys

from tests.deaths.case import Case
from tests.deaths.endings import MISSING

__all__ = ["CASES"]

TRAINING = """
from mpidist.nn import Linear, Mode, ReLU, Sequential, mse_loss
from mpidist.parallel import Pipeline


class Failing(ReLU):
    passes = 0

    def backward_input(self, ctx, dy):
        self.passes += 1
        if world.rank == guilty and self.passes == 7:  # micro-batch 2 of the second step
            it_happens()
            <fault>
        return super().backward_input(ctx, dy)


layers = [layer for seed in range(size) for layer in (Failing(), Linear(64, 64, rng=seed))]
pipe = Pipeline(Sequential(*layers), world, micro_batches=4, cut="layers", loss=mse_loss)
x = np.ones((8, 64), np.float32)
while True:
    pipe.step(x, x, Mode(training=True))  # at: others
    pipe.zero_grad()
"""


def training(fault: str) -> str:
    return TRAINING.replace("<fault>", fault)


def notes(*patterns: str) -> tuple[str, ...]:
    """Return patterns of notes of exceptions, which earlier versions of Python do not print."""
    return patterns if sys.version_info >= (3, 11) else ()


CASES = (
    Case(
        name="pipeline-raise",
        fault="raises in a stage of a pipeline",
        body=training('raise RuntimeError("no step")  # at: guilty'),
        sees=("RuntimeError: no step", *notes(r"in pipeline <guilty>B2")),
        blames=r"rank <guilty>",
        sites=("others", "guilty"),
    ),
    Case(
        name="pipeline-kill",
        fault="is killed in a stage of a pipeline",
        body=training("os.kill(os.getpid(), signal.SIGKILL)"),
        launcher=True,
        dumps=False,
        sites=(),
    ),
    Case(
        name="pipeline-late",
        fault="stays away in a stage of a pipeline",
        body=training("time.sleep(60)  # at: guilty"),
        sees=("CollectiveTimeoutError", r"pipeline \dB2, waits for <guilty>B2 of rank <guilty>"),
        # Another rank may come to the deadline first, which waits for one that waits for it.
        blames=MISSING.format("") + r"|waits for <guilty>B2 of rank <guilty>",
        sites=("others", "guilty"),
    ),
    Case(
        name="pipeline-shape",
        fault="sends another shape in a pipeline",
        body=training("return dy[:, :5], None"),
        sees=(
            r"Linear.backward: expected dy of the output's shape, \(2, 64\), got \(2, 5\)",
            *notes(r"in pipeline \dB2, after <guilty>B2 of rank <guilty>"),
        ),
        blames=r"ValueError",
        sites=("others",),
    ),
)
