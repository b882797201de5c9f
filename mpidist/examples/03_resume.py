"""Train, be interrupted, go on: mpirun -n 4 python 03_resume.py

Each run makes 100 steps more than the last one kept, on any number of ranks.
"""

import numpy as np

import mpidist
from mpidist import checkpoint
from mpidist.nn import GELU, Linear, Mode, Sequential, cross_entropy
from mpidist.optim import AdamW
from mpidist.parallel import DDP


def main(world, directory="runs/rings", steps=100):
    model = Sequential(Linear(2, 32, rng=0), GELU(), Linear(32, 2, rng=1))
    points = np.random.default_rng(3)  # the same numbers on all ranks

    with DDP(model, world) as ddp:
        optimizer = AdamW(model.named_parameters(), lr=1e-2)
        state = {"model": ddp, "optimizer": optimizer, "points": points}
        try:
            first = checkpoint.load(directory, state, world).step
        except mpidist.CheckpointNotFoundError:
            first = 0
        saving = None
        for step in range(first, first + steps):
            x = points.normal(size=(world.size, 32, 2)).astype(np.float32)[world.rank]
            target = (np.hypot(x[:, 0], x[:, 1]) > 1).astype(np.int64)
            y, ctx = ddp.forward(x, Mode(training=True, step=step, sample_offset=world.rank * 32))
            loss, dy = cross_entropy(y, target)
            optimizer.zero_grad()
            ddp.backward(ctx, dy)
            optimizer.step()
            if (step + 1) % 50 == 0:  # so many steps are done
                saving = checkpoint.save_async(directory, state, world, step=step + 1)
            elif saving is not None:
                saving.done()  # drives it; costs nothing when it is over
        if saving is not None:
            saving.wait()

    if world.rank == 0:
        checkpoint.prune(directory, keep=2)
        world.print(f"steps {first} to {first + steps}, loss {loss:.4f}")
    return model.state_dict()


if __name__ == "__main__":
    with mpidist.init() as group:
        main(group)
