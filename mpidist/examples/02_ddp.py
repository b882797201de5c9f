"""Train a model on all ranks as if on one: a group, a model, one wrapper, four verbs.

    mpirun -n 4 python 02_ddp.py

The network learns which of two interleaved spirals a point lies on.
"""

import numpy as np

import mpidist
from mpidist.nn import GELU, Linear, Mode, Sequential, cross_entropy
from mpidist.optim import AdamW
from mpidist.parallel import DDP


def spirals(rng, count):
    arm = rng.integers(0, 2, count)
    angle = rng.uniform(0.5, 2, count) * np.pi
    points = np.stack([np.cos(angle + arm * np.pi), np.sin(angle + arm * np.pi)], axis=1)
    return (points * angle[:, None] / 6).astype(np.float32), arm


def main(world):
    model = Sequential(
        Linear(2, 64, rng=0), GELU(), Linear(64, 64, rng=1), GELU(), Linear(64, 2, rng=2)
    )
    samples = np.random.default_rng([3, world.rank])  # other samples on every rank

    with DDP(model, world) as ddp:
        optimizer = AdamW(model.named_parameters(), lr=3e-3)
        for step in range(300):
            x, target = spirals(samples, 64)
            # Random layers draw by a sample's place in the joined batch.
            mode = Mode(training=True, step=step, sample_offset=world.rank * 64)
            y, ctx = ddp.forward(x, mode)
            loss, dy = cross_entropy(y, target)
            optimizer.zero_grad()
            ddp.backward(ctx, dy)  # gradients are the mean over all ranks when this returns
            optimizer.step()

    loss = mpidist.all_reduce(loss, world, op=mpidist.MEAN)
    if world.rank == 0:
        world.print(f"loss {loss:.4f}")
    return float(loss), model.state_dict()


if __name__ == "__main__":
    with mpidist.init() as group:
        main(group)
