"""The place of device arrays where the stand-in is in the place of CuPy."""

from __future__ import annotations

import time

from mpidist.testing.contract import DevicePlace

__all__ = ["StandInPlace"]


class StandInPlace(DevicePlace):
    """Device arrays of the stand-in, which has no raw kernels."""

    def busy(self, seconds: float) -> None:
        """Queue a step on the current stream that is over so long after it has begun."""
        began: list[float] = []

        def step() -> bool:
            began[:] = began or [time.monotonic()]
            return time.monotonic() - began[0] >= seconds

        self.cupy.cuda.get_current_stream().queue.push(step)
