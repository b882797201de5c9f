"""A training loop to read and copy, and what it shows of a run."""

from __future__ import annotations

from mpidist.train.loop import Plan, evaluate, train, train_step
from mpidist.train.plot import plot_records
from mpidist.train.progress import ProgressBar
from mpidist.train.records import MetricsFile, Record

__all__ = [
    "MetricsFile",
    "Plan",
    "ProgressBar",
    "Record",
    "evaluate",
    "plot_records",
    "train",
    "train_step",
]
