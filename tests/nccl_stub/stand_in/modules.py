"""The modules themselves, put together from the parts."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

import numpy as np

from tests.nccl_stub.stand_in import arrays, devices, kernels, memory, namespace, runtime, streams
from tests.nccl_stub.stand_in.namespace import MODULE, Namespace

__all__ = ["FINDER", "modules"]


class _Finder(MetaPathFinder, Loader):
    """Finds cupy.cuda.nccl, which in CuPy is no attribute of cupy.cuda until it is imported."""

    nccl: ModuleType | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "cupy.cuda.nccl" and self.nccl is not None:
            return importlib.util.spec_from_loader(fullname, self)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.nccl

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: it is complete."""


FINDER = _Finder()


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module


@functools.cache
def modules() -> dict[str, ModuleType]:
    """Return the modules by their names in `sys.modules`."""
    cuda = _module(
        "cupy.cuda",
        __path__=[],
        Device=devices.Device,
        Event=streams.Event,
        MemoryPointer=memory.Pointer,
        Stream=streams.Stream,
        get_current_stream=streams.current_stream,
        get_device_id=devices.current,
        get_elapsed_time=streams.get_elapsed_time,
        is_available=lambda: devices.count() > 0,
        runtime=_module(
            "cupy.cuda.runtime", is_hip=False, **{n: getattr(runtime, n) for n in runtime.__all__}
        ),
    )
    lib = Namespace("cupy.lib", np.lib)
    lib.stride_tricks = Namespace("cupy.lib.stride_tricks", np.lib.stride_tricks)
    pool, pinned_pool = memory.Pool(), memory.Pool(pinned=True)
    vars(MODULE).update(
        __path__=[],
        __version__="14.2.0",
        ElementwiseKernel=kernels.ElementwiseKernel,
        RawKernel=kernels.NotImitated,
        RawModule=kernels.NotImitated,
        ReductionKernel=kernels.NotImitated,
        cuda=cuda,
        get_default_memory_pool=lambda: pool,
        get_default_pinned_memory_pool=lambda: pinned_pool,
        is_available=cuda.is_available,
        lib=lib,
        linalg=Namespace("cupy.linalg", np.linalg),
        ndarray=arrays.DeviceArray,
        ufunc=namespace.UFunc,
        **{name: getattr(namespace, name) for name in namespace.OWN},
    )
    cupyx = _module(
        "cupyx",
        empty_pinned=memory.empty_pinned,
        empty_like_pinned=memory.empty_like_pinned,
        zeros_pinned=memory.zeros_pinned,
        zeros_like_pinned=memory.zeros_like_pinned,
    )
    return {
        "cupy": MODULE,
        "cupy.cuda": cuda,
        "cupy.cuda.runtime": cuda.runtime,
        "cupy.lib": lib,
        "cupy.lib.stride_tricks": lib.stride_tricks,
        "cupy.linalg": MODULE.linalg,
        "cupyx": cupyx,
    }
