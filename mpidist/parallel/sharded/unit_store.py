"""`UnitStore`: parameters of which each rank keeps its slices, gathered when they are needed.

[Note: gathered units] Where ranks do not share the memory of one node, a rank keeps its slices of
the units, and few *slots*: memory in which a unit is whole while its modules run. Slots are shared
by the ranks of a node where they can be, each rank gathering the slices of those with its local
rank on the other nodes ([Note: order of slices]); on a device, and where there is no such memory,
every rank has slots of its own. They are made once and are as large as what is needed together at
most, so no order of events can take more memory.

Units that are needed together, by one module, are a *stage*. A unit whose module
encloses modules of other units, as the outermost one does, would be whole during all of their
passes: it is whole at any time, as all are in a `NodeStore`, and is exchanged in a step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from mpidist._types import Array
from mpidist.arrays.boxes import round_up, split_evenly
from mpidist.arrays.namespaces import device_empty
from mpidist.backends.work import Work
from mpidist.collectives import all_gather, barrier, iall_gather
from mpidist.group import ProcessGroup
from mpidist.parallel.data.buckets import ALIGNMENT_BYTES
from mpidist.parallel.sharded.flat_parameters import FlatLayout, FlatParameters
from mpidist.parallel.sharded.stores import (
    ParameterStore,
    make_store,
    owners_by_node,
    shared_blocks,
)
from mpidist.parallel.sharded.transfers import traced

__all__ = ["UnitStore"]


class UnitStore(ParameterStore):
    """Slices of units that a rank keeps, and slots in which some of them are whole for a while.

    Parameters
    ----------
    group : ProcessGroup
        The ranks in the order of their slices, as `by_node` makes it. A duplicate is made.
    layouts : sequence of FlatLayout
        The layout of each unit.
    stages : sequence of tuple of int
        Indices of the units that are gathered together. The others are whole at any time.
    slots : int
        How many stages can be whole at once.
    on_device : bool, optional
        Whether the parameters lie on this rank's device.

    Notes
    -----
    Collective over `group`; blocks. So are `start` and all that waits: ranks call these methods
    in one order. A gather costs a rank the bytes of the unit divided by the ranks of its node,
    received from the other nodes.
    """

    def __init__(
        self,
        group: ProcessGroup,
        layouts: Sequence[FlatLayout],
        stages: Sequence[tuple[int, ...]],
        *,
        slots: int,
        on_device: bool = False,
    ) -> None:
        gathered = sorted({index for stage in stages for index in stage})
        stay = [index for index in range(len(layouts)) if index not in gathered]
        kept = [layouts[index] for index in stay]
        self._kept = make_store(group, kept, on_device=on_device) if kept else None
        self._group = group.duplicate(f"{group.name}/gathers")
        self._stages = [_offsets({index: layouts[index] for index in stage}) for stage in stages]
        sizes = [max(nbytes for _, nbytes in self._stages)] * slots
        blocks = None if on_device else shared_blocks(self._group, sizes)
        self.shared = blocks is not None
        self._on_device = on_device
        self._slots = blocks or [self._empty(nbytes) for nbytes in sizes]
        self._node = self._group.node_group()
        self._peers = self._group.cross_group() if self.shared else self._group
        owners = owners_by_node(group) if self.shared else group.size
        flats = dict(zip(stay, self._kept.flats if self._kept else (), strict=True))
        for index in gathered:
            layout, rank = layouts[index], group.rank
            counts = layout.counts(owners, group.size)
            own = self._empty(counts[rank] * layout.dtype.itemsize).view(layout.dtype)
            flats[index] = FlatParameters(layout, own, counts, rank)
        self.flats = tuple(flats[index] for index in range(len(layouts)))
        self._gathered = {index: flats[index] for index in gathered}
        self.whole = self._kept.whole if self._kept else {}
        self.nbytes = sum(flat.own.nbytes for flat in self._gathered.values())
        self.nbytes += self._kept.nbytes if self._kept else 0
        node = split_evenly(sum(sizes), group.local_size)[group.local_rank][1]
        self.buffers_nbytes = node if self.shared else sum(sizes)
        self._held: list[int | None] = [None] * slots  # the stage in each slot
        self._works: dict[int, list[Work[Any]]] = {}  # of the stages whose parts are under way
        self._complete: set[int] = set()  # stages of which all ranks of the node have their part

    # -- gathering -----------------------------------------------------------------------------

    def holds(self, stage: int) -> bool:
        """Whether a stage is in a slot, perhaps not all of it yet."""
        return stage in self._held

    def start(self, stage: int, keep: Collection[int]) -> None:
        """Start to gather a stage into a slot that holds none of those in `keep`.

        No rank of the node may be reading what that slot holds. Does not block, unless what is
        there has been gathered in vain and is not complete.
        """
        free = [slot for slot, held in enumerate(self._held) if held is None or held not in keep]
        slot = min(free, key=lambda slot: self._held[slot] not in (None, *self._complete))
        before = self._held[slot]
        if before is not None and before not in self._complete:
            self.wait_all()
        if before is not None:
            self._complete.discard(before)
        self._held[slot] = stage
        offsets, _ = self._stages[stage]
        self._works[stage] = [
            work
            for index, offset in offsets.items()
            for work in self._start_unit(index, self._slots[slot][offset:])
        ]

    def _start_unit(self, index: int, memory: Array) -> Iterable[Work[Any]]:
        flat = self._gathered[index]
        data = memory[: flat.layout.nbytes].view(flat.layout.dtype)
        if self._peers is None:
            return  # the others of this node gather all
        first = self._group.local_rank * self._group.num_nodes if self.shared else 0
        counts = flat.counts[first : first + self._peers.size]
        start = sum(flat.counts[:first])
        out = data[start : start + sum(counts)]
        gather = iall_gather(flat.own, self._peers, out=out, counts=counts)
        yield traced(f"unit {index}: gather", gather)

    def wait(self, stage: int) -> None:
        """Wait until this rank's part of a stage is there."""
        for work in self._works.pop(stage, ()):
            work.wait()

    def complete(self, stage: int) -> None:
        """Take note that all ranks of the node have waited for their part of a stage."""
        self._complete.add(stage)

    def is_complete(self, stage: int) -> bool:
        """Whether all of a stage is there."""
        return stage in self._complete

    def wait_for_node(self) -> None:
        """Wait for the ranks of this node."""
        barrier(self._node)

    def wait_all(self) -> None:
        """Wait until everything that has been started is complete."""
        started = [stage for stage in self._held if stage is not None]
        pending = [stage for stage in started if stage not in self._complete]
        for stage in pending:
            self.wait(stage)
        if pending:
            self.wait_for_node()
            self._complete.update(pending)

    def poison(self, keep: Collection[int]) -> None:
        """Fill complete stages with NaN, but for some, and hold them no longer; blocks.

        No rank may be reading them. A layer that has kept a view of one gets no other unit's
        values from it.
        """
        for slot, stage in enumerate(self._held):
            if stage in self._complete and stage not in keep:
                if not self.shared or self._group.local_rank == 0:
                    self._slots[slot][...] = 255  # all bits set: NaN in each dtype of floats
                self._held[slot] = None
                self._complete.discard(stage)
        self.wait_for_node()

    def names(self, stage: int) -> list[str]:
        """Return the names of the parameters of a stage."""
        offsets, _ = self._stages[stage]
        return [name for index in offsets for name in self._gathered[index].layout.spans]

    def progress(self) -> None:
        """Let gathers under way make progress."""
        if self._works and self._peers is not None:
            self._peers.progress()

    def views(self, stage: int) -> dict[str, Array]:
        """Return the parameters of a stage that is complete; views of a slot."""
        slot = self._held.index(stage)
        offsets, _ = self._stages[stage]
        views: dict[str, Array] = {}
        for index, offset in offsets.items():
            layout = self._gathered[index].layout
            memory = self._slots[slot][offset : offset + layout.nbytes]
            views |= layout.views(memory.view(layout.dtype))
        return views

    def gather_all(self) -> dict[str, Array]:
        """Gather all parameters that are not whole at any time, into new memory; blocks."""
        sizes = [flat.layout.nbytes for flat in self._gathered.values()]
        blocks = shared_blocks(self._group, sizes) if self.shared else None
        views: dict[str, Array] = {}
        for number, (index, flat) in enumerate(self._gathered.items()):
            memory = self._empty(sizes[number]) if blocks is None else blocks[number]
            if blocks is None:
                data = memory.view(flat.layout.dtype)
                all_gather(flat.own, self._group, out=data, counts=flat.counts)
            else:
                for work in self._start_unit(index, memory):
                    work.wait()
            views |= flat.layout.views(memory.view(flat.layout.dtype))
        self.wait_for_node()
        return views

    # -- writing -------------------------------------------------------------------------------

    def begin_write(self) -> None:
        """Wait until nobody reads what this rank is about to write: of units whole at any time."""
        if self._kept is not None:
            self._kept.begin_write()

    def end_write(self) -> None:
        """Exchange the units that are whole at any time; what the slots hold is out of date."""
        self._held = [None] * len(self._slots)
        self._complete.clear()
        if self._kept is not None:
            self._kept.end_write()

    def close(self) -> None:
        """Release the group."""
        self._group.close()

    def _empty(self, nbytes: int) -> Array:
        return device_empty(nbytes, np.uint8) if self._on_device else np.empty(nbytes, np.uint8)


def _offsets(layouts: dict[int, FlatLayout]) -> tuple[dict[int, int], int]:
    """Return where each unit begins in a slot, and the bytes of all together."""
    offsets, offset = {}, 0
    for index, layout in layouts.items():
        offsets[index] = offset
        offset += round_up(layout.nbytes, ALIGNMENT_BYTES)
    return offsets, offset
