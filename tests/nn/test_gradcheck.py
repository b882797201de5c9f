"""The check must find what is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from mpidist.nn import Context, Linear, Mode, ReLU, count_uses
from mpidist.testing.gradcheck import (
    check_gradients,
    check_halves,
    gradients,
    numerical_gradient,
    projection,
)

TRAIN = Mode(training=True)
X = np.random.default_rng(0).normal(size=(3, 2))


def _linear(cls: type[Linear]) -> Linear:
    return cls(2, 2, rng=0, dtype=np.float64)


class WrongInput(Linear):
    def backward_input(self, ctx, dy):
        dx, wctx = super().backward_input(ctx, dy)
        return 1.001 * dx, wctx


class WrongBias(Linear):
    def backward_weight(self, wctx):
        x, dy = wctx
        super().backward_weight((x / 1.001, dy * 1.001))  # the weight's is a product of both


class Silent(Linear):
    def forward(self, x, mode):
        y, _ = super().forward(x, mode)
        return y, Context(x)


class Boastful(Linear):
    def forward(self, x, mode):
        y, ctx = super().forward(x, mode)
        return y, Context(x, count_uses(ctx, self.weight))


class Early(Linear):
    def backward_input(self, ctx, dy):
        dx, wctx = super().backward_input(ctx, dy)
        self.backward_weight(wctx)
        return dx, wctx

    def backward(self, ctx, dy):
        return self.backward_input(ctx, dy)[0]


class Diverging(Linear):
    def backward(self, ctx, dy):
        return super().backward(ctx, dy) * (1 + 1e-15)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (WrongInput, "dx: off by"),
        (WrongBias, "bias: off by"),
        (Silent, "more contributions"),
        (Boastful, "fewer contributions.*weight"),
    ],
)
def test_wrong_gradients_and_uses_are_found(cls, message):
    check_gradients(_linear(Linear), X.copy())
    with pytest.raises(AssertionError, match=message):
        check_gradients(_linear(cls), X.copy())


@pytest.mark.parametrize(
    ("cls", "message"), [(Early, "touched"), (Diverging, "dx of micro-batch 0: the halves differ")]
)
def test_wrong_halves_are_found(cls, message):
    with pytest.raises(AssertionError, match=message):
        check_halves(_linear(cls), [X])


def test_single_precision_is_refused():
    with pytest.raises(AssertionError, match="float64"):
        check_gradients(Linear(2, 2, rng=0), X.copy())


def test_the_numerical_gradient_of_a_polynomial():
    x = np.array([[1.0, -2.0], [0.5, 3.0]])
    gradient = numerical_gradient(lambda: float((x**3).sum()), x)
    np.testing.assert_allclose(gradient, 3 * x**2, rtol=1e-8)
    np.testing.assert_array_equal(x, [[1.0, -2.0], [0.5, 3.0]])


def test_gradients_reports_output_and_both_kinds_of_gradient():
    got = gradients(ReLU(), X)
    np.testing.assert_array_equal(got["y"], np.maximum(X, 0))
    np.testing.assert_array_equal(got["dx"], projection(X) * (X > 0))
    assert set(gradients(_linear(Linear), X, mode=TRAIN)) == {"weight", "bias", "y", "dx"}
