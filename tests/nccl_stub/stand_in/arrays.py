"""cupy.ndarray of the stand-in."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.nccl_stub.stand_in import devices, memory, methods, namespace, operations, streams
from tests.nccl_stub.stand_in.operations import compute, host

__all__ = ["DeviceArray"]


class DeviceArray(np.ndarray):  # type: ignore[type-arg]
    """An array whose contents are right only for who has waited for the stream that writes them."""

    def __new__(
        cls,
        shape: Any,
        dtype: Any = float,
        memptr: object = None,
        strides: object = None,
        order: str = "C",
    ) -> Any:
        if memptr is not None or strides is not None:
            raise NotImplementedError("the stand-in makes no arrays on given memory")
        return operations.empty(shape, dtype, order)

    # What it is.

    @property
    def data(self) -> memory.Pointer:  # type: ignore[override]
        block = self._block
        return memory.Pointer(block, host(self).ctypes.data if block.memory.data.nbytes else 0)

    @property
    def _block(self) -> memory.Block:
        block = memory.block_of(self)
        assert block is not None, "a device array outside of all blocks"
        return block

    @property
    def device(self) -> Any:
        return devices.Device(self._block.memory.device)

    @property
    def base(self) -> Any:
        base = np.ndarray.base.__get__(self)  # type: ignore[attr-defined]
        while base is not None and not isinstance(base, (DeviceArray, memory.Block)):
            base = np.ndarray.base.__get__(base)  # type: ignore[attr-defined]
        return None if isinstance(base, memory.Block) else base

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        described = dict(host(self).__array_interface__)
        described.update(version=3, data=(self.data.ptr, False), stream=1)
        return described

    # To the host and from it.

    def get(
        self,
        stream: streams.Stream | None = None,
        order: str = "C",
        out: np.ndarray[Any, Any] | None = None,
        blocking: bool = True,
    ) -> np.ndarray[Any, Any]:
        if out is None:
            out = np.empty(self.shape, self.dtype, order)  # type: ignore[call-overload]
        elif not isinstance(out, np.ndarray) or operations.is_device(out):
            raise TypeError("Only numpy.ndarray can be obtained from cupy.ndarray")
        elif out.dtype != self.dtype:
            raise TypeError(f"{out.dtype} array cannot be obtained from {self.dtype} array")
        elif out.shape != self.shape:
            raise ValueError(f"Shape mismatch. Expected shape: {self.shape}, actual: {out.shape}")
        elif not out.flags.forc:
            raise RuntimeError("`out` cannot be specified when copying to non-contiguous ndarray")
        chosen = stream or streams.current_stream()
        with self.device:  # what its null stream is
            source = memory.unowned(self)
            chosen.queue.push(lambda: np.copyto(out, source), late=True)
            if blocking:
                chosen.synchronize()
        return out

    def set(self, arr: np.ndarray[Any, Any], stream: streams.Stream | None = None) -> None:
        if not isinstance(arr, np.ndarray) or operations.is_device(arr):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if self.dtype != arr.dtype:
            raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
        if self.shape != arr.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {arr.shape}")
        if not self.flags.forc:
            raise RuntimeError("Cannot set to non-contiguous array")
        # Pinned memory is read when the copy runs; other memory has been staged on return, and so
        # has what CuPy has to make contiguous first.
        ready = arr.flags.c_contiguous if self.flags.c_contiguous else arr.flags.f_contiguous
        pinned = memory.block_of(arr) is not None and ready
        source = memory.unowned(arr) if pinned else arr.copy()
        chosen = stream or streams.current_stream()
        with self.device:
            operations.copy_later(chosen.queue, self, lambda: source, late=pinned)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct "
            "a NumPy array explicitly."
        )

    def item(self) -> Any:
        return self.get().item()

    def tolist(self) -> Any:
        return self.get().tolist()

    def tobytes(self, order: Any = "C") -> bytes:
        return self.get().tobytes(order)

    def __bool__(self) -> bool:
        return bool(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __index__(self) -> int:
        raise TypeError("'cupy.ndarray' object cannot be interpreted as an integer")

    def __float__(self) -> float:
        return float(self.get())

    def __complex__(self) -> complex:
        return complex(self.get())

    def __repr__(self) -> str:
        return repr(self.get())

    def __str__(self) -> str:
        return str(self.get())

    def __format__(self, spec: str) -> str:
        return format(self.get(), spec)

    def __reduce__(self) -> Any:
        return namespace.array, (self.get(),)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    def __dlpack__(self, **_: Any) -> Any:
        raise NotImplementedError("the stand-in has no DLPack")

    # Elements.

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        if any(isinstance(part, (np.ndarray, list)) for part in parts):
            masked = any(isinstance(part, np.ndarray) and part.dtype == bool for part in parts)
            plain = _plain_index(index)
            name = "nonzero" if masked else "getitem"
            return compute(name, lambda x: x[plain], (self,), {})
        if not any(part is Ellipsis for part in parts):
            parts = (*parts, Ellipsis)  # numpy gives no scalars then
        return operations.view(host(self)[parts])

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, (list, tuple)):
            raise TypeError(f"setitem: Unsupported type {type(value)}")
        plain = _plain_index(index)

        def changed(values: Any, new: Any) -> None:
            values[0][plain] = new

        operations.change("setitem", [self], changed, (value,), {})

    def __iter__(self) -> Iterator[Any]:
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    def __contains__(self, value: object) -> bool:
        return bool((self == value).any())

    def __copy__(self) -> Any:
        return self.copy()

    def __deepcopy__(self, memo: Any) -> Any:
        with self.device:
            return self.copy()

    # Calculation.

    def astype(
        self,
        dtype: Any,
        order: Any = "K",
        casting: Any = None,
        subok: Any = None,
        copy: bool = True,
    ) -> Any:
        dtype = operations.check_dtype(dtype)
        if not copy and dtype == self.dtype:
            return self
        return compute("astype", lambda x: x.astype(dtype, order=order), (self,), {})

    def view(self, dtype: Any = None, array_class: Any = None) -> Any:
        plain = host(self) if dtype is None else host(self).view(operations.check_dtype(dtype))
        return operations.view(plain)

    @property
    def T(self) -> Any:
        return self.transpose()

    @property
    def mT(self) -> Any:
        return self.swapaxes(-1, -2)

    @property
    def real(self) -> Any:
        return operations.view(host(self).real) if self.dtype.kind == "c" else self

    @real.setter
    def real(self, value: Any) -> None:
        self.real[...] = value

    @property
    def imag(self) -> Any:
        if self.dtype.kind == "c":
            return operations.view(host(self).imag)
        return namespace.zeros(self.shape, self.dtype)

    @imag.setter
    def imag(self, value: Any) -> None:
        if self.dtype.kind != "c":
            raise TypeError("cupy.ndarray does not have imaginary part to set")
        self.imag[...] = value

    @property
    def flat(self) -> Any:
        raise NotImplementedError("the stand-in has no flatiter")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        out = kwargs.get("out")
        if out is not None:
            if len(out) != 1:
                raise ValueError("The 'out' parameter must have exactly one array value")
            kwargs["out"] = out[0]
        function = getattr(namespace.MODULE, ufunc.__name__, None)
        if method != "__call__" or function is None:
            return NotImplemented
        return function(*inputs, **kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        try:
            path = func.__module__.split(".")[1:]
            module = functools.reduce(getattr, path, namespace.MODULE)
            function = getattr(module, func.__name__)
        except AttributeError:
            return NotImplemented
        if function is func or not all(issubclass(t, np.ndarray) for t in types):
            return NotImplemented
        return function(*args, **kwargs)


def _plain_index(index: Any) -> Any:
    """Return an index with device arrays as plain ones; CuPy takes the host's here, too."""
    parts = index if isinstance(index, tuple) else (index,)
    plain = tuple(memory.unowned(x) if isinstance(x, np.ndarray) else x for x in parts)
    return plain if isinstance(index, tuple) else plain[0]


methods.add_to(DeviceArray)
DeviceArray.__name__ = DeviceArray.__qualname__ = "ndarray"
DeviceArray.__module__ = "cupy"
operations._array_type[:] = [DeviceArray]
