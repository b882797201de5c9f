"""Parameters on a device, updated a bucket at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from mpidist._types import Array
from mpidist.arrays.flat import FlatBuffer
from mpidist.arrays.namespaces import array_namespace
from mpidist.nn.parameter import Parameter
from mpidist.optim.kernels import apply_rule
from mpidist.optim.rules import UpdateRule

__all__ = ["FusedUpdates"]


@dataclass(frozen=True, slots=True)
class _Mirror:
    """Values and state that lie as the gradients of a bucket do."""

    values: FlatBuffer
    slots: dict[str, FlatBuffer]


class FusedUpdates:
    """Applies a rule with one kernel per bucket instead of one per parameter.

    [Note: mirrored buckets] One kernel can update many parameters if values, gradients and state
    lie in the same order. The gradients' order is the buckets', which is found in the first
    backward (`mpidist.parallel.data.ddp`). So at the first step that meets a bucket, values and
    state move into flat arrays that are laid out as it is: `Parameter.data` and the state's arrays
    are other arrays from then on. A gradient that lies in no bucket has a kernel of its own.

    Parameters
    ----------
    rule : UpdateRule
        The arithmetic of one update.
    params : mapping of str to Parameter
        The optimizer's parameters.
    state : mapping of str to dict of str to Array
        Each one's state; its arrays are exchanged.
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
        """Make one step.

        Parameters
        ----------
        updates : mapping of str to (Array, int)
            The gradient of each parameter that has one, and which update of it this is, from 1.
        lr : float
            Learning rate of this step.

        Notes
        -----
        Local; does not block the host.
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
