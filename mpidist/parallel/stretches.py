"""Gradients of many parameters as few arrays."""

from __future__ import annotations

from collections.abc import Iterable

from mpidist._types import Array
from mpidist.arrays import is_device
from mpidist.flat import FlatBuffer
from mpidist.nn.parameter import Parameter

__all__ = ["gradient_arrays"]


def gradient_arrays(parameters: Iterable[Parameter]) -> tuple[list[Array], list[Array]]:
    """Return arrays that hold the gradients of these parameters and nothing else.

    Parameters
    ----------
    parameters : iterable of Parameter
        Those without a gradient are passed over.

    Returns
    -------
    host : list of Array
        The gradients on the host, one by one.
    device : list of Array
        Those on a device: neighbours in a bucket as one flat array, with the zeros between them.
    """
    host: list[Array] = []
    device: list[Array] = []
    parts: dict[FlatBuffer, set[str]] = {}
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        if not is_device(grad):
            host.append(grad)
        elif parameter.place is None:
            device.append(grad)
        else:
            flat, name = parameter.place
            parts.setdefault(flat, set()).add(name)
    for flat, names in parts.items():
        device += [flat.data[where] for _, where in flat.stretches(dict.fromkeys(names))]
    return host, device
