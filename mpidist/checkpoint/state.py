"""The state of a program as arrays and values by name, taken from objects and given back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from mpidist._types import Array, DType
from mpidist.arrays.namespaces import DTYPES, is_array
from mpidist.arrays.shards import ShardedArray
from mpidist.checkpoint.format.manifest import (
    FLOAT_KEY,
    JSON,
    nested,
    problem_with_name,
    problem_with_shape,
)
from mpidist.errors import CheckpointIncompatibleError, UnsupportedOperationError
from mpidist.mesh import DTensor


@runtime_checkable
class Stateful(Protocol):
    """An object that can be saved: modules, optimizers, samplers, anyone's own."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return all that it needs to continue.

        Returns
        -------
        mapping of str to Any
            Arrays (they may be the living ones), `DTensor`, `ShardedArray`, JSON values, mappings
            and lists of such.
        """

    def load_state_dict(self, state: Any, /) -> object:
        """Continue from what `state_dict` returned, perhaps in another process."""


State: TypeAlias = Mapping[str, Any]
"""What is saved, by name: arrays, `DTensor`, `ShardedArray`, JSON values, `numpy.random.Generator`,
objects that are `Stateful`, and mappings, lists and tuples of such."""


@dataclass
class FlatState:
    """A state as a checkpoint keeps it: one name for each array and each value.

    Attributes
    ----------
    arrays : dict of str to (Array or ShardedArray)
        The arrays themselves, not copies.
    values : dict of str to JSON value
        Everything that is not an array.
    inside : set of str
        Names of what belongs to an object, which takes it by `load_state_dict`.
    objects : set of str
        Names of the objects that are `Stateful`.
    lists : set of str
        Names of the lists and tuples in which arrays are: all items of one are saved and loaded.
    """

    arrays: dict[str, Array | ShardedArray] = field(default_factory=dict)
    values: dict[str, JSON] = field(default_factory=dict)
    inside: set[str] = field(default_factory=set)
    objects: set[str] = field(default_factory=set)
    lists: set[str] = field(default_factory=set)


class _GeneratorState:
    """A random generator of numpy, with the methods of a `Stateful` object."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._bits = generator.bit_generator

    def state_dict(self) -> Mapping[str, Any]:
        return self._bits.state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        try:
            self._bits.state = state
        except (ValueError, KeyError) as error:
            raise ValueError(f"the state of a {type(self._bits).__name__}: {error}") from error


def flatten(state: State) -> FlatState:
    """Take a state apart that is to be saved, or loaded into.

    Names inside objects and mappings are joined by ``/``; items of lists and tuples have their
    positions for names, counted from 0. What has no array in it is one value.

    Raises
    ------
    UnsupportedOperationError
        If something is of a kind or dtype that cannot be kept, or a name is none or comes twice.
    """
    flat = FlatState()
    for name, value in state.items():
        _add(flat, _checked(name), value)
    check_nesting(flat.arrays)
    return flat


def check_nesting(names: Collection[str]) -> None:
    """Raise UnsupportedOperationError if an array's name is a part of another's path.

    A dataset cannot be a group, and a program that reads the file shall find each under its name.
    """
    pair = nested(names)
    if pair is not None:
        raise UnsupportedOperationError(
            f"checkpoint: {pair[0]!r} is an array, so that {pair[1]!r} cannot be inside it; "
            "rename one"
        )


def _add(flat: FlatState, name: str, value: Any) -> None:
    if isinstance(value, np.random.Generator):
        value = _GeneratorState(value)
    if isinstance(value, DTensor):
        value = _sharded(name, value)
    if is_array(value) or isinstance(value, ShardedArray):
        if isinstance(value, np.ma.MaskedArray):
            raise UnsupportedOperationError(
                f"checkpoint: {name!r} is a masked array, whose mask would be lost; keep its data "
                "and its mask"
            )
        if not _can_be_kept(value.dtype):
            raise UnsupportedOperationError(
                f"checkpoint: {name!r} has dtype {value.dtype}, which a checkpoint cannot "
                "keep; convert it to numbers first"
            )
        problem = problem_with_shape(tuple(value.shape), value.dtype.itemsize)
        if problem is not None:
            raise UnsupportedOperationError(f"checkpoint: {name!r} has {problem}")
        _put(flat.arrays, flat, name, value)
    elif isinstance(value, Stateful):
        flat.objects.add(name)
        before = flat.arrays.keys() | flat.values.keys()
        _add(flat, name, value.state_dict())
        flat.inside |= (flat.arrays.keys() | flat.values.keys()) - before
    elif isinstance(value, Mapping) and _holds_arrays(value):
        for key, item in value.items():
            _add(flat, f"{name}/{_checked(key)}", item)
    elif isinstance(value, (list, tuple)) and _holds_arrays(value):
        flat.lists.add(name)
        for number, item in enumerate(value):
            _add(flat, f"{name}/{number}", item)
    else:
        _put(flat.values, flat, name, as_json(name, value))


def _sharded(name: str, value: DTensor) -> ShardedArray:
    try:
        return value.sharded()
    except UnsupportedOperationError as error:
        raise UnsupportedOperationError(f"checkpoint: {name!r}: {error}") from None


@cache
def _can_be_kept(dtype: DType) -> bool:
    return dtype.newbyteorder("=") in DTYPES


def _put(where: dict[str, Any], flat: FlatState, name: str, value: Any) -> None:
    if name in flat.arrays or name in flat.values:
        raise UnsupportedOperationError(f"checkpoint: the name {name!r} comes twice; rename one")
    where[name] = value


def _checked(name: object) -> str:
    """Return a name that may be a path in an HDF5 file."""
    if not isinstance(name, str):
        raise UnsupportedOperationError(f"checkpoint: {name!r} cannot be a name; expected text")
    problem = problem_with_name(name)
    if problem is not None:
        raise UnsupportedOperationError(f"checkpoint: {problem}")
    if name == FLOAT_KEY:
        raise _taken("the state")
    return name


def _taken(where: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(
        f"checkpoint: {where} has the key {FLOAT_KEY!r}, by which a manifest writes inf and nan; "
        "rename it"
    )


def _holds_arrays(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_arrays, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_arrays, value))
    return is_array(value) or isinstance(
        value, (DTensor, ShardedArray, Stateful, np.random.Generator)
    )


def as_json(name: str, value: Any) -> JSON:
    """Return a value as JSON would give it back; tuples become lists, numpy's numbers Python's."""
    if isinstance(value, np.generic):
        value = value.item()  # also of numpy's float64, which is a float
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping) and FLOAT_KEY in value:
        raise _taken(repr(name))
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: as_json(f"{name}/{key}", item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(f"{name}[{i}]", item) for i, item in enumerate(value)]
    raise UnsupportedOperationError(
        f"checkpoint: {name!r} is a {type(value).__module__}.{type(value).__qualname__}; expected "
        "an array, a DTensor, a ShardedArray, a JSON value, a numpy.random.Generator, or an object "
        "with state_dict and load_state_dict"
    )


def restore(state: State, arrays: Mapping[str, Any], values: Mapping[str, JSON]) -> None:
    """Give the objects of a state what has been loaded, in the order of their names.

    `arrays` and `values` are what a checkpoint has under the names of `flatten`. Raises
    CheckpointIncompatibleError if an object refuses it.
    """
    for name in sorted(state):
        _restore(name, state[name], arrays, values)


_ABSENT: Any = object()
"""In place of a value that the checkpoint does not have."""


def _restore(name: str, value: Any, arrays: Mapping[str, Any], values: Mapping[str, JSON]) -> Any:
    """Return what stands for `value` in the state dict that holds it."""
    if isinstance(value, np.random.Generator):
        value = _GeneratorState(value)
    if is_array(value) or isinstance(value, (DTensor, ShardedArray)):
        return arrays[name]
    if isinstance(value, Stateful):
        loaded = _restore(name, value.state_dict(), arrays, values)
        try:
            value.load_state_dict(loaded)
        except ValueError as error:
            raise CheckpointIncompatibleError(
                f"load: {name!r} does not take what was saved under this name: {error}; make it "
                "with the arguments of the run that was saved"
            ) from error
        return loaded
    if isinstance(value, Mapping) and _holds_arrays(value):
        parts = {key: _restore(f"{name}/{key}", v, arrays, values) for key, v in value.items()}
        return {key: part for key, part in parts.items() if part is not _ABSENT}
    if isinstance(value, (list, tuple)) and _holds_arrays(value):
        items = [_restore(f"{name}/{n}", item, arrays, values) for n, item in enumerate(value)]
        if isinstance(value, list):
            return items
        return value._make(items) if hasattr(value, "_make") else tuple(items)
    return values.get(name, _ABSENT)
