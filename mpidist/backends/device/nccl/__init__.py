"""NCCL: collectives and messages of device arrays, see `mpidist.backends.device.hybrid`.

`communicator` holds every call of the library, `dtypes` its codes, `plans` the calls of each verb,
`link` the streams, what is under way, and the watchdog, and `backend` the transport of a group.
"""

from __future__ import annotations

from mpidist.backends.device.nccl.backend import NcclBackend
from mpidist.backends.device.nccl.communicator import NcclCommunicator

__all__ = ["NcclBackend", "NcclCommunicator"]
