"""cupy.ndarray of the stand-in."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.nccl_stub.stand_in import devices, memory, namespace, operations, streams
from tests.nccl_stub.stand_in.operations import compute, host, words

__all__ = ["DeviceArray"]

_COMPUTED = words("""
    all any argmax argmin argpartition argsort choose clip compress conj conjugate copy cumprod
    cumsum dot flatten max mean min nonzero prod repeat round searchsorted std sum take trace var
""")
_VIEWED = words("reshape ravel transpose swapaxes squeeze diagonal")
_IN_PLACE = words("fill partition put sort")
_NOT_OF_CUPY = words("""
    ctypes getfield setfield setflags resize newbyteorder itemset tostring __array_interface__
    __array_struct__
""")


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
        return memory.Pointer(block, host(self).ctypes.data if block.nbytes else 0)

    @property
    def _block(self) -> memory.Block:
        block = memory.block_of(self)
        assert block is not None, "a device array outside of all blocks"
        return block

    @property
    def device(self) -> Any:
        return devices.Device(self._block.device)

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
        elif type(out) is not np.ndarray and operations.is_device(out):
            raise TypeError("Only numpy.ndarray can be obtained from cupy.ndarray")
        elif out.dtype != self.dtype:
            raise TypeError(f"{out.dtype} array cannot be obtained from {self.dtype} array")
        elif out.shape != self.shape:
            raise ValueError(f"Shape mismatch. Expected shape: {self.shape}, actual: {out.shape}")
        elif not out.flags.c_contiguous:
            raise RuntimeError("`out` cannot be specified when copying to non-contiguous ndarray")
        into, source = out, host(self)
        with self.device:
            chosen = stream or streams.current_stream()
            chosen.queue.push(streams.once(lambda: np.copyto(into, source)))
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
        # Pinned memory is read when the copy runs; other memory has been staged on return.
        pinned = memory.block_of(arr) is not None
        into, source = host(self), arr if pinned else arr.copy()
        with self.device:
            queue = (stream or streams.current_stream()).queue
            queue.push(streams.once(lambda: np.copyto(into, source)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct "
            "a NumPy array explicitly."
        )

    def item(self, *args: Any) -> Any:
        return self.get().item(*args)

    def tolist(self) -> Any:
        return self.get().tolist()

    def tobytes(self, order: Any = "C") -> bytes:
        return self.get().tobytes(order)

    def __bool__(self) -> bool:
        return bool(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __index__(self) -> int:
        return self.get().__index__()

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
        plain, computed = _plain_index(index)
        if computed:
            return compute("getitem", lambda x: x[plain()], (self,), {})
        if isinstance(index, tuple):
            key = (
                index
                if Ellipsis in [i for i in index if not isinstance(i, np.ndarray)]
                else (*index, Ellipsis)
            )
        else:
            key = (index,) if index is Ellipsis else (index, Ellipsis)
        return operations.view(host(self)[key])

    def __setitem__(self, index: Any, value: Any) -> None:
        plain, _ = _plain_index(index)

        def changed(x: Any, new: Any) -> None:
            x[plain()] = new

        _change("setitem", changed, self, (value,), {})

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


def _plain_index(index: Any) -> tuple[Any, bool]:
    """Return how to read an index once its stream has run, and whether it has to be read."""
    parts = index if isinstance(index, tuple) else (index,)
    computed = any(isinstance(part, (np.ndarray, list)) and np.ndim(part) for part in parts) or any(
        operations.is_device(part) for part in parts
    )

    def plain() -> Any:
        read = tuple(host(part) if operations.is_device(part) else part for part in parts)
        return read if isinstance(index, tuple) else read[0]

    return plain, computed


def _change(name: str, fn: Any, x: Any, args: Any, kwargs: Any) -> None:
    """Let the current stream change an array as `fn` changes a plain one."""
    args, kwargs = operations.to_plain(name, args), operations.to_plain(name, kwargs)
    operations.to_plain(name, x)
    streams.drain()
    values = host(x).copy()
    with np.errstate(all="ignore"):
        fn(values, *args, **kwargs)
    operations.queue_copy(x, values)


def _computed(name: str) -> Any:
    fn = getattr(np.ndarray, name)
    return lambda self, *args, **kwargs: compute(name, fn, (self, *args), kwargs)


def _viewed(name: str) -> Any:
    fn = getattr(np.ndarray, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain = fn(host(self), *args, **kwargs)
        if memory.block_of(plain) is not None:
            return operations.view(plain)
        return compute(name, fn, (self, *args), kwargs)  # a copy, which has to wait

    return method


def _in_place(name: str) -> Any:
    fn = getattr(np.ndarray, name)
    return lambda self, *args, **kwargs: _change(name, fn, self, args, kwargs)


def _absent(name: str) -> Any:
    def absent(self: Any) -> Any:
        raise AttributeError(f"'cupy.ndarray' object has no attribute '{name}'")

    return property(absent)


for _names, _make in (
    (_COMPUTED, _computed),
    (_VIEWED, _viewed),
    (_IN_PLACE, _in_place),
    (_NOT_OF_CUPY, _absent),
):
    for _name in _names:
        setattr(DeviceArray, _name, _make(_name))

DeviceArray.__name__ = DeviceArray.__qualname__ = "ndarray"
DeviceArray.__module__ = "cupy"
operations._array_type[:] = [DeviceArray]
