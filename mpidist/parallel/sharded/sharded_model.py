"""`ShardedModel`: the parameters of a model cut over its ranks, and what moves them."""

from __future__ import annotations

import os

from mpidist.group import ProcessGroup
from mpidist.mesh import DeviceMesh
from mpidist.nn.module import Module
from mpidist.parallel.data.broadcasts import broadcast_in_place
from mpidist.parallel.sharded.gathers import UnitGathers
from mpidist.parallel.sharded.gradients import UnitGradients
from mpidist.parallel.sharded.options import FSDPOptions, ShardingStrategy
from mpidist.parallel.sharded.parameter_shards import ParameterShards
from mpidist.parallel.sharded.stores import by_node
from mpidist.parallel.sharded.unit_store import UnitStore
from mpidist.parallel.sharded.units import Unit, find_stages

__all__ = ["ShardedModel"]

_GATHERS = (ShardingStrategy.FULL_SHARD, ShardingStrategy.HYBRID_SHARD)
"""The strategies with which parameters are whole only while they are needed."""


class ShardedModel:
    """Cuts a model's units over groups of its ranks, made for it.

    Parameters
    ----------
    module : Module
        The model. Its parameters and buffers are overwritten with rank 0's.
    group : ProcessGroup
        All ranks.
    units : tuple of Unit
        What stands and travels together.
    options : FSDPOptions
        As `FSDPOptions.agreed` returns them.
    strategy : str
        The class that it is for; named in errors.

    Attributes
    ----------
    group : ProcessGroup
        All ranks, by local rank and then by node.
    replicas : ProcessGroup or None
        The ranks with the same slices as this one, where there are several groups of ranks over
        which parameters are cut.
    shards : ParameterShards
        The slices of this rank.
    gathers : UnitGathers or None
        What makes units whole for passes; None where parameters are whole at any time.
    gradients : UnitGradients
        What reduces the gradients into the slices.

    Raises
    ------
    OSError
        On all ranks, if `options.offload` is a directory that cannot take the parameters. The
        groups are closed then: another directory may be tried.

    Notes
    -----
    Collective over `group`; blocks.
    """

    def __init__(
        self,
        module: Module,
        group: ProcessGroup,
        units: tuple[Unit, ...],
        options: FSDPOptions,
        *,
        strategy: str,
    ) -> None:
        self.group = by_node(group, f"{group.name}/fsdp")
        named = dict(module.named_parameters())
        arrays = {name: parameter.data for name, parameter in named.items()}
        buffers = dict(module.named_buffers())
        broadcast_in_place([*arrays.values(), *buffers.values()], self.group)
        self._cut_over, self.replicas = _groups(self.group, options.mesh, options.strategy)
        stages = find_stages(module, units) if options.strategy in _GATHERS else ()
        try:
            self.shards = ParameterShards(
                named,
                [unit.layout(arrays, options.cut) for unit in units],
                self._cut_over,
                first=self.replicas is None or self.replicas.rank == 0,
                stages=[stage.units for stage in stages],
                slots=1 + options.prefetch,
                offload=None if options.offload is None else os.fspath(options.offload),
                all_ranks=self.group,
            )
        except OSError:
            self._close_groups()
            raise
        store = self.shards.store
        self.gathers: UnitGathers | None = None
        if isinstance(store, UnitStore):
            self.gathers = UnitGathers(
                module, stages, store, self._cut_over, prefetch=options.prefetch
            )
        self.gradients = UnitGradients(
            {name: p for name, p in named.items() if p.trainable},
            self.shards,
            self.group,
            replicas=self.replicas,
            op=options.op,
            precision=options.precision,
            strategy=strategy,
        )

    def close(self) -> None:
        """Release the groups."""
        if self.gathers is not None:
            self.gathers.close()
        self._close_groups()

    def _close_groups(self) -> None:
        made = (self._cut_over, self.replicas or self.group, self.group)
        for group in dict.fromkeys(made):  # each once, in one order on all ranks
            group.close()


def _groups(
    ordered: ProcessGroup, mesh: DeviceMesh | None, strategy: ShardingStrategy
) -> tuple[ProcessGroup, ProcessGroup | None]:
    """Make the group over which parameters are cut, and that of the ranks with the same slices."""
    if strategy is ShardingStrategy.NO_SHARD:
        alone = ordered.split(ordered.rank, name=f"{ordered.name}/rank")
        assert alone is not None, "every rank gave a color"
        return alone, ordered
    if mesh is None or mesh.sizes[0] == 1:
        return ordered, None
    row, column = mesh.coordinate
    shard = ordered.split(row, column, name=f"{ordered.name}/shard")
    replicas = ordered.split(column, row, name=f"{ordered.name}/replicate")
    assert shard is not None, "every rank gave a color"
    assert replicas is not None, "every rank gave a color"
    return shard, replicas
