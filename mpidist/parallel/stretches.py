"""Gradients of many parameters as few arrays."""

from __future__ import annotations

from collections.abc import Iterator

from mpidist._types import Array
from mpidist.arrays.flat import FlatBuffer
from mpidist.arrays.namespaces import is_device
from mpidist.nn.parameters import Parameters, named_list

__all__ = ["gradient_arrays"]


def gradient_arrays(
    parameters: Parameters, caller: str, *, may_be_empty: bool = False
) -> tuple[list[Array], list[Array]]:
    """Return arrays that hold the gradients of these parameters and nothing else.

    Parameters
    ----------
    parameters : Module, DDP or iterable of Parameter
        Those without a gradient are passed over.
    caller : str
        For errors.
    may_be_empty : bool, optional
        Whether an iterator may yield nothing.

    Returns
    -------
    host : list of Array
        The gradients on the host, one by one.
    device : list of Array
        Those on a device: neighbours in a bucket as one flat array, with the zeros between them.

    Raises
    ------
    TypeError
        If it is something else.
    ValueError
        If an iterator yields nothing: it may have been used before.
    """
    named = named_list(parameters, caller)
    if not (named or may_be_empty) and isinstance(parameters, Iterator):
        raise ValueError(
            f"{caller}: got no parameter; an iterator can be used only once: pass "
            "model.parameters() anew"
        )
    host: list[Array] = []
    device: list[Array] = []
    parts: dict[FlatBuffer, set[str]] = {}
    for _, parameter in named:
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
