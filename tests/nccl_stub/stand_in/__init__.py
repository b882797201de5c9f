"""Modules that stand in for cupy where there is no GPU, so that device code can be tested.

`install` puts modules into `sys.modules` under the names of CuPy's. Their arrays lie in the host's
memory and are calculated by numpy. Their streams do nothing until somebody waits for them, and
memory is garbage (NaN, -1) before it is written and after it is free. So device code that forgets
an event, or an array that it has lent to a stream, gives wrong results here.

What is imitated
----------------
- An operation first runs what the current stream has been asked for, including events that it
  waits for, and computes; its result is seen by who waits for the stream, or for an event on it.
  Until then a new array holds garbage, and a changed one what it held before. Where the stream has
  to wait for another rank, the operation is computed when the stream gets there, and the host goes
  on; where the shape of the result is in the data, it waits.
- Streams run as badly as a device may: nothing runs before it has to, but NCCL's calls run before
  whatever they are not ordered behind.
- Freed memory becomes garbage as soon as the stream on which it was allocated can have given it to
  another array: at once, unless that stream waits for others; then in its turn. Pinned memory
  becomes garbage at once.
- `cupy.cuda.nccl` is CuPy's own extension over the stub of libnccl. Its calls run when their stream
  is waited for, or after `queues.IDLE_SECONDS`, since a rank's device goes on while its host waits.
- What CuPy refuses is refused: arrays of the host among those of the device, names and parameters
  that it has not (see `signatures`), streams and arrays of another device than the current one.

What is not
-----------
- `numpy.asarray(x)` and the buffer protocol (so mpi4py, too) give the memory of a device array, as
  it is at that moment, where CuPy raises a TypeError: no subclass of numpy's array can help it.
  Calling `x.__array__()`, and mixing the result with a device array, raises.
- `isinstance(x, numpy.ndarray)` is true.
- Results are numpy's to the last bit, not a GPU's. Integers out of bounds raise in indices, where
  CuPy wraps around; repeated indices of an assignment are in order.
- Steps of the host's own are at once: no kernel is slow unless `hold` or `delay` makes it so.
- Operations read their operands when they are called, if their stream could be run, so that a
  later change of an operand on another stream, without an event, goes unnoticed. So does memory
  that is freed too early, if the stream on which it was allocated waits for something else.
- One memory address belongs to one device; there are no peers, managed memory, CUDA graphs,
  per-thread default streams, DLPack, flat iterators, raw and reduction kernels, or handles between
  processes. Kernels run on the host, without the threads and the shared memory of a block.
- No memory runs out, and nothing is cached: `free_all_blocks` has nothing to do.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from tests.nccl_stub.stand_in import devices, operations, queues, streams
from tests.nccl_stub.stand_in import nccl as over_the_stub
from tests.nccl_stub.stand_in.modules import FINDER, modules
from tests.nccl_stub.stand_in.nccl import NoStubError

__all__ = ["NoStubError", "contents", "delay", "hold", "install", "uninstall"]

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

    def step() -> None:
        fn()

    stream.queue.push(step, late=True)


def hold(stream: streams.Stream) -> Callable[[], None]:
    """Let a stream stand still, as behind an endless kernel, until what is returned is called."""
    released = threading.Event()
    stream.queue.push(released.is_set, late=True)
    return released.set


def contents(x: Any) -> np.ndarray[Any, Any]:
    """Return the memory of a device array as it is now, whoever has yet to write there."""
    return operations.host(x)


def _is_cupy(name: str) -> bool:
    return name.partition(".")[0] in ("cupy", "cupyx")


def _set_devices(number: int) -> None:
    devices.reset(number)


def _nccl_unavailable() -> ModuleType:
    module = ModuleType("cupy.cuda.nccl")
    module.available = False  # type: ignore[attr-defined]
    return module
