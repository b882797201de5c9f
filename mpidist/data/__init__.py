"""Which samples go to which rank; local to a process, knowing ranks only as two numbers."""

from __future__ import annotations

from mpidist.data.sampler import Batch, ShardedSampler

__all__ = ["Batch", "ShardedSampler"]
