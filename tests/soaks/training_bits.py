"""Train the tasks of jobs/ for some steps in many ways, and print digests of the parameters.

Two versions of the package that print the same train with the same bits::

    mpirun -n 4 python -m tests.soaks.training_bits > new.txt     # in each of two checkouts
    diff old.txt new.txt

Names are no part of a digest, and numbers of ranks give different ones from 3 on.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

import mpidist
from mpidist._types import SUM
from mpidist.nn import Mode, cross_entropy
from mpidist.optim import AdamW
from mpidist.parallel import DDP, BucketSizes, Compression, ShardedOptimizer, clip_grad_norm

JOBS = Path(__file__).parents[2] / "jobs"
TASKS = ("digits", "text")
WAYS = ("ddp", "float16", "bfloat16", "sharded", "sharded over ddp")
SIZES = {"one bucket": BucketSizes(), "small buckets": BucketSizes(first=5_000, rest=40_000)}
BATCH = 16


def task_of(name: str) -> Any:
    """Return a task of jobs/, with a freshly initialised model."""
    if str(JOBS) not in sys.path:
        sys.path.insert(0, str(JOBS))
    module = __import__(f"{name}_task")
    return getattr(module, f"{name}_task")(3)


def train(
    group: mpidist.ProcessGroup, task: Any, way: str, sizes: BucketSizes, *, steps: int = 6
) -> str:
    """Train, each second step in two micro-batches, and return a digest."""
    factory, model = partial(AdamW, lr=1e-3), task.model
    optimizer: Any
    if way == "sharded":
        optimizer = ShardedOptimizer(model, group, optimizer=factory, op=SUM, sizes=sizes)
        trained = reduced = optimizer
    else:
        narrow = Compression(way) if way in ("float16", "bfloat16") else None
        trained = reduced = DDP(model, group, op=SUM, sizes=sizes, compression=narrow)
        optimizer = factory(model)
        if way == "sharded over ddp":
            optimizer = reduced = ShardedOptimizer(trained, group, optimizer=factory, sizes=sizes)
    sharded = isinstance(optimizer, ShardedOptimizer)
    total = hashlib.sha256()
    for step in range(steps):
        optimizer.zero_grad()
        start, stop = (BATCH * rank // group.size for rank in (group.rank, group.rank + 1))
        cuts = [*pairwise(np.linspace(start, stop, 2 + step % 2).astype(int).tolist())]
        for a, b in cuts:
            x, target = task.train.take(np.arange(step * BATCH + a, step * BATCH + b))
            mode = Mode(True, seed=1, step=step, sample_offset=step * BATCH + a)
            with nullcontext() if (a, b) == cuts[-1] else reduced.no_sync():
                y, ctx = model.forward(x, mode)
                all_targets = BATCH * int(np.prod(target.shape[1:], dtype=int))
                reduced.backward(ctx, cross_entropy(y, target, denominator=all_targets)[1])
        parameters = optimizer.shards() if sharded else list(model.parameters())
        norm = clip_grad_norm(parameters, 0.5, group=group if sharded else None)
        total.update(np.float64(norm).tobytes())
        optimizer.step()
    for array in model.state_dict().values():
        total.update(array.tobytes())
    optimizer.close() if sharded else None
    if trained is not optimizer:
        trained.close()
    return total.hexdigest()[:16]


def digests(group: mpidist.ProcessGroup) -> Iterator[str]:
    """Yield a line for each way to train."""
    for name, way, sizes in product(TASKS, WAYS, SIZES):
        digest = train(group, task_of(name), way, SIZES[sizes])
        yield f"{group.size} ranks, {name}, {way}, {sizes}: {digest}"


def main() -> None:
    """Print all lines on rank 0."""
    with mpidist.init() as world:
        for line in digests(world):
            if world.rank == 0:
                print(line, flush=True)


if __name__ == "__main__":
    main()
