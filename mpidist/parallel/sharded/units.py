"""`Unit`: parameters that stand and travel together; how a model is cut into units.

[Note: units] A unit is what stands or travels as one: its parameters lie in one flat array, its
gradients fill one message buffer. So a rank needs memory for two units beside its own slices. Units
are subtrees of the model, since those are needed together, and end together in the backward pass.
Parameters too small to be worth a message stay with the module around. A parameter that two units
would hold, a tied one, is a unit of its own. So is one that another stage of a pipeline holds, too:
all stages cut it into the same slices then, and a checkpoint takes those of any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TypeAlias

import numpy as np

from mpidist._types import Array, DType
from mpidist.nn.containers import Sequential
from mpidist.nn.members import members
from mpidist.nn.module import Module
from mpidist.nn.parameter import Parameter
from mpidist.parallel.data.buckets import BucketSizes, assign_buckets
from mpidist.parallel.sharded.flat_parameters import Cut, FlatLayout

__all__ = ["UNIT_BYTES", "Stage", "Unit", "Units", "find_stages", "find_units", "tied_over_parts"]

UNIT_BYTES = 32 << 20
"""Most bytes of parameters in a unit: large messages, and memory for two of them."""

_SMALL_BYTES = 64 << 10
"""What is smaller is left to the module around: a message costs as much as these bytes."""

Units: TypeAlias = "int | Sequence[str] | Callable[[str, Module], bool] | BucketSizes"
"""How a model is cut: the most bytes of a unit, names of modules (with ``*``), or a function of a
module's name and the module. `BucketSizes` cuts the list of parameters, whatever the modules."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Parameters of one dtype that stand and travel together, all trainable or all frozen.

    Attributes
    ----------
    name : str
        That of its module, where it has one; "" of what is left to the outermost one.
    modules : tuple of str
        Names of the modules that need it: in their passes it is whole.
    parameters : tuple of str
        Names of the parameters.
    nbytes : int
        Bytes of the parameters.
    dtype : dtype
        Of the parameters, as the layers see them.
    trainable : bool
        Whether they have gradients.
    """

    name: str
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    nbytes: int
    dtype: DType
    trainable: bool

    def layout(self, arrays: Mapping[str, Array], cut: Cut) -> FlatLayout:
        """Return how its parameters lie in a flat array of its dtype."""
        return FlatLayout.of(
            {name: arrays[name] for name in self.parameters}, cut, dtype=self.dtype
        )

    def stored_in(self, dtype: DType) -> Unit:
        """Return this unit with its parameters in another dtype."""
        return replace(
            self, nbytes=self.nbytes // self.dtype.itemsize * dtype.itemsize, dtype=dtype
        )


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """Units that are needed together, by modules of which none holds one that needs others.

    Attributes
    ----------
    name : str
        Of the units.
    units : tuple of int
        Their indices.
    modules : tuple of Module
        In the passes of each of them the units are whole.
    """

    name: str
    units: tuple[int, ...]
    modules: tuple[Module, ...]


def find_units(module: Module, units: Units) -> tuple[Unit, ...]:
    """Cut a model into units.

    Parameters
    ----------
    module : Module
        The model.
    units : int, sequence of str, callable or BucketSizes
        How. An int: the largest subtrees that hold at most so many bytes of parameters are units,
        neighbours together if they fit; a larger layer is cut between its parameters, and a unit
        may be a 64th longer than the bytes, or than its largest parameter, so that a bias stays
        with its weight; modules of less than 64 KiB stay with the module around. Names or a
        callable: these modules are units, one inside another without it, and all other parameters
        are one unit.

    Returns
    -------
    tuple of Unit
        In the order in which a forward pass needs them, as far as the order of definition tells.
        Each parameter is in one of them.

    Raises
    ------
    ValueError
        If the number is not positive, or a name matches no module.
    TypeError
        If `units` is something else.
    """
    named = dict(module.named_parameters())
    if isinstance(units, BucketSizes):
        apart = tied_over_parts(module)
        rest = {name: p for name, p in named.items() if name not in apart}
        kinds = [{n: p.data for n, p in rest.items() if p.trainable is t} for t in (True, False)]
        buckets = [[name] for name in named if name in apart]
        buckets += [names for arrays in kinds for names in assign_buckets(arrays, units)[::-1]]
        return tuple(
            _unit(f"bucket {i}", ("",), {name: named[name] for name in names})
            for i, names in enumerate(buckets)
        )
    limit = None
    if isinstance(units, (int, np.integer)) and not isinstance(units, bool):
        limit = int(units)
    is_unit = _rule(module, units) if limit is None else _small_enough(module, limit)
    names_of = {parameter: name for name, parameter in named.items()}
    groups: dict[tuple[tuple[str, ...], DType, bool], list[str]] = {}
    for parameter, modules in _needed_by(module, is_unit, nested=limit is None).items():
        kind = (("",) if "" in modules else modules, parameter.dtype, parameter.trainable)
        groups.setdefault(kind, []).append(names_of[parameter])
    result = []
    for (modules, _, _), names in groups.items():
        title = " + ".join(modules) or "(outermost)"
        chunks = list(_chunks({name: named[name] for name in names}, limit))
        several = len(chunks) > 1 or sum(kind[0] == modules for kind in groups) > 1
        for chunk in chunks:
            first = f", {next(iter(chunk))}" if several else ""
            result.append(_unit(title + first, modules, chunk))
    position = {name: i for i, name in enumerate(named)}
    result.sort(key=lambda unit: min(position[name] for name in unit.parameters))
    return tuple(result if limit is None else _joined(result, limit))


def tied_over_parts(module: Module) -> frozenset[str]:
    """Return the names of parameters that other parts of a whole model hold, too."""
    return frozenset(module.tied.values() if isinstance(module, Sequential) else ())


def find_stages(module: Module, units: Sequence[Unit]) -> tuple[Stage, ...]:
    """Return what can be made whole for the passes of some modules alone.

    Parameters
    ----------
    module : Module
        The model.
    units : sequence of Unit
        As `find_units` has cut it.

    Returns
    -------
    tuple of Stage
        In the order of the units. Those in none of them are needed while others are, by modules
        around others: by the outermost one, for instance.
    """
    named = _by_name(module)
    needs: dict[int, tuple[Module, set[int]]] = {}
    for index, unit in enumerate(units):
        for name in unit.modules:
            needs.setdefault(id(named[name]), (named[name], set()))[1].add(index)
    stay: set[int] = set()
    for part, own in needs.values():
        within = [needs[id(m)][1] for _, m in part.named_modules() if id(m) in needs]
        if part is module or any(inner != own for inner in within):
            stay |= own
    stages: dict[tuple[int, ...], list[Module]] = {}
    for part, own in needs.values():
        if own - stay:
            stages.setdefault(tuple(sorted(own - stay)), []).append(part)
    return tuple(
        Stage(" and ".join(units[i].name for i in indices), indices, tuple(modules))
        for indices, modules in sorted(stages.items(), key=lambda stage: stage[0])
    )


def _by_name(module: Module) -> dict[str, Module]:
    """Return the modules by all their names; of a wrapper and what it wraps, the wrapper."""
    named: dict[str, Module] = {}

    def walk(part: Module, name: str, around: frozenset[int]) -> None:
        named.setdefault(name, part)
        around |= {id(part)}
        for child_name, child in part.named_children():
            if id(child) not in around:
                walk(child, ".".join(filter(None, (name, child_name))), around)

    walk(module, "", frozenset())
    return named


def _joined(units: Sequence[Unit], limit: int) -> Iterator[Unit]:
    """Join neighbours under one module, as long as they hold no more than the limit together."""
    joined: list[Unit] = []
    for unit in units:
        if joined and not _fits(joined, unit, limit):
            yield _join(joined)
            joined = []
        joined.append(unit)
    yield _join(joined)


def _fits(joined: Sequence[Unit], unit: Unit, limit: int) -> bool:
    first = joined[0]
    alike = (first.dtype, first.trainable) == (unit.dtype, unit.trainable)
    # Tied parameters, and those of the outermost module, are needed at other times.
    alone = len(first.modules) == len(unit.modules) == 1 and first.modules[0] and unit.modules[0]
    same = first.modules[0].rpartition(".")[0] == unit.modules[0].rpartition(".")[0]
    total = sum(other.nbytes for other in joined) + unit.nbytes
    return bool(alike and alone and same and total <= limit)


def _join(units: Sequence[Unit]) -> Unit:
    if len(units) == 1:
        return units[0]
    modules = tuple(dict.fromkeys(name for unit in units for name in unit.modules))
    return Unit(
        f"{modules[0]} to {modules[-1]}",
        modules,
        tuple(name for unit in units for name in unit.parameters),
        sum(unit.nbytes for unit in units),
        units[0].dtype,
        units[0].trainable,
    )


def _unit(name: str, modules: tuple[str, ...], parameters: Mapping[str, Parameter]) -> Unit:
    first = next(iter(parameters.values()))
    nbytes = sum(parameter.nbytes for parameter in parameters.values())
    return Unit(name, modules, tuple(parameters), nbytes, first.dtype, first.trainable)


def _small_enough(module: Module, limit: int) -> Callable[[str, Module], bool]:
    """Return a function that says which modules are units of at most so many bytes."""
    if limit < 1:
        raise ValueError(f"FSDP: units must be a positive number of bytes, got {limit}")

    if sum(parameter.nbytes for parameter in module.parameters()) <= limit:
        return lambda *_: False  # the outermost one is

    def is_unit(_: str, part: Module) -> bool:
        nbytes = sum(parameter.nbytes for parameter in part.parameters())
        is_leaf = not any(any(child.parameters()) for _, child in part.named_children())
        return nbytes >= min(_SMALL_BYTES, limit) and (nbytes <= limit or is_leaf)

    return is_unit


def _rule(module: Module, units: Units) -> Callable[[str, Module], bool]:
    """Return a function that says which modules the user has chosen."""
    if callable(units) and not isinstance(units, type):
        return units
    if (
        isinstance(units, str)
        or not isinstance(units, Sequence)
        or not all(isinstance(name, str) for name in units)
    ):
        raise TypeError(
            "FSDP: units must be a number of bytes, a list of names of modules, or a function of a "
            "name and a module, such as lambda name, module: isinstance(module, Linear); got "
            f"{units!r}"
        )
    patterns, known = tuple(units), [name for name, _ in module.named_modules()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(
                f"FSDP: units={list(patterns)}: no module is named {pattern!r}; the modules are "
                f"{', '.join(known[1:9])}{', ...' if len(known) > 9 else ''}"
            )
    return lambda name, _: any(fnmatchcase(name, pattern) for pattern in patterns)


def _needed_by(
    module: Module, is_unit: Callable[[str, Module], bool], *, nested: bool
) -> dict[Parameter, tuple[str, ...]]:
    """Return the names of the units' modules whose passes need each parameter; "": the outermost.

    Of several on the way down to a parameter the innermost counts if `nested`, else the first.
    """
    needed: dict[Parameter, dict[str, None]] = {}

    def walk(part: Module, name: str, within: str, around: frozenset[int]) -> None:
        for parameter in _held_directly(part):
            needed.setdefault(parameter, {})[within] = None
        around |= {id(part)}
        for child_name, child in part.named_children():
            if id(child) in around:
                continue  # a module may hold one that it is within
            path = ".".join(filter(None, (name, child_name)))
            # A Recompute and what it wraps have one name, and are one.
            begins = (nested or not within) and path != name and is_unit(path, child)
            walk(child, path, path if begins else within, around)

    walk(module, "", "", frozenset())
    return {parameter: tuple(names) for parameter, names in needed.items()}


def _held_directly(module: Module) -> Iterator[Parameter]:
    for attribute, value in vars(module).items():
        for _, member in members(attribute, value, (Parameter, Module)):
            if isinstance(member, Parameter):
                yield member


def _chunks(
    parameters: Mapping[str, Parameter], limit: int | None
) -> Iterator[dict[str, Parameter]]:
    """Cut a list of parameters into lists of at most `limit` bytes, or of a larger one.

    Each may be a 64th longer, so that a bias is no message beside that of its weight.
    """
    chunk: dict[str, Parameter] = {}
    for name, parameter in parameters.items():
        sizes = [p.nbytes for p in (*chunk.values(), parameter)]
        if limit is not None and chunk and 64 * sum(sizes) > 65 * max(limit, *sizes):
            yield chunk
            chunk = {}
        chunk[name] = parameter
    yield chunk
