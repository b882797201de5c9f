"""DTensor: an array that is spread over a mesh, and moves from one placement to another."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from mpidist._formatting import format_ranges
from mpidist._types import Array, DType
from mpidist.arrays.boxes import Box
from mpidist.arrays.namespaces import DTYPES, as_native, device_empty, is_device
from mpidist.arrays.shards import ShardedArray
from mpidist.backends.work import Work
from mpidist.collectives._checks import check_array, check_rank, flat_source
from mpidist.errors import SizeMismatchError, UnsupportedOperationError
from mpidist.group.operations import Timeout
from mpidist.mesh.agreement import (
    Checked,
    agree,
    check_mesh,
    check_partial,
    check_same_ranks,
    memory_of,
    sum_shapes,
)
from mpidist.mesh.mesh import DeviceMesh
from mpidist.mesh.placements import (
    Partial,
    Placement,
    Replicate,
    check_placements,
    check_shape,
    cut_to,
)
from mpidist.mesh.redistribution import Sharding, plan_distribution, plan_redistribution
from mpidist.mesh.transfer import Total, Transfer, exchange_boxes, view_of

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["DTensor"]

_MOST = 2**63
"""More dimensions than any array has, where their number is not known yet."""


class DTensor:
    """An array that is spread over a mesh: its global shape, its placements, this rank's part.

    Parameters
    ----------
    local : Array
        This rank's part, on the host or on a device; not copied, unless its byte order is foreign.
        May be empty.
    mesh : DeviceMesh
        The ranks.
    placements : sequence of Placement
        One per dimension of the mesh: `Shard`, `Replicate` or `Partial`. They apply from left to
        right.
    shape : sequence of int, optional
        Of the whole array. When omitted it is asked of all ranks: along each dimension that is
        sharded, the sum of their parts.

    Attributes
    ----------
    local, mesh, placements
        As given, `placements` as a tuple.
    shape : tuple of int
        Of the whole array.

    Raises
    ------
    CollectiveMismatchError
        On all ranks, if they give different meshes, placements, dtypes or shapes.
    SizeMismatchError
        On all ranks, if the part of one has not the shape that `mpidist.mesh.box_at` says.
    UnsupportedOperationError
        On all ranks, if `local` of one is no array, or placements are none, or its dtype cannot be
        reduced as `Partial` says.

    Notes
    -----
    Collective over the mesh; blocks. Two all_gathers, of 16 and of some 300 bytes per rank; the
    values stay where they are, and whether replicas are equal is not compared.

    It holds and moves an array, and calculates nothing: arithmetic raises TypeError. Calculate with
    `local`, and say by placements what the result is: a product of a sharded sum is `Partial`.

    Examples
    --------
    >>> from mpidist.testing import run_ranks
    >>> from mpidist import Shard
    >>> def transpose(world):
    ...     mesh = DeviceMesh(world, all=2)
    ...     rows = np.arange(3.0)[None] + 10 * world.rank
    ...     x = DTensor(rows, mesh, [Shard(0)])
    ...     return x.shape, x.redistribute([Shard(1)]).local.tolist()
    >>> run_ranks(2, transpose)
    [((2, 3), [[0.0, 1.0], [10.0, 11.0]]), ((2, 3), [[2.0], [12.0]])]
    """

    __slots__ = ("local", "mesh", "placements", "shape")

    local: Array
    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: tuple[int, ...]

    def __init__(
        self,
        local: Array,
        mesh: DeviceMesh,
        placements: Sequence[Placement],
        *,
        shape: Sequence[int] | None = None,
    ) -> None:
        check_mesh(mesh, "DTensor")
        group = mesh.group
        what = f"DTensor on {group}"

        def check() -> Checked[tuple[Array, tuple[Placement, ...]], tuple[int, ...]]:
            array = check_array(local, "DTensor", group, name="local")
            if not array.dtype.isnative:
                array = as_native(array)
            checked = check_placements(placements, mesh.ndim, array.ndim, what)
            check_partial(checked, array.dtype, what)
            given = None if shape is None else check_shape(shape, what)
            if given is not None and len(given) != array.ndim:
                raise SizeMismatchError(
                    f"{what}: shape must have as many dimensions as local, {array.ndim}; got "
                    f"{given}"
                )
            facts = {"meshes": mesh.dimensions, "placements": str(list(checked))}
            facts |= {"dtypes": str(array.dtype), "memory": memory_of(array)}
            facts |= {"numbers of dimensions": str(array.ndim), "shape=": str(given)}
            return Checked((array, checked), facts, array.shape)

        (array, checked), shapes = agree(group, "DTensor", check)
        total = sum_shapes(shapes, mesh, checked) if shape is None else check_shape(shape, what)
        boxes = _sharding_of(total, mesh, checked, mesh).boxes()
        for rank, (box, part) in enumerate(zip(boxes, shapes, strict=True)):
            if part != box.sizes:
                added = ", the sum of all parts," * (shape is None)
                raise SizeMismatchError(
                    f"{what}: rank {rank} gave a part of shape {part}; by {list(checked)} on the "
                    f"mesh {mesh.dimensions} its part of an array of shape {total}{added} has to "
                    f"have shape {box.sizes}. mpidist.mesh.box_at says which parts ranks have: the "
                    "longer ones come first"
                )
        self._fill(array, mesh, checked, total)

    def _fill(
        self,
        local: Array,
        mesh: DeviceMesh,
        placements: tuple[Placement, ...],
        shape: tuple[int, ...],
    ) -> DTensor:
        """Be this part of this array; all has been checked."""
        self.local, self.mesh, self.placements, self.shape = local, mesh, placements, shape
        return self

    # -- how they come to be ---------------------------------------------------------------------

    @classmethod
    def empty(
        cls,
        shape: Sequence[int],
        mesh: DeviceMesh,
        placements: Sequence[Placement],
        *,
        dtype: npt.DTypeLike = np.float32,
        device: str | None = None,
    ) -> DTensor:
        """Make one whose parts are not initialised: to load into, or to calculate into.

        Parameters
        ----------
        shape : sequence of int
            Of the whole array.
        mesh : DeviceMesh
            The ranks.
        placements : sequence of Placement
            One per dimension of the mesh; the same on all ranks.
        dtype : dtype, optional
            The same on all ranks.
        device : {"cpu", "gpu"}, optional
            Where the parts lie: on the host, which they do when omitted, or on the current device.

        Raises
        ------
        SizeMismatchError, UnsupportedOperationError
            If the placements do not fit mesh and shape, or one of them is none; if arrays of this
            dtype are not sent.

        Notes
        -----
        Local; compares nothing with other ranks, which `redistribute` does.
        """
        what = "DTensor.empty"
        check_mesh(mesh, what)
        total = check_shape(shape, what)
        checked = check_placements(placements, mesh.ndim, len(total), what)
        native = np.dtype(dtype).newbyteorder("=")
        if native not in DTYPES:
            raise UnsupportedOperationError(
                f"{what}: dtype must be boolean, integer, float or complex, of at most 64 bits per "
                f"number; got {native}"
            )
        check_partial(checked, native, what)
        if device not in (None, "cpu", "gpu"):
            raise UnsupportedOperationError(
                f"{what}: device must be 'cpu' or 'gpu', got {device!r}"
            )
        box = cut_to(Box.whole(total), mesh.sizes, checked, mesh.coordinate)
        local = _empty_array(box.sizes, native, on_device=device == "gpu")
        return cls.__new__(cls)._fill(local, mesh, checked, total)

    @classmethod
    def distribute(
        cls,
        x: Array | None,
        mesh: DeviceMesh,
        placements: Sequence[Placement],
        *,
        root: int | None = 0,
        timeout: Timeout = None,
    ) -> DTensor:
        """Spread an array over a mesh.

        Parameters
        ----------
        x : Array or None
            The whole array, on `root`; ignored elsewhere.
        mesh : DeviceMesh
            The ranks.
        placements : sequence of Placement
            One per dimension of the mesh.
        root : int or None, optional
            The rank of ``mesh.group`` that has the array. None: every rank has it, the same one,
            and takes its part.
        timeout : float or datetime.timedelta, optional
            Seconds for this call; the group's when omitted.

        Returns
        -------
        DTensor
            Its parts share no memory with `x`, and lie where that of the root lies. Where it is
            `Partial`, the first rank of each line of the mesh has the values and the others have
            what does not change them, such as 0 for `SUM`.

        Raises
        ------
        CollectiveMismatchError
            On all ranks, if they give different meshes, placements or roots, or, where each gives
            the array, different shapes or dtypes.
        CollectiveTimeoutError
            If a rank does not arrive within the group's timeout.
        InvalidRankError
            If `root` is no rank of the mesh.
        SizeMismatchError, UnsupportedOperationError
            On all ranks, as `DTensor`.

        Notes
        -----
        Collective over the mesh; blocks. Two small all_gathers, as `DTensor`. Then the root sends
        each element once, to one of the ranks that get it, in at most p - 1 messages and
        ``x.nbytes`` bytes for p ranks; these pass it on to the others, at most p - 1 messages and
        p - 1 times the bytes of what they have received. With ``root=None`` nothing is sent.
        """
        check_mesh(mesh, "DTensor.distribute")
        group = mesh.group
        what = f"DTensor.distribute on {group}"
        root = None if root is None else check_rank(root, "DTensor.distribute", group)
        source = group.rank if root is None else root

        def check() -> Checked[Array | None, tuple[tuple[int, ...], DType, bool] | None]:
            facts = {"meshes": mesh.dimensions, "roots": str(root)}
            facts["placements"] = str(list(check_placements(placements, mesh.ndim, _MOST, what)))
            if group.rank != source:
                return Checked(None, facts, None)
            array = as_native(check_array(x, "DTensor.distribute", group))  # type: ignore[arg-type]
            if root is None:
                facts |= {"shapes": str(array.shape), "dtypes": str(array.dtype)}
                facts["memory"] = memory_of(array)
            return Checked(array, facts, (array.shape, array.dtype, is_device(array)))

        array, described = agree(group, "DTensor.distribute", check, timeout)
        kind = described[source]
        assert kind is not None, "it has the array"
        shape, dtype, on_device = kind
        checked = check_placements(placements, mesh.ndim, len(shape), what)
        check_partial(checked, dtype, what)
        target = _sharding_of(shape, mesh, checked, mesh)
        plan = plan_distribution(target, source, group.nodes, group.rank)
        local = _empty_array(plan.box.sizes, dtype, on_device=on_device)
        made = cls.__new__(cls)._fill(local, mesh, checked, shape)
        if root is not None:
            title = f"{dtype}{list(shape)} of rank {root} to {list(checked)} on {mesh.dimensions}"
            steps = partial(exchange_boxes, plan, array, local, group.rank)
            return Transfer(group, title, steps, local, made, timeout).run()
        assert array is not None, "every rank has it"
        local[...] = view_of(array, plan.box) if plan.fill is None else plan.fill
        return made

    # -- moving ----------------------------------------------------------------------------------

    def redistribute(
        self,
        placements: Sequence[Placement],
        *,
        mesh: DeviceMesh | None = None,
        timeout: Timeout = None,
    ) -> DTensor:
        """Return the same array with other placements, or on another mesh.

        Parameters
        ----------
        placements : sequence of Placement
            One per dimension of the mesh that it gets.
        mesh : DeviceMesh, optional
            Another mesh of the same ranks, made of the same group.
        timeout : float or datetime.timedelta, optional
            Seconds for this call; the group's when omitted.

        Returns
        -------
        DTensor
            A new array, also where nothing has changed. Values keep their bits, and replicas have
            the same; partial sums are added up in the order of the ranks along the mesh, float16
            and bfloat16 in float32, and rounded once.

        Raises
        ------
        CollectiveMismatchError
            On all ranks, if they ask for different things; nobody gets a result then.
        CollectiveTimeoutError
            If a rank does not arrive within the group's timeout.
        SizeMismatchError, UnsupportedOperationError
            If the placements do not fit, `mesh` has other ranks, or `local` has been replaced by an
            array of another shape.

        Notes
        -----
        Collective over the mesh; blocks. Each rank receives what it lacks of its new part, from the
        nearest rank that has it: itself, then its node; at most p - 1 messages for p ranks. Where a
        `Partial` of n bytes per rank along k ranks ends, each first receives k - 1 messages of
        n / k bytes; so becoming `Replicate` costs 2 (k - 1) / k n bytes, becoming `Shard` half of
        that. Where the whole mesh is on one node, what is partial along all of it becomes
        `Replicate` in shared memory, as by `all_reduce`. From `Replicate`, and to a `Partial` that
        is a sum, nothing is sent or received, but the ranks wait for each other to compare their
        calls. What becomes a `Partial` lies as `distribute` says.
        """
        return self._plan(placements, mesh, timeout).run()

    def iredistribute(
        self,
        placements: Sequence[Placement],
        *,
        mesh: DeviceMesh | None = None,
        timeout: Timeout = None,
    ) -> Work[DTensor]:
        """Start a `redistribute`; `local` belongs to it until the Work is complete.

        Of device arrays the hosts wait for each other before it returns, and without NCCL until the
        partial sums have been added up.
        """
        return self._plan(placements, mesh, timeout).start()

    def full(self, *, timeout: Timeout = None) -> Array:
        """Return the whole array on every rank.

        Parameters
        ----------
        timeout : float or datetime.timedelta, optional
            Seconds for this call; the group's when omitted.

        Returns
        -------
        Array, shape ``shape``
            A new array, of the same bits on all ranks.

        Notes
        -----
        Collective over the mesh; blocks. The cost is that of `redistribute` to `Replicate`.
        """
        return self.redistribute([Replicate()] * self.mesh.ndim, timeout=timeout).local

    def _plan(
        self, placements: Sequence[Placement], mesh: DeviceMesh | None, timeout: Timeout
    ) -> Transfer[DTensor]:
        """Check what `redistribute` was asked for, and plan it."""
        group = self.mesh.group
        what = f"redistribute on {group}"
        to = self.mesh if mesh is None else mesh
        check_same_ranks(self.mesh, to, what)
        if tuple(self.local.shape) != self.box.sizes:  # another array may have been put there
            raise SizeMismatchError(
                f"{what}: x.local is an array of shape {tuple(self.local.shape)} now, and this "
                f"rank's part by {list(self.placements)} of an array of shape {self.shape} has "
                f"shape {self.box.sizes}; make a DTensor of what has another shape"
            )
        checked = check_placements(placements, to.ndim, len(self.shape), what)
        check_partial(checked, self.dtype, what)
        source = _sharding_of(self.shape, self.mesh, self.placements, self.mesh)
        target = _sharding_of(self.shape, to, checked, self.mesh)
        plan = plan_redistribution(source, target, group.nodes, group.rank)
        on_device = is_device(self.local)
        local = _empty_array(plan.box.sizes, self.dtype, on_device=on_device)
        made = type(self).__new__(type(self))._fill(local, to, checked, self.shape)
        title = (
            f"{self.dtype}{list(self.shape)} of {list(self.placements)} on {self.mesh.dimensions} "
            f"to {list(checked)}"
        )
        if to is not self.mesh:
            title += f" on {to.dimensions} of ranks {format_ranges(to.ranks, ordered=True)}"
        steps = partial(exchange_boxes, plan, self.local, local, group.rank)
        total: Total | None = None
        on_one_node = group.num_nodes == 1 and not on_device
        if on_one_node and plan.op is not None and _is_total(self.placements, checked):
            total = Total(flat_source(self.local), local.reshape(-1), plan.op, listed=title)
        return Transfer(group, title, steps, local, made, timeout, total)

    # -- what it is ------------------------------------------------------------------------------

    @property
    def dtype(self) -> DType:
        """Element type."""
        return self.local.dtype

    @property
    def box(self) -> Box:
        """Which part of the whole array `local` is, or is one of the summands of."""
        return cut_to(Box.whole(self.shape), self.mesh.sizes, self.placements, self.mesh.coordinate)

    def sharded(self) -> ShardedArray:
        """Return it as what checkpoints save and load; loading into it fills `local`.

        Raises
        ------
        UnsupportedOperationError
            If it is `Partial`: nobody has the values yet.

        Notes
        -----
        Local; copies nothing. A checkpoint takes a `DTensor` as it is, too.
        """
        if any(isinstance(one, Partial) for one in self.placements):
            raise UnsupportedOperationError(
                f"{self} is partial: no rank has its values. Reduce it before it is saved, or "
                "loaded: x.redistribute(...) to Replicate() or Shard(dim)"
            )
        return ShardedArray(self.shape, self.dtype, {self.box: self.local})

    def __repr__(self) -> str:
        return (
            f"DTensor({self.dtype}{list(self.shape)}, {list(self.placements)}, "
            f"{self.local.shape} here) on {self.mesh}"
        )

    def _no_arithmetic(self, *_: object, **__: object) -> NoReturn:
        """Refuse to calculate."""
        raise TypeError(
            "a DTensor holds and moves an array, and calculates nothing: use x.local, this rank's "
            "part, or x.full(), the whole array on every rank"
        )

    __array_ufunc__ = None  # so that operators of numpy's arrays leave it to these
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _no_arithmetic
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _no_arithmetic
    __matmul__ = __rmatmul__ = __pow__ = __rpow__ = __neg__ = __abs__ = _no_arithmetic
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __invert__ = _no_arithmetic
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _no_arithmetic
    __getitem__ = __setitem__ = __len__ = __iter__ = __array__ = __bool__ = _no_arithmetic
    __hash__ = object.__hash__


def _sharding_of(
    shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Placement, ...], on: DeviceMesh
) -> Sharding:
    """Return how an array lies on a mesh, in the ranks of the group of a mesh of the same ranks."""
    rank_of = {rank: number for number, rank in enumerate(on.ranks)}
    return Sharding(shape, mesh.sizes, placements, tuple(rank_of[rank] for rank in mesh.ranks))


def _is_total(source: Sequence[Placement], target: Sequence[Placement]) -> bool:
    """Whether the summands of all ranks become the whole array on all of them."""
    summands = all(isinstance(one, Partial) for one in source)
    return summands and all(isinstance(one, Replicate) for one in target)


def _empty_array(shape: Sequence[int], dtype: DType, *, on_device: bool) -> Array:
    """Return an array that is not initialised."""
    return device_empty(shape, dtype) if on_device else np.empty(shape, dtype)
