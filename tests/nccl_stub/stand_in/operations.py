"""Operations on device arrays: computed by numpy, visible once their stream is waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from tests.nccl_stub.stand_in import devices, memory, streams

__all__ = [
    "check_dtype",
    "compute",
    "empty",
    "host",
    "is_device",
    "queue_copy",
    "upload",
    "view",
    "words",
]

_DTYPES = frozenset(np.dtype(c) for c in "?bhilqBHILQefdFD") | {np.dtype(ml_dtypes.bfloat16)}
_array_type: list[type] = []  # the class of device arrays, which needs this module


def words(text: str) -> tuple[str, ...]:
    """Return the words of a list of names."""
    return tuple(text.split())


def host(x: Any) -> np.ndarray[Any, Any]:
    """Return the memory of a device array as a plain numpy array that shares it, as it is now."""
    return np.ndarray.view(x, np.ndarray)


def is_device(x: object) -> bool:
    return isinstance(x, _array_type[0])


def check_dtype(dtype: Any) -> np.dtype[Any]:
    dtype = np.dtype(dtype)
    if dtype not in _DTYPES or not dtype.isnative:
        raise ValueError(f"Unsupported dtype {dtype}")
    return dtype


def empty(shape: Any, dtype: Any = float, order: str = "C") -> Any:
    """Return a device array of garbage on the current device."""
    dtype = check_dtype(dtype)
    shape = (shape,) if np.ndim(shape) == 0 else tuple(shape)
    block = memory.allocate(int(np.prod(shape, dtype=object)) * dtype.itemsize)
    return np.ndarray.__new__(_array_type[0], shape, dtype, buffer=block, order=order)  # type: ignore[call-overload]


def queue_copy(to: Any, values: Any, casting: str = "unsafe") -> None:
    """Let the current stream copy host values, which must not change, into a device array."""
    into = host(to)
    streams.current_stream().queue.push(
        streams.once(lambda: np.copyto(into, values, casting=casting))  # type: ignore[arg-type]
    )


def upload(values: np.ndarray[Any, Any]) -> Any:
    """Return a device array that will hold what `values`, a host array nobody changes, holds."""
    order = "F" if values.flags.fnc else "C"
    made = empty(values.shape, values.dtype, order)
    queue_copy(made, values)
    return made


def view(plain: np.ndarray[Any, Any]) -> Any:
    """Return a plain array over a device's memory as a device array."""
    return plain.view(_array_type[0])


def compute(
    name: str, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a function of numpy on device arrays, after all that the current stream has to do.

    Parameters
    ----------
    name : str
        For messages.
    fn : callable
        Gets plain arrays over the same memory, and must not write to them.
    args, kwargs
        With device arrays in them; ``out``, if given by name, must be such, or a tuple of such.

    Returns
    -------
    Any
        What `fn` returned, its arrays and scalars as device arrays that the current stream will
        fill; `out` if it was given.
    """
    out = kwargs.get("out")
    outs = out if isinstance(out, tuple) else (out,)
    plain_args, plain_kwargs = to_plain(name, args), to_plain(name, kwargs)
    streams.drain()
    if any(o is not None for o in outs):
        for o in outs:
            if o is not None and not is_device(o):
                raise TypeError(f"{name}: out must be a cupy array, got {type(o)}")
        # Copies: what an operation leaves as it is (where=) keeps its old contents.
        temporaries = [None if o is None else host(o).copy() for o in outs]
        plain_kwargs["out"] = tuple(temporaries) if isinstance(out, tuple) else temporaries[0]
        with np.errstate(all="ignore"):
            fn(*plain_args, **plain_kwargs)
        for o, values in zip(outs, temporaries, strict=True):
            if o is not None:
                queue_copy(o, values)
        return out[0] if isinstance(out, tuple) and len(out) == 1 else out
    with np.errstate(all="ignore"):
        result = fn(*plain_args, **plain_kwargs)
    return to_device(result)


def to_plain(name: str, x: Any) -> Any:
    """Return arguments with device arrays as plain ones; refuse the host's."""
    if is_device(x):
        if x.device.id != devices.current():
            raise ValueError(
                f"{name}: Array device must be same as the current device: "
                f"array device = {x.device.id} while current = {devices.current()}"
            )
        return host(x)
    if isinstance(x, np.ndarray) and x.ndim:
        raise TypeError(f"{name}: Unsupported type {type(x)}")
    if isinstance(x, (tuple, list)):
        return type(x)(to_plain(name, item) for item in x)
    if isinstance(x, dict):
        return {key: to_plain(name, item) for key, item in x.items()}
    return x


def to_device(result: Any) -> Any:
    """Return results with arrays and scalars of numpy as device arrays."""
    if isinstance(result, (np.ndarray, np.generic)):
        plain = np.asarray(result)
        if memory.block_of(plain) is not None:
            return view(plain)
        return upload(plain)
    if type(result) in (tuple, list):
        return type(result)(to_device(item) for item in result)
    if isinstance(result, tuple):  # named
        return type(result)(*(to_device(item) for item in result))
    return result
