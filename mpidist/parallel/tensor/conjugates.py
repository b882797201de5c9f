"""What layers send each other over the ranks, forward and backward: functions and their adjoints.

[Note: what is replicated counts once] The ranks compute one loss, together. An activation is either
whole and the same on all ranks; or cut, each rank having some of its features; or a sum, of which
each rank has a summand. Its gradient is that of the one loss, and it, too, is one of the three:

========================  ====================  =====================================
function                  activation            gradient
========================  ====================  =====================================
`copied`, before          whole, stays whole    each rank's summand; they are added
layers cut by columns
`summed`, after           summands, become      whole, stays whole
layers cut by rows        whole
`gathered`                cut, becomes whole    whole; each rank takes what it has cut
`scattered`               whole; each rank      cut, becomes whole
                          takes its part
========================  ====================  =====================================

With <x, y> the sum of products, over all elements of what is whole (once, not once per rank), of
what is cut, and of a whole with the sum of the summands, each pair satisfies
<forward(x), y> = <x, backward(y)>. So no gradient is multiplied or divided by the number of ranks,
and a parameter that all ranks have gets the same gradient on all of them, without a message.

References
----------
Shoeybi et al. (2019), Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
Parallelism, section 3: `copied` and `summed` are its f and g.
Hewett, Grady (2020), A Linear Algebraic Approach to Model Parallelism in Deep Learning, section 3:
communication as linear functions, and their adjoints.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

from mpidist._types import Array
from mpidist.arrays.boxes import even_part, part_slices, split_evenly
from mpidist.arrays.namespaces import array_namespace, is_device
from mpidist.collectives import all_gather, all_reduce
from mpidist.errors import UnsupportedOperationError
from mpidist.group.group import ProcessGroup

__all__ = ["Conjugate", "check_host", "copied", "gathered", "scattered", "summed"]


class Conjugate(NamedTuple):
    """A linear function of an activation, and its adjoint, which brings gradients back.

    Both are collective over the group that it was made for, and block. They do not write into what
    they are given.
    """

    forward: Callable[[Array], Array]
    backward: Callable[[Array], Array]


def copied(group: ProcessGroup) -> Conjugate:
    """Hand a whole activation on to layers that use a part each; one all-reduce backward."""
    return Conjugate(_same, _sum(group))


def summed(group: ProcessGroup) -> Conjugate:
    """Add up the summands of the ranks; one all-reduce forward."""
    return Conjugate(_sum(group), _same)


def gathered(group: ProcessGroup, width: int) -> Conjugate:
    """Put together an activation whose last axis, of `width`, is cut; one all-gather forward."""
    return Conjugate(_gather(group, width), _take(group, width))


def scattered(group: ProcessGroup, width: int) -> Conjugate:
    """Take this rank's part of the last axis, of `width`; one all-gather backward."""
    return Conjugate(_take(group, width), _gather(group, width))


def check_host(layer: str, x: Array) -> None:
    """Raise UnsupportedOperationError if an activation lies on a device."""
    if is_device(x):
        raise UnsupportedOperationError(
            f"{layer}: tensor parallelism of arrays on a device is not supported; keep the model "
            "and its inputs on the host"
        )


def _same(x: Array) -> Array:
    return x


def _sum(group: ProcessGroup) -> Callable[[Array], Array]:
    return lambda x: all_reduce(x, group)


def _take(group: ProcessGroup, width: int) -> Callable[[Array], Array]:
    start, size = even_part(width, group.size, group.rank)
    return lambda x: x[..., start : start + size]


def _gather(group: ProcessGroup, width: int) -> Callable[[Array], Array]:
    sizes = [size for _, size in split_evenly(width, group.size)]

    def gather(x: Array) -> Array:
        leading = x.shape[:-1]
        counts = [prod(leading) * size for size in sizes]
        flat = all_gather(x.reshape(-1), group, counts=counts)
        whole: Array = array_namespace(x).empty((*leading, width), x.dtype)
        for there, own in zip(part_slices(sizes), part_slices(counts), strict=True):
            whole[..., there] = flat[own].reshape(*leading, there.stop - there.start)
        return whole

    return gather
