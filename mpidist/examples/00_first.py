"""Fit a plane to points that are spread over the ranks: mpirun -n 4 python 00_first.py"""

import numpy as np

import mpidist

with mpidist.init() as world:  # one rank without mpirun
    # Every rank has points of its own, and a different number of them.
    rng = np.random.default_rng(world.rank)
    x = rng.normal(size=(1000 + 100 * world.rank, 3))
    y = x @ [1.0, -2.0, 3.0] + 0.1 * rng.normal(size=len(x))
    points = mpidist.all_reduce(np.array(len(x)), world)

    # All ranks begin with the values of rank 0.
    w = mpidist.broadcast(rng.normal(size=3), world)
    for _ in range(50):
        error = x @ w - y
        work = mpidist.iall_reduce(x.T @ error / points, world)  # returns at once
        loss = np.sum(error**2) / points  # computed while the gradient is under way
        w -= 0.2 * work.wait()  # the sum over all ranks, the same bits on each

    loss = mpidist.all_reduce(loss, world)  # all ranks call it, though one prints
    if world.rank == 0:
        world.print(f"{points} points, w = {np.round(w, 2)}, mean square error {loss:.4f}")
