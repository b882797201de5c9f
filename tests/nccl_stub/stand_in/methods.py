"""The methods of device arrays that are numpy's."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.nccl_stub.stand_in import memory, operations, signatures
from tests.nccl_stub.stand_in.operations import compute, host, words

__all__ = ["add_to"]

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


def add_to(cls: type) -> None:
    """Give a class the methods that `cupy.ndarray` has, and take away those that it has not."""
    for names, make in ((_COMPUTED, _computed), (_VIEWED, _viewed), (_IN_PLACE, _in_place)):
        for name in names:
            setattr(cls, name, _checked(name, make(name)))
    for name in _NOT_OF_CUPY:
        setattr(cls, name, _absent(name))


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

    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        operations.change(name, [self], lambda x, *a, **k: fn(x[0], *a, **k), args, kwargs)

    return method


def _absent(name: str) -> Any:
    def absent(self: Any) -> Any:
        raise AttributeError(f"'cupy.ndarray' object has no attribute '{name}'")

    return property(absent)


def _checked(name: str, method: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = signatures.checked(f"ndarray.{name}", args, kwargs)
        return method(self, *args, **kwargs)

    return call
