"""`Module` and `Context`: the protocol every layer and model follows.

The whole interface, as strategies such as data parallelism use it::

    y, ctx = module.forward(x, mode)        # ctx belongs to the caller; many may be in flight
    ctx.uses                                # {Parameter: contributions its backward will make}
    dx = module.backward(ctx, dy)           # contributions go in by Parameter.add_grad

    dx, wctx = module.backward_input(ctx, dy)   # the same in halves: no parameter is touched ...
    module.backward_weight(wctx)                # ... until here, at any later time

    module.named_parameters()               # (qualified name, Parameter), a shared one once
    module.named_buffers()                  # (qualified name, Array), updated in place only
    module.state_dict(); module.load_state_dict(state)

Writing a module: keep parameters and child modules as attributes, or in lists, tuples and dicts
that are attributes, name buffers in the class attribute `buffer_names`, and write `forward`,
`backward_input` and `backward_weight`.
A module made of others also overrides `backward`, so that each child's gradients are complete
before the child before it begins. Two layers are tied by holding the same `Parameter` object.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from mpidist._types import Array
from mpidist.arrays.boxes import Box
from mpidist.arrays.namespaces import to_device, to_host
from mpidist.arrays.shards import ShardedArray, check_held, copy_in
from mpidist.nn.members import SUBSTITUTES, members, nameless, render_tree
from mpidist.nn.mode import Mode
from mpidist.nn.names import with_present_names
from mpidist.nn.parameter import Parameter


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Context:
    """What one forward pass leaves for its backward pass.

    Parameters
    ----------
    saved : object
        Whatever the layer needs in its backward pass.
    uses : mapping of Parameter to int, optional
        Number of `add_grad` calls that the backward pass of this context will make on each
        trainable parameter. One that is not used in this forward pass is absent.
    """

    saved: Any
    uses: Mapping[Parameter, int] = dataclasses.field(default_factory=dict)


def count_uses(*parts: Parameter | Context | None) -> dict[Parameter, int]:
    """Add up the uses of parameters (one each) and of contexts.

    Parameters
    ----------
    *parts : Parameter, Context or None
        A parameter that is not trainable, and None, count nothing.

    Returns
    -------
    dict of Parameter to int
        For `Context.uses`.
    """
    total: dict[Parameter, int] = {}
    for part in parts:
        if isinstance(part, Context):
            for parameter, uses in part.uses.items():
                total[parameter] = total.get(parameter, 0) + uses
        elif part is not None and part.trainable:
            total[part] = total.get(part, 0) + 1
    return total


def check_gradient(layer: Module, dy: Array, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the gradient by a layer's output has the shape of the output."""
    if dy.shape != shape:
        raise ValueError(
            f"{type(layer).__name__}.backward: expected dy of the output's shape, {shape}, got "
            f"{dy.shape}"
        )


_under_construction: set[int] = set()
"""The identities of the modules whose outermost constructor has not ended."""


def _labelling(constructor: Callable[..., None]) -> Callable[..., None]:
    """Let a constructor end by labelling the tree below its module.

    The outermost module is built last, so names and layer indices end up as positions in the
    whole model, and no author of a module can forget to assign them.
    """

    @functools.wraps(constructor)
    def wrapper(self: Module, *args: Any, **kwargs: Any) -> None:
        if id(self) in _under_construction:  # the constructor of a subclass has called this one
            constructor(self, *args, **kwargs)
            return
        # Not in the module: a constructor may copy it, or exchange all that it holds.
        _under_construction.add(id(self))
        try:
            constructor(self, *args, **kwargs)
        finally:
            _under_construction.discard(id(self))
        self.relabel()

    return wrapper


class Module(ABC):
    """A function with parameters and an explicit backward pass.

    Notes
    -----
    Arrays of samples have the batch as their first axis, and every module accepts a batch of no
    samples. `x` and `dy` are never written to; `dx` has the shape of `x`. A context is not
    used up: it may be dropped, or run backward more than once.

    A constructor ends by naming the parameters and numbering the leaves of the tree below it, so
    that the outermost module, built last, decides. It raises if parameters or modules are where
    they have no name that all ranks share: in sets, as keys of dicts, in arrays. Objects that are
    no modules are not looked into. Modules that are added or exchanged later have no names and
    numbers yet: call `relabel` on the outermost module then. Building another module around a part
    of a model numbers that part anew, in place.
    """

    buffer_names: ClassVar[tuple[str, ...]] = ()
    draws_by_index: ClassVar[bool] = False
    """Whether the layer's output depends on `layer_index`."""
    elementwise_blocks: ClassVar[int] = 0
    """Of how many equal blocks of the last axis an element of the output depends on one element
    each: 1 of an elementwise function, 2 of a gate; 0: on more than these."""
    layer_index: int | None = None
    """Position among the tree's leaves, which random layers draw by; None before `relabel`."""
    _is_labelled: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _labelling(vars(cls)["__init__"])  # type: ignore[method-assign]
        # Of a dataclass, also where it comes from a class that is no module.
        owner = next(base for base in cls.__mro__ if "__post_init__" in vars(base))
        if owner is cls or not issubclass(owner, Module):
            cls.__post_init__ = _labelling(vars(owner)["__post_init__"])  # type: ignore[method-assign]

    @_labelling  # noqa: B027  # nothing, unless it is overridden
    def __post_init__(self) -> None:
        """End the constructor of a dataclass, which is made after the class."""

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        """Say what to write: a pass has two results, and needs a mode.

        Raises
        ------
        TypeError
            Always.
        """
        raise TypeError(
            f"{type(self).__name__} is not called: write y, ctx = model.forward(x, Mode("
            "training=True, seed=seed, step=step)) and model.backward(ctx, dy) to train, and y, _ "
            "= model.forward(x, EVAL) to use it"
        )

    if not TYPE_CHECKING:  # which would take every name for an attribute

        def __getattr__(self, name: str) -> NoReturn:
            """Say what a method of other packages is here."""
            hint = f"; here it is {SUBSTITUTES[name]}" if name in SUBSTITUTES else ""
            raise AttributeError(
                f"'{type(self).__name__}' object has no attribute '{name}'{hint}",
                name=name,
                obj=self,
            )

    def __repr__(self) -> str:
        """Return the tree of modules, with shapes and numbers of elements."""
        return render_tree(self)

    @abstractmethod
    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Compute the output and what backward will need.

        Parameters
        ----------
        x : Array, shape (batch, ...)
            The input; kept by reference in the context, so it must not change before backward.
        mode : Mode
            Training or not, and what random numbers depend on.

        Returns
        -------
        y : Array
            The output.
        ctx : Context
            Belongs to the caller.
        """

    @abstractmethod
    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        """Compute the input's gradient without touching any parameter's.

        Parameters
        ----------
        ctx : Context
            What `forward` returned for these samples.
        dy : Array, shape of the output
            Gradient of the loss by the output.

        Returns
        -------
        dx : Array, shape of the input
            Gradient by the input. Zeros where the input is integer.
        wctx : object
            For `backward_weight`.
        """

    @abstractmethod
    def backward_weight(self, wctx: Any) -> None:
        """Add this pass's contributions to the parameters' gradients.

        Parameters
        ----------
        wctx : object
            What `backward_input` returned for these samples.
        """

    def backward(self, ctx: Context, dy: Array) -> Array:
        """Run both halves of the backward pass, with the same bits as the halves.

        Parameters
        ----------
        ctx : Context
            What `forward` returned for these samples.
        dy : Array, shape of the output
            Gradient of the loss by the output.

        Returns
        -------
        Array, shape of the input
            Gradient by the input.
        """
        dx, wctx = self.backward_input(ctx, dy)
        self.backward_weight(wctx)
        return dx

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Yield the modules held directly: in attributes, lists (`name.0`), dicts (`name.key`).

        A wrapper that is no part of names, such as `Recompute`, yields what it wraps as "".
        """
        return children_of(self)

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """Yield this module as "" and all below it, parents first, a shared one once.

        What a `Recompute` wraps has the same name as the `Recompute`, and follows it.
        """
        return _walk(self, "", set())

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Yield (qualified name, parameter) in order of definition.

        Yields
        ------
        tuple of str and Parameter
            A parameter held in several places is yielded once, under its first name.

        Raises
        ------
        RuntimeError
            If two random layers below have one `layer_index`, so that they would draw the same.
        TypeError, ValueError
            If a parameter or a module cannot be named: it is in a set, an array, or a dict whose
            keys are no parts of names.
        """
        if self._is_labelled:  # a constructor may list what it has so far
            self._check_labels()
        return self._walk_parameters()

    def _walk_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Yield all parameters; then raise if modules hold some that have no name."""
        seen: set[Parameter] = set()
        modules = tuple(self.named_modules())
        for prefix, module in modules:
            for attribute, value in vars(module).items():
                for name, member in members(attribute, value, (Parameter, Module)):
                    if isinstance(member, Parameter) and member not in seen:
                        seen.add(member)
                        yield _join(prefix, name), member
        named = {id(module) for _, module in modules}.union(map(id, seen))
        for prefix, module in modules:
            for attribute, value in vars(module).items():
                for where, member in nameless(value, (Parameter, Module)):
                    if id(member) not in named:
                        raise TypeError(
                            f"{type(self).__name__}: '{_join(prefix, attribute)}' holds a "
                            f"{type(member).__name__} in {where}, where it has no name, so it "
                            "would not be trained; hold it as an attribute, or in a list, tuple or "
                            "dict"
                        )

    def parameters(self) -> Iterator[Parameter]:
        """Yield the parameters, a shared one once."""
        return (parameter for _, parameter in self.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, Array]]:
        """Yield (qualified name, array) of the state that is not trained.

        Yields
        ------
        tuple of str and Array
            The array itself, which its module only ever changes in place.
        """
        for prefix, module in self.named_modules():
            for name in module.buffer_names:
                yield _join(prefix, name), getattr(module, name)

    def zero_grad(self) -> None:
        """Forget all gradients; no memory is touched."""
        for parameter in self.parameters():
            parameter.zero_grad()

    def to(self, device: str) -> None:
        """Put parameters and buffers into the memory of a GPU or of the host, in place.

        Parameters
        ----------
        device : str
            ``"gpu"``: this thread's current one, which `mpidist.init` has chosen. ``"cpu"``.

        Raises
        ------
        ValueError
            If `device` is something else.
        UnsupportedOperationError
            If cupy is not installed.
        RuntimeError
            If gradients are being reduced.

        Notes
        -----
        Local. Before a `DDP` or an optimizer is made of the parameters: those hold on to the arrays
        that they find. `Parameter.data` and the buffers are other arrays afterwards; gradients
        are forgotten, and so is their memory. What lies there already stays as it is, gradients
        included. The model's inputs have to lie in the same memory.
        """
        moves = {"gpu": to_device, "cpu": to_host}
        if device not in moves:
            raise ValueError(f"Module.to: expected 'gpu' or 'cpu', got {device!r}")
        for parameter in self.parameters():
            parameter.move(moves[device])
        for _, module in self.named_modules():
            for name in module.buffer_names:
                moved = moves[device](getattr(module, name))
                object.__setattr__(module, name, moved)  # a frozen dataclass may be a layer

    def relabel(self, *, prefix: str = "", first_layer: int = 0) -> None:
        """Set the names of the parameters and the layer indices of the leaves below.

        Parameters
        ----------
        prefix : str, optional
            Name of this module in the whole model.
        first_layer : int, optional
            Index of the first leaf in the whole model.

        Notes
        -----
        Done whenever a module is built, so it is only needed for a part of a model that must
        behave as it does within the whole, and on the outermost module after children have been
        added to a built one or a part has been built into another module, which numbers it anew
        in place. Only modules without children are counted: wrapping a layer (`Recompute`,
        `Residual`) does not change what it draws.
        """
        for name, parameter in self._walk_parameters():
            parameter.name = _join(prefix, name)
        leaves = (m for _, m in self.named_modules() if not any(m.named_children()))
        for index, leaf in enumerate(leaves, start=first_layer):
            object.__setattr__(leaf, "layer_index", index)  # a frozen dataclass may be a layer
        object.__setattr__(self, "_is_labelled", True)

    def _check_labels(self) -> None:
        """Refuse two layers that would draw the same: one was added after the tree was built."""
        names: dict[int | None, str] = {}
        for name, module in self.named_modules():
            if module.draws_by_index and names.setdefault(module.layer_index, name) != name:
                raise RuntimeError(
                    f"{type(self).__name__}: the random layers '{names[module.layer_index]}' and "
                    f"'{name}' have the same layer_index, {module.layer_index}, and would draw the "
                    "same numbers; call relabel() on the outermost module after adding to it"
                )

    def state_dict(self) -> dict[str, Any]:
        """Return parameters and buffers by qualified name.

        Returns
        -------
        dict of str to (Array or ShardedArray)
            The live arrays, not copies. A shared parameter appears once, under its first name; one
            that is a `Part` of a whole array appears as a `ShardedArray` of it.
        """
        state: dict[str, Any] = {
            name: p.data if p.part is None else p.part.sharded(p.data)
            for name, p in self.named_parameters()
        }
        return state | dict(self.named_buffers())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy values into the parameters and buffers, in place.

        Parameters
        ----------
        state : mapping of str to (Array or ShardedArray)
            As `state_dict` gives it: the same names, shapes and dtypes. Whole arrays, or parts
            that have all elements which are here. Names that contain the ``inner`` of a
            wrapper, as earlier versions wrote them, are understood, too.

        Raises
        ------
        ValueError
            Listing every name that is missing or unknown and every shape or dtype that differs, or
            naming a parameter that is read-only because its memory is shared; nothing has been
            changed then.
        """
        own = self.state_dict()
        state = with_present_names(state, own)
        self.check_state_dict(state)
        held = {name: _as_sharded(array) for name, array in own.items()}
        for name, sharded in held.items():
            arrays = sharded.pieces.values()
            if not all(getattr(array.flags, "writeable", True) for array in arrays):  # cupy's are
                raise ValueError(
                    f"load_state_dict: '{name}' is read-only: other processes see this memory, and "
                    "the optimizer that made it so writes it; nothing was changed. Load through "
                    "FSDP or ShardedOptimizer.model_state on all ranks, or give the parameter "
                    "memory of its own first (parameter.data = parameter.data.copy())"
                )
        check_held("load_state_dict", held, state)
        copy_in(held, state)

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise unless `load_state_dict` could take these values.

        Parameters
        ----------
        state : mapping of str to Array
            As `state_dict` gives it: the same names, shapes and dtypes.

        Raises
        ------
        ValueError
            Listing every name that is missing or unknown and every shape or dtype that differs.
        """
        check_fits(type(self).__name__, self.state_dict(), state)


class ParameterFree(Module):
    """A module that holds no parameters."""

    def backward_weight(self, wctx: Any) -> None:
        """Nothing to add."""


def children_of(module: Module, *, but: str = "") -> Iterator[tuple[str, Module]]:
    """Yield the modules in the attributes of a module, but for those of one attribute."""
    for attribute, value in vars(module).items():
        if attribute != but and type(value) is not Parameter:  # the most frequent ones
            for name, member in members(attribute, value, (Parameter, Module)):
                if not isinstance(member, Parameter):
                    yield name, member


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _walk(module: Module, name: str, seen: set[int]) -> Iterator[tuple[str, Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    yield name, module
    for child_name, child in module.named_children():
        yield from _walk(child, _join(name, child_name), seen)


def _as_sharded(array: Array | ShardedArray) -> ShardedArray:
    if isinstance(array, ShardedArray):
        return array
    return ShardedArray(array.shape, array.dtype, {Box.whole(array.shape): array})


def check_fits(model: str, own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the model, unless a state has the names, shapes and dtypes of `own`.

    All names that are missing or unknown, and all shapes and dtypes that differ, are listed.
    """
    state = with_present_names(state, own)
    problems = [f"{name}: missing" for name in own if name not in state]
    problems += [f"{name}: not in this model" for name in state if name not in own]
    for name, array in own.items():
        given = state.get(name)
        if given is not None and (given.shape, given.dtype) != (array.shape, array.dtype):
            problems.append(
                f"{name}: expected {array.shape} {array.dtype}, got {given.shape} {given.dtype}"
            )
    if problems:
        raise ValueError(
            f"load_state_dict: the state does not fit {model}; nothing was changed:\n  "
            + "\n  ".join(problems)
        )
