"""Data sets, and which of their samples go to which rank.

Local to a process: ranks are known only as two numbers.
"""

from __future__ import annotations

from mpidist.data.dataset import ArrayDataset, split_off
from mpidist.data.sampler import Batch, ShardedSampler

__all__ = ["ArrayDataset", "Batch", "ShardedSampler", "split_off"]
