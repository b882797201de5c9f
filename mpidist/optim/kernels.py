"""Update rules as one kernel each, for arrays on a device: every array is read and written once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from mpidist._types import Array, DType
from mpidist.arrays.namespaces import HALVES, array_namespace
from mpidist.optim.rules import AdamRule, SGDRule, UpdateRule

__all__ = ["apply_rule"]

_Call: TypeAlias = Callable[[Array, Array, Mapping[str, Array], float, int], None]
"""From values, gradient, state, learning rate and number of the update."""

# `wide` is what to calculate in: the arrays' own type, or float for halves. The order of the
# operations is that of rules.py, so that results differ by rounding at most.
_SGD = """
    {wide} x = w;
    {wide} d = decay * x + ({wide})g;
"""
_MOMENTUM = """
    {wide} v = ({wide})velocity * momentum + d;
    velocity = v;
    d = {step};
"""
_ADAM = """
    {wide} x = ({wide})w * keep;
    {wide} d = l2 * x + ({wide})g;
    {wide} m = mean;
    m += (d - m) * share1;
    {wide} s = ({wide})square * beta2 + d * d * share2;
    w = x - m / (sqrt(s) * correction + eps) * rate;
    mean = m;
    square = s;
"""


def apply_rule(
    rule: UpdateRule,
    w: Array,
    g: Array,
    state: Mapping[str, Array],
    *,
    lr: float,
    t: int,
) -> None:
    """Update device arrays in place, as ``rule.apply`` does.

    Parameters
    ----------
    rule : UpdateRule
        An `AdamRule` or `SGDRule` is one kernel. Another one's own `apply` is called; what it does
        with numpy's functions runs on the device, too.
    w, g, state, lr, t
        As for `UpdateRule.apply`. All arrays are on one device.

    Notes
    -----
    Local; does not block the host.
    """
    xp = array_namespace(w)
    call = _fused(rule, xp, w.dtype) if isinstance(rule, (AdamRule, SGDRule)) else None
    if call is not None:
        call(w, g, state, lr, t)
    else:
        rule.apply(w, g, state, xp.empty((2, *w.shape), w.dtype), lr=lr, t=t)


@cache
def _fused(rule: AdamRule | SGDRule, xp: ModuleType, dtype: DType) -> _Call:
    wide = np.dtype(np.float32) if dtype in HALVES else dtype
    return _adam(rule, xp, wide) if isinstance(rule, AdamRule) else _sgd(rule, xp, wide)


def _adam(rule: AdamRule, xp: ModuleType, wide: DType) -> _Call:
    names = ("keep", "l2", "share1", "beta2", "share2", "correction", "eps", "rate")
    kernel = _kernel(xp, wide, names, ("w", "mean", "square"), _ADAM, "mpidist_adam")

    def call(w: Array, g: Array, state: Mapping[str, Array], lr: float, t: int) -> None:
        correction = (1.0 - rule.beta2**t) ** -0.5
        rate = lr / (1.0 - rule.beta1**t)
        shares = (1.0 - rule.beta1, rule.beta2, 1.0 - rule.beta2)
        numbers = (1.0 - lr * rule.decay, rule.l2, *shares, correction, rule.eps, rate)
        kernel(g, *numbers, w, state["mean"], state["mean_square"])

    return call


def _sgd(rule: SGDRule, xp: ModuleType, wide: DType) -> _Call:
    names = ("lr", "decay", "momentum")
    source = _SGD + (_MOMENTUM if rule.momentum else "") + "w = x - d * lr;"
    source = source.replace("{step}", "d + v * momentum" if rule.nesterov else "v")
    kernel = _kernel(xp, wide, names, ("w", *rule.slots), source, "mpidist_sgd")

    def call(w: Array, g: Array, state: Mapping[str, Array], lr: float, _: int) -> None:
        kernel(g, lr, rule.weight_decay, rule.momentum, w, *state.values())

    return call


def _kernel(
    xp: ModuleType,
    wide: DType,
    numbers: tuple[str, ...],
    arrays: tuple[str, ...],
    source: str,
    name: str,
) -> Any:
    """Make a kernel of a gradient `g`, some numbers, and arrays that it changes."""
    return xp.ElementwiseKernel(
        ", ".join(["T g", *(f"{wide} {number}" for number in numbers)]),
        ", ".join(f"T {array}" for array in arrays),
        source.replace("{wide}", "double" if wide == np.float64 else "float"),
        name,
    )
