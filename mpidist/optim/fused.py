"""Updates on a device: a rule is one kernel, and a bucket of parameters one call of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np

from mpidist._types import Array, DType
from mpidist.arrays.flat import FlatBuffer
from mpidist.arrays.namespaces import HALVES, array_namespace
from mpidist.nn.parameter import Parameter
from mpidist.optim.rules import AdamRule, SGDRule, UpdateRule

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


@dataclass(frozen=True, slots=True)
class _Mirror:
    """Values and state that lie as the gradients of a bucket do."""

    values: FlatBuffer
    slots: dict[str, FlatBuffer]


class FusedUpdates:
    """Applies a rule with one kernel per bucket instead of one per parameter.

    The arrays of `state` are exchanged.

    [Note: mirrored buckets] One kernel can update many parameters if values, gradients and state
    lie in the same order. The gradients' order is the buckets', which is found in the first
    backward (`mpidist.parallel.data.broadcasts`). So at the first step with a bucket, values and
    state move into flat arrays that are laid out as it is: `Parameter.data` and the state's arrays
    are other arrays from then on. A gradient that lies in no bucket has a kernel of its own.
    """

    def __init__(
        self,
        rule: UpdateRule,
        params: Mapping[str, Parameter],
        state: Mapping[str, dict[str, Array]],
    ) -> None:
        self._rule = rule
        self._params = params
        self._state = state
        # A bucket that is laid out anew is another one; what mirrored the old one goes with it.
        self._mirrors: WeakKeyDictionary[FlatBuffer, _Mirror] = WeakKeyDictionary()

    def update(self, updates: Mapping[str, tuple[Array, int]], lr: float) -> None:
        """Make one step; local, does not block the host.

        `updates` has the gradient of each parameter that has one, and which update of it this is,
        from 1.
        """
        buckets: dict[FlatBuffer, dict[str, int]] = {}
        for name, (grad, t) in updates.items():
            parameter = self._params[name]
            if parameter.location is None or parameter.location[0].data.dtype != parameter.dtype:
                apply_rule(self._rule, parameter.data, grad, self._state[name], lr=lr, t=t)
                continue
            flat, part = parameter.location
            self._move(name, part, self._mirror(flat))
            buckets.setdefault(flat, {})[part] = t
        for flat, counts in buckets.items():
            mirror = self._mirrors[flat]
            # Those that have had equally many updates: all, unless some went without a gradient.
            for t, where in flat.segments(counts):
                state = {slot: like.data[where] for slot, like in mirror.slots.items()}
                apply_rule(
                    self._rule, mirror.values.data[where], flat.data[where], state, lr=lr, t=t
                )

    def _mirror(self, flat: FlatBuffer) -> _Mirror:
        mirror = self._mirrors.get(flat)
        if mirror is None:
            slots = {slot: flat.zeros_like() for slot in self._rule.slots}
            mirror = self._mirrors[flat] = _Mirror(flat.zeros_like(), slots)
        return mirror

    def _move(self, name: str, part: str, mirror: _Mirror) -> None:
        """Let a parameter's values and state lie in a mirror, if they do not yet."""
        parameter, state = self._params[name], self._state[name]
        parameter.data = _moved(parameter.data, mirror.values.views[part])
        for slot, like in mirror.slots.items():
            state[slot] = _moved(state[slot], like.views[part])


def _moved(array: Array, to: Array) -> Array:
    if array is not to:
        array_namespace(to).copyto(to, array)
    return to


def apply_rule(
    rule: UpdateRule,
    w: Array,
    g: Array,
    state: Mapping[str, Array],
    *,
    lr: float,
    t: int,
) -> None:
    """Update device arrays in place, as ``rule.apply`` does; local, does not block the host.

    An `AdamRule` or `SGDRule` is one kernel. Another one's own `apply` is called; what it does with
    numpy's functions runs on the device, too. All arrays are on one device.
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
