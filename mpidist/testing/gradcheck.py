"""Check a module's backward pass: against central differences, and against its own halves.

Everything here works in float64. The scalar that is differentiated is the sum of the output
times a fixed random array, so that every output element counts with its own weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpidist._types import Array
from mpidist.nn.mode import Mode
from mpidist.nn.module import Module

_TRAINING = Mode(training=True)


def numerical_gradient(function: Callable[[], float], x: Array, *, eps: float = 1e-6) -> Array:
    """Differentiate by central differences, with an error of order eps**2.

    `function` returns the value at the present content of `x`, of which one float64 element at a
    time is changed and restored. Costs 2 * x.size calls.
    """
    gradient = np.zeros(x.shape)
    for index in np.ndindex(*x.shape):
        centre = x[index]
        x[index] = centre + eps
        above = function()
        x[index] = centre - eps
        below = function()
        x[index] = centre
        gradient[index] = (above - below) / (2.0 * eps)
    return gradient


def gradients(
    module: Module, x: Array, dy: Array | None = None, *, mode: Mode = _TRAINING
) -> dict[str, Any]:
    """Run one forward and one whole backward pass from zeroed gradients.

    Returns copies, by name, of the gradient by each parameter (None where there is none), of "y"
    the output and of "dx" the gradient by the input. `dy` is the `projection` of the output when
    omitted.
    """
    module.zero_grad()
    y, ctx = module.forward(x, mode)
    dx = module.backward(ctx, projection(y) if dy is None else dy)
    return _snapshot(module) | {"y": y.copy(), "dx": dx.copy()}


def projection(y: Array) -> Array:
    """Return fixed pseudo-random weights of the shape and dtype of `y`."""
    return np.random.default_rng(20240229).normal(size=y.shape).astype(y.dtype)


def check_gradients(
    module: Module, x: Array, *, mode: Mode = _TRAINING, rtol: float = 1e-6, eps: float = 1e-6
) -> None:
    """Compare the whole backward pass with central differences, and its uses with the truth.

    Parameters
    ----------
    module : Module
        Its parameters must be float64.
    x : Array, float64 or integer
        Its input; of an integer input no gradient is checked.
    mode : Mode, optional
        For all forward passes; those after the first are replays.
    rtol : float, optional
        Allowed error, relative to the largest element of each gradient (at least 1).
    eps : float, optional
        Half the distance of the central differences.

    Raises
    ------
    AssertionError
        Naming the parameter, or "dx", whose gradient is wrong, or the parameter that receives
        another number of contributions than `Context.uses` announced.
    """
    counted = _backward_counted(module, x, mode)
    weights = projection(counted["y"])

    def value() -> float:
        y, _ = module.forward(x, mode.replayed())
        return float((y * weights).sum())

    variables = {name: parameter.data for name, parameter in module.named_parameters()}
    if x.dtype.kind == "f":
        variables["dx"] = x
    for name, array in variables.items():
        if array.dtype != np.float64:
            raise AssertionError(f"{name}: central differences need float64, got {array.dtype}")
        expected = numerical_gradient(value, array, eps=eps)
        got = np.zeros(array.shape) if counted[name] is None else counted[name]
        error = float(np.abs(got - expected).max(initial=0.0))
        allowed = rtol * max(1.0, float(np.abs(expected).max(initial=0.0)))
        if got.shape != expected.shape or not error <= allowed:
            raise AssertionError(
                f"{name}: off by {error:.3e}, allowed {allowed:.3e}\nexpected {expected}\ngot {got}"
            )


def check_halves(module: Module, inputs: Sequence[Array], *, mode: Mode = _TRAINING) -> None:
    """Check that the halves of backward give the same bits as the whole, with all in flight.

    All forward passes are run first, then all first halves, then all second halves; and it is
    checked that a first half touches no parameter's gradient.

    Parameters
    ----------
    module : Module
        Any; buffers must not influence the outputs (they do not in training).
    inputs : sequence of Array
        One input per micro-batch.
    mode : Mode, optional
        Of the first micro-batch; later ones are shifted by the samples before them.

    Raises
    ------
    AssertionError
        Naming what differs.
    """
    modes = _modes(inputs, mode)
    module.zero_grad()
    joined = []
    for x, m in zip(inputs, modes, strict=True):
        y, ctx = module.forward(x, m)
        joined.append(module.backward(ctx, projection(y)).copy())
    expected = _snapshot(module)

    module.zero_grad()
    forwards = [module.forward(x, m.replayed()) for x, m in zip(inputs, modes, strict=True)]
    halves = [module.backward_input(ctx, projection(y)) for y, ctx in forwards]
    if any(parameter.grad is not None for parameter in module.parameters()):
        raise AssertionError("backward_input touched the gradient of a parameter")
    for _, wctx in halves:
        module.backward_weight(wctx)
    got = _snapshot(module)

    for i, (dx, (dx_half, _)) in enumerate(zip(joined, halves, strict=True)):
        _same_bits(f"dx of micro-batch {i}", dx, dx_half)
    for name, gradient in expected.items():
        _same_bits(name, gradient, got[name])


def _backward_counted(module: Module, x: Array, mode: Mode) -> dict[str, Any]:
    """Run forward and backward with every parameter armed for exactly its announced uses."""
    module.zero_grad()
    y, ctx = module.forward(x, mode)
    ready: list[Any] = []
    for parameter in module.parameters():
        parameter.expect(ctx.uses.get(parameter, 0), ready.append)
    try:
        dx = module.backward(ctx, projection(y))
    except RuntimeError as error:
        raise AssertionError(f"more contributions than ctx.uses announced: {error}") from error
    finally:
        for parameter in module.parameters():
            parameter.release()
    missing = [p.name for p in ctx.uses if p not in ready]
    if missing:
        raise AssertionError(f"fewer contributions than ctx.uses announced: {missing}")
    return _snapshot(module) | {"y": y, "dx": dx}


def _snapshot(module: Module) -> dict[str, Any]:
    return {
        name: None if parameter.grad is None else parameter.grad.copy()
        for name, parameter in module.named_parameters()
    }


def _modes(inputs: Sequence[Array], mode: Mode) -> list[Mode]:
    modes = []
    for x in inputs:
        modes.append(mode)
        mode = mode.shifted(x.shape[0])
    return modes


def _same_bits(name: str, expected: Array | None, got: Array | None) -> None:
    if expected is None or got is None:
        same = expected is got
    else:
        same = expected.dtype == got.dtype and np.array_equal(expected, got)
    if not same:
        raise AssertionError(f"{name}: the halves differ from the whole\n{expected}\n{got}")
