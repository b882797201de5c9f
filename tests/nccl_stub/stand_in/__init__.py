"""Modules that stand in for cupy where there is no GPU, so that device code can be tested.

`install` puts modules into `sys.modules` under the names of CuPy's. Their arrays lie in the host's
memory and are calculated by numpy. Their streams do nothing until somebody waits for them, and
memory is garbage before it is written and after it is free, so that device code that forgets an
event, or an array that it has lent to a stream, gives wrong results here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

from tests.nccl_stub.stand_in import devices, queues, streams
from tests.nccl_stub.stand_in import nccl as over_the_stub
from tests.nccl_stub.stand_in.modules import FINDER, modules
from tests.nccl_stub.stand_in.nccl import NoStubError

__all__ = ["NoStubError", "delay", "install", "uninstall"]

_real: dict[str, ModuleType] = {}


def install(devices: int = 4, *, nccl: bool = True) -> None:
    """Put the stand-in's modules where cupy's would be.

    Parameters
    ----------
    devices : int
        How many GPUs there seem to be; with 0, CuPy finds no device.
    nccl : bool
        Build and load the stub of libnccl, and let CuPy's own extension call it. Without,
        `cupy.cuda.nccl` is as CuPy without libnccl has it.

    Raises
    ------
    NoStubError
        If there is no compiler, or no wheel of CuPy. Nothing is in place then.

    Notes
    -----
    Modules of a real CuPy that have been imported come back with `uninstall`.
    """
    if FINDER in sys.meta_path:
        raise RuntimeError("the stand-in is in place already")
    _set_devices(devices)
    if nccl:
        FINDER.nccl = over_the_stub.module()
    else:
        FINDER.nccl = _nccl_unavailable()
    _real.update({name: sys.modules.pop(name) for name in list(sys.modules) if _is_cupy(name)})
    sys.meta_path.insert(0, FINDER)
    sys.modules.update(modules())


def uninstall() -> None:
    """Take the modules out again, and forget all streams."""
    if FINDER not in sys.meta_path:
        return
    sys.meta_path.remove(FINDER)
    for name in list(filter(_is_cupy, sys.modules)):
        del sys.modules[name]
    sys.modules.update(_real)
    _real.clear()
    FINDER.nccl = None
    vars(modules()["cupy.cuda"]).pop("nccl", None)
    over_the_stub.disconnect()
    queues.reset()
    streams.reset()
    _set_devices(0)


def delay(stream: streams.Stream, fn: Callable[[], object]) -> None:
    """Queue a function of the host on a stream, as if it were a kernel."""
    stream.queue.push(lambda: (fn(), None)[1])


def _is_cupy(name: str) -> bool:
    return name.partition(".")[0] in ("cupy", "cupyx")


def _set_devices(number: int) -> None:
    devices.reset(number)


def _nccl_unavailable() -> ModuleType:
    module = ModuleType("cupy.cuda.nccl")
    module.available = False  # type: ignore[attr-defined]
    return module
