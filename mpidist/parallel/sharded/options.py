"""`FSDPOptions`: the arguments of an FSDP, the same on all ranks."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum

from mpidist._types import MEAN, SUM, ReduceOp
from mpidist.arrays.namespaces import BFLOAT16, REDUCTIONS, is_device
from mpidist.errors import UnsupportedOperationError
from mpidist.group import ProcessGroup
from mpidist.mesh import DeviceMesh
from mpidist.nn.module import Module
from mpidist.nn.parameter import Parameter
from mpidist.parallel.data.verify import Description, describe, verify_same
from mpidist.parallel.sharded.flat_parameters import Cut
from mpidist.parallel.sharded.parameter_shards import HOST, check_can_be_sharded
from mpidist.parallel.sharded.precision import Precision
from mpidist.parallel.sharded.units import Unit, Units, find_units

__all__ = ["FSDPOptions", "ShardingStrategy"]


class ShardingStrategy(Enum):
    """What is split over the ranks.

    Notes
    -----
    `FULL_SHARD`: parameters, gradients and the optimizer's state. `SHARD_GRAD_OP`: gradients and
    the optimizer's state, and every node has all parameters; on one node, where they stand once for
    all ranks, it is the same.
    `HYBRID_SHARD`: as `FULL_SHARD` among the ranks of a node, and every node has all; gradients are
    summed over the nodes, and parameters never travel. `NO_SHARD`: nothing; every rank has all, as
    with `DDP`.
    """

    FULL_SHARD = "full_shard"
    SHARD_GRAD_OP = "shard_grad_op"
    HYBRID_SHARD = "hybrid_shard"
    NO_SHARD = "no_shard"


@dataclass(frozen=True, slots=True)
class FSDPOptions:
    """The arguments of an `FSDP` beside the model and the ranks; it describes them.

    `mesh` is None for a group that has no dimensions.
    """

    strategy: ShardingStrategy
    op: ReduceOp
    cut: Cut
    units: Units
    precision: Precision
    prefetch: int
    offload: str | os.PathLike[str] | None
    mesh: DeviceMesh | None

    def agreed(self, module: Module, group: ProcessGroup) -> FSDPOptions:
        """Return them as they are used; raise on all ranks what is wrong with them.

        Notes
        -----
        Collective over `group`; blocks.
        """
        # First together: what only one rank refuses would leave the others waiting for it.
        verify_same(self._description(module), group, operation="FSDP")
        _check_choice("strategy", self.strategy, ShardingStrategy)
        _check_choice("cut", self.cut, Cut)
        if not isinstance(self.precision, Precision):
            raise TypeError(
                "FSDP: precision must be a Precision, such as "
                f"Precision(parameters={self.precision!r}); got {self.precision!r}"
            )
        prefetch = _prefetch(self.prefetch)
        if self.op not in (MEAN, SUM):
            raise UnsupportedOperationError(f"FSDP: op must be MEAN or SUM, got {self.op}")
        named = dict(module.named_parameters())
        _check_parameters(named, group, self.precision)
        offload = _offload(self.offload, named, group, self.strategy)
        mesh = _mesh(self.mesh, group, self.strategy)
        return replace(self, prefetch=prefetch, offload=offload, mesh=mesh)

    def _description(self, module: Module) -> Description:
        arguments: dict[str, object] = {f.name: getattr(self, f.name) for f in fields(self)}
        if callable(self.units):  # what it finds is compared later
            arguments["units"] = "a function"
        if self.mesh is not None:
            arguments["mesh"] = self.mesh.dimensions
        return (
            *(
                describe(
                    "parameter" if p.trainable else "frozen parameter",
                    name,
                    p.like if p.is_sealed else p.data,  # sealed ones are refused later, by name
                )
                for name, p in module.named_parameters()
            ),
            *(describe("buffer", name, array) for name, array in module.named_buffers()),
            *((f"argument '{name}'", str(value)) for name, value in arguments.items()),
        )

    def find_units(self, module: Module, group: ProcessGroup) -> tuple[Unit, ...]:
        """Cut a model into units; raise on all ranks if they differ, or one cannot.

        Notes
        -----
        Collective over `group`; blocks.
        """
        made: tuple[Unit, ...] = ()
        failure: Exception | None = None
        try:
            made = find_units(module, self.units)
        except Exception as error:  # noqa: BLE001  # of the user's function, too; raised below
            failure = error
        result = f"{len(made)} units" if failure is None else repr(failure)
        verify_same(
            (
                ("what 'units' gives", result),
                *((f"unit '{unit.name}'", str(unit.parameters)) for unit in made),
            ),
            group,
            operation="FSDP",
        )
        if failure is not None:
            raise failure
        return tuple(unit.stored_in(self.precision.stored(unit.dtype)) for unit in made)


def _check_choice(argument: str, value: object, kind: type[Enum]) -> None:
    """Raise unless a value is one of an enumeration, and not only the name of one."""
    if not isinstance(value, kind):
        choices = ", ".join(map(str, kind))
        raise TypeError(f"FSDP: {argument} must be one of {choices}; got {value!r}")


def _prefetch(count: int) -> int:
    try:
        count = operator.index(count)
    except TypeError:
        raise TypeError(f"FSDP: prefetch must be a number of units, got {count!r}") from None
    if count < 0:
        raise ValueError(f"FSDP: prefetch must not be negative, got {count}")
    return count


def _check_parameters(
    named: Mapping[str, Parameter], group: ProcessGroup, precision: Precision
) -> None:
    """Raise unless a model's parameters can be trained so."""
    if not any(parameter.trainable for parameter in named.values()):
        raise ValueError(f"FSDP on {group}: the model has no trainable parameter")
    for name, parameter in named.items():
        if parameter.trainable and (MEAN, parameter.dtype) not in REDUCTIONS:
            raise UnsupportedOperationError(
                f"FSDP: '{name}' has dtype {parameter.dtype}; gradients are float or complex"
            )
    if precision.parameters == BFLOAT16 and any(is_device(p.like) for p in named.values()):
        raise UnsupportedOperationError(
            f"FSDP on {group}: layers on a device do not compute in bfloat16; use "
            "Precision(parameters=numpy.float16), or Precision(reduction='bfloat16'), with which "
            "gradients travel so"
        )
    check_can_be_sharded(named, "FSDP", group)


def _offload(
    given: object,
    named: Mapping[str, Parameter],
    group: ProcessGroup,
    strategy: ShardingStrategy,
) -> str | None:
    """Return `offload` as a string; raise unless what is offloaded is where that helps."""
    if not isinstance(given, (str, os.PathLike, type(None))):
        raise TypeError(f"FSDP: offload must be 'host' or the path of a directory, got {given!r}")
    offload: str | None = None if given is None else os.fsdecode(given)
    if offload == HOST and given != HOST:
        offload = f"{os.curdir}{os.sep}{HOST}"  # a directory of that name
    on_device = any(is_device(parameter.like) for parameter in named.values())
    if offload == HOST and not on_device:
        raise UnsupportedOperationError(
            f"FSDP on {group}: offload='host' is for a model on a device, and this one lies on the "
            "host; give a directory to keep its parameters in a file, or move the model first "
            "(model.to('gpu'))"
        )
    if offload not in (None, HOST) and on_device:
        raise UnsupportedOperationError(
            f"FSDP on {group}: offload={offload!r} keeps parameters of the host in a file, and "
            "these lie on a device; use offload='host'"
        )
    if offload not in (None, HOST) and (
        strategy is ShardingStrategy.FULL_SHARD and group.num_nodes > 1
    ):
        raise UnsupportedOperationError(
            f"FSDP on {group}: offload={offload!r} keeps parameters whole on a node, and with "
            f"FULL_SHARD over {group.num_nodes} nodes none has all of them; use "
            "ShardingStrategy.HYBRID_SHARD or SHARD_GRAD_OP"
        )
    return offload


def _mesh(
    mesh: DeviceMesh | None, group: ProcessGroup, strategy: ShardingStrategy
) -> DeviceMesh | None:
    """Return the mesh over which to replicate and to shard, if the strategy has one."""
    if mesh is not None and mesh.ndim != 1 + (strategy is ShardingStrategy.HYBRID_SHARD):
        raise UnsupportedOperationError(
            "FSDP: expected two dimensions for HYBRID_SHARD, of which the first replicates and the "
            f"second shards, or one for the other strategies; got {strategy.name} and {mesh}. "
            "Take the dimensions that are meant, as in mesh['replicate', 'shard']"
        )
    if strategy is not ShardingStrategy.HYBRID_SHARD:
        return None
    mesh = DeviceMesh.by_node(group) if mesh is None else mesh
    if mesh.names[1] in mesh.across_nodes:
        raise UnsupportedOperationError(
            f"FSDP: HYBRID_SHARD shards among ranks of one node, and those along "
            f"'{mesh.names[1]}', the second dimension, are on several: {mesh}. Use "
            "DeviceMesh.by_node(group), or ShardingStrategy.SHARD_GRAD_OP, with which parameters "
            "stand once on each node"
        )
    return mesh
