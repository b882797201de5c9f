"""Strategies: who computes what, and what is exchanged when."""

from mpidist.parallel.bucket import BUCKET_BYTES, FIRST_BUCKET_BYTES, BucketSizes
from mpidist.parallel.clip import clip_grad_norm
from mpidist.parallel.compression import Compression, Hook, plain
from mpidist.parallel.ddp import DDP
from mpidist.parallel.grad_scaler import GradScaler
from mpidist.parallel.memory import (
    MemoryLedger,
    MemoryUse,
    memory_ledger,
    memory_use,
    proportional_set_size,
)
from mpidist.parallel.metrics import Metrics
from mpidist.parallel.model_state import ModelState
from mpidist.parallel.naive import NaiveDataParallel
from mpidist.parallel.reducer import GradientReducer
from mpidist.parallel.shard_state import full_state_dict
from mpidist.parallel.zero import OptimizerFactory, ShardedOptimizer

__all__ = [
    "BUCKET_BYTES",
    "DDP",
    "FIRST_BUCKET_BYTES",
    "BucketSizes",
    "Compression",
    "GradScaler",
    "GradientReducer",
    "Hook",
    "MemoryLedger",
    "MemoryUse",
    "Metrics",
    "ModelState",
    "NaiveDataParallel",
    "OptimizerFactory",
    "ShardedOptimizer",
    "clip_grad_norm",
    "full_state_dict",
    "memory_ledger",
    "memory_use",
    "plain",
    "proportional_set_size",
]
