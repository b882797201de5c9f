"""`GradScaler`: keep small gradients above the smallest float16, by a factor that adapts itself."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from mpidist._types import LAND, Array
from mpidist.arrays.namespaces import HALVES, is_device
from mpidist.collectives import all_reduce
from mpidist.group.group import ProcessGroup, check_group
from mpidist.nn.parameter import Parameters
from mpidist.parallel import gradient_kernels
from mpidist.parallel.gradient_kernels import gradient_arrays

__all__ = ["GradScaler"]

_SMALLEST = 2.0**-24
"""Least factor. What overflows even a float16 with it is beyond 2**40, or was never finite."""

_LARGEST = 2.0**127
"""Greatest factor: the largest power of two that a float32 holds. Gradients of zero let it grow."""


class GradScaler:
    """Scale the loss up before backward and the gradients down after it.

    Once per step, in this order::

        optimizer.zero_grad()
        ddp.backward(ctx, scaler.scale(dy))             # every rank scales, also with no sample
        if scaler.unscale(model.parameters()):          # the same answer on all ranks
            clip_grad_norm(model.parameters(), 1.0)     # before unscale, it would clip too much
            optimizer.step()

    Parameters
    ----------
    group : ProcessGroup
        The ranks that decide together.
    initial : float, optional
        The first factor, from 2**-24 to 2**127; it never leaves this range.
    growth : float, optional
        Factor by which it grows after `interval` good steps in a row, above 1.
    backoff : float, optional
        Factor by which it shrinks after a step with an infinity or NaN, between 0 and 1.
    interval : int, optional
        Good steps in a row before it grows.

    Attributes
    ----------
    factor : float
        The present factor, the same on all ranks.

    Raises
    ------
    ValueError
        If a number is out of its range.

    References
    ----------
    Micikevicius et al. (2018), Mixed Precision Training, section 3.2.
    """

    def __init__(
        self,
        group: ProcessGroup,
        *,
        initial: float = 2.0**16,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
    ) -> None:
        check_group(group, "GradScaler")
        in_range = _SMALLEST <= initial <= _LARGEST
        if not (in_range and 1 < growth < math.inf and 0 < backoff < 1 and interval >= 1):
            raise ValueError(
                "GradScaler: expected 2**-24 <= initial <= 2**127, growth > 1, 0 < backoff < 1 and "
                f"interval >= 1; got {initial}, {growth}, {backoff} and {interval}"
            )
        self.factor = float(initial)
        self._group = group
        self._growth = growth
        self._backoff = backoff
        self._interval = interval
        self._good_steps = 0
        self._unscaled = False  # since the last scale()

    def scale(self, dy: Array) -> Array:
        """Return `dy` times the factor.

        Parameters
        ----------
        dy : Array, float
            Gradient of the loss by the model's output.

        Returns
        -------
        Array, shape and dtype of `dy`
            A new array; infinite where the product is beyond the dtype's range.

        Notes
        -----
        Local. Begins a step: `unscale` may follow once. May be called once per micro-batch.
        """
        self._unscaled = False
        if is_device(dy):
            return gradient_kernels.scaled(dy, self.factor)
        # The factor itself may be beyond the half's range where the product is not.
        wide = dy.astype(np.float32) if dy.dtype in HALVES else dy
        with np.errstate(all="ignore"):
            scaled: Array = (wide * self.factor).astype(dy.dtype, copy=False)
        return scaled

    def unscale(self, parameters: Parameters) -> bool:
        """Divide the gradients by the factor, if all are finite, and adjust the factor.

        Parameters
        ----------
        parameters : Module, DDP or iterable of Parameter
            Those without a gradient are passed over.

        Returns
        -------
        bool
            Whether every gradient of every rank was finite; the same on all ranks. If not, this
            step has to be left out: the gradients are not to be used, and the factor has shrunk.

        Raises
        ------
        RuntimeError
            If it has been called since the last `scale`: the gradients would be divided twice.
        TypeError, ValueError
            If `parameters` is something else, or an iterator that has been used up.
        FloatingPointError
            On every rank, if the factor would fall below 2**-24: the loss itself is not finite.

        Notes
        -----
        Collective over the group; blocks. One all-reduce of one byte. To be called once per step,
        after the gradients have been reduced and before they are clipped. On a device one kernel
        per bucket looks and divides at once.
        """
        if self._unscaled:
            raise RuntimeError(
                "GradScaler.unscale: called twice in one step, and the gradients would be divided "
                "by the factor twice; the order is scale, backward, unscale, clip_grad_norm, step"
            )
        host, device = gradient_arrays(parameters, "GradScaler.unscale")
        self._unscaled = True
        all_finite = gradient_kernels.all_finite_divided(device, self.factor)
        all_finite = all_finite and all(bool(np.isfinite(grad).all()) for grad in host)
        finite = bool(all_reduce(np.array(all_finite), self._group, op=LAND))
        if finite:
            for grad in host:
                _divide(grad, self.factor)
        self._adjust(finite=finite)
        return finite

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint must keep: ``"factor"`` and ``"good_steps"``."""
        return {"factor": self.factor, "good_steps": self._good_steps}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a state that `state_dict` gave.

        Parameters
        ----------
        state : mapping of str to float
            The same on all ranks.
        """
        self.factor = float(state["factor"])
        self._good_steps = int(state["good_steps"])

    def _adjust(self, *, finite: bool) -> None:
        self._good_steps = self._good_steps + 1 if finite else 0
        if not finite:
            self._shrink()
        elif self._good_steps == self._interval:
            self.factor = min(self.factor * self._growth, _LARGEST)
            self._good_steps = 0

    def _shrink(self) -> None:
        """Make the factor smaller, but never 0: dividing by that, good steps would give NaN."""
        if self.factor * self._backoff < _SMALLEST:
            raise FloatingPointError(
                f"GradScaler.unscale on {self._group}: gradients are infinite or NaN even with the "
                f"factor {self.factor:g}, and none below {_SMALLEST:g} is tried; the loss itself "
                "is not finite: lower the learning rate, or look at the data"
            )
        self.factor *= self._backoff


def _divide(grad: Array, factor: float) -> None:
    # Small gradients underflow, also of a rank whose error state raises, and of no other.
    with np.errstate(all="ignore"):
        if grad.dtype in HALVES:
            grad[...] = grad.astype(np.float32) / np.float32(factor)
        else:
            grad /= factor
