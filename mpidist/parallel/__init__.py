"""Strategies: who computes what, and what is exchanged when."""

from mpidist.parallel.clip import clip_grad_norm
from mpidist.parallel.data.buckets import BUCKET_BYTES, FIRST_BUCKET_BYTES, BucketSizes
from mpidist.parallel.data.compression import Compression, Hook, plain
from mpidist.parallel.data.ddp import DDP
from mpidist.parallel.data.naive import NaiveDataParallel
from mpidist.parallel.data.reducer import GradientReducer
from mpidist.parallel.data.sync_batch_norm import SyncBatchNorm2d, synchronize_batch_norms
from mpidist.parallel.grad_scaler import GradScaler
from mpidist.parallel.metrics import Metrics
from mpidist.parallel.pipeline.fitting import fitted
from mpidist.parallel.pipeline.generators import (
    dualpipev,
    gpipe,
    interleaved,
    one_f_one_b,
    zb_h1,
    zbv,
)
from mpidist.parallel.pipeline.layer_costs import LayerCosts
from mpidist.parallel.pipeline.pipeline import Evaluation, Pipeline, StepResult
from mpidist.parallel.pipeline.schedule import Action, Pass, Schedule
from mpidist.parallel.pipeline.timeline import Costs, Span, Timeline, best_of, simulate
from mpidist.parallel.sharded.flat_parameters import Cut
from mpidist.parallel.sharded.fsdp import FSDP
from mpidist.parallel.sharded.memory import (
    MemoryLedger,
    MemoryUse,
    memory_ledger,
    memory_use,
    proportional_set_size,
)
from mpidist.parallel.sharded.naive_full_shard import NaiveFullShard
from mpidist.parallel.sharded.options import ShardingStrategy
from mpidist.parallel.sharded.precision import Precision
from mpidist.parallel.sharded.state import ModelState
from mpidist.parallel.sharded.units import UNIT_BYTES, Unit
from mpidist.parallel.sharded.zero import OptimizerFactory, ShardedOptimizer, full_state_dict
from mpidist.parallel.strategy import Strategy
from mpidist.parallel.tensor.attention import Heads
from mpidist.parallel.tensor.cuts import Split
from mpidist.parallel.tensor.linear import ColumnLinear, Columns, RowLinear, Rows
from mpidist.parallel.tensor.plan import cut_table, parallelize
from mpidist.parallel.tensor.vocabulary import (
    Vocabulary,
    VocabularyEmbedding,
    vocabulary_cross_entropy,
)

__all__ = [
    "BUCKET_BYTES",
    "DDP",
    "FIRST_BUCKET_BYTES",
    "FSDP",
    "UNIT_BYTES",
    "Action",
    "BucketSizes",
    "ColumnLinear",
    "Columns",
    "Compression",
    "Costs",
    "Cut",
    "Evaluation",
    "GradScaler",
    "GradientReducer",
    "Heads",
    "Hook",
    "LayerCosts",
    "MemoryLedger",
    "MemoryUse",
    "Metrics",
    "ModelState",
    "NaiveDataParallel",
    "NaiveFullShard",
    "OptimizerFactory",
    "Pass",
    "Pipeline",
    "Precision",
    "RowLinear",
    "Rows",
    "Schedule",
    "ShardedOptimizer",
    "ShardingStrategy",
    "Span",
    "Split",
    "StepResult",
    "Strategy",
    "SyncBatchNorm2d",
    "Timeline",
    "Unit",
    "Vocabulary",
    "VocabularyEmbedding",
    "best_of",
    "clip_grad_norm",
    "cut_table",
    "dualpipev",
    "fitted",
    "full_state_dict",
    "gpipe",
    "interleaved",
    "memory_ledger",
    "memory_use",
    "one_f_one_b",
    "parallelize",
    "plain",
    "proportional_set_size",
    "simulate",
    "synchronize_batch_norms",
    "vocabulary_cross_entropy",
    "zb_h1",
    "zbv",
]
