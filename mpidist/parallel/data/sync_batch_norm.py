"""`SyncBatchNorm2d`: batch normalisation over the samples of all ranks."""

from __future__ import annotations

from copy import copy, deepcopy
from typing import Any

import numpy as np
import numpy.typing as npt

from mpidist._types import Array
from mpidist.arrays.namespaces import array_namespace, is_host
from mpidist.collectives import all_reduce
from mpidist.group.group import ProcessGroup, check_group
from mpidist.nn.members import replace_members
from mpidist.nn.module import Module
from mpidist.nn.normalization import BatchNorm2d, Count

__all__ = ["SyncBatchNorm2d", "synchronize_batch_norms"]


class SyncBatchNorm2d(BatchNorm2d):
    """A `BatchNorm2d` whose batch is that of all ranks of a group, joined.

    Parameters
    ----------
    channels : int
        Channels of the input.
    group : ProcessGroup
        The ranks whose samples are normalised together. It is used as it is, so it must not be
        closed before the layer has been used for the last time.
    eps, momentum : float, optional
        As those of `BatchNorm2d`; the same on all ranks.
    dtype : dtype, optional
        Likewise.

    Notes
    -----
    In training, `forward` and `backward` are collective over `group`, and block: `forward` makes
    an all-reduce of ``channels + 1`` float64 and one of ``channels``, `backward` one of
    ``2 * channels``. A replay (`Recompute`) repeats those of `forward`. In evaluation nothing
    is sent. So all ranks have to call the layers of a model equally often, in the same order and
    in the same mode, those without samples, too.

    Ranks may have different numbers of samples, and none: the number of values travels with their
    sums. Outputs, gradients by the input, and running statistics are those of a `BatchNorm2d` that
    gets the joined batch, to rounding; the running statistics have the same bits on all ranks. The
    variance is the mean of the squares about the joint mean: nothing cancels where that is large.

    [Note: gradients of a synchronised norm] A rank's `dy` is the gradient of its own loss. `dx` is
    then the gradient of the sum of all ranks' losses, since a rank's samples move the others'
    outputs, and the gradients of `weight` and `bias` are this rank's part of that sum. Adding the
    latter up over the ranks is left to the strategy, as for every other layer: `DDP` with SUM
    gives the gradient of the sum of the losses, with MEAN that of their mean.

    References
    ----------
    Ioffe, Szegedy (2015), Batch Normalization, algorithms 1 and 2.
    """

    def __init__(
        self,
        channels: int,
        group: ProcessGroup,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        check_group(group, "SyncBatchNorm2d")
        super().__init__(channels, eps=eps, momentum=momentum, dtype=dtype)
        self.group = group

    @classmethod
    def of(cls, norm: BatchNorm2d, group: ProcessGroup) -> SyncBatchNorm2d:
        """Return a layer that stands for another one and normalises over a group.

        Parameters
        ----------
        norm : BatchNorm2d
            Stays as it is.
        group : ProcessGroup
            The ranks whose samples are normalised together.

        Returns
        -------
        SyncBatchNorm2d
            With the same `Parameter` objects, buffers and place among the model's layers.

        Raises
        ------
        TypeError
            If `norm` is none.
        """
        if not isinstance(norm, BatchNorm2d):
            raise TypeError(
                f"SyncBatchNorm2d.of: expected a BatchNorm2d, got a {type(norm).__name__}; "
                "synchronize_batch_norms(model, group) exchanges those of a model"
            )
        channels, dtype = norm.weight.shape[0], norm.weight.dtype
        sync = cls(channels, group, eps=norm.eps, momentum=norm.momentum, dtype=dtype)
        for name in ("weight", "bias", *norm.buffer_names, "layer_index"):
            setattr(sync, name, getattr(norm, name))
        return sync

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm2d:
        """Return an independent layer over the same group, which cannot be copied."""
        memo[id(self.group)] = self.group
        memo[id(self)] = copied = copy(self)
        vars(copied).update((name, deepcopy(value, memo)) for name, value in vars(self).items())
        return copied

    def _count_and_sums(self, rows: Array) -> tuple[Count, Array]:
        count, sums = super()._count_and_sums(rows)
        joined = self._total(array_namespace(sums).append(sums, count))
        # On a device the number stays there: the host would have to wait for it.
        return float(joined[-1]) if is_host(joined) else joined[-1], joined[:-1]

    def _total(self, sums: Array) -> Array:
        return all_reduce(sums, self.group)


def synchronize_batch_norms(module: Module, group: ProcessGroup) -> Module:
    """Exchange every `BatchNorm2d` of a model for a `SyncBatchNorm2d`, in place.

    Parameters
    ----------
    module : Module
        The model. Norms that several modules hold are exchanged everywhere; a `SyncBatchNorm2d`
        gets this group.
    group : ProcessGroup
        The ranks whose samples are normalised together.

    Returns
    -------
    Module
        `module` itself, or what stands for it if it is a norm.

    Raises
    ------
    TypeError
        If `module` is no Module; if a norm is of a class of its own derived from `BatchNorm2d`,
        whose arithmetic is not known here; nothing has been exchanged then.

    Notes
    -----
    Local. Parameters and buffers are the same objects under the same names, so states, optimizers
    and layer indices are those of before. Do it before a `DDP` is made of the model.
    """
    if not isinstance(module, Module):
        raise TypeError(
            "synchronize_batch_norms: expected synchronize_batch_norms(model, group), got a "
            f"{type(module).__name__} first; exchange the norms of the model inside a DDP or FSDP "
            "before that is made"
        )
    check_group(group, "synchronize_batch_norms")
    norms = {name: m for name, m in module.named_modules() if isinstance(m, BatchNorm2d)}
    for name, norm in norms.items():
        if type(norm) not in (BatchNorm2d, SyncBatchNorm2d):
            raise TypeError(
                f"synchronize_batch_norms: '{name}' is a {type(norm).__name__}, a class of its own "
                "derived from BatchNorm2d; derive it from SyncBatchNorm2d, and give it its group; "
                "nothing was exchanged"
            )
    exchange = {id(norm): SyncBatchNorm2d.of(norm, group) for norm in norms.values()}
    for _, parent in tuple(module.named_modules()):
        replace_members(parent, exchange)
    return exchange.get(id(module), module)
