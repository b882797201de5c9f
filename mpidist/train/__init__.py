"""A training loop to read and copy, with records, checkpoints and a stop at a signal."""

from __future__ import annotations

from mpidist.train.loop import CountedCrossEntropy, Plan, evaluate, make_sampler, train, train_step
from mpidist.train.records import MetricsFile, ProgressBar, Record, plot_records, read_records
from mpidist.train.saving import Checkpoints, Run, check_space, raise_from_rank_0
from mpidist.train.stopping import StopSignal

__all__ = [
    "Checkpoints",
    "CountedCrossEntropy",
    "MetricsFile",
    "Plan",
    "ProgressBar",
    "Record",
    "Run",
    "StopSignal",
    "check_space",
    "evaluate",
    "make_sampler",
    "plot_records",
    "raise_from_rank_0",
    "read_records",
    "train",
    "train_step",
]
