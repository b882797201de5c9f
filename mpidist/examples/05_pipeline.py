"""Train a model whose layers are spread over the ranks, and draw what each of them did.

    mpirun -n 4 python 05_pipeline.py

It is the model of 02_ddp.py, deeper. All ranks draw the same batches; only the first one uses the
points, and only the last one what they should be.
"""

import numpy as np

import mpidist
from mpidist.nn import GELU, Linear, Mode, Sequential, cross_entropy
from mpidist.optim import AdamW
from mpidist.parallel import Metrics, Pipeline


def spirals(rng, count):
    arm = rng.integers(0, 2, count)
    angle = rng.uniform(0.5, 2, count) * np.pi
    points = np.stack([np.cos(angle + arm * np.pi), np.sin(angle + arm * np.pi)], axis=1)
    return (points * angle[:, None] / 6).astype(np.float32), arm


def main(world, schedule="1f1b", steps=60):
    hidden = [module for seed in range(1, 8) for module in (Linear(64, 64, rng=seed), GELU())]
    model = Sequential(Linear(2, 64, rng=0), GELU(), *hidden, Linear(64, 2, rng=8))
    samples = np.random.default_rng(3)  # the same samples on every rank
    metrics = Metrics(world)

    with Pipeline(model, world, micro_batches=8, schedule=schedule, loss=cross_entropy) as pipe:
        del model  # the pipeline has the layers of this rank's stages
        optimizer = AdamW(pipe.named_parameters(), lr=3e-3)
        for step in range(steps):
            x, target = spirals(samples, 256)
            optimizer.zero_grad()
            result = pipe.step(x, target, Mode(training=True, step=step))
            pipe.clip_grad_norm(1.0)
            optimizer.step()
        timeline = pipe.timeline(result)
        metrics.add("loss", result.loss, result.samples)
        loss = metrics.reduce()["loss"]  # only the last rank has added something
        state = pipe.state_dict()

    if world.rank == 0:
        print(timeline.picture(width=90))
        world.print(f"loss {loss:.4f}, idle over useful time {timeline.bubble:.2f}")
    return loss, state


if __name__ == "__main__":
    with mpidist.init() as group:
        main(group)
