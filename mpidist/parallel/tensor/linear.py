"""`ColumnLinear` and `RowLinear`: affine maps whose outputs, or inputs, are cut over the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mpidist._types import Array
from mpidist.arrays.shards import Part
from mpidist.group.group import ProcessGroup
from mpidist.nn.layers import Linear
from mpidist.nn.mode import Mode
from mpidist.nn.module import Context, Module
from mpidist.parallel.tensor.conjugates import (
    Conjugate,
    check_host,
    copied,
    gathered,
    scattered,
    summed,
)
from mpidist.parallel.tensor.cuts import Features, LayerCut, Split, ranges_of, with_attributes_of

__all__ = ["ColumnLinear", "Columns", "RowLinear", "Rows"]


class ColumnLinear(Linear):
    """A `Linear` of which each rank computes some outputs.

    Attributes
    ----------
    takes : None
        Every rank needs the whole input.
    gives : Part or None
        Which outputs this rank returns; None: all.
    exchanges : tuple of str
        What is sent for each pass over a batch.

    Notes
    -----
    `parallelize` makes it of a `Linear`, with the same `Parameter` objects, of which this rank
    keeps some rows. Collective over the group, and blocks: `backward` and `backward_input` add up
    the gradients by the input (one all-reduce of its size); where all outputs are returned,
    `forward` gathers them (one all-gather).
    """

    takes: ClassVar[Features] = None
    gives: Features
    exchanges: tuple[str, ...]
    _input: Conjugate
    _output: Conjugate | None

    @classmethod
    def of(
        cls, linear: Linear, group: ProcessGroup, features: Part, *, gather: bool = False
    ) -> ColumnLinear:
        """Return the layer that stands for a `Linear` whose parameters will be cut so."""
        layer = with_attributes_of(linear, cls)
        layer._input = copied(group)
        layer._output = gathered(group, *features.shape) if gather else None
        layer.gives = None if gather else features
        sent = (f"backward all_reduce (..., {linear.weight.shape[1]})",)
        layer.exchanges = (
            (f"forward all_gather (..., {features.shape[0]})", *sent) if gather else sent
        )
        return layer

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Map `x` (..., d_in), the same on all ranks, to this rank's outputs or to all."""
        check_host("ColumnLinear", x)
        y, ctx = super().forward(x, mode)
        return y if self._output is None else self._output.forward(y), ctx

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        """Map `dy` to dx (..., d_in), the same on all ranks."""
        if self._output is not None:
            dy = self._output.backward(dy)
        dx, wctx = super().backward_input(ctx, dy)
        return self._input.backward(dx), wctx


class RowLinear(Linear):
    """A `Linear` of which each rank uses some inputs; the products are added up over the ranks.

    Attributes
    ----------
    takes : Part or None
        Which inputs this rank expects; None: all, of which it takes its own.
    gives : None
        Every rank returns the whole output.
    exchanges : tuple of str
        What is sent for each pass over a batch.

    Notes
    -----
    `parallelize` makes it of a `Linear`, with the same `Parameter` objects, of whose weight this
    rank keeps some columns. The bias is whole on all ranks, and added once, to the sum, so its
    gradient is whole, too. Collective over the group, and blocks: `forward` adds up the outputs
    (one all-reduce of their size); where the input is whole, backward gathers its gradient (one
    all-gather).
    """

    takes: Features
    gives: ClassVar[Features] = None
    exchanges: tuple[str, ...]
    _input: Conjugate | None
    _output: Conjugate

    @classmethod
    def of(
        cls, linear: Linear, group: ProcessGroup, features: Part, *, scatter: bool = False
    ) -> RowLinear:
        """Return the layer that stands for a `Linear` whose weight will be cut so."""
        layer = with_attributes_of(linear, cls)
        layer._input = scattered(group, *features.shape) if scatter else None
        layer._output = summed(group)
        layer.takes = None if scatter else features
        sent = (f"forward all_reduce (..., {linear.weight.shape[0]})",)
        layer.exchanges = (
            (*sent, f"backward all_gather (..., {features.shape[0]})") if scatter else sent
        )
        return layer

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Map this rank's part of the inputs, or all of them, to y (..., d_out), on all ranks.

        Raises
        ------
        ValueError
            If the last axis of `x` has another size.
        """
        check_host("RowLinear", x)
        if self._input is not None:
            x = self._input.forward(x)
        elif self.takes is not None and x.shape[-1:] != self.takes.sizes:
            raise ValueError(
                f"RowLinear: expected an input of shape (..., {self.weight.shape[1]}), this rank's "
                f"part of {self.takes.shape[0]} features, got {x.shape}; the layer before has to "
                "be cut by Columns(), or this one by Rows(scatter=True)"
            )
        return super().forward(x, mode)

    def _product(self, x: Array) -> Array:
        return self._output.forward(super()._product(x))

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        """Map `dy` (..., d_out), the same on all ranks, to dx of the shape of `x`."""
        dx, wctx = super().backward_input(ctx, dy)
        return dx if self._input is None else self._input.backward(dx), wctx


@dataclass(frozen=True, slots=True)
class Columns(Split):
    """Cut the outputs of a `Linear`: each rank computes some of them, from the whole input.

    Parameters
    ----------
    blocks : int, optional
        How many equal blocks the outputs are made of, each of which is cut: 2 where a gate and a
        value are one matrix, 3 for queries, keys and values.
    gather : bool, optional
        Whether every rank gets all outputs; else each keeps its own, for a layer cut by `Rows`.

    Raises
    ------
    ValueError
        If outputs of several blocks are to be gathered, whose order would be another one.
    """

    blocks: int = 1
    gather: bool = False

    def __post_init__(self) -> None:
        if self.gather and self.blocks != 1:
            raise ValueError(
                f"Columns: outputs of {self.blocks} blocks cannot be gathered: they would come in "
                "the order of the ranks; cut the layer that uses them by Rows()"
            )

    def cut(self, module: Module, group: ProcessGroup) -> LayerCut:
        """Return what becomes of a `Linear`."""
        linear = plain_linear(module)
        return cut_columns(linear, group, blocks=self.blocks, gather=self.gather)


@dataclass(frozen=True, slots=True)
class Rows(Split):
    """Cut the inputs of a `Linear`: each rank uses some of them, and the products are added up.

    Parameters
    ----------
    scatter : bool, optional
        Whether the input is whole, and each rank takes its part of it; else it comes from a layer
        cut by `Columns`.
    """

    scatter: bool = False

    def cut(self, module: Module, group: ProcessGroup) -> LayerCut:
        """Return what becomes of a `Linear`."""
        return cut_rows(plain_linear(module), group, scatter=self.scatter)


def plain_linear(module: Module) -> Linear:
    """Return a module if it is a `Linear`, and none of a class of its own.

    Raises
    ------
    ValueError
        If it is none.
    """
    if type(module) is not Linear:
        raise ValueError(f"expected a Linear, got a {type(module).__name__}")
    return module


def cut_columns(
    linear: Linear, group: ProcessGroup, *, blocks: int = 1, unit: int = 1, gather: bool = False
) -> LayerCut:
    """Return what becomes of a `Linear` whose outputs are cut; `unit` of a block stay together."""
    ranges = ranges_of(linear.weight.shape[0], group, blocks=blocks, unit=unit)
    features = Part.of_ranges(linear.weight.shape[:1], 0, ranges)
    parts = {linear.weight: Part.of_ranges(linear.weight.shape, 0, ranges)}
    if linear.bias is not None:
        parts[linear.bias] = features
    layer = ColumnLinear.of(linear, group, features, gather=gather)
    return LayerCut(parts, {id(linear): layer})


def cut_rows(
    linear: Linear, group: ProcessGroup, *, unit: int = 1, scatter: bool = False
) -> LayerCut:
    """Return what becomes of a `Linear` whose inputs are cut; `unit` of them stay together."""
    ranges = ranges_of(linear.weight.shape[1], group, unit=unit)
    features = Part.of_ranges(linear.weight.shape[1:], 0, ranges)
    layer = RowLinear.of(linear, group, features, scatter=scatter)
    return LayerCut(
        {linear.weight: Part.of_ranges(linear.weight.shape, 1, ranges)}, {id(linear): layer}
    )
