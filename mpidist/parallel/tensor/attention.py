"""`Heads`: attention whose heads are spread over the ranks."""

from __future__ import annotations

from dataclasses import dataclass

from mpidist.group.group import ProcessGroup
from mpidist.nn.attention import CausalSelfAttention
from mpidist.nn.module import Module
from mpidist.parallel.tensor.cuts import LayerCut, Split
from mpidist.parallel.tensor.linear import cut_columns, cut_rows, plain_linear

__all__ = ["Heads"]


@dataclass(frozen=True, slots=True)
class Heads(Split):
    """Cut a `CausalSelfAttention` by its heads: each rank computes some, from the whole input.

    Of queries, keys and values, one fused matrix, a rank keeps the rows of its heads in each of the
    three. The numbers of heads may differ by one; of more ranks than heads some have none.
    Its `qkv` becomes a `ColumnLinear`, and its `proj` a `RowLinear`.
    """

    def cut(self, module: Module, group: ProcessGroup) -> LayerCut:
        """Return what becomes of a `CausalSelfAttention`."""
        if type(module) is not CausalSelfAttention:
            raise ValueError(
                f"expected a CausalSelfAttention, which has heads, got a {type(module).__name__}; "
                "a subclass may count on all of them"
            )
        size = module.head_dim
        qkv = cut_columns(plain_linear(module.qkv), group, blocks=3, unit=size)
        proj = cut_rows(plain_linear(module.proj), group, unit=size)
        idle = group.size - module.heads
        warning = f"{idle} of {group.size} ranks have none of its {module.heads} heads"
        return LayerCut(
            {**qkv.parts, **proj.parts},
            {**qkv.layers, **proj.layers},
            warning if idle > 0 else "",
        )
