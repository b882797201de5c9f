"""Parameters that are not trained, and parameters whose values are elsewhere."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from mpidist.nn import (
    Conv2d,
    Embedding,
    LayerNorm,
    Linear,
    Mode,
    Parameter,
    PositionEmbedding,
    Sequential,
    count_uses,
)
from mpidist.nn.module import Module
from mpidist.optim import SGD, Adam
from mpidist.parallel import DDP, ShardedOptimizer, memory_use
from mpidist.testing import run_ranks

TRAIN = Mode(training=True)


def _backward(model: Module, x: np.ndarray) -> None:
    y, ctx = model.forward(x, TRAIN)
    model.backward(ctx, np.ones_like(y))


LAYERS = {
    "linear": (lambda: Linear(3, 2, rng=0), np.ones((4, 3), np.float32)),
    "embedding": (lambda: Embedding(5, 2, rng=0), np.array([[1, 2]])),
    "position": (lambda: PositionEmbedding(5, 3, rng=0), np.ones((2, 4, 3), np.float32)),
    "convolution": (lambda: Conv2d(1, 2, 3, rng=0), np.ones((1, 1, 4, 4), np.float32)),
    "norm": (lambda: LayerNorm(3), np.ones((4, 3), np.float32)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("frozen", [0, 1, None])
def test_frozen_parameters_get_no_gradient_and_the_others_the_same(kind, frozen):
    make, x = LAYERS[kind]
    trained, layer = make(), make()
    _backward(trained, x)
    for i, parameter in enumerate(layer.parameters()):
        parameter.trainable = frozen is not None and i != frozen
    _backward(layer, x)
    ctx = layer.forward(x, TRAIN)[1]
    for parameter, other in zip(layer.parameters(), trained.parameters(), strict=True):
        assert (parameter in ctx.uses) is parameter.trainable
        if parameter.trainable:
            np.testing.assert_array_equal(parameter.grad, other.grad)
        else:
            assert parameter.grad is None
            assert parameter.grad_nbytes == 0


def test_a_frozen_parameter_takes_no_contribution():
    p = Parameter(np.ones(2), trainable=False)
    assert p.first_grad() is None
    p.add_grad(np.ones(2))
    assert p.grad is None
    assert count_uses(p, None) == {}
    with pytest.raises(ValueError, match="expects a gradient of shape"):
        p.add_grad(np.ones(3))


def _half_frozen() -> Sequential:
    model = Sequential(Linear(3, 3, rng=0), Linear(3, 2, rng=1))
    for parameter in model.layers[0].parameters():
        parameter.trainable = False
    return model


def test_an_optimizer_leaves_them_out():
    model = _half_frozen()
    before = copy.deepcopy(model.state_dict())
    optimizer = Adam(model, lr=0.1)
    _backward(model, np.ones((1, 3), np.float32))
    optimizer.step()
    assert not any(key.startswith("0.") for key in optimizer.state_dict())
    for name, array in model.state_dict().items():
        assert np.array_equal(array, before[name]) is name.startswith("0."), name
    use = memory_use(model, optimizer)
    assert use.parameters == 4 * (12 + 8)
    assert use.gradients == 4 * 8
    optimizer = Adam(model, lr=0.1)
    model.layers[0].weight.trainable = True
    with pytest.raises(ValueError, match=r"'0\.weight' has come to the model"):
        optimizer.step()
    with pytest.raises(ValueError, match="got no parameter"):
        Adam([p for p in _half_frozen().parameters() if not p.trainable])


@pytest.mark.parametrize("sharded", [False, True])
def test_strategies_reduce_the_others_and_keep_rank_0s_values(sharded):
    def body(group):
        model = _half_frozen()
        for parameter in model.parameters():
            parameter.data += group.rank
        x = np.full((1, 3), 1.0 + group.rank, np.float32)
        if sharded:
            factory = lambda params: SGD(params, lr=0.5)  # noqa: E731
            with ShardedOptimizer(model, group, optimizer=factory) as optimizer:
                y, ctx = model.forward(x, TRAIN)
                optimizer.backward(ctx, np.ones_like(y))
                optimizer.step()
                assert not any(key.startswith("0.") for key in optimizer.state_dict())
                state = {name: array + 1 for name, array in model.state_dict().items()}
                optimizer.model_state.load_state_dict(state)
                # Half of each of two arrays, of a cache line per parameter.
                assert optimizer.memory_use().parameters == 2 * 64
            for parameter in model.parameters():
                parameter.data = parameter.data - 1
        else:
            with DDP(model, group) as ddp:
                optimizer = SGD(ddp, lr=0.5)
                y, ctx = ddp.forward(x, TRAIN)
                ddp.backward(ctx, np.ones_like(y))
                optimizer.step()
                assert ddp.order == ("1.weight", "1.bias")
        return {name: array.copy() for name, array in model.state_dict().items()}

    alone = _half_frozen()
    optimizer = SGD(alone, lr=0.5)
    for value in (1.0, 2.0):
        y, ctx = alone.forward(np.full((1, 3), value, np.float32), TRAIN)
        alone.backward(ctx, np.ones_like(y) / 2)
    optimizer.step()
    for found in run_ranks(2, body):
        for name, array in alone.state_dict().items():
            np.testing.assert_allclose(found[name], array, rtol=1e-6, err_msg=name)


def test_shape_and_dtype_stay_when_the_values_go():
    p = Parameter(np.ones((2, 3), np.float32), name="w")
    p.seal()
    assert (p.shape, p.dtype, p.size, p.nbytes) == ((2, 3), np.float32, 6, 0)
    assert p.is_sealed
    with pytest.raises(RuntimeError, match="'w' is sealed"):
        _ = p.data
    p.add_grad(np.ones((2, 3)))
    assert p.grad.dtype == np.float32
    copied = copy.deepcopy(p)
    assert copied.is_sealed
    p.data = np.zeros(4)
    assert (p.shape, p.dtype, p.nbytes, p.is_sealed) == ((4,), np.float64, 32, False)


@pytest.mark.parametrize("kind", LAYERS)
def test_weights_get_their_gradients_without_their_values(kind):
    make, x = LAYERS[kind]
    layer, other = make(), make()
    _backward(other, x)
    y, ctx = layer.forward(x, TRAIN)
    _, wctx = layer.backward_input(ctx, np.ones_like(y))
    for parameter in layer.parameters():
        parameter.seal()
    layer.backward_weight(wctx)
    for parameter, expected in zip(layer.parameters(), other.parameters(), strict=True):
        np.testing.assert_array_equal(parameter.grad, expected.grad)


@pytest.mark.parametrize(("d_in", "d_out"), [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("batch", [(), (2,), (2, 4), (0, 4)])
def test_a_linear_layer_may_have_no_columns_or_rows(d_in, d_out, batch):
    layer = Linear(d_in, d_out, rng=0)
    y, ctx = layer.forward(np.ones((*batch, d_in), np.float32), TRAIN)
    assert y.shape == (*batch, d_out)
    np.testing.assert_array_equal(y, np.broadcast_to(layer.bias.data, y.shape) if d_in == 0 else y)
    dx = layer.backward(ctx, np.ones_like(y))
    assert dx.shape == (*batch, d_in)
    assert layer.weight.grad.shape == (d_out, d_in)
    np.testing.assert_array_equal(layer.bias.grad, np.full(d_out, np.prod(batch)))
