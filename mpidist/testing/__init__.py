"""Tools for tests of mpidist, of programs that use it, and of new transports.

Simulated ranks (`run_ranks`) with injected faults, and the cases that every transport has to pass
(`BackendContract`; `DeviceContract` of device arrays). Nothing in mpidist imports this package.
"""

from __future__ import annotations

from mpidist.backends.simulated.faults import Death, DeliveryMode, Drop, Faults
from mpidist.testing.contract import BackendContract, DeviceContract, DevicePlace
from mpidist.testing.gradcheck import check_gradients, check_halves
from mpidist.testing.ranks import run_ranks

Mode = DeliveryMode  # its name in version 0.1.0

__all__ = [
    "BackendContract",
    "Death",
    "DeliveryMode",
    "DeviceContract",
    "DevicePlace",
    "Drop",
    "Faults",
    "check_gradients",
    "check_halves",
    "run_ranks",
]
