"""The module cupy of the stand-in: numpy's functions on device arrays, where CuPy has them."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from tests.nccl_stub.stand_in import memory, operations, signatures, streams
from tests.nccl_stub.stand_in.operations import compute, host, is_device, words

__all__ = ["MODULE", "array", "zeros"]

_VIEWS = words("""
    array_split as_strided atleast_1d atleast_2d atleast_3d broadcast_arrays broadcast_to diagonal
    dsplit expand_dims flip fliplr flipud hsplit imag matrix_transpose moveaxis permute_dims ravel
    real reshape rollaxis rot90 sliding_window_view split squeeze swapaxes transpose vsplit
""")
_IN_PLACE = words("fill_diagonal place put put_along_axis putmask")
_OF_THE_HOST = words("""
    broadcast_shapes can_cast common_type finfo iinfo iscomplexobj isfortran isrealobj isscalar
    issubdtype may_share_memory min_scalar_type mintypecode ndim promote_types result_type shape
    shares_memory size typename
""")
_AS_THEY_ARE = (float, int, type(None))


def empty(shape: Any, dtype: Any = float, order: str = "C") -> Any:
    return operations.empty(shape, dtype, order)


def full(shape: Any, fill_value: Any, dtype: Any = None, order: str = "C") -> Any:
    if dtype is None:
        dtype = fill_value.dtype if is_device(fill_value) else np.asarray(fill_value).dtype
    made = operations.empty(shape, dtype, order)
    made.fill(fill_value)
    return made


def zeros(shape: Any, dtype: Any = float, order: str = "C") -> Any:
    return full(shape, 0, dtype, order)


def ones(shape: Any, dtype: Any = float, order: str = "C") -> Any:
    return full(shape, 1, dtype, order)


def empty_like(
    prototype: Any, dtype: Any = None, order: Any = "K", subok: Any = None, shape: Any = None
) -> Any:
    plain = host(prototype) if is_device(prototype) else np.asarray(prototype)
    model = np.empty_like(plain, operations.check_dtype(dtype or plain.dtype), order, shape=shape)
    return operations.empty(model.shape, model.dtype, "F" if model.flags.fnc else "C")


def full_like(
    a: Any,
    fill_value: Any,
    dtype: Any = None,
    order: Any = "K",
    subok: Any = None,
    shape: Any = None,
) -> Any:
    made = empty_like(a, dtype, order, shape=shape)
    made.fill(fill_value)
    return made


def zeros_like(
    a: Any, dtype: Any = None, order: Any = "K", subok: Any = None, shape: Any = None
) -> Any:
    return full_like(a, 0, dtype, order, shape=shape)


def ones_like(
    a: Any, dtype: Any = None, order: Any = "K", subok: Any = None, shape: Any = None
) -> Any:
    return full_like(a, 1, dtype, order, shape=shape)


def array(
    obj: Any,
    dtype: Any = None,
    copy: bool | None = True,
    order: str = "K",
    subok: bool = False,
    ndmin: int = 0,
    *,
    blocking: bool = False,
) -> Any:
    if is_device(obj):
        wanted = obj.dtype if dtype is None else operations.check_dtype(dtype)
        plain = host(obj)
        shared = np.asarray(plain, order=None if order == "K" else order)  # type: ignore[call-overload]
        if not copy and wanted == obj.dtype and memory.block_of(shared) is not None:
            return (
                obj
                if obj.ndim >= ndmin
                else operations.view(np.array(plain, copy=False, ndmin=ndmin))
            )
        return compute("array", lambda x: np.array(x, wanted, order=order, ndmin=ndmin), (obj,), {})
    if isinstance(obj, (list, tuple)) and any(is_device(item) for item in obj):
        return compute("array", np.array, (list(obj), dtype), {})
    values = np.array(obj, dtype, order=order, ndmin=ndmin)  # type: ignore[call-overload]
    if values.dtype.byteorder == ">":
        values = values.astype(values.dtype.newbyteorder("="))
    made = operations.upload(values.astype(operations.check_dtype(values.dtype), copy=False))
    if blocking:
        streams.current_stream().synchronize()
    return made


def asarray(
    a: Any, dtype: Any = None, order: Any = None, *, copy: Any = None, blocking: bool = False
) -> Any:
    return array(a, dtype, bool(copy), order or "K", blocking=blocking)


def ascontiguousarray(a: Any, dtype: Any = None) -> Any:
    return array(a, dtype, copy=False, order="C", ndmin=1)


def asfortranarray(a: Any, dtype: Any = None) -> Any:
    return array(a, dtype, copy=False, order="F", ndmin=1)


def asnumpy(
    a: Any, stream: Any = None, order: str = "C", out: Any = None, *, blocking: bool = True
) -> Any:
    if is_device(a):
        return a.get(stream=stream, order=order, out=out, blocking=blocking)
    return np.asarray(a, order=order)  # type: ignore[call-overload]


def copyto(dst: Any, src: Any, casting: str = "same_kind", where: Any = None) -> None:
    def copied(out: Any, source: Any, mask: Any) -> None:
        np.copyto(out[0], source, casting=casting, where=True if mask is None else mask)  # type: ignore[arg-type]

    operations.change("copyto", [dst], copied, (src, where), {})


def get_array_module(*args: Any) -> ModuleType:
    return MODULE if any(is_device(a) for a in args) else np


def fuse(*args: Any, **kwargs: Any) -> Any:
    return args[0] if args and callable(args[0]) else lambda fn: fn


OWN = words("""
    array asarray ascontiguousarray asfortranarray asnumpy copyto empty empty_like full full_like
    fuse get_array_module ones ones_like zeros zeros_like
""")
"""What is not numpy's with other arrays."""


class UFunc:
    """cupy.ufunc: a function of numpy on device arrays."""

    def __init__(self, ufunc: np.ufunc) -> None:
        self._ufunc = ufunc
        self.__name__ = ufunc.__name__
        self.name = f"cupy_{ufunc.__name__}"
        self.nin, self.nout, self.nargs = ufunc.nin, ufunc.nout, ufunc.nargs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        unknown = kwargs.keys() - {"out", "dtype", "casting", "where", "axes", "axis"}
        if unknown:
            raise TypeError(f"Wrong arguments {sorted(unknown)} of {self.name}")
        if any(isinstance(a, (list, tuple)) for a in args):
            raise TypeError(f"{self.name}: Unsupported type {list}")
        if len(args) > self.nin:
            kwargs["out"] = args[self.nin] if self.nout == 1 else tuple(args[self.nin :])
            args = args[: self.nin]
        return compute(self.name, self._ufunc, args, kwargs)

    def reduce(
        self, array: Any, axis: Any = 0, dtype: Any = None, out: Any = None, keepdims: bool = False
    ) -> Any:
        return self._method(
            "reduce", ("add", "multiply"), array, axis=axis, dtype=dtype, out=out, keepdims=keepdims
        )

    def accumulate(self, array: Any, axis: int = 0, dtype: Any = None, out: Any = None) -> Any:
        return self._method(
            "accumulate", ("add", "multiply"), array, axis=axis, dtype=dtype, out=out
        )

    def reduceat(
        self, array: Any, indices: Any, axis: int = 0, dtype: Any = None, out: Any = None
    ) -> Any:
        return self._method("reduceat", ("add",), array, indices, axis=axis, dtype=dtype, out=out)

    def outer(self, a: Any, b: Any, **kwargs: Any) -> Any:
        return compute(f"{self.name}.outer", self._ufunc.outer, (a, b), kwargs)

    def _method(self, method: str, defined: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
        if self.__name__ not in defined:
            raise NotImplementedError(f"`{self.name}.{method}` is not supported yet")
        return compute(f"{self.name}.{method}", getattr(self._ufunc, method), args, kwargs)


def _computed(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: compute(name, fn, args, kwargs)


def _to_device_always(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Python's booleans and integers that CuPy returns as arrays."""
    return lambda *args, **kwargs: compute(
        name, lambda *a, **k: np.asarray(fn(*a, **k)), args, kwargs
    )


def _viewed(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        result = fn(*operations.to_plain(name, args), **operations.to_plain(name, kwargs))
        parts = result if isinstance(result, (tuple, list)) else [result]
        if all(memory.block_of(part) is not None for part in parts):
            return operations.to_device(result)
        return compute(name, fn, args, kwargs)  # a copy, which has to wait

    return call


def _in_place(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Any, *args: Any, **kwargs: Any) -> None:
        operations.change(name, [x], lambda xs, *a, **k: fn(xs[0], *a, **k), args, kwargs)

    return call


def _of_the_host(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    def plain(x: Any) -> Any:
        return host(x) if is_device(x) else x

    return lambda *args, **kwargs: fn(*map(plain, args), **{k: plain(v) for k, v in kwargs.items()})


def forwarded(name: str, source: Any) -> Any:
    """Return what stands for an attribute of numpy; NotImplemented if nothing does."""
    short = name.rpartition(".")[2]
    if isinstance(source, np.ufunc):
        return UFunc(source)
    if isinstance(source, _AS_THEY_ARE) or _is_type_alike(source):
        return source
    if isinstance(source, type) or not callable(source):
        return NotImplemented
    if short in _OF_THE_HOST:
        return _of_the_host(name, source)
    if short in _VIEWS:
        return _checked(name, _viewed(name, source))
    if short in _IN_PLACE:
        return _checked(name, _in_place(name, source))
    if short in ("allclose", "array_equal", "array_equiv", "count_nonzero"):
        return _checked(name, _to_device_always(name, source))
    return _checked(name, _computed(name, source))


def _is_type_alike(source: Any) -> bool:
    """Whether it is a type that CuPy has from numpy."""
    alike = (np.generic, Exception, np.dtype, np.finfo, np.iinfo, np.ndindex)
    return isinstance(source, type) and issubclass(source, alike)


def _checked(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = signatures.checked(name, args, kwargs)
        return fn(*args, **kwargs)

    return call


class Namespace(ModuleType):
    """A module that forwards to one of numpy what CuPy has of it."""

    def __init__(self, name: str, source: Any) -> None:
        super().__init__(name)
        self._source = source

    def __getattr__(self, name: str) -> Any:
        path = ".".join([*self.__name__.split(".")[1:], name])
        if path not in signatures.known():
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        made = forwarded(path, getattr(self._source, name, NotImplemented))
        if made is NotImplemented:
            raise AttributeError(f"the stand-in does not imitate {self.__name__}.{name}")
        setattr(self, name, made)
        return made


MODULE = Namespace("cupy", np)
