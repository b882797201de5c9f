"""`Parameter`: an array to be trained, and the count of the contributions to its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from mpidist._types import Array
from mpidist.arrays.flat import FlatBuffer
from mpidist.arrays.namespaces import HALVES, array_namespace
from mpidist.arrays.shards import FlatPart, Part


class Parameter:
    """A trained array, the memory of its gradient, and a count of contributions.

    Parameters
    ----------
    data : Array
        The values. Held, not copied; optimizers write into it in place.
    name : str, optional
        Qualified name, used in errors. Modules set it when they are built.
    trainable : bool, optional
        Whether it has a gradient. One that is frozen takes no contribution and has no optimizer
        state, and `DDP` reduces nothing for it. Set it before a `DDP` or an optimizer is made.

    Attributes
    ----------
    name : str
        Qualified name, such as ``"0.weight"``; empty before a module has set it.
    trainable : bool
        Whether it has a gradient.
    part : Part, FlatPart or None
        Which elements of a whole array the values are; None: they are whole. States then hold
        a `ShardedArray` of the whole.

    Notes
    -----
    The life of a gradient::

        p.attach(view)              # optional, once: the gradient lives in this array
        p.zero_grad()               # resets a flag; touches no memory
        p.expect(2, on_ready)       # optional: two contributions are expected
        memory = p.first_grad()     # no contribution yet: the memory to write into ...
        p.add_grad(memory)          # ... and this then copies nothing
        p.add_grad(g)               # added in place; the second of two, so on_ready(p) fires
        p.release()                 # the gradient may be added to again

    Between `on_ready` and `release` the gradient is being communicated: it is neither this rank's
    nor everyone's, so `grad`, `zero_grad`, `first_grad` and `add_grad` raise. Parameters compare
    and hash by identity.
    """

    __slots__ = (
        "_closed",
        "_data",
        "_dtype",
        "_empty",
        "_grad",
        "_has_grad",
        "_location",
        "_memory_for",
        "_on_ready",
        "_remaining",
        "_sealed",
        "_shape",
        "_take",
        "name",
        "part",
        "trainable",
    )

    def __init__(self, data: Array, *, name: str = "", trainable: bool = True) -> None:
        self.data = data
        self._sealed = ""  # where the values are, while they are not here
        self.name = name
        self.trainable = trainable
        self.part: Part | FlatPart | None = None
        self._memory_for: Callable[[Parameter], Array | None] | None = None
        self._closed = ""  # why its gradient is not here, while it is with others
        self._grad: Array | None = None
        self._location: tuple[FlatBuffer, str] | None = None
        self._has_grad = False
        self._remaining: int | None = None  # None: not counting
        self._on_ready: Callable[[Parameter], None] | None = None
        self._take: Callable[[Array], object] | None = None

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        """Return what a copy has: no part in the reduction that this one's gradient is in."""
        state = {name: getattr(self, name) for name in self.__slots__}
        alone = {"_memory_for": None, "_on_ready": None, "_remaining": None, "_closed": ""}
        return None, state | alone | {"_take": None}

    def __repr__(self) -> str:
        return f"Parameter({self.name or 'unnamed'!s}, shape={self.shape}, dtype={self.dtype})"

    @property
    def data(self) -> Array:
        """The values.

        Raises
        ------
        RuntimeError
            If the parameter is sealed.
        """
        if self._data is None:
            raise RuntimeError(f"parameter '{self.name}' {self._sealed}")
        return self._data

    @data.setter
    def data(self, data: Array) -> None:
        self._data: Array | None = data
        self._shape = tuple(data.shape)
        self._dtype: np.dtype[Any] = data.dtype
        # The kind of memory, host or device, is still known while there are no values.
        self._empty: Array = array_namespace(data).empty(0, data.dtype)

    def seal(
        self,
        reason: str = "is sealed: its values are not here just now; what has sealed it gives them "
        "back for the passes that need them",
    ) -> None:
        """Drop the values; shape, dtype and gradient stay. Setting `data` ends it.

        Parameters
        ----------
        reason : str, optional
            Where the values are meanwhile, and what to do; the words of the error.
        """
        self._data, self._sealed = None, reason

    @property
    def is_sealed(self) -> bool:
        """Whether the values are not here, so that `data` raises."""
        return self._data is None

    @property
    def like(self) -> Array:
        """An array of no elements in the memory, host or device, and the dtype of the values."""
        return self._empty

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the values."""
        return self._dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self._shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values that are here; 0 while sealed."""
        return 0 if self._data is None else int(self._data.nbytes)

    @property
    def grad_memory(self) -> Array | None:
        """The memory of the gradient, whether there is one or not; None until it is needed.

        `attach` sets it. Read and write it by way of `grad`, `first_grad` and `add_grad`, which
        know whether it may be touched just now.
        """
        return self._grad

    @property
    def location(self) -> tuple[FlatBuffer, str] | None:
        """The flat array that the gradient is a part of, and the part's name; None: of none."""
        return self._location

    @property
    def grad(self) -> Array | None:
        """The gradient summed so far; None if there was no contribution since `zero_grad`.

        Raises
        ------
        RuntimeError
            If all expected contributions were made and `release` has not been called.
        """
        self._check_open()
        return self.unreduced_grad()

    @property
    def grad_nbytes(self) -> int:
        """Bytes of the gradient's memory; 0 before any has been made or attached."""
        return 0 if self._grad is None else int(self._grad.nbytes)

    def unreduced_grad(self) -> Array | None:
        """Return what `grad` does, also while all contributions are in: for who communicates it.

        Returns
        -------
        Array, shape and dtype of the gradient, or None
            This rank's gradient until its communication begins, and anything from then on until
            that has been waited for.
        """
        return self._grad if self._has_grad else None

    def first_grad(self) -> Array | None:
        """Return the memory for the first contribution, or None if there was one.

        Returns
        -------
        Array, shape and dtype of the parameter, or None
            Uninitialised memory. A layer passes it as ``out=`` and then hands it to `add_grad`.
            None (which ``out=`` understands too) when the contribution must be added, or the
            gradient has another dtype than the parameter.

        Raises
        ------
        RuntimeError
            If all expected contributions were made and `release` has not been called.
        """
        self._check_open()
        if self._has_grad or not self.trainable or self._take is not None:
            return None
        memory = self._own_memory()
        return memory if memory.dtype == self._dtype else None

    def empty_grad(self) -> Array:
        """Return memory for one contribution: `first_grad`, or a new array if it must be added.

        Returns
        -------
        Array, shape and dtype of the parameter
            Uninitialised.
        """
        first = self.first_grad()
        return self._new_array() if first is None else first

    def add_grad(self, g: Array) -> None:
        """Add one contribution to the gradient.

        Parameters
        ----------
        g : Array, shape of the parameter
            The contribution. The array returned by `first_grad` is taken as it stands; any
            other array is copied or added, and stays the caller's. It is rounded to the dtype of
            the gradient; infinite where it is beyond its range. Dropped if not `trainable`.

        Raises
        ------
        RuntimeError
            If all expected contributions were made and `release` has not been called, or `g`
            is the gradient's own memory and already counted.
        ValueError
            If `g` has another shape.
        """
        self._check_open()
        if tuple(g.shape) != self._shape:
            raise ValueError(
                f"add_grad: parameter '{self.name}' expects a gradient of shape {self.shape}, "
                f"got {tuple(g.shape)}; sum broadcast axes before adding"
            )
        if not self.trainable:
            return
        if self._take is not None:
            self._take(g)
            return
        self._accumulate(g)
        if self._remaining is not None:
            # The last one closes the parameter: from here on its memory may be on its way.
            self._remaining -= 1
            if self._remaining == 0 and self._on_ready is not None:
                self._on_ready(self)

    def divert(self, take: Callable[[Array], object] | None) -> None:
        """Hand contributions to somebody else, who adds them later, or not at all.

        Parameters
        ----------
        take : callable or None
            Called as ``take(g)`` with each contribution, which stays the caller's: copy it to keep
            it. It is neither added nor counted. None ends that.
        """
        self._take = take

    def zero_grad(self) -> None:
        """Forget the gradient. Only a flag changes; no memory is touched.

        Raises
        ------
        RuntimeError
            If all expected contributions were made and `release` has not been called: the
            reduction would restore it.
        """
        self._check_open()
        self._has_grad = False

    def attach(self, memory: Array, *, location: tuple[FlatBuffer, str] | None = None) -> None:
        """Keep the gradient in `memory` from now on.

        Parameters
        ----------
        memory : Array, shape of the parameter
            Usually a view of a flat array. A gradient present is copied into it.
        location : (FlatBuffer, str), optional
            The flat array and the name under which `memory` is one of its views. On a device an
            optimizer then updates all parameters whose gradients lie there at once.

        Raises
        ------
        ValueError
            If `memory` has another shape.
        RuntimeError
            If contributions are being counted (between `expect` and `release`).
        """
        if tuple(memory.shape) != self.shape:
            raise ValueError(
                f"attach: parameter '{self.name}' expects a buffer of shape {self.shape}, "
                f"got {tuple(memory.shape)}"
            )
        self._check_not_armed("attach")
        if self._has_grad and memory is not self._grad:
            memory[...] = self._grad
        self._grad = memory
        self._location = location
        self._memory_for = None

    def attach_later(self, memory_for: Callable[[Parameter], Array | None]) -> None:
        """Ask for the gradient's memory when a first contribution comes, from now on.

        Parameters
        ----------
        memory_for : callable
            Called as ``memory_for(parameter)`` where there is no memory; returns an array of the
            shape of the parameter, or None, for an array of its own. It may have another float
            dtype, which contributions are rounded to. `detach` ends its use.

        Raises
        ------
        RuntimeError
            If contributions are being counted (between `expect` and `release`).
        """
        self._check_not_armed("attach_later")
        self.detach()
        self._memory_for = memory_for

    def is_attached_to(self, memory_for: Callable[[Parameter], Array | None]) -> bool:
        """Whether this function was the last one given to `attach_later`, and no `attach` since."""
        return self._memory_for == memory_for

    def detach(self) -> None:
        """Forget the gradient and its memory; also while all contributions are in."""
        self._grad = self._location = None
        self._has_grad = False

    def move(self, to: Callable[[Array], Array]) -> None:
        """Replace the values by what a function makes of them, and forget the gradient's memory.

        Parameters
        ----------
        to : callable
            From the values to an array of the same shape and dtype. If that is the same array,
            nothing changes.

        Raises
        ------
        RuntimeError
            If contributions are being counted (between `expect` and `release`).
        """
        self._check_not_armed("move")
        moved = to(self.data)
        if moved is not self.data:
            self.data = moved
            self._memory_for = None
            self.detach()

    @property
    def is_attached(self) -> bool:
        """Whether a strategy has said where the gradient lies, by `attach` or `attach_later`."""
        return self._location is not None or self._memory_for is not None

    def cut(self, part: Part) -> None:
        """Keep a part of the values, in memory of its own, and forget the gradient's memory.

        Parameters
        ----------
        part : Part
            Of the array that the values are now. `Parameter.part` from now on.

        Raises
        ------
        ValueError
            If the values are a part already, or `part` is one of an array of another shape.
        RuntimeError
            If a strategy has said where the gradient lies, or contributions are being counted.
        """
        self._check_not_armed("cut")
        if self.is_attached:
            raise RuntimeError(
                f"cut: the gradient of parameter '{self.name}' lies in the memory of a strategy; "
                "cut parameters before a DDP, an FSDP or an optimizer is made of them"
            )
        if self.part is not None or part.shape != self._shape:
            raise ValueError(
                f"cut: expected the part of a whole array of shape {self._shape}, parameter "
                f"'{self.name}', got {part}; the values are {self.part or 'whole'}"
            )
        self.data = part.of(self.data)
        self.part = part
        self.detach()

    def expect(self, uses: int, on_ready: Callable[[Parameter], None] | None = None) -> None:
        """Count contributions from now, and call `on_ready` when the last one is in.

        Parameters
        ----------
        uses : int
            Number of contributions. With 0 nothing fires, and any contribution raises.
        on_ready : callable, optional
            Called as ``on_ready(parameter)`` inside the last `add_grad`.

        Raises
        ------
        ValueError
            If `uses` is negative.
        RuntimeError
            If an earlier `expect` has not been released.
        """
        if uses < 0:
            raise ValueError(f"expect: parameter '{self.name}' got a negative count, {uses}")
        self._check_not_armed("expect")
        self._remaining = uses
        self._on_ready = on_ready

    def close(self, reason: str) -> None:
        """Let nobody read, zero or add to the gradient until `release`.

        Parameters
        ----------
        reason : str
            Where the gradient is meanwhile, and what to do; the words of the error.
        """
        self._remaining, self._closed, self._on_ready = 0, reason, None

    def release(self) -> None:
        """End what `expect` or `close` began; any number of contributions is allowed again."""
        self._remaining = None
        self._on_ready = None
        self._closed = ""

    def _accumulate(self, g: Array) -> None:
        grad = self._own_memory()
        if not self._has_grad:
            # A layer that wrote into first_grad() itself has nothing left to copy.
            if g is not grad:
                with _rounding(g, grad):
                    grad[...] = g
            self._has_grad = True
            return
        if g is grad:
            raise RuntimeError(
                f"add_grad: the gradient of parameter '{self.name}' was handed in twice; "
                "write into first_grad() only when it returns an array"
            )
        casting = "unsafe" if grad.dtype in HALVES else "same_kind"
        with _rounding(g, grad):
            array_namespace(grad).add(grad, g, out=grad, casting=casting)

    def _own_memory(self) -> Array:
        """Return the memory of the gradient, which is asked for if there is none yet."""
        if self._grad is None:
            given = None if self._memory_for is None else self._memory_for(self)
            self._grad = self._new_array() if given is None else given
        return self._grad

    def _new_array(self) -> Array:
        array: Array = array_namespace(self._empty).empty(self._shape, self._dtype)
        return array

    def _check_open(self) -> None:
        if self._remaining == 0:
            if self._closed:
                raise RuntimeError(f"the gradient of parameter '{self.name}' {self._closed}")
            raise RuntimeError(
                f"parameter '{self.name}' has received all gradient contributions announced by "
                "expect() and its gradient may be in communication; wait for it (release()) "
                "before its gradient is read, zeroed or added to, or announce all contributions "
                "(ctx.uses) beforehand"
            )

    def _check_not_armed(self, operation: str) -> None:
        if self._remaining is not None:
            raise RuntimeError(
                f"{operation}: parameter '{self.name}' is still counting contributions "
                f"({self._remaining} to come); call release() first"
            )


def _rounding(g: Array, grad: Array) -> AbstractContextManager[None]:
    """Let what is beyond the range of a narrower dtype become infinite, as in a reduction."""
    return nullcontext() if g.dtype == grad.dtype else np.errstate(all="ignore")


@runtime_checkable
class HasParameters(Protocol):
    """A `Module`, or what wraps one, such as `DDP`."""

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Yield (qualified name, parameter), each once."""


Parameters: TypeAlias = HasParameters | Iterable[Parameter | tuple[str, Parameter]]


def named_list(parameters: Parameters, caller: str) -> list[tuple[str, Parameter]]:
    """Return the parameters with their names.

    Parameters
    ----------
    parameters : Module, DDP, or iterable of Parameter or of (str, Parameter)
        A mapping of names to parameters, too.
    caller : str
        The first words of an error.

    Raises
    ------
    TypeError
        If it is something else, with what to write.
    """
    entries: Any = parameters
    if isinstance(parameters, HasParameters):
        entries = parameters.named_parameters()
    elif isinstance(parameters, Mapping):
        entries = parameters.items()
    expected = f"{caller}: expected a model, model.parameters() or model.named_parameters(), got "
    try:
        entries = iter(entries)
    except TypeError:
        raise TypeError(expected + _described(parameters)) from None
    named = []
    for entry in entries:
        name, parameter = entry if _is_pair(entry) else (getattr(entry, "name", ""), entry)
        if not isinstance(parameter, Parameter):
            raise TypeError(f"{expected}{type(parameters).__name__} of {type(parameter).__name__}")
        named.append((name, parameter))
    return named


def _is_pair(entry: object) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)


def _described(parameters: object) -> str:
    if callable(parameters):
        return f"{getattr(parameters, '__name__', parameters)}; call it"
    kind = type(parameters).__name__
    return f"one {kind}; put it into a list" if isinstance(parameters, Parameter) else kind
