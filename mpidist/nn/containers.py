"""Modules made of others: `Sequential`, `Residual` and `Recompute`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from types import MappingProxyType
from typing import Any

from mpidist._types import Array
from mpidist.nn.mode import Mode
from mpidist.nn.module import Context, Module, children_of, count_uses
from mpidist.nn.parameter import Parameter
from mpidist.nn.skips import SkipLayer, Skips, connections


class Sequential(Module):
    """Modules one after the other.

    Parameters
    ----------
    *layers : Module
        In order of the forward pass. Their names are "0", "1", ... There may be connections that
        skip layers, each from a `Stash` to a `Pop`.

    Attributes
    ----------
    tied : mapping of str to str
        Of a `part` whose other parts are elsewhere: the names in the whole of parameters that those
        hold, too, by the names that they would have here. Else empty.

    Raises
    ------
    TypeError
        If one is no Module.
    ValueError
        If a connection has not both ends, or has one twice, or ends before it begins.

    Notes
    -----
    The passes of a `part` take what is stashed in other parts, and leave what others pop, in
    `skips`; those of the whole need no such argument.
    """

    def __init__(self, *layers: Module) -> None:
        for i, layer in enumerate(layers):
            if not isinstance(layer, Module):
                raise TypeError(
                    f"Sequential: layer {i} is a {type(layer).__name__}, not a Module; pass "
                    "modules one by one: Sequential(*layers)"
                )
        connections(layers)
        self.layers = layers

    _first = 0
    """Number of the first layer; above 0 in a `part`."""

    tied: Mapping[str, str] = MappingProxyType({})

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Yield (qualified name, parameter) in order of definition; `tied` ones as in the whole."""
        return ((self.tied.get(name, name), p) for name, p in super().named_parameters())

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Yield the layers under their numbers, then what is held in other attributes."""
        yield from ((str(i), layer) for i, layer in enumerate(self.layers, self._first))
        yield from children_of(self, but="layers")

    def part(self, start: int, stop: int) -> Sequential:
        """Return some of the layers as a module of their own that keeps their names.

        Parameters
        ----------
        start, stop : int
            Numbers of the first layer and of the one after the last, as in a slice of this module;
            ``0 <= start <= stop <= len(layers)``.

        Returns
        -------
        Sequential
            Of the same layer objects. Their names and layer indices are those that they have in
            the whole, so that parts on different ranks draw, save and load as the whole does.

        Raises
        ------
        ValueError
            If there are no such layers.
        """
        if not 0 <= start <= stop <= len(self.layers):
            raise ValueError(
                f"Sequential.part: expected 0 <= start <= stop <= {len(self.layers)}, got "
                f"{start} and {stop}"
            )
        part = copy(self)  # not by the constructor, which would number the layers anew
        part.layers = self.layers[start:stop]
        part._first = self._first + start
        return part

    def forward(self, x: Array, mode: Mode, skips: Skips | None = None) -> tuple[Array, Context]:
        """Run the layers in order."""
        skips = {} if skips is None else skips
        contexts = []
        for layer in self.layers:
            if isinstance(layer, SkipLayer):
                x, ctx = layer.forward(x, mode, skips)
            else:
                x, ctx = layer.forward(x, mode)
            contexts.append(ctx)
        return x, Context(tuple(contexts), count_uses(*contexts))

    def backward(self, ctx: Context, dy: Array, skips: Skips | None = None) -> Array:
        """Run the layers' whole backward passes, last first."""
        skips = {} if skips is None else skips
        for layer, layer_ctx in zip(reversed(self.layers), reversed(ctx.saved), strict=True):
            if isinstance(layer, SkipLayer):
                dy = layer.backward(layer_ctx, dy, skips)
            else:
                dy = layer.backward(layer_ctx, dy)
        return dy

    def backward_input(
        self, ctx: Context, dy: Array, skips: Skips | None = None
    ) -> tuple[Array, Any]:
        """Run the first halves, last layer first."""
        skips = {} if skips is None else skips
        wctxs = []
        for layer, layer_ctx in zip(reversed(self.layers), reversed(ctx.saved), strict=True):
            if isinstance(layer, SkipLayer):
                dy, wctx = layer.backward_input(layer_ctx, dy, skips)
            else:
                dy, wctx = layer.backward_input(layer_ctx, dy)
            wctxs.append(wctx)
        return dy, wctxs

    def backward_weight(self, wctx: Any) -> None:
        """Run the second halves, last layer first."""
        for layer, layer_wctx in zip(reversed(self.layers), wctx, strict=True):
            layer.backward_weight(layer_wctx)


class Residual(Module):
    """``y = x + inner(x)``.

    Parameters
    ----------
    inner : Module
        Must keep the shape.
    """

    def __init__(self, inner: Module) -> None:
        self.inner = inner

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Map `x` to ``x + inner(x)``."""
        y, ctx = self.inner.forward(x, mode)
        return x + y, ctx

    def backward(self, ctx: Context, dy: Array) -> Array:
        """Add the inner module's input gradient to `dy`."""
        return dy + self.inner.backward(ctx, dy)

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        """Add the inner module's input gradient to `dy`."""
        dx, wctx = self.inner.backward_input(ctx, dy)
        return dy + dx, wctx

    def backward_weight(self, wctx: Any) -> None:
        """Run the inner module's second half."""
        self.inner.backward_weight(wctx)


class Recompute(Module):
    """Runs its module's forward pass again in backward instead of keeping its activations.

    Parameters
    ----------
    inner : Module
        The module that is run twice; its names are those of `Recompute`.

    Notes
    -----
    Only the input is kept. The second pass is a replay: it draws the same random numbers and
    changes no buffer, so gradients have the same bits as without `Recompute`. Costs one more
    forward pass. Names do not change either: what was saved with it loads without it.

    References
    ----------
    Chen, Xu, Zhang, Guestrin (2016), Training Deep Nets with Sublinear Memory Cost, section 4.
    """

    def __init__(self, inner: Module) -> None:
        self.inner = inner

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Yield the inner module as "": names are the same with and without `Recompute`."""
        yield "", self.inner

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Run the inner module and drop its context."""
        y, ctx = self.inner.forward(x, mode)
        return y, Context((x, mode.replayed()), ctx.uses)

    def backward(self, ctx: Context, dy: Array) -> Array:
        """Run the inner module forward again, then its whole backward pass."""
        return self.inner.backward(self._replay(ctx), dy)

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        """Run the inner module forward again, then its first half."""
        return self.inner.backward_input(self._replay(ctx), dy)

    def backward_weight(self, wctx: Any) -> None:
        """Run the inner module's second half."""
        self.inner.backward_weight(wctx)

    def _replay(self, ctx: Context) -> Context:
        x, mode = ctx.saved
        _, inner_ctx = self.inner.forward(x, mode)
        return inner_ctx
