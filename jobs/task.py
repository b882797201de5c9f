"""What `train.py` needs to know of a task."""

from __future__ import annotations

from dataclasses import dataclass

from mpidist.data import ArrayDataset
from mpidist.nn import Module

__all__ = ["HELD_OUT", "SPLIT_SEED", "Defaults", "Task"]

HELD_OUT = 0.1
"""Share of the samples that no step is trained on."""

SPLIT_SEED = 0
"""Decides which ones. Not the run's seed: runs of all seeds are judged by the same samples."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """Options of a run that were not given.

    Attributes
    ----------
    epochs : float
        Passes over the training samples.
    batch_size : int
        Samples per step over all ranks.
    lr : float
        Highest learning rate of AdamW or Adam; SGD takes ten times as much.
    """

    epochs: float
    batch_size: int
    lr: float


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Data, a model to be trained on it, and what to compare the loss with.

    Attributes
    ----------
    train, held_out : ArrayDataset
        What to learn from, and what to judge by.
    model : Module
        Freshly initialised.
    defaults : Defaults
        Options that suit it.
    baseline : (str, float)
        Name and value, in nats, of a loss that takes no model.
    """

    train: ArrayDataset
    held_out: ArrayDataset
    model: Module
    defaults: Defaults
    baseline: tuple[str, float]
