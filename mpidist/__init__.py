"""MPI-first communication for distributed training.

::

    import mpidist

    world = mpidist.init()
    total = mpidist.all_reduce(x, world)

Importing this package starts nothing; `init` does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpidist._types import (
        BAND,
        BOR,
        BXOR,
        LAND,
        LOR,
        LXOR,
        MAX,
        MEAN,
        MIN,
        PROD,
        SUM,
        ReduceOp,
    )
    from mpidist._version import __version__ as __version__
    from mpidist.arrays.boxes import Box
    from mpidist.arrays.shards import ShardedArray
    from mpidist.backends.availability import is_mpi_available, is_nccl_available
    from mpidist.backends.work import ANY_SOURCE, Work
    from mpidist.collectives import *
    from mpidist.errors import *
    from mpidist.group import ProcessGroup
    from mpidist.job.start import init
    from mpidist.mesh import DeviceMesh, DTensor, Partial, Replicate, Shard
    from mpidist.observe.regions import region
    from mpidist.point_to_point import *
    from mpidist.tracing import trace

__all__ = [
    "ANY_SOURCE",
    "BAND",
    "BOR",
    "BXOR",
    "LAND",
    "LOR",
    "LXOR",
    "MAX",
    "MEAN",
    "MIN",
    "PROD",
    "SUM",
    "BackendUnavailableError",
    "Box",
    "CheckpointAsyncError",
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointIncompatibleError",
    "CheckpointMissingShardError",
    "CheckpointNotFoundError",
    "CollectiveMismatchError",
    "CollectiveTimeoutError",
    "DTensor",
    "DeviceMesh",
    "DistributedError",
    "GroupBrokenError",
    "InvalidRankError",
    "InvalidWorldSizeError",
    "LaunchError",
    "NoConnectionError",
    "Partial",
    "PeerLostError",
    "ProcessGroup",
    "Receive",
    "ReceiveWork",
    "ReduceOp",
    "Replicate",
    "ScheduleError",
    "SelfSendError",
    "Send",
    "Shard",
    "ShardedArray",
    "SizeMismatchError",
    "TransportError",
    "UnsupportedOperationError",
    "Work",
    "all_gather",
    "all_gather_coalesced",
    "all_gather_object",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "barrier",
    "broadcast",
    "broadcast_coalesced",
    "broadcast_object",
    "exchange",
    "gather",
    "gather_object",
    "gpu_all_reduce",
    "gpu_broadcast",
    "iall_gather",
    "iall_gather_coalesced",
    "iall_reduce",
    "iall_reduce_coalesced",
    "iall_to_all",
    "ibarrier",
    "ibroadcast",
    "ibroadcast_coalesced",
    "igather",
    "init",
    "irecv",
    "ireduce",
    "ireduce_scatter",
    "ireduce_scatter_coalesced",
    "is_mpi_available",
    "is_nccl_available",
    "iscatter",
    "isend",
    "recv",
    "recv_object",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_coalesced",
    "region",
    "scatter",
    "scatter_object",
    "send",
    "send_object",
    "sendrecv",
    "trace",
]

_PARTS = (
    "errors",
    "_types",
    "arrays.boxes",
    "arrays.shards",
    "backends.availability",
    "backends.work",
    "group",
    "job.start",
    "collectives",
    "point_to_point",
    "observe.regions",
    "tracing",
    "mesh",
)
"""The modules that offer these names, each after those on which it stands: a name is looked for in
this order, and what is looked into is imported."""


def __getattr__(name: str) -> Any:
    """Return one of the names above, or one of the modules, when it is used first (PEP 562).

    Importing all of them takes a quarter of the time that importing numpy does.
    """
    if name == "__version__":
        return import_module("mpidist._version").__version__
    if name in _PARTS:
        return import_module(f"mpidist.{name}")
    if name in __all__:
        for part in _PARTS:
            module = import_module(f"mpidist.{part}")
            if name in module.__all__:
                value = globals()[name] = getattr(module, name)
                return value
    raise AttributeError(f"module 'mpidist' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the names that are not there yet, too."""
    return sorted({*globals(), *__all__})
