"""Learning rates as pure functions of the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi
from typing import TypeAlias

Schedule: TypeAlias = Callable[[int], float]
"""From the number of steps already made to the learning rate of the next one."""


@dataclass(frozen=True, slots=True)
class WarmupCosine:
    """Rise linearly, then fall along half a cosine.

    Parameters
    ----------
    peak : float
        Highest learning rate, reached by the last step of the warm-up.
    warmup_steps : int
        Steps of the rise; 0 starts at `peak`.
    total_steps : int
        Steps after which the rate is `final`, and stays so.
    final : float, optional
        Learning rate at the end, and after it.

    Raises
    ------
    ValueError
        If `warmup_steps` does not lie in [0, `total_steps`], or a rate is negative.

    References
    ----------
    Goyal et al. (2017), Accurate, large minibatch SGD, section 2.2 (gradual warm-up).
    Loshchilov, Hutter (2017), SGDR, equation 5, without restarts.

    Examples
    --------
    >>> rate = WarmupCosine(0.1, warmup_steps=2, total_steps=6)
    >>> [round(rate(step), 4) for step in range(7)]
    [0.05, 0.1, 0.1, 0.0854, 0.05, 0.0146, 0.0]
    """

    peak: float
    warmup_steps: int
    total_steps: int
    final: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ValueError(
                f"WarmupCosine: warmup_steps must lie in [0, total_steps={self.total_steps}], "
                f"got {self.warmup_steps}"
            )
        if not (self.peak >= 0.0 and self.final >= 0.0):
            raise ValueError(
                f"WarmupCosine: rates must not be negative, got peak {self.peak} and final "
                f"{self.final}"
            )

    def __call__(self, step: int) -> float:
        """Return the learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if step >= self.total_steps:
            return self.final
        done = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.final + (self.peak - self.final) * 0.5 * (1.0 + cos(pi * done))
