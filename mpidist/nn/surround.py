"""Code around the passes of any module, by which strategies hook into models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from mpidist.nn.module import Module

PASSES = ("forward", "backward", "backward_input", "backward_weight")
"""The methods of a module that compute."""

BACKWARD_PASSES = PASSES[1:]
"""Those of them that are backward passes: the whole one, and its halves."""


def surround(
    module: Module, around: Callable[[str, Callable[[], Any]], Any], passes: Sequence[str] = PASSES
) -> AbstractContextManager[None]:
    """Put something around each pass of a module, inside a ``with`` block.

    Parameters
    ----------
    module : Module
        Any module, whether it overrides `Module.backward` or not.
    around : callable
        Called as ``around(name, run)`` in place of the pass of that name, on any call of it.
        Returns what ``run()`` returns, or something else in its place. A pass within a pass of the
        same module, such as the halves within `Module.backward`, is a part of the outer one.
    passes : sequence of str, optional
        Which of the passes.

    Returns
    -------
    context manager
        It may be entered again after it has been left.

    Notes
    -----
    For the strategies, which have to do something before or after a module computes: gather its
    parameters, let messages make progress, look at its results. Several may surround one module;
    the last one is the outermost. Attributes of the object hide the methods meanwhile, so type,
    names and parameters stay what they are.
    """
    return _Surround(module, around, passes)


class _Surround:
    """Hides the passes of a module behind attributes of the same names."""

    def __init__(
        self,
        module: Module,
        around: Callable[[str, Callable[[], Any]], Any],
        passes: Sequence[str],
    ) -> None:
        self._module = module
        self._methods: dict[str, Callable[..., Any]] = {}
        self._hidden: dict[str, Any] = {}
        # They do not refer to this object, which then goes with the last reference to it.
        inside: set[str] = set()
        self._shadows = {name: _shadow(name, self._methods, around, inside) for name in passes}

    def __enter__(self) -> None:
        attributes = vars(self._module)  # not by setattr: a frozen dataclass may be a layer
        self._hidden = {name: attributes[name] for name in self._shadows if name in attributes}
        if self._hidden or not self._methods:  # else they are those of the last time
            self._methods.update((name, getattr(self._module, name)) for name in self._shadows)
        attributes.update(self._shadows)

    def __exit__(self, *error: object) -> None:
        attributes = vars(self._module)
        for name in self._shadows:
            del attributes[name]
        if self._hidden:
            attributes.update(self._hidden)
            self._methods.clear()


def _shadow(
    name: str,
    methods: Mapping[str, Callable[..., Any]],
    around: Callable[[str, Callable[[], Any]], Any],
    inside: set[str],
) -> Callable[..., Any]:
    """Return what is called instead of a pass; `inside` holds the pass that is being run."""

    def call(*args: Any, **kwargs: Any) -> Any:
        method = methods[name]
        if inside:
            return method(*args, **kwargs)
        inside.add(name)
        try:
            return around(name, lambda: method(*args, **kwargs))
        finally:
            inside.clear()

    return call


def after_passes(
    modules: Iterable[Module], call: Callable[[], None], passes: Sequence[str] = PASSES
) -> AbstractContextManager[None]:
    """Call `call` at the end of each pass of these modules, inside a ``with`` block.

    Parameters
    ----------
    modules : iterable of Module
        Any modules. Halves of the backward pass that are run alone count, each.
    call : callable
        Takes nothing. What is to be done between the layers of a model, such as letting
        communication make progress.
    passes : sequence of str, optional
        Which of the passes.

    Returns
    -------
    context manager
        It may be entered again after it has been left.
    """

    def around(_: str, run: Callable[[], Any]) -> Any:
        result = run()
        call()
        return result

    surrounds = [_Surround(module, around, passes) for module in modules]
    return _Together(surrounds) if surrounds else nullcontext()


class _Together:
    """Several surrounds, entered and left together."""

    def __init__(self, surrounds: Sequence[_Surround]) -> None:
        self._surrounds = surrounds

    def __enter__(self) -> None:
        for surround in self._surrounds:
            surround.__enter__()

    def __exit__(self, *error: object) -> None:
        for surround in reversed(self._surrounds):
            surround.__exit__()
