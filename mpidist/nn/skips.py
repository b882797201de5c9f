"""`Stash` and `Pop`: connections that skip layers of a `Sequential`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import MutableMapping, Sequence
from enum import Enum
from typing import Any, TypeAlias

from mpidist._types import Array
from mpidist.arrays.namespaces import array_namespace
from mpidist.nn.mode import Mode
from mpidist.nn.module import Context, Module, ParameterFree


class Merge(Enum):
    """How a `Pop` joins what was stashed to its input."""

    ADD = "add"
    CONCAT = "concat"


ADD = Merge.ADD
CONCAT = Merge.CONCAT

Skips: TypeAlias = MutableMapping[str, Array]
"""What has been stashed and not yet popped, by name; in backward, gradients on their way back."""


class SkipLayer(ParameterFree):
    """A `Stash` or a `Pop`, which a `Sequential` runs with what has been stashed in it.

    Parameters
    ----------
    name : str
        Of the connection.
    """

    def __init__(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise TypeError(
                f"{type(self).__name__}: expected as name of the connection a str that is not "
                f"empty, got {name!r}"
            )
        self.name = name

    def __str__(self) -> str:
        """Return the class and the name."""
        return f"{type(self).__name__}('{self.name}')"

    @abstractmethod
    def forward(self, x: Array, mode: Mode, skips: Skips | None = None) -> tuple[Array, Context]:
        """Put something into `skips`, or take it out."""

    @abstractmethod
    def backward_input(
        self, ctx: Context, dy: Array, skips: Skips | None = None
    ) -> tuple[Array, Any]:
        """Take a gradient out of `skips`, or put it in."""

    def backward(self, ctx: Context, dy: Array, skips: Skips | None = None) -> Array:
        """Run the first half; there is no second one."""
        return self.backward_input(ctx, dy, skips)[0]

    def _of_sequential(self, skips: Skips | None) -> Skips:
        if skips is None:
            raise RuntimeError(
                f"{self} was run by something else than a Sequential; make it a layer of one, "
                f"whose layers between Stash('{self.name}') and Pop('{self.name}') are skipped"
            )
        return skips

    def _take(self, skips: Skips | None, other: str) -> Array:
        array = self._of_sequential(skips).pop(self.name, None)
        if array is None:
            raise RuntimeError(
                f"{self}: {other} has left nothing for it; a part of a Sequential has to be given "
                "what comes from its other parts (skips=)"
            )
        return array


class Stash(SkipLayer):
    """Passes its input on, and keeps it for the `Pop` of the same name, further on.

    ::

        Sequential(Stash("a"), Linear(8, 8, rng=0), ReLU(), Pop("a"), Linear(8, 4, rng=1))

    is ``Sequential(Residual(Sequential(Linear(8, 8, rng=0), ReLU())), Linear(8, 4, rng=1))``. But
    the layers in between are layers of the one `Sequential`, so that a `Pipeline` can cut there,
    and connections may overlap, or end in a concatenation, as those of a U-net.

    Parameters
    ----------
    name : str
        Of the connection: each has one `Stash` and one `Pop`, both layers of one `Sequential`.

    Notes
    -----
    The gradient by its input is that by its output plus that by what was kept.
    """

    def forward(self, x: Array, mode: Mode, skips: Skips | None = None) -> tuple[Array, Context]:
        """Return `x`, and keep it."""
        self._of_sequential(skips)[self.name] = x
        return x, Context(None)

    def backward_input(
        self, ctx: Context, dy: Array, skips: Skips | None = None
    ) -> tuple[Array, Any]:
        """Add what comes back from the `Pop`."""
        return dy + self._take(skips, f"Pop('{self.name}')"), None


class Pop(SkipLayer):
    """Joins what the `Stash` of the same name has kept to its input.

    Parameters
    ----------
    name : str
        Of the connection.
    merge : Merge, optional
        `ADD`: the sum of the two, which have one shape. `CONCAT`: the input, and behind it what was
        kept.
    axis : int, optional
        Of a concatenation. The default, 1, is that of the channels of images (samples, channels,
        height, width), and of the features of (samples, features).

    Raises
    ------
    TypeError
        If `merge` is something else.
    """

    def __init__(self, name: str, *, merge: Merge = ADD, axis: int = 1) -> None:
        super().__init__(name)
        if not isinstance(merge, Merge):
            raise TypeError(f"{self}: expected merge=ADD or merge=CONCAT, got {merge!r}")
        self.merge = merge
        self.axis = axis

    def forward(self, x: Array, mode: Mode, skips: Skips | None = None) -> tuple[Array, Context]:
        """Join what was kept to `x`.

        Raises
        ------
        ValueError
            If shapes do not fit.
        """
        kept = self._take(skips, f"Stash('{self.name}')")
        if self._others(x.shape) != self._others(kept.shape):
            but = "" if self.merge is ADD else f", but for axis {self.axis}"
            raise ValueError(
                f"{self}: expected an input of shape {kept.shape}, as was stashed{but}; got "
                f"{x.shape}"
            )
        if self.merge is ADD:
            return x + kept, Context(None)
        joined: Array = array_namespace(x).concatenate([x, kept], self.axis)
        return joined, Context(x.shape[self.axis])

    def backward_input(
        self, ctx: Context, dy: Array, skips: Skips | None = None
    ) -> tuple[Array, Any]:
        """Send the stashed array's gradient back, and return that of the input."""
        dx = dkept = dy
        if self.merge is CONCAT:
            # Copies: layers before, and messages, sum the elements of whole arrays in one order.
            xp = array_namespace(dy)
            dx, dkept = map(xp.ascontiguousarray, xp.split(dy, [ctx.saved], self.axis))
        self._of_sequential(skips)[self.name] = dkept
        return dx, None

    def _others(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the extents that have to be alike."""
        if self.merge is ADD:
            return shape
        axis = self.axis % max(len(shape), 1)
        return (*shape[:axis], *shape[axis + 1 :])


def connections(layers: Sequence[Module]) -> dict[str, tuple[int, int]]:
    """Return the numbers of the layers that stash and that pop, by the name of the connection.

    Parameters
    ----------
    layers : sequence of Module
        Those of a `Sequential`.

    Raises
    ------
    ValueError
        If one of the two is missing or there twice, or the wrong one comes first.
    """
    ends: tuple[dict[str, int], dict[str, int]] = {}, {}
    for i, layer in enumerate(layers):
        if isinstance(layer, SkipLayer):
            own = ends[isinstance(layer, Pop)]
            first = own.setdefault(layer.name, i)
            if first != i:
                raise ValueError(
                    f"Sequential: the layers {first} and {i} both are {layer}; give each "
                    "connection a name of its own"
                )
    stashes, pops = ends
    for name in (*stashes, *pops):
        if name not in pops:
            raise ValueError(
                f"Sequential: layer {stashes[name]} is Stash('{name}'), and no layer is "
                f"Pop('{name}'); a connection has both ends among the layers of one Sequential"
            )
        if name not in stashes:
            raise ValueError(
                f"Sequential: layer {pops[name]} is Pop('{name}'), and no layer is "
                f"Stash('{name}'); a connection has both ends among the layers of one Sequential"
            )
        if pops[name] < stashes[name]:
            raise ValueError(
                f"Sequential: layer {pops[name]}, Pop('{name}'), is before layer {stashes[name]}, "
                f"Stash('{name}'); connections go forward, so exchange the two"
            )
    return {name: (stashes[name], pops[name]) for name in stashes}
