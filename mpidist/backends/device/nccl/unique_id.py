"""What the ranks of a communicator have to have in common before NCCL can connect them."""

from __future__ import annotations

import numpy as np

from mpidist.backends.base import Backend
from mpidist.backends.device.nccl import calls
from mpidist.backends.verbs import Broadcast
from mpidist.backends.work import Waiter
from mpidist.errors import SizeMismatchError

__all__ = ["NcclUniqueId"]


class NcclUniqueId(bytes):
    """NCCL's identifier of a communicator in the making: 128 bytes.

    It says where rank 0 listens, and whoever has it can join: it goes to the ranks of one job only.

    Parameters
    ----------
    data : bytes
        What `new` made on another rank.

    Raises
    ------
    SizeMismatchError
        If these are not 128 bytes.
    """

    def __new__(cls, data: bytes) -> NcclUniqueId:
        """Take the bytes of another rank's identifier."""
        if len(data) != calls.UNIQUE_ID_NBYTES:
            raise SizeMismatchError(
                f"NcclUniqueId: expected {calls.UNIQUE_ID_NBYTES} bytes, got {len(data)}"
            )
        return super().__new__(cls, data)

    @classmethod
    def new(cls) -> NcclUniqueId:
        """Make one, on the rank that is to be rank 0; local."""
        return cls(calls.new_unique_id())

    @classmethod
    def share(cls, host: Backend, waiter: Waiter) -> NcclUniqueId:
        """Make one on rank 0 of a transport, and give it to all its ranks; collective, blocks."""
        data = np.zeros(calls.UNIQUE_ID_NBYTES, np.uint8)
        if host.rank == 0:
            data[:] = np.frombuffer(cls.new(), np.uint8)
        host.run(Broadcast(data, 0), waiter=waiter)
        return cls(data.tobytes())
