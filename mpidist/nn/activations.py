"""Elementwise functions without parameters: `ReLU` and `GELU`."""

from __future__ import annotations

import math
from typing import Any

from mpidist._types import Array
from mpidist.arrays.namespaces import array_namespace
from mpidist.nn.mode import Mode
from mpidist.nn.module import Context, ParameterFree, check_gradient

_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715


class ReLU(ParameterFree):
    """``y = max(x, 0)``."""

    elementwise_blocks = 1

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Map `x`, of any shape, elementwise."""
        y = array_namespace(x).maximum(x, 0)
        return y, Context(x > 0)

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        """Pass `dy` where the input was positive."""
        check_gradient(self, dy, ctx.saved.shape)
        return dy * ctx.saved, None


class GELU(ParameterFree):
    """Gaussian error linear unit, in its tanh form.

    Notes
    -----
    ``y = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x**3)))``, which is what torch calls
    ``GELU(approximate="tanh")``; it differs from the form with erf by at most 5e-4.

    References
    ----------
    Hendrycks, Gimpel (2016), Gaussian Error Linear Units, section 2.
    """

    elementwise_blocks = 1

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Map `x`, of any shape, elementwise."""
        xp = array_namespace(x)
        tanh: Array = x * x
        tanh *= _CUBIC
        tanh += 1.0
        tanh *= x
        tanh *= _SQRT_2_OVER_PI
        xp.tanh(tanh, out=tanh)
        y = tanh + 1.0
        y *= x
        y *= 0.5
        return y, Context((x, tanh))

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        """Multiply `dy` by the derivative at the input."""
        x, tanh = ctx.saved
        check_gradient(self, dy, x.shape)
        xp = array_namespace(x)
        # y' = (1 + tanh + x * (1 - tanh**2) * s) / 2, s the derivative of tanh's argument. In
        # place, since fresh memory for every intermediate would cost ten times the arithmetic.
        dx: Array = x * x
        dx *= 3.0 * _CUBIC * _SQRT_2_OVER_PI
        dx += _SQRT_2_OVER_PI
        dx *= x
        square = tanh * tanh
        dx *= xp.subtract(1.0, square, out=square)
        dx += tanh
        dx += 1.0
        dx *= 0.5
        dx *= dy
        return dx, None
