"""The collectives: what all ranks of a group do together, each blocking and immediate.

A blocking verb returns its result. Its immediate form, with an ``i`` before the name, takes the
same arguments and returns a `Work` whose `wait` returns the result. Rows are counted along the
first dimension. Costs are those of `mpidist.backends.algorithms`; a transport that has its own
collective may be cheaper.

Arrays stay where they are: of host arrays the result is a host array, of device arrays one of the
device (`ProcessGroup.device_capabilities` says what these can). What a blocking verb returns of
device arrays is ready for what the caller puts on the current stream next, and so it is after
`Work.wait`; the host goes on at once, and `Work.synchronize` makes it wait. The first device
collective of a group connects its ranks, and blocks until all have arrived, in either form. A
`barrier` is one of the hosts.
"""

from __future__ import annotations

from mpidist.collectives._coalesced import (
    all_gather_coalesced,
    all_reduce_coalesced,
    broadcast_coalesced,
    iall_gather_coalesced,
    iall_reduce_coalesced,
    ibroadcast_coalesced,
    ireduce_scatter_coalesced,
    reduce_scatter_coalesced,
)
from mpidist.collectives._gathers import (
    all_gather,
    gather,
    iall_gather,
    igather,
)
from mpidist.collectives._gpu import gpu_all_reduce, gpu_broadcast
from mpidist.collectives._objects import (
    all_gather_object,
    broadcast_object,
    gather_object,
    scatter_object,
)
from mpidist.collectives._reductions import (
    all_reduce,
    barrier,
    broadcast,
    iall_reduce,
    ibarrier,
    ibroadcast,
    ireduce,
    ireduce_scatter,
    reduce,
    reduce_scatter,
)
from mpidist.collectives._scatters import (
    all_to_all,
    iall_to_all,
    iscatter,
    scatter,
)

__all__ = [
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
    "ireduce",
    "ireduce_scatter",
    "ireduce_scatter_coalesced",
    "iscatter",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_coalesced",
    "scatter",
    "scatter_object",
]
