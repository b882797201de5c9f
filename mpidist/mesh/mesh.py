"""Meshes: the ranks of a group in rows and columns, with a name for each dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from mpidist._arguments import whole_number
from mpidist._closing import Closing
from mpidist._types import Array
from mpidist.errors import InvalidRankError, InvalidWorldSizeError, UnsupportedOperationError
from mpidist.group.group import ProcessGroup, check_group

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["DeviceMesh"]


class DeviceMesh(Closing):
    """The ranks of a group as an n-dimensional array, with a name for each dimension.

    Parameters
    ----------
    group : ProcessGroup
        All its ranks are in the mesh, in row-major order: the last dimension counts fastest.
    **sizes : int
        Name and number of ranks of each dimension, in order; their product is the size of the
        group. One may be -1: what is left.

    Attributes
    ----------
    names : tuple of str
        Of the dimensions.
    sizes : tuple of int
        Ranks along each dimension.
    ranks : tuple of int
        The ranks of the mesh in row-major order, counted in the group that it was made of.
    coordinate : tuple of int
        Where this rank is.
    base : ProcessGroup
        The group that it was made of.

    Raises
    ------
    InvalidWorldSizeError
        If the sizes do not make up the group.
    UnsupportedOperationError
        If there is no dimension, a size is not a positive whole number, or a name is no identifier.

    Notes
    -----
    Local: a mesh is arithmetic until its `group` is asked for. Give all ranks the same dimensions
    in the same order. `close`, or the end of a ``with`` block, closes the groups that it has made,
    not the group that it was made of.

    Examples
    --------
    >>> from mpidist.testing import run_ranks
    >>> run_ranks(4, lambda world: DeviceMesh(world, dp=2, tp=-1).coordinate)
    [(0, 0), (0, 1), (1, 0), (1, 1)]
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    ranks: tuple[int, ...]
    coordinate: tuple[int, ...]
    base: ProcessGroup

    def __init__(self, group: ProcessGroup, /, **sizes: int) -> None:
        check_group(group, "DeviceMesh")
        lengths = _lengths(group, sizes)
        self._arrange(group, tuple(sizes), np.arange(group.size).reshape(lengths), {})
        crossing = [name for name in self.across_nodes if name == "tp"]
        if crossing and group.rank == 0:
            group.log.info(
                "%s: the ranks of tensor parallelism (tp) are on several nodes, and exchange "
                "activations over the network in every layer; make tp the last dimension, of at "
                "most as many ranks as a node has",
                self,
            )

    def _arrange(
        self,
        group: ProcessGroup,
        names: tuple[str, ...],
        ranks: Array,
        groups: dict[tuple[int, ...], ProcessGroup],
    ) -> Self:
        """Be the mesh of these ranks; `groups` are those that it and its sub-meshes have made."""
        self.names = names
        self.sizes = ranks.shape
        self.ranks = tuple(ranks.ravel().tolist())
        self.base = group
        self._ranks = ranks
        self._groups = groups
        self.coordinate = self.coordinate_of(group.rank)
        return self

    @classmethod
    def by_node(
        cls, group: ProcessGroup, *, across: str = "replicate", inside: str = "shard"
    ) -> DeviceMesh:
        """Make the mesh of nodes x ranks of a node.

        Parameters
        ----------
        group : ProcessGroup
            All its ranks are in the mesh.
        across, inside : str, optional
            Names of the dimension that counts the nodes, and of the one along which ranks share a
            node.

        Returns
        -------
        DeviceMesh
            Of the sizes (num_nodes, local_size).

        Raises
        ------
        InvalidWorldSizeError
            If the nodes have different numbers of ranks.

        Notes
        -----
        Local.
        """
        check_group(group, "DeviceMesh.by_node")
        _check_names(group, (across, inside), "DeviceMesh.by_node")
        members = [np.flatnonzero(np.equal(group.nodes, n)) for n in range(group.num_nodes)]
        counts = [len(ranks) for ranks in members]
        if len(set(counts)) > 1:
            odd = next(node for node, count in enumerate(counts) if count != counts[0])
            raise InvalidWorldSizeError(
                f"DeviceMesh.by_node on {group}: the nodes must have equally many ranks; node 0 "
                f"has {counts[0]} of the group and node {odd} has {counts[odd]} (rank "
                f"{', '.join(map(str, members[odd]))}). Start as many on each, or make the group "
                "of equally many with new_group"
            )
        return cls.__new__(cls)._arrange(group, (across, inside), np.stack(members), {})

    # -- facts ---------------------------------------------------------------------------------

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.names)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def across_nodes(self) -> tuple[str, ...]:
        """Names of the dimensions along which ranks are on different nodes."""
        nodes = np.array(self.base.nodes)[self._ranks]
        return tuple(
            name
            for axis, name in enumerate(self.names)
            if (nodes != nodes.take([0], axis=axis)).any()
        )

    def __repr__(self) -> str:
        crossing = self.across_nodes
        sizes = (
            f"{name}={size}{' across nodes' * (name in crossing)}"
            for name, size in zip(self.names, self.sizes, strict=True)
        )
        return f"DeviceMesh({', '.join(sizes)}) of {self.base}, at {self.coordinate}"

    def rank_at(self, *coordinate: int) -> int:
        """Return the rank at a coordinate, counted in the group that the mesh was made of.

        Parameters
        ----------
        *coordinate : int
            One index per dimension, counted from 0.

        Raises
        ------
        InvalidRankError
            If the mesh has no such coordinate.
        """
        try:
            index = tuple(map(whole_number, coordinate))
        except TypeError:
            index = ()
        if len(index) != self.ndim or not all(
            0 <= number < size for number, size in zip(index, self.sizes, strict=True)
        ):
            raise InvalidRankError(
                f"rank_at of {self}: expected one index per dimension, counted from 0 and below "
                f"{self.sizes}; got {coordinate}"
            )
        return int(self._ranks[index])

    def coordinate_of(self, rank: int) -> tuple[int, ...]:
        """Return where a rank is, counted in the group that the mesh was made of.

        Raises
        ------
        InvalidRankError
            If the mesh does not have this rank.
        """
        try:
            number = self.ranks.index(whole_number(rank))
        except (TypeError, ValueError):
            raise InvalidRankError(
                f"coordinate_of: the mesh {self.dimensions} has the ranks {list(self.ranks)} of "
                f"group {self.base.name!r}; got {rank!r}"
            ) from None
        return tuple(map(int, np.unravel_index(number, self.sizes)))

    @property
    def dimensions(self) -> str:
        """Names and sizes, such as ``(dp=2, tp=2)``."""
        return f"({', '.join(map('{}={}'.format, self.names, self.sizes))})"

    # -- sub-meshes and groups -------------------------------------------------------------------

    def __getitem__(self, names: str | tuple[str, ...]) -> DeviceMesh:
        """Return the sub-mesh through this rank, with these dimensions in this order.

        Parameters
        ----------
        names : str or tuple of str
            One or several of `names`, each once. ``mesh["tp", "dp"]`` is another mesh than
            ``mesh["dp", "tp"]``: its ranks come in another order.

        Raises
        ------
        UnsupportedOperationError
            If there is no such dimension, or one is named twice.

        Notes
        -----
        Local. Its `group` is made once, however often it is asked for.
        """
        wanted = (names,) if isinstance(names, str) else names
        if (
            not isinstance(wanted, tuple)
            or not wanted
            or any(name not in self.names for name in wanted)
            or len(set(wanted)) != len(wanted)
        ):
            raise UnsupportedOperationError(
                f"{self}: expected one or several of the names {', '.join(self.names)}, each once, "
                f"as in mesh[{', '.join(map(repr, self.names))}]; got {names!r}"
            )
        rest = tuple(
            slice(None) if name in wanted else number
            for name, number in zip(self.names, self.coordinate, strict=True)
        )
        left = [name for name in self.names if name in wanted]
        ranks = self._ranks[rest].transpose([left.index(name) for name in wanted])
        made = DeviceMesh.__new__(DeviceMesh)
        return made._arrange(self.base, wanted, ranks, self._groups)

    @property
    def group(self) -> ProcessGroup:
        """The group of all ranks of the mesh, in row-major order.

        Collective over them when first asked for, and blocks, as `ProcessGroup.new_group`; the
        group that the mesh was made of where that has the same ranks in the same order. It is named
        after the dimensions, ``mesh/dp``, in records, errors and reports.
        """
        ranks, base = self.ranks, self.base
        if ranks == tuple(range(base.size)):
            return base
        if ranks not in self._groups:
            made = base.new_group(ranks, name=f"mesh/{','.join(self.names)}")
            assert made is not None, "this rank is in the mesh"
            self._groups[ranks] = made
        return self._groups[ranks]

    def close(self) -> None:
        """Close the groups that the mesh and its sub-meshes have made."""
        while self._groups:
            _, group = self._groups.popitem()
            group.close()


def _lengths(group: ProcessGroup, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the size of each dimension, -1 replaced, if they make up the group."""
    _check_names(group, tuple(sizes), "DeviceMesh")
    try:
        numbers = list(map(whole_number, sizes.values()))
    except TypeError:
        numbers = [0]
    given = ", ".join(f"{name}={size!r}" for name, size in sizes.items())
    if any(number < 1 and number != -1 for number in numbers) or numbers.count(-1) > 1:
        raise UnsupportedOperationError(
            f"DeviceMesh on {group}: sizes must be whole numbers of ranks, at least 1, of which "
            f"one may be -1 (what is left); got {given}"
        )
    known = prod(number for number in numbers if number != -1)
    left, remainder = divmod(group.size, known)
    if remainder or (left != 1 and -1 not in numbers):
        if -1 in numbers:
            needed = f"a multiple of {known} ranks for {given}; start as many"
        else:
            needed = f"{known} ranks for {given}; start as many, or give one size as -1, the rest"
        raise InvalidWorldSizeError(
            f"DeviceMesh on {group}: the group has {group.size} ranks. Expected {needed}"
        )
    return tuple(left if number == -1 else number for number in numbers)


def _check_names(group: ProcessGroup, names: Sequence[str], what: str) -> None:
    """Raise unless each is an identifier, and comes once."""
    valid = all(isinstance(name, str) and name.isidentifier() for name in names)
    if not names or not valid or len(set(names)) != len(names):
        raise UnsupportedOperationError(
            f"{what} on {group}: expected a name for each dimension, at least one, no two the same "
            f"and each an identifier, as in DeviceMesh(group, dp=2, tp=-1); got {list(names)}"
        )
