"""Collectives of which the arrays have to lie on a GPU."""

from __future__ import annotations

from mpidist._types import SUM, Array, ReduceOp
from mpidist.arrays.namespaces import is_device
from mpidist.collectives._reductions import all_reduce, broadcast
from mpidist.errors import UnsupportedOperationError
from mpidist.group.group import ProcessGroup, check_group
from mpidist.group.operations import Timeout


def gpu_all_reduce(
    x: Array,
    group: ProcessGroup,
    *,
    op: ReduceOp = SUM,
    out: Array | None = None,
    timeout: Timeout = None,
) -> Array:
    """Combine a device array of all ranks, element by element, and never a host array.

    `all_reduce` of a device array does the same. This one is for programs that want an error where
    an array has come to the host by mistake.

    Parameters
    ----------
    x : cupy.ndarray, any shape
        The same shape and dtype on every rank, on the rank's device.
    group : ProcessGroup
        The ranks taking part.
    op : ReduceOp, optional
        How to combine.
    out : cupy.ndarray, shape and dtype of `x`, optional
        Where to write the result; ``out=x`` is in place. Allocated when omitted.
    timeout : float or datetime.timedelta, optional
        Seconds for this call; the group's when omitted.

    Returns
    -------
    cupy.ndarray, shape and dtype of `x`
        Ready for what is put on the current stream next; `out` itself when given.

    Raises
    ------
    UnsupportedOperationError
        If `x` or `out` is a host array; if the group carries no device arrays, as for want of NCCL,
        and ``MPIDIST_ENABLE_GPU_FALLBACK=1`` was not set when it was made; if `op` is not offered
        for this dtype. On all ranks alike, before the first byte moves.
    SizeMismatchError
        If `out` does not fit.

    Notes
    -----
    Collective over `group`. Over NCCL the host goes on at once, but for the first collective of a
    group on a device, which connects the ranks. By way of the host it blocks until the sum is made.
    """
    _check_on_device("gpu_all_reduce", group, x=x, out=out)
    return all_reduce(x, group, op=op, out=out, timeout=timeout)


def gpu_broadcast(
    x: Array,
    group: ProcessGroup,
    *,
    root: int = 0,
    out: Array | None = None,
    timeout: Timeout = None,
) -> Array:
    """Give a device array of one rank to all, and never a host array.

    `broadcast` of a device array does the same; see `gpu_all_reduce`.

    Parameters
    ----------
    x : cupy.ndarray, any shape
        The same shape and dtype on every rank; its values count on `root` only.
    group : ProcessGroup
        The ranks taking part.
    root : int, optional
        The rank whose array is given.
    out : cupy.ndarray, shape and dtype of `x`, optional
        Where to write it; ``out=x`` is in place. Allocated when omitted.
    timeout : float or datetime.timedelta, optional
        Seconds for this call; the group's when omitted.

    Returns
    -------
    cupy.ndarray, shape and dtype of `x`
        Ready for what is put on the current stream next; `out` itself when given.

    Raises
    ------
    UnsupportedOperationError
        As of `gpu_all_reduce`.
    InvalidRankError
        If `root` is not a rank of the group.
    SizeMismatchError
        If `out` does not fit.

    Notes
    -----
    Collective over `group`; blocks as `gpu_all_reduce` does.
    """
    _check_on_device("gpu_broadcast", group, x=x, out=out)
    return broadcast(x, group, root=root, out=out, timeout=timeout)


def _check_on_device(verb: str, group: ProcessGroup, **arrays: Array | None) -> None:
    check_group(group, verb)
    for name, array in arrays.items():
        if array is not None and not is_device(array):
            kind = f"{type(array).__module__}.{type(array).__qualname__}"
            raise UnsupportedOperationError(
                f"{verb} on {group}: {name} is {kind}, and must lie on a GPU; bring it "
                f"there (cupy.asarray), or call {verb.removeprefix('gpu_')}, which takes either"
            )
