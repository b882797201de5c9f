"""Operations on device arrays: computed by numpy, visible once their stream is waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from tests.nccl_stub.stand_in import devices, memory, streams
from tests.nccl_stub.stand_in.queues import Queue

__all__ = [
    "change",
    "check_dtype",
    "compute",
    "copy_later",
    "empty",
    "host",
    "is_device",
    "to_device",
    "to_plain",
    "upload",
    "view",
    "words",
]

Plain = np.ndarray[Any, Any]

_DTYPES = frozenset(np.dtype(c) for c in "?bhilqBHILQefdFD") | {np.dtype(ml_dtypes.bfloat16)}
_array_type: list[type] = []  # the class of device arrays, which needs this module


def words(text: str) -> tuple[str, ...]:
    """Return the words of a list of names."""
    return tuple(text.split())


# These wait for the stream, as CuPy does: their results' shapes are in the data.
_WAITING = words("""
    argwhere array_equiv bincount compress digitize extract flatnonzero histogram in1d
    intersect1d isin nonzero piecewise place repeat setdiff1d setxor1d trim_zeros union1d unique
    unique_all unique_counts unique_inverse unique_values
""")


def host(x: Any) -> Plain:
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


def copy_later(queue: Queue, to: Any, values: Callable[[], Any], *, late: bool = False) -> None:
    """Let a queue write values into a device array, unless that has been freed by then."""
    block = memory.block_of(to)
    assert block is not None, "a device array outside of all blocks"
    its_memory, into = block.memory, memory.unowned(to)

    def copy() -> None:
        made = values()
        if not its_memory.freed:
            np.copyto(into, made, casting="unsafe")

    queue.push(copy, late=late)


def upload(values: Plain) -> Any:
    """Return a device array that will hold what `values`, a host array nobody changes, holds."""
    made = empty(values.shape, values.dtype, "F" if values.flags.fnc else "C")
    copy_later(streams.current_stream().queue, made, lambda: values)
    return made


def view(plain: Plain) -> Any:
    """Return a plain array over a device's memory as a device array."""
    return plain.view(_array_type[0])


def _read_only(x: Any) -> Plain:
    plain = host(x)
    plain.flags.writeable = False
    return plain


def to_plain(name: str, x: Any, convert: Callable[[Any], Plain] = _read_only) -> Any:
    """Return arguments with device arrays as plain ones; refuse the host's."""
    if is_device(x):
        if x.device.id != devices.current():
            raise ValueError(
                f"{name}: Array device must be same as the current device: "
                f"array device = {x.device.id} while current = {devices.current()}"
            )
        return convert(x)
    if isinstance(x, np.ndarray) and x.ndim:
        raise TypeError(f"{name}: Unsupported type {type(x)}")
    if type(x) in (tuple, list):
        return type(x)(to_plain(name, item, convert) for item in x)
    if isinstance(x, dict):
        return {key: to_plain(name, item, convert) for key, item in x.items()}
    return x


def _arrays(result: Any) -> list[Any] | None:
    """Return the arrays of a result; None if there is something of the host in it."""
    if isinstance(result, (np.ndarray, np.generic)):
        return [result]
    if isinstance(result, (tuple, list)):
        parts = [_arrays(item) for item in result]
        return None if None in parts else [x for part in parts for x in part or ()]
    return None


def to_device(result: Any) -> Any:
    """Return results with arrays and scalars of numpy as device arrays."""
    if isinstance(result, (np.ndarray, np.generic)):
        plain = np.asarray(result)
        return upload(plain) if memory.block_of(plain) is None else view(plain)
    if isinstance(result, (tuple, list)):
        parts = [to_device(item) for item in result]
        return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
    return result


def _catch_up(name: str) -> bool:
    """Run the current stream; return whether it is through, as it is after waiting."""
    stream = streams.current_stream()
    if name in _WAITING:
        stream.synchronize()
    return stream.done


def _trial(name: str, fn: Callable[[], Any]) -> tuple[Any, bool]:
    """Call a function on what its arguments hold now; return whether that is what they shall hold.

    The current stream is run first. If it waits for other ranks, the host goes on, as with a GPU:
    then the results tell shapes and dtypes only.
    """
    through = _catch_up(name)
    with np.errstate(all="ignore"):
        try:
            return fn(), through
        except Exception:
            if through:
                raise
        # The values may be to blame, which are garbage.
        streams.current_stream().synchronize()
        return fn(), True


def _later(fn: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that does its work once, quietly."""
    made: list[Any] = []

    def call() -> Any:
        if not made:
            with np.errstate(all="ignore"):
                made.append(fn())
        return made[0]

    return call


def change(name: str, outs: list[Any], fn: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Let the current stream change device arrays as a function changes plain ones.

    Parameters
    ----------
    name : str
        For messages.
    outs : list of device arrays
        What is changed.
    fn : callable
        Gets a list of plain arrays with what `outs` hold, to be changed, and then the others.
    args, kwargs
        Its other arguments, with device arrays in them.
    """
    for out in outs:
        if not is_device(out):
            raise TypeError(f"{name}: out must be a cupy array, got {type(out)}")
    to_plain(name, outs)  # are they on this device?
    plain_args = to_plain(name, args, _unowned)
    plain_kwargs = to_plain(name, kwargs, _unowned)
    into = [memory.unowned(out) for out in outs]

    def changed() -> list[Plain]:
        values = [i.copy(order="K") for i in into]
        fn(values, *plain_args, **plain_kwargs)
        return values

    values, through = _trial(name, changed)
    again = _later(changed)
    queue = streams.current_stream().queue
    for k, out in enumerate(outs):
        copy_later(
            queue,
            out,
            (lambda k=k: values[k]) if through else (lambda k=k: again()[k]),
            late=not through,
        )


def _unowned(x: Any) -> Plain:
    return memory.unowned(x)


def compute(
    name: str, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a function of numpy on device arrays.

    Parameters
    ----------
    name : str
        For messages.
    fn : callable
        Gets plain arrays over the same memory, which it cannot write to.
    args, kwargs
        With device arrays in them; ``out``, if given by name, must be such, or a tuple of such.

    Returns
    -------
    Any
        What `fn` returned, its arrays and scalars as device arrays that the current stream will
        fill; `out` if it was given.
    """
    out = kwargs.pop("out", None)
    if any(o is not None for o in (out if isinstance(out, tuple) else (out,))):
        return _compute_into(name, fn, args, kwargs, out)
    plain_args, plain_kwargs = to_plain(name, args), to_plain(name, kwargs)
    result, through = _trial(name, lambda: fn(*plain_args, **plain_kwargs))
    if not through and _arrays(result) is None:
        streams.current_stream().synchronize()
        with np.errstate(all="ignore"):
            result, through = fn(*plain_args, **plain_kwargs), True
    if through:
        return to_device(result)
    made = _garbage_like(result)
    later_args = to_plain(name, args, _unowned)
    later_kwargs = to_plain(name, kwargs, _unowned)
    again = _later(lambda: _arrays(fn(*later_args, **later_kwargs)))
    for k, part in enumerate(_arrays(made) or ()):
        copy_later(streams.current_stream().queue, part, lambda k=k: again()[k], late=True)
    return made


def _garbage_like(result: Any) -> Any:
    """Return results with device arrays of garbage for what has yet to be calculated."""
    if isinstance(result, (tuple, list)):
        parts = [_garbage_like(item) for item in result]
        return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
    plain = np.asarray(result)
    return empty(plain.shape, plain.dtype, "F" if plain.flags.fnc else "C")


def _compute_into(
    name: str, fn: Callable[..., Any], args: Any, kwargs: dict[str, Any], out: Any
) -> Any:
    several = isinstance(out, tuple)

    def into(values: list[Plain], *plain: Any, **named: Any) -> None:
        fn(*plain, out=tuple(values) if several else values[0], **named)

    change(name, list(out) if several else [out], into, args, kwargs)
    return out[0] if several and len(out) == 1 else out
