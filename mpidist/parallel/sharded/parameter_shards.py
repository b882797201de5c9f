"""`ParameterShards`: the parameters of a model in flat arrays, and this rank's slices of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mpidist._types import Array, DType
from mpidist.arrays.namespaces import array_namespace, is_device, is_host
from mpidist.arrays.shards import ShardedArray, copy_in
from mpidist.errors import UnsupportedOperationError
from mpidist.group import ProcessGroup
from mpidist.nn.parameter import Parameter
from mpidist.parallel.gradient_kernels import cast
from mpidist.parallel.sharded.flat_parameters import FlatLayout, FlatParameters
from mpidist.parallel.sharded.mapped_files import mapped_arrays
from mpidist.parallel.sharded.stores import NodeStore, ParameterStore, make_store, shared_blocks
from mpidist.parallel.sharded.unit_store import UnitStore

__all__ = ["HOST", "SEALED", "ParameterShards", "check_can_be_sharded", "read_only"]


SEALED = (
    "is sharded: its values are whole only while its unit runs in a pass of the FSDP; read it "
    "inside fsdp.whole()"
)
"""What is wrong where a parameter is read that is not whole."""

HOST = "host"
"""What `offload` says of host memory; anything else is a directory."""


class ParameterShards:
    """Moves parameters into flat arrays, of which each rank owns a slice.

    Parameters
    ----------
    named : mapping of str to Parameter
        All parameters of a model, with the same values on all ranks. Their `data` become read-only
        views of the store.
    layouts : sequence of FlatLayout
        The flat arrays; each parameter lies in one of them.
    group : ProcessGroup
        The ranks in the order of their slices, as `by_node` makes it.
    first : bool, optional
        Whether this rank counts and writes its slices, of several groups that hold the same.
    stages : sequence of tuple of int, optional
        Indices of the flat arrays that are whole together, only while they are needed, where the
        ranks share no memory.
    slots : int, optional
        How many of these are whole at once.
    offload : str, optional
        ``"host"``: this rank's slices of parameters on a device are in host memory; else the
        directory of a file in which parameters stand once per node.
    all_ranks : ProcessGroup, optional
        All ranks that do this, where several groups hold the same; `group` when omitted.

    Attributes
    ----------
    group : ProcessGroup
        The ranks over which parameters are cut.
    store : ParameterStore
        Their memory.
    own : tuple of Array
        This rank's slice of each flat array, in the dtype in which the parameters were given: that
        of the store, or a master beside it, of which the store has the rounded values.
    offload : str or None
        As given.
    shards : dict of str to Parameter
        This rank's slice of each trainable parameter, with its `part`; some are empty.
    held : dict of str to ShardedArray
        What this rank owns of every parameter, to be written by `load` only.

    Notes
    -----
    Collective over `all_ranks`; blocks.
    """

    def __init__(
        self,
        named: Mapping[str, Parameter],
        layouts: Sequence[FlatLayout],
        group: ProcessGroup,
        *,
        first: bool = True,
        stages: Sequence[tuple[int, ...]] = (),
        slots: int = 1,
        offload: str | None = None,
        all_ranks: ProcessGroup | None = None,
    ) -> None:
        self.group = group
        self.offload = offload
        on_device = any(is_device(parameter.like) for parameter in named.values())
        if offload is None or on_device:
            self.store = _make_store(group, layouts, stages, slots, on_device=on_device)
        else:
            sizes = [layout.nbytes for layout in layouts]
            everybody = all_ranks or group
            blocks = mapped_arrays(sizes, offload, everybody, shared_by=group.node_group())
            self.store = NodeStore(group, layouts, blocks)
        flat_of = {name: flat for flat in self.store.flats for name in flat.layout.spans}
        self._flat_of = flat_of
        dtypes = [named[next(iter(flat.layout.spans))].dtype for flat in self.store.flats]
        self.own = tuple(map(self._own, self.store.flats, dtypes))
        own_of = dict(zip(self.store.flats, self.own, strict=True))
        self.shards: dict[str, Parameter] = {}
        self.held: dict[str, ShardedArray] = {}
        for name, parameter in named.items():
            flat = flat_of[name]
            own, part = flat.within(name, own_of[flat]), flat.part(name, first=first)
            self.held[name] = part.sharded(own)
            if parameter.trainable:
                self.shards[name] = Parameter(own, name=name)
                self.shards[name].part = part
        copy_in(self.held, {name: parameter.data for name, parameter in named.items()})
        self.end_write()
        self._read_by_layers: dict[str, tuple[Parameter, Array]] = {}
        for name, parameter in named.items():
            if name in self.store.whole:
                parameter.data = read_only(self.store.whole[name])
                self._read_by_layers[name] = parameter, parameter.data
            else:
                stored = flat_of[name].own
                if parameter.dtype != stored.dtype:  # which its gradient has, too
                    parameter.data = array_namespace(stored).empty(parameter.shape, stored.dtype)
                parameter.seal(SEALED)

    def _own(self, flat: FlatParameters, dtype: DType) -> Array:
        """Return this rank's slice: that of the store, if it has the dtype and is to be there."""
        on_host = self.offload is not None and is_device(flat.own)
        if dtype == flat.own.dtype and not on_host:
            return flat.own
        xp = np if on_host else array_namespace(flat.own)
        own: Array = xp.zeros(flat.own.shape, dtype)
        return own

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's share of the store, and of masters, without what is offloaded."""
        return self.store.nbytes + self._masters_nbytes - self.offloaded_nbytes

    @property
    def offloaded_nbytes(self) -> int:
        """Bytes of what lies in host memory or in files instead."""
        if self.offload is None:
            return 0
        return self._masters_nbytes if self.offload == HOST else self.store.nbytes

    @property
    def _masters_nbytes(self) -> int:
        return sum(own.nbytes for _, own in self._masters())

    def check_in_place(self, operation: str) -> None:
        """Raise RuntimeError if layers read another array than the one that is updated."""
        for name, (parameter, data) in self._read_by_layers.items():
            if parameter.data is not data:
                raise RuntimeError(
                    f"{operation} on {self.group}: parameter '{name}' has been given another array "
                    "(parameter.data = ...), which no step updates; load values through the "
                    "FSDP or ShardedOptimizer.model_state on all ranks"
                )

    def begin_write(self) -> None:
        """Return when this rank may write its slices, as `ParameterStore.begin_write`."""
        self.store.begin_write()

    def end_write(self) -> None:
        """Let all ranks have what all have written, as `ParameterStore.end_write`."""
        for flat, own in self._masters():
            cast(own, flat.own)
        self.store.end_write()

    def _masters(self) -> Iterator[tuple[FlatParameters, Array]]:
        """Yield the slices that the store has copies of, rounded or elsewhere."""
        for flat, own in zip(self.store.flats, self.own, strict=True):
            if own is not flat.own:
                yield flat, own

    def part_of(self, name: str, whole: Array) -> Array:
        """Return the part of an array of a parameter's shape that belongs to this rank's slice."""
        flat = self._flat_of[name]
        box = flat.box(name)
        return whole.reshape(-1)[box.slices].reshape(self.shards[name].shape)

    def state_dict(self) -> dict[str, ShardedArray]:
        """Return what this rank owns of every parameter: the living arrays, read-only."""
        return {
            name: ShardedArray(
                held.shape, held.dtype, {box: read_only(a) for box, a in held.pieces.items()}
            )
            for name, held in self.held.items()
        }


def _make_store(
    group: ProcessGroup,
    layouts: Sequence[FlatLayout],
    stages: Sequence[tuple[int, ...]],
    slots: int,
    *,
    on_device: bool,
) -> ParameterStore:
    if not stages:
        return make_store(group, layouts, on_device=on_device)
    if group.num_nodes == 1 and not on_device:
        blocks = shared_blocks(group, [layout.nbytes for layout in layouts])
        if blocks is not None:  # nothing need be gathered
            return NodeStore(group, layouts, blocks)
    return UnitStore(group, layouts, stages, slots=slots, on_device=on_device)


def read_only(view: Array) -> Array:
    """Return a view that cannot be written by mistake, unless it lies on a device."""
    protected: Array = view.view()
    if is_host(view):
        protected.flags.writeable = False
    return protected


def check_can_be_sharded(
    named: Mapping[str, Parameter], strategy: str, group: ProcessGroup
) -> None:
    """Raise unless these parameters can be moved into flat arrays."""
    if len({is_device(parameter.like) for parameter in named.values()}) > 1:
        raise UnsupportedOperationError(
            f"{strategy} on {group}: some parameters lie on a device and some do not; move the "
            "whole model (model.to)"
        )
    for name, parameter in named.items():
        if parameter.part is not None:
            raise UnsupportedOperationError(
                f"{strategy} on {group}: parameter '{name}' is a part of a whole one, as "
                "parallelize leaves it, and is not cut further; use a DDP"
            )
        if parameter.is_sealed or not getattr(
            parameter.data.flags, "writeable", True
        ):  # arrays on a device have no flag
            raise ValueError(
                f"{strategy} on {group}: parameter '{name}' is read-only, as another FSDP or "
                "ShardedOptimizer leaves it; for parameters that are updated differently let the "
                "factory of a ShardedOptimizer return several optimizers, or first give it memory "
                "of its own (parameter.data = parameter.data.copy())"
            )
