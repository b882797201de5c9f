"""Which device each rank of a group uses, told over the host before NCCL is asked for anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpidist.arrays.namespaces import device_module
from mpidist.backends.availability import why_no_nccl
from mpidist.backends.base import Backend
from mpidist.backends.device.nccl import calls
from mpidist.backends.verbs import AllGather
from mpidist.backends.work import Waiter
from mpidist.env import allows_shared_devices
from mpidist.errors import BackendUnavailableError, LaunchError

__all__ = ["check_devices", "gather_facts", "own_facts"]

_TEXT_BYTES, _REASON_LETTERS = 1024, 400
"""Bytes of the facts of a rank as JSON, and letters of a reason in them."""

_SHARED_SINCE = 23003
"""The NCCL that lets several ranks use one GPU, if the environment says so: 2.30.3."""


def own_facts(node: int) -> dict[str, Any]:
    """Return what the other ranks must know about this rank, for `check_devices`.

    Parameters
    ----------
    node : int
        The same for exactly the ranks of this node.
    """
    reason = why_no_nccl()
    if reason is not None:
        return {"lacks": reason[:_REASON_LETTERS]}
    cuda = device_module().cuda
    device = cuda.Device().id
    return {
        "node": node,
        "device": device,
        "bus": cuda.runtime.deviceGetPCIBusId(device),
        "nccl": calls.version(),
        "shared": allows_shared_devices(),
    }


def gather_facts(own: dict[str, Any], host: Backend, waiter: Waiter) -> list[dict[str, Any]]:
    """Return the facts of every rank; collective, blocks."""
    text = json.dumps(own).encode()
    sent = np.frombuffer(text.ljust(_TEXT_BYTES), np.uint8)
    rows = np.empty((host.size, _TEXT_BYTES), np.uint8)
    host.run(AllGather(sent, rows.reshape(-1), (_TEXT_BYTES,) * host.size), waiter=waiter)
    return [json.loads(row.tobytes()) for row in rows]


def check_devices(facts: Sequence[dict[str, Any]]) -> None:
    """Raise, on all ranks alike, where NCCL could not connect these ranks.

    Raises
    ------
    LaunchError
        If two ranks use one device, and are not allowed to.
    BackendUnavailableError
        If a rank lacks something, or ranks have different releases of NCCL.
    """
    for rank, fact in enumerate(facts):
        if "lacks" in fact:
            raise BackendUnavailableError(f"NCCL: on rank {rank}, {fact['lacks']}")
    versions = {fact["nccl"] for fact in facts}
    if len(versions) > 1:
        releases = ", ".join(f"rank {rank} {fact['nccl']}" for rank, fact in enumerate(facts))
        raise BackendUnavailableError(
            f"NCCL: the ranks have different releases of the library: {releases}; use one "
            "environment on all nodes"
        )
    allowed = all(fact["shared"] for fact in facts) and min(versions) >= _SHARED_SINCE
    users: dict[tuple[int, str], int] = {}
    for rank, fact in enumerate(facts):
        first = users.setdefault((fact["node"], fact["bus"]), rank)
        if first != rank and not allowed:
            raise LaunchError(
                f"NCCL: ranks {first} and {rank} both use GPU {fact['bus']} (device "
                f"{fact['device']} there), which NCCL refuses, or hangs on. Start at most one rank "
                "per GPU (mpirun -n GPUS; srun --ntasks-per-node=GPUS --gpus-per-node=GPUS), and "
                "import cupy before mpidist.init, which gives each a GPU of its own then; with "
                f"NCCL 2.30.3 or newer (here {fact['nccl']}) NCCL_MULTI_RANK_GPU_ENABLE=1 on all "
                "ranks allows it"
            )
