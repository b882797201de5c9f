"""Vocabularies cut over the ranks: embedding, the layer of logits, and their loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpidist._types import MAX, Array
from mpidist.arrays.boxes import even_part
from mpidist.arrays.namespaces import array_namespace
from mpidist.arrays.shards import Part
from mpidist.collectives import all_reduce
from mpidist.group.group import ProcessGroup, check_group
from mpidist.nn.layers import Embedding, Linear, check_integers
from mpidist.nn.losses import check_target, divisor
from mpidist.nn.mode import Mode
from mpidist.nn.module import Context, Module, count_uses
from mpidist.parallel.tensor.conjugates import Conjugate, check_host, summed
from mpidist.parallel.tensor.cuts import Features, LayerCut, Split, ranges_of, with_attributes_of
from mpidist.parallel.tensor.linear import cut_columns, plain_linear

__all__ = ["Vocabulary", "VocabularyEmbedding", "vocabulary_cross_entropy"]


class VocabularyEmbedding(Embedding):
    """An `Embedding` of which each rank has some rows.

    Attributes
    ----------
    takes, gives : None
        Every rank needs all integers, and returns all vectors.
    exchanges : tuple of str
        What is sent for each pass over a batch.

    Notes
    -----
    `parallelize` makes it of an `Embedding`, with the same `Parameter`. Collective over the group,
    and blocks: `forward` adds up what the ranks have looked up (one all-reduce of the vectors).
    Integers are checked against the whole table, before anything is sent.
    """

    takes: ClassVar[Features] = None
    gives: ClassVar[Features] = None
    exchanges: tuple[str, ...]
    _rows: tuple[int, int, int]
    _output: Conjugate

    @classmethod
    def of(cls, embedding: Embedding, group: ProcessGroup) -> VocabularyEmbedding:
        """Return the layer that stands for an `Embedding` whose table will be cut."""
        layer = with_attributes_of(embedding, cls)
        num, dim = embedding.weight.shape
        layer._rows = (num, *even_part(num, group.size, group.rank))
        layer._output = summed(group)
        layer.exchanges = (f"forward all_reduce (..., {dim})",)
        return layer

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Map integers `x` (batch, ...), the same on all ranks, to rows y (batch, ..., dim).

        Raises
        ------
        ValueError
            If `x` holds no integers, or one outside the whole table.
        """
        check_host("VocabularyEmbedding", x)
        num, start, size = self._rows
        check_integers(x, num)
        local = x.astype(np.int64).reshape(-1) - start
        own = (local >= 0) & (local < size)
        y = np.zeros((local.size, self.weight.shape[1]), self.weight.dtype)
        y[own] = self.weight.data[local[own]]
        y = self._output.forward(y).reshape(*x.shape, self.weight.shape[1])
        return y, Context((x.shape, own, local[own]), count_uses(self.weight))

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        """Return zeros of the input's shape: integers have no gradient."""
        shape, own, local = ctx.saved
        dy = self._output.backward(dy)
        rows = dy.reshape(own.size, dy.shape[-1])[own]
        return array_namespace(dy).zeros(shape, dtype=dy.dtype), (local, rows)


def vocabulary_cross_entropy(
    logits: Array,
    target: Array,
    group: ProcessGroup,
    *,
    classes: int,
    denominator: float | None = None,
) -> tuple[Array, Array]:
    """Compute `cross_entropy` of logits whose classes are cut over the ranks.

    Parameters
    ----------
    logits : Array, shape (..., this rank's part of classes), float
        What a layer cut by `Vocabulary` returns.
    target : Array, shape (...), integer
        The class of each position, in 0 .. classes - 1; the same on all ranks.
    group : ProcessGroup
        Over which the classes are cut.
    classes : int
        The whole number of classes. It need not be a multiple of the number of ranks: nothing is
        padded.
    denominator : float, optional
        What the sum over positions is divided by. Default: the number of positions. See
        `cross_entropy`.

    Returns
    -------
    loss : Array, shape (), float32 or wider
        The same on all ranks; 0 for an empty batch.
    dlogits : Array, shape and dtype of `logits`
        Gradient of `loss` by this rank's logits.

    Raises
    ------
    ValueError
        If shapes do not fit, `target` is not integer or out of the range of all classes, or
        `denominator` is not positive; before anything is sent.
    UnsupportedOperationError
        If `logits` lie on a device.

    Notes
    -----
    Collective over `group`; blocks. Two all-reduces, of one and of two numbers per position, in
    place of an all-gather of the logits.

    References
    ----------
    Shoeybi et al. (2019), Megatron-LM, section 3: fusing the layer of logits with the loss.
    """
    check_group(group, "vocabulary_cross_entropy")
    start, size = even_part(classes, group.size, group.rank)
    if logits.shape[-1:] != (size,):
        raise ValueError(
            f"vocabulary_cross_entropy on {group}: expected logits of shape (..., {size}), this "
            f"rank's part of {classes} classes, got {logits.shape}; cut the layer that makes them "
            "by Vocabulary()"
        )
    check_host("vocabulary_cross_entropy", logits)
    check_target(target, logits.shape[:-1], classes, "vocabulary_cross_entropy")
    scale = 1.0 / divisor(target.size, denominator)
    wide = np.result_type(logits.dtype, np.float32)  # halves are summed in float32
    rows = logits.reshape(target.size, size).astype(wide, copy=True)
    rows -= all_reduce(rows.max(axis=-1, keepdims=True, initial=-np.inf), group, op=MAX)
    local = target.reshape(-1).astype(np.int64) - start
    own = np.flatnonzero((local >= 0) & (local < size))
    picked = (own, local[own])
    sums = np.zeros((2, target.size), wide)
    sums[1, own] = rows[picked]
    np.exp(rows, out=rows)
    rows.sum(axis=-1, out=sums[0])
    sums = all_reduce(sums, group)
    loss = np.asarray((np.log(sums[0]) - sums[1]).sum() * scale, dtype=wide)
    rows *= (scale / sums[0])[:, None]
    rows[picked] -= scale
    return loss, rows.reshape(logits.shape).astype(logits.dtype, copy=False)


@dataclass(frozen=True, slots=True)
class Vocabulary(Split):
    """Cut a vocabulary: the rows of an `Embedding`, or the outputs of the `Linear` of the logits.

    The logits stay cut: their loss is `vocabulary_cross_entropy`. Parts differ by one row at most,
    so nothing is padded. A table that an embedding and the layer of logits share is cut once, if
    both are.
    """

    def cut(self, module: Module, group: ProcessGroup) -> LayerCut:
        """Return what becomes of an `Embedding` or a `Linear`."""
        if isinstance(module, Linear):
            return cut_columns(plain_linear(module), group)
        if type(module) is not Embedding:
            raise ValueError(f"expected an Embedding or a Linear, got a {type(module).__name__}")
        shape = module.weight.shape
        part = Part.of_ranges(shape, 0, ranges_of(shape[0], group))
        layer = VocabularyEmbedding.of(module, group)
        return LayerCut({module.weight: part}, {id(module): layer})
