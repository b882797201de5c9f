"""Optimizers and learning rates; local to a process.

Notes
-----
The state has the dtype of its parameter. `SGD` updates float16 and bfloat16 parameters in their own
precision and `Adam` and `AdamW` refuse them, so keep parameters in float32 and cast for the forward
pass.
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
