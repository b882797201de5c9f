"""Gradients of your own, averaged over all ranks while the next one is being computed.

    mpirun -n 4 python 01_gradient_reducer.py

A network of two layers in plain numpy learns to multiply two numbers.
"""

import numpy as np

import mpidist
from mpidist.parallel import GradientReducer


def main(world):
    rng = np.random.default_rng(0)  # the same on every rank, so all begin with equal weights
    weights = {"w1": rng.normal(size=(3, 32)), "w2": rng.normal(size=(32, 1)) / 6}
    samples = np.random.default_rng([1, world.rank])  # other samples on every rank

    with GradientReducer(weights, world) as reducer:
        for _ in range(1000):
            x = samples.uniform(-1, 1, size=(32, 3))
            x[:, 2] = 1  # the bias
            hidden = np.tanh(x @ weights["w1"])
            error = hidden @ weights["w2"] - x[:, :1] * x[:, 1:2]

            d_error = error * (2 / len(x))
            np.matmul(hidden.T, d_error, out=reducer.grads["w2"])  # where it will be sent from
            reducer.ready("w2")  # it may travel ...
            d_hidden = (d_error @ weights["w2"].T) * (1 - hidden**2)
            np.matmul(x.T, d_hidden, out=reducer.grads["w1"])  # ... while this is computed
            reducer.ready("w1")
            reducer.wait()  # now both are means over all ranks

            for name, grad in reducer.grads.items():
                weights[name] -= 0.05 * grad

    loss = mpidist.all_reduce(np.asarray(np.mean(error**2)), world, op=mpidist.MEAN)
    if world.rank == 0:
        world.print(f"mean squared error {loss:.5f}")
    return float(loss), weights


if __name__ == "__main__":
    with mpidist.init() as group:
        main(group)
