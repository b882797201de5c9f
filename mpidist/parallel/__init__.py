"""Strategies: who computes what, and what is exchanged when."""

from mpidist.parallel.bucket import BUCKET_BYTES, FIRST_BUCKET_BYTES, BucketSizes
from mpidist.parallel.clip import clip_grad_norm
from mpidist.parallel.compression import Compression, Hook, plain
from mpidist.parallel.ddp import DDP
from mpidist.parallel.grad_scaler import GradScaler
from mpidist.parallel.metrics import Metrics
from mpidist.parallel.naive import NaiveDataParallel
from mpidist.parallel.reducer import GradientReducer

__all__ = [
    "BUCKET_BYTES",
    "DDP",
    "FIRST_BUCKET_BYTES",
    "BucketSizes",
    "Compression",
    "GradScaler",
    "GradientReducer",
    "Hook",
    "Metrics",
    "NaiveDataParallel",
    "clip_grad_norm",
    "plain",
]
