"""Train a model that the ranks of a node hold together: each has a share of everything.

    mpirun -n 4 python 04_fsdp.py

It is the model of 02_ddp.py, wider, and says at the end how much memory each rank has needed.
"""

from functools import partial

import numpy as np

import mpidist
from mpidist.nn import GELU, Linear, Mode, Residual, Sequential, cross_entropy
from mpidist.optim import AdamW
from mpidist.parallel import FSDP, ShardedOptimizer, memory_ledger


def spirals(rng, count):
    arm = rng.integers(0, 2, count)
    angle = rng.uniform(0.5, 2, count) * np.pi
    points = np.stack([np.cos(angle + arm * np.pi), np.sin(angle + arm * np.pi)], axis=1)
    return (points * angle[:, None] / 6).astype(np.float32), arm


def block(width, seed):
    return Residual(Sequential(Linear(width, width, rng=seed), GELU()))


def main(world, width=256, depth=6, steps=60):
    blocks = [block(width, seed) for seed in range(depth)]
    model = Sequential(Linear(2, width, rng=97), GELU(), *blocks, Linear(width, 2, rng=98))
    samples = np.random.default_rng([3, world.rank])  # other samples on every rank

    # Each block is a unit: whose gradients travel in one message.
    with FSDP(model, world, units=4 * width * (width + 1)) as fsdp:
        optimizer = ShardedOptimizer(fsdp, optimizer=partial(AdamW, lr=1e-3))
        for step in range(steps):
            x, target = spirals(samples, 64)
            mode = Mode(training=True, step=step, sample_offset=world.rank * 64)
            y, ctx = fsdp.forward(x, mode)
            loss, dy = cross_entropy(y, target)
            optimizer.backward(ctx, dy)  # each rank receives the mean of its slices
            fsdp.clip_grad_norm(1.0)
            optimizer.step()  # and updates them; all ranks see the new parameters
        ledger = memory_ledger(optimizer.memory_use(), world)

    loss = float(mpidist.all_reduce(loss, world, op=mpidist.MEAN))
    whole = sum(p.nbytes for p in model.parameters())
    if world.rank == 0:
        held = ledger.rank.total / whole
        world.print(
            f"loss {loss:.4f}; a rank held {held:.2f} times the parameters, with DDP 4 times"
        )
    return loss, ledger.rank


if __name__ == "__main__":
    with mpidist.init() as group:
        main(group)
