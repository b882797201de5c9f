"""NCCL: collectives and messages of device arrays, see `mpidist.backends.device.hybrid`.

`calls` holds every call of the library, `communicator` its operations on arrays, `plans` the verbs
in these terms, `streams` their order on the device, `work` what is under way, and `backend` brings
them together for a group.
"""

from __future__ import annotations

from mpidist.backends.device.nccl.backend import NcclBackend
from mpidist.backends.device.nccl.communicator import NcclCommunicator
from mpidist.backends.device.nccl.unique_id import NcclUniqueId

__all__ = ["NcclBackend", "NcclCommunicator", "NcclUniqueId"]
