"""Gradient clipping by the norm of all gradients together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mpidist._types import Array
from mpidist.arrays.namespaces import HALVES
from mpidist.collectives import all_reduce
from mpidist.group import ProcessGroup
from mpidist.nn.parameter import Parameter, Parameters, named_list
from mpidist.parallel import gradient_kernels
from mpidist.parallel.gradient_kernels import gradient_arrays

__all__ = ["clip_grad_norm"]

_BLOCK = 1 << 16
"""Elements widened to float64 at once."""


def clip_grad_norm(
    parameters: Parameters, max_norm: float, *, group: ProcessGroup | None = None
) -> float:
    """Scale all gradients down together so that their norm is at most `max_norm`.

    Between backward and the step; with a `GradScaler` after its `unscale`, since scaled gradients
    would be clipped by the factor too much::

        ddp.backward(ctx, scaler.scale(dy))
        if scaler.unscale(model.parameters()):
            clip_grad_norm(model.parameters(), 1.0)
            optimizer.step()

    Parameters
    ----------
    parameters : Module, DDP or iterable of Parameter
        Those without a gradient are passed over.
    max_norm : float
        The largest Euclidean norm of all gradients taken as one vector, positive.
    group : ProcessGroup, optional
        The ranks over which the gradients are spread, where each has other elements of them, as
        the shards of an `FSDP` or a `ShardedOptimizer`: their norm is that of all together. What
        several ranks hold alike is counted once, if their `Part` says who is the first.

    Returns
    -------
    float
        The norm before clipping, summed in float64; the same on all ranks of `group`.

    Raises
    ------
    TypeError
        If `parameters` is something else.
    ValueError
        If `max_norm` is not positive, or, without `group`, an iterator has been used up, or a
        parameter is a part of a whole one.

    Notes
    -----
    Local: after `DDP.backward` the gradients are the same on all ranks, bit by bit, so the norm is
    too. With `group` collective over it: one all_reduce of 8 bytes. Blocks the host; gradients on a
    device once, with two kernels per bucket. The factor is not rounded to the gradients' dtype:
    each product is rounded to it once. A norm that is not finite, or beyond 1e154, whose square is
    not, is returned, and nothing is scaled. numpy's error state (`numpy.seterr`) does not act here.

    References
    ----------
    Pascanu, Mikolov, Bengio (2013), On the difficulty of training recurrent neural networks,
    section 3.2, algorithm 1.
    """
    check_max_norm(max_norm)
    named = named_list(parameters, "clip_grad_norm")
    if group is None:
        check_whole(named)
    spread = [] if group is None else named
    # A rank that raised for want of a shard would leave the others waiting.
    host, device = gradient_arrays(
        named or parameters, "clip_grad_norm", may_be_empty=group is not None
    )
    counted = (host, device)
    if not all(_counts(parameter) for _, parameter in spread):
        own = [(name, parameter) for name, parameter in spread if _counts(parameter)]
        counted = gradient_arrays(own, "clip_grad_norm", may_be_empty=True)
    with np.errstate(all="ignore"):
        squares = _add(
            [*map(sum_of_squares, counted[0]), gradient_kernels.sum_of_squares(counted[1])]
        )
        if group is not None:
            squares = float(all_reduce(np.array(squares), group))
    return clip_to_norm(host, device, [squares], max_norm)


def check_max_norm(max_norm: float) -> None:
    """Raise unless it is positive."""
    if not max_norm > 0:
        raise ValueError(f"clip_grad_norm: max_norm must be positive, got {max_norm}")


def clip_to_norm(
    host: Sequence[Array], device: Sequence[Array], squares: Sequence[float], max_norm: float
) -> float:
    """Scale gradients down so that a norm whose squares are given is at most `max_norm`; return it.

    The squares are added without rounding in between, so that their order does not matter.
    """
    with np.errstate(all="ignore"):
        norm = math.sqrt(_add(squares))
        if math.isfinite(norm) and norm > max_norm:
            for grad in host:
                _scale(grad, max_norm / norm)
            for grad in device:
                gradient_kernels.scale(grad, max_norm / norm)
    return norm


def squares_of(parameters: Sequence[Parameter], group: ProcessGroup | None) -> list[float]:
    """Return the sum of squares of each gradient on the host; 0 where there is none.

    With a group, of the parts that its ranks hold together: one all_reduce of 8 bytes per
    parameter.
    """
    own = [0.0 if p.grad is None or not _counts(p) else sum_of_squares(p.grad) for p in parameters]
    if group is None:
        return own
    return all_reduce(np.array(own), group).tolist()  # type: ignore[no-any-return]


def check_whole(named: Sequence[tuple[str, Parameter]]) -> None:
    """Raise ValueError if a parameter is a part of a whole: its norm differs from rank to rank."""
    for name, parameter in named:
        if parameter.part is not None and parameter.size != math.prod(parameter.part.shape):
            raise ValueError(
                f"clip_grad_norm: '{name}' is this rank's part of a parameter of shape "
                f"{parameter.part.shape}, and the ranks would scale their parts by different "
                "factors; give the ranks that have the others, as in "
                "clip_grad_norm(optimizer.shards(), max_norm, group=optimizer.group)"
            )


def _counts(parameter: Parameter) -> bool:
    """Whether this rank counts it, of several that hold the same part of a whole."""
    return parameter.part is None or parameter.part.first


def _add(numbers: Sequence[float]) -> float:
    """Return the sum, rounded once; infinite where it is beyond the range of a float."""
    try:
        return math.fsum(numbers)
    except OverflowError:
        return math.inf


def _scale(grad: Array, factor: float) -> None:
    """Multiply in place, rounding once: the factor may be beyond the precision of the dtype."""
    wide = np.complex128 if grad.dtype.kind == "c" else np.float64
    if grad.dtype in HALVES or factor < np.finfo(grad.dtype).tiny:
        np.multiply(grad, factor, out=grad, dtype=wide, casting="unsafe")
    else:
        grad *= factor


def sum_of_squares(x: Array) -> float:
    """Return the sum of the squares of a gradient on the host, in float64."""
    wide = np.complex128 if x.dtype.kind == "c" else np.float64
    flat = x.reshape(-1)
    total = 0.0
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK].astype(wide)
        total += float(np.vdot(block, block).real)
    return total
