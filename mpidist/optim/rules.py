"""Update rules: arithmetic on a block of a parameter, and nothing else.

A rule depends on neither names nor the position of the block, so it can be applied to a slice of a
parameter, its gradient and its state. `mpidist.optim.Optimizer` keeps the state.

numpy's ufuncs dispatch on their arguments, so on cupy arrays the same lines run on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mpidist._types import Array


class UpdateRule(Protocol):
    """What an optimizer asks of its rule."""

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the state arrays per parameter, each of its shape and zero at first."""
        ...

    def apply(
        self, w: Array, g: Array, state: Mapping[str, Array], scratch: Array, *, lr: float, t: int
    ) -> None:
        """Update a block of a parameter in place.

        Parameters
        ----------
        w : Array, any shape, floating
            Values of the parameter; overwritten.
        g : Array, shape and dtype of `w`
            Their gradient; only read.
        state : mapping of str to Array, each the shape and dtype of `w`
            One array per name in `slots`; overwritten.
        scratch : Array, shape ``(2, *w.shape)``, dtype of `w`
            Memory for intermediate values.
        lr : float
            Learning rate of this step.
        t : int
            Which update of this parameter it is, from 1.
        """
        ...


@dataclass(frozen=True, slots=True)
class SGDRule:
    """Gradient descent with momentum.

    Parameters
    ----------
    momentum : float
        Share of the velocity that is kept, at least 0 and below 1. With 0 there is no state.
    nesterov : bool
        Step along the gradient plus the next decay of the velocity.
    weight_decay : float
        Added to the gradient as `weight_decay * w`.

    References
    ----------
    Sutskever, Martens, Dahl, Hinton (2013), On the importance of initialization and momentum in
    deep learning, section 2; here the learning rate is not part of the velocity.
    """

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"SGD: momentum must lie in [0, 1), got {self.momentum}")
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("SGD: nesterov needs a momentum above 0, got 0")
        _check_not_negative("SGD", "weight_decay", self.weight_decay)

    @property
    def slots(self) -> tuple[str, ...]:
        """``("velocity",)``, or nothing without momentum."""
        return ("velocity",) if self.momentum else ()

    def apply(
        self, w: Array, g: Array, state: Mapping[str, Array], scratch: Array, *, lr: float, t: int
    ) -> None:
        """Update a block in place; see `UpdateRule.apply`."""
        decayed, step = scratch
        if self.weight_decay:
            np.multiply(w, self.weight_decay, out=decayed)
            g = np.add(decayed, g, out=decayed)
        if self.momentum:
            velocity = state["velocity"]
            velocity *= self.momentum
            velocity += g
            if self.nesterov:
                np.multiply(velocity, self.momentum, out=step)
                g = np.add(step, g, out=step)
            else:
                g = velocity
        np.multiply(g, lr, out=step)
        w -= step


@dataclass(frozen=True, slots=True)
class AdamRule:
    """Adaptive moments, bias corrected.

    Parameters
    ----------
    beta1, beta2 : float
        Decay of the running means of the gradient and of its square, in [0, 1).
    eps : float
        Added to the root of the mean square.
    l2 : float
        Added to the gradient as `l2 * w`, before the means.
    decay : float
        Share `lr * decay` of `w` that is taken off directly, outside the means.

    Notes
    -----
    For float32 and float64: in float16 the usual `eps` is 0. The optimizers refuse halves.

    References
    ----------
    Kingma, Ba (2015), Adam: a method for stochastic optimization, algorithm 1.
    Loshchilov, Hutter (2019), Decoupled weight decay regularization, algorithm 2.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    l2: float = 0.0
    decay: float = 0.0

    def __post_init__(self) -> None:
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Adam: {name} must lie in [0, 1), got {beta}")
        for name, value in (("eps", self.eps), ("l2", self.l2), ("decay", self.decay)):
            _check_not_negative("Adam", name, value)

    @property
    def slots(self) -> tuple[str, ...]:
        """``("mean", "mean_square")``: of the gradient."""
        return ("mean", "mean_square")

    def apply(
        self, w: Array, g: Array, state: Mapping[str, Array], scratch: Array, *, lr: float, t: int
    ) -> None:
        """Update a block in place; see `UpdateRule.apply`."""
        mean, mean_square = state["mean"], state["mean_square"]
        decayed, work = scratch
        if self.decay:
            w *= 1.0 - lr * self.decay
        if self.l2:
            np.multiply(w, self.l2, out=decayed)
            g = np.add(decayed, g, out=decayed)
        np.subtract(g, mean, out=work)
        work *= 1.0 - self.beta1
        mean += work
        np.multiply(g, g, out=work)
        work *= 1.0 - self.beta2
        mean_square *= self.beta2
        mean_square += work
        # The corrections are numbers, so they go into the factors and cost no pass over the array.
        np.sqrt(mean_square, out=work)
        work *= (1.0 - self.beta2**t) ** -0.5
        work += self.eps
        np.divide(mean, work, out=work)
        work *= lr / (1.0 - self.beta1**t)
        w -= work


def _check_not_negative(rule: str, name: str, value: float) -> None:
    if not value >= 0.0:
        raise ValueError(f"{rule}: {name} must not be negative, got {value}")
