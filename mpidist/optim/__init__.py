"""Optimizers and learning rates; local to a process, with no word of ranks.

Notes
-----
The state has the dtype of its parameter: float16 and bfloat16 parameters are updated in their own
precision, so keep such parameters in float32 and cast for the forward pass.
"""

from __future__ import annotations

from mpidist.optim.optimizer import SGD, Adam, AdamW, Optimizer
from mpidist.optim.rules import AdamRule, SGDRule, UpdateRule
from mpidist.optim.schedule import Schedule, WarmupCosine

__all__ = [
    "SGD",
    "Adam",
    "AdamRule",
    "AdamW",
    "Optimizer",
    "SGDRule",
    "Schedule",
    "UpdateRule",
    "WarmupCosine",
]
