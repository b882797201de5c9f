"""A small explicit model library: layers with a forward and a backward pass, and no graph.

A training step without any distribution::

    model = Sequential(Linear(64, 32, rng=rng), ReLU(), Linear(32, 10, rng=rng))
    y, ctx = model.forward(x, Mode(training=True, seed=0, step=7))
    loss, dy = cross_entropy(y, target)
    model.zero_grad()
    model.backward(ctx, dy)
    for p in model.parameters():
        p.data -= 0.1 * p.grad

`mpidist.nn.module` states the protocol and `mpidist.nn.parameter` the life of a gradient.
Nothing here knows of ranks.

Dtypes are numpy's: an output has the dtype that input and parameters have together. A float64 input
makes a float32 model work in float64, more slowly, from its first layer on, and only the
parameters' gradients are rounded to float32; cast the input where that is not meant. Parameters are
float16, float32 or float64. bfloat16 is refused, since numpy has no arithmetic of its own for it; a
bfloat16 input becomes float32 in the first layer that computes with it.
"""

from mpidist.nn.activations import GELU, ReLU
from mpidist.nn.attention import CausalSelfAttention
from mpidist.nn.containers import Recompute, Residual, Sequential
from mpidist.nn.convolution import Conv2d
from mpidist.nn.dropout import Dropout
from mpidist.nn.layers import Embedding, Flatten, Linear, PositionEmbedding
from mpidist.nn.losses import cross_entropy, mse_loss
from mpidist.nn.mode import EVAL, Mode
from mpidist.nn.module import Context, Module, count_uses
from mpidist.nn.normalization import BatchNorm2d, LayerNorm
from mpidist.nn.parameter import Parameter
from mpidist.nn.pooling import AvgPool2d, MaxPool2d
from mpidist.nn.skips import ADD, CONCAT, Merge, Pop, Stash

__all__ = [
    "ADD",
    "CONCAT",
    "EVAL",
    "GELU",
    "AvgPool2d",
    "BatchNorm2d",
    "CausalSelfAttention",
    "Context",
    "Conv2d",
    "Dropout",
    "Embedding",
    "Flatten",
    "LayerNorm",
    "Linear",
    "MaxPool2d",
    "Merge",
    "Mode",
    "Module",
    "Parameter",
    "Pop",
    "PositionEmbedding",
    "ReLU",
    "Recompute",
    "Residual",
    "Sequential",
    "Stash",
    "count_uses",
    "cross_entropy",
    "mse_loss",
]
