"""What optimizers and clipping take: a model, or parameters with or without names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

from mpidist.nn.parameter import Parameter

__all__ = ["HasParameters", "Parameters", "named_list"]


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
