"""Who we are: the ranks of a group, the groups made of them, and the memory that they share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from operator import index
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from mpidist._arguments import whole_number
from mpidist._closing import Closing
from mpidist._types import Array, ReduceOp
from mpidist.arrays.namespaces import device_empty
from mpidist.backends.base import Backend
from mpidist.backends.capabilities import Capabilities
from mpidist.backends.crossovers import Crossovers
from mpidist.backends.verbs import AllGather
from mpidist.errors import (
    BackendUnavailableError,
    CollectiveMismatchError,
    InvalidRankError,
    SizeMismatchError,
    UnsupportedOperationError,
)
from mpidist.group.operations import C, Operations, Timeout
from mpidist.group.state import GroupState

if TYPE_CHECKING:
    import logging

    import numpy.typing as npt

    from mpidist.observe.recorder.recorder import Site
    from mpidist.observe.watch import Watch

__all__ = ["Layout", "ProcessGroup", "check_group"]


def check_group(group: object, operation: str) -> None:
    """Raise unless something is a group, and say how to make one of what it is.

    Raises
    ------
    UnsupportedOperationError
        Before anything has been sent.
    """
    if isinstance(group, ProcessGroup):
        return
    kind = f"{type(group).__module__}.{type(group).__qualname__}"
    if group is None:
        got = (
            "None, which split and new_group return on ranks that are not members: call it on the "
            "members only"
        )
    elif isinstance(group, ReduceOp) and "reduce" in operation:
        got = f"{group}: give the operation by name, {operation}(x, group, op={group.name})"
    elif kind.startswith("mpi4py."):
        got = f"a communicator ({kind}): make a group of it once, mpidist.init(comm=...)"
    else:
        got = f"{kind}"
    raise UnsupportedOperationError(
        f"{operation}: the group must be a ProcessGroup, as mpidist.init() returns it, or split or "
        f"new_group of one; got {got}"
    )


@dataclass(frozen=True, slots=True)
class Layout:
    """Which node each rank of the world is on.

    Attributes
    ----------
    nodes : tuple of int
        Node of each rank of the world, counted from 0 in the order of their first ranks.
    """

    nodes: tuple[int, ...]

    def of(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Return the node of each of these ranks, counted anew from 0."""
        order: dict[int, int] = {}
        return tuple(order.setdefault(self.nodes[rank], len(order)) for rank in ranks)


class ProcessGroup(Closing):
    """A group of ranks that call the same collectives.

    Made by `mpidist.init`, `split`, `new_group` and `duplicate`; closed by `close`, or at the end
    of a ``with`` block. Its collectives are called by one thread at a time, in the same order on
    all ranks; its messages by any thread, also meanwhile.

    Attributes
    ----------
    rank, size : int
        This process's rank in the group, and the number of ranks.
    ranks : tuple of int
        The rank in the world of each member.
    name : str
        For messages.
    local_rank, local_size : int
        Rank among, and number of, the members on this node.
    node_rank, num_nodes : int
        This node among, and number of, the nodes of the members.
    nodes : tuple of int
        The node of each member, counted from 0.
    timeout : float
        Seconds after which a wait fails and the group is broken.
    warn_after : float
        Seconds after which a wait logs a warning, and again at each doubling.
    operations : Operations
        Begins operations on this group: for verbs and adapters.
    transport : Backend
        What carries them; its `device` is what carries device arrays.
    watch : Watch
        Sees what the ranks of the world are doing.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        name: str,
        ranks: Sequence[int],
        layout: Layout,
        timeout: float,
        warn_after: float,
        watch: Watch,
        identity: int = 0,
    ) -> None:
        state = GroupState(
            backend,
            watch,
            ranks,
            name=name,
            timeout=timeout,
            warn_after=warn_after,
            identity=identity,
        )
        self.operations = Operations(state)
        self.transport = backend
        self.watch = watch
        self.rank = state.rank
        self.size = state.size
        self.ranks = state.ranks
        self.name = name
        self._state = state
        self._closed_with: list[ProcessGroup] = []
        self._layout = layout
        self._related: dict[str, ProcessGroup | None] = {}
        nodes = layout.of(self.ranks)
        self.node_rank = nodes[self.rank]
        self.num_nodes = max(nodes) + 1
        self.local_rank = nodes[: self.rank].count(self.node_rank)
        self.local_size = nodes.count(self.node_rank)
        self.nodes = nodes

    @classmethod
    def over(
        cls,
        backend: Backend,
        *,
        name: str = "world",
        timeout: float,
        warn_after: float,
        answers: bool = False,
    ) -> ProcessGroup:
        """Make the group of all ranks of a transport; collective over them.

        Parameters
        ----------
        backend : Backend
            The transport; the group closes it.
        name : str, optional
            For messages.
        timeout, warn_after : float
            Seconds; see the attributes.
        answers : bool, optional
            Whether a thread of this process answers ranks that want to know what it is doing.

        Returns
        -------
        ProcessGroup
            Its ranks are the ranks of the world.
        """
        ranks = range(backend.size)
        lone = Layout((0,) * backend.size)
        from mpidist.observe.watch import Watch

        records = backend.record()
        watch = Watch(backend.rank, backend.recorder, records)
        options: dict[str, Any] = {"timeout": timeout, "warn_after": warn_after, "watch": watch}
        group = cls(backend, name=name, ranks=ranks, layout=lone, **options)
        numbers, identity = group._introduce(backend.node())
        layout = Layout(tuple(numbers))
        nodes = layout.of(ranks)
        if answers:
            from mpidist.observe.watch.helper import helper

            helper().serve(watch, nodes)
        watch.connect(nodes, group._gather_bytes(watch.endpoint()))
        return cls(backend, name=name, ranks=ranks, layout=layout, identity=identity, **options)

    def __reduce_ex__(self, _: Any) -> NoReturn:
        """Refuse to be copied or pickled."""
        self._state.refuse_copy()

    def __repr__(self) -> str:
        """Return name, rank and size, as messages show them."""
        return repr(self._state)

    # -- facts ---------------------------------------------------------------------------------

    @property
    def timeout(self) -> float:
        """Seconds after which a wait fails and the group is broken."""
        return self._state.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._state.timeout = seconds

    @property
    def warn_after(self) -> float:
        """Seconds after which a wait logs a warning, and again at each doubling."""
        return self._state.warn_after

    @warn_after.setter
    def warn_after(self, seconds: float) -> None:
        self._state.warn_after = seconds

    @cached_property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        """Logger whose messages carry group and rank."""
        # Here, since few programs log: it is a part of the import that can be saved.
        from mpidist.log import rank_logger

        return rank_logger(self.name, self.rank, self.size)

    @property
    def capabilities(self) -> Capabilities:
        """What this group's transport can do with host arrays."""
        return self.transport.capabilities

    @property
    def device_capabilities(self) -> Capabilities | None:
        """What it can do with device arrays; None where it carries none."""
        return None if self.transport.device is None else self.transport.device.capabilities

    @property
    def backend(self) -> str:
        """Name of the transport; ``"hybrid"`` where it carries device arrays, too."""
        return self.transport.name if self.transport.device is None else "hybrid"

    def check_device(self, x: Array, verb: str, name: str = "x") -> None:
        """Raise unless this group carries this device array."""
        device = self.transport.device
        if device is None:
            raise UnsupportedOperationError(
                f"{verb} on {self}: {name} is a device array, and this group carries none: "
                f"{self.transport.no_device}. Copy it to the host (cupy.asnumpy) first, or "
                "set MPIDIST_ENABLE_GPU_FALLBACK=1 on all ranks before init, which does so for you"
            )
        device.check_device(x, f"{verb} on {self}: {name}")

    @property
    def crossovers(self) -> Crossovers:
        """From which sizes on this group takes which path; may be set, to the same on all ranks."""
        return self.transport.crossovers

    @crossovers.setter
    def crossovers(self, sizes: Crossovers) -> None:
        self.transport.take({1: sizes})

    @property
    def mpi_comm(self) -> Any:
        """The mpi4py communicator of exactly these ranks, for calls that mpidist lacks.

        Raises
        ------
        BackendUnavailableError
            If the group does not stand on MPI.
        """
        return self.transport.mpi_comm()

    def rank_of(self, world_rank: int) -> int | None:
        """Return the rank in this group of a rank of the world, or None for a non-member.

        The other way round is ``group.ranks[rank]``. `InvalidRankError` if it is no integer.
        """
        try:
            number = whole_number(world_rank)
        except TypeError as error:
            raise InvalidRankError(f"rank_of on {self}: {error}") from None
        return self.ranks.index(number) if number in self.ranks else None

    # -- making groups -------------------------------------------------------------------------

    def split(
        self,
        color: int | None,
        key: int = 0,
        *,
        name: str | None = None,
        timeout: Timeout = None,
    ) -> ProcessGroup | None:
        """Cut the group into one group per color.

        Parameters
        ----------
        color : int or None
            Ranks with the same color form a group; None takes part in none.
        key : int, optional
            Order in the new group; ties keep the order of this one.
        name : str, optional
            For messages.
        timeout : float or datetime.timedelta, optional
            Seconds for this call; the group's when omitted.

        Returns
        -------
        ProcessGroup or None
            This rank's new group; None if its color was. It inherits the deadline of this one.

        Raises
        ------
        CollectiveTimeoutError
            If a rank does not arrive within the group's timeout.

        Notes
        -----
        Collective over the group; blocks.
        """
        self._check_color(color, key)
        with self.operations.performing("split", timeout=timeout) as waiter:
            backend = self.transport.split(color, key, waiter=waiter)
            if self.transport.device is not None:
                device = self.transport.device.split(color, key, backend, waiter)
                if backend is not None:
                    backend.device = device
        if backend is None:
            return None
        return self._child(backend, name or f"{self.name}/{color}", timeout)

    def new_group(
        self, ranks: Sequence[int], *, name: str | None = None, timeout: Timeout = None
    ) -> ProcessGroup | None:
        """Make the group of some ranks.

        Parameters
        ----------
        ranks : sequence of int
            Ranks of this group in the order of the new one.
        name : str, optional
            For messages.
        timeout : float or datetime.timedelta, optional
            Seconds for this call; the group's when omitted.

        Returns
        -------
        ProcessGroup or None
            The new group; None at once on a rank that is not a member. It inherits the deadline of
            this one.

        Raises
        ------
        InvalidRankError
            If a rank lies outside the group, is named twice or is no integer, or there is none. A
            boolean mask is no list of ranks.
        CollectiveTimeoutError
            If a member does not arrive within the group's timeout.

        Notes
        -----
        Collective over `ranks` only, which block until all of them have arrived.
        """
        ranks = self._check_members(ranks)
        if self.rank not in ranks:
            return None
        what = f"new_group({list(ranks)})" + ("" if name is None else f" of {name}")
        with self.operations.performing(what, among=ranks, timeout=timeout) as waiter:
            backend = self.transport.create(ranks, waiter=waiter)
            if self.transport.device is not None:
                backend.device = self.transport.device.create(backend)
        label = name or f"{self.name}[{','.join(map(str, ranks))}]"
        return self._child(backend, label, timeout)

    def duplicate(self, name: str, *, timeout: Timeout = None) -> ProcessGroup:
        """Make another group of the same ranks, whose operations never match this one's.

        Collective over the group; blocks, as `split`. A subsystem that communicates by itself uses
        one.
        """
        duplicate = self.split(0, self.rank, name=name, timeout=timeout)
        assert duplicate is not None, "every rank gave color 0"
        return duplicate

    def node_group(self) -> ProcessGroup:
        """Return the group of the members on this node; collective when first called."""
        group = self._relative("node", self.node_rank)
        assert group is not None, "every rank is on some node"
        return group

    def cross_group(self) -> ProcessGroup | None:
        """Return the group of the members with this local rank, one per node.

        Where nodes have different numbers of members, the first q of each node take part, q being
        the smallest of these numbers; on the others it is None. Collective when first called.
        """
        smallest = min(self.nodes.count(node) for node in range(self.num_nodes))
        return self._relative("cross", self.local_rank if self.local_rank < smallest else None)

    def _relative(self, kind: str, color: int | None) -> ProcessGroup | None:
        if kind not in self._related:
            group = self.split(color, self.rank, name=f"{self.name}/{kind}")
            self._related[kind] = group
            self._closed_with += [] if group is None else [group]
        return self._related[kind]

    def _child(self, backend: Backend, name: str, timeout: Timeout) -> ProcessGroup:
        options: dict[str, Any] = {
            "name": name,
            "timeout": self.timeout,
            "warn_after": self.warn_after,
            "watch": self.watch,
        }
        backend.join(self.transport)
        lone = Layout((0,) * backend.size)
        group = ProcessGroup(backend, ranks=range(backend.size), layout=lone, **options)
        ranks, identity = group._introduce(self.ranks[self.rank], timeout)
        return ProcessGroup(backend, ranks=ranks, layout=self._layout, identity=identity, **options)

    def _introduce(self, number: int, timeout: Timeout = None) -> tuple[list[int], int]:
        """Return the number of each rank, and an identity drawn by rank 0; collective, blocks."""
        numbers = np.empty((self.size, 2), np.int64)
        own = np.array([number, int.from_bytes(os.urandom(7), "little")], np.int64)
        counts = (own.size,) * self.size
        self.operations.run(AllGather(own, numbers.reshape(-1), counts), lambda: None, timeout)
        return numbers[:, 0].tolist(), int(numbers[0, 1])

    def _gather_bytes(self, own: bytes) -> list[bytes]:
        """Return the bytes of every rank, which have one length on all; collective, blocks."""
        rows = np.empty((self.size, len(own)), np.uint8)
        counts = (len(own),) * self.size
        sent = np.frombuffer(own, np.uint8)
        self.operations.run(AllGather(sent, rows.reshape(-1), counts), lambda: None)
        return [row.tobytes() for row in rows]

    # -- memory --------------------------------------------------------------------------------

    def empty(
        self,
        shape: int | Sequence[int],
        dtype: npt.DTypeLike = np.float32,
        *,
        device: str | None = None,
        timeout: Timeout = None,
    ) -> Array:
        """Make an array in memory on which the transport works directly.

        On the host that is memory which the ranks of a node share, so that it need not be sent.

        Parameters
        ----------
        shape : int or sequence of int
            The same on all ranks.
        dtype : dtype, optional
            The same on all ranks.
        device : {"cpu", "gpu"}, optional
            Where it lies: on the host, which it does when omitted, or on the current device.
        timeout : float or datetime.timedelta, optional
            Seconds for this call; the group's when omitted.

        Returns
        -------
        Array
            Not initialised. `all_reduce` in place, `broadcast` in place, `reduce_scatter` from it
            and `all_gather` into it work on the memory of all ranks directly; everything else
            treats it as any other array. It, and views of it, stay valid after `close`.

        Raises
        ------
        CollectiveMismatchError
            If the ranks ask for different numbers of bytes; on all of them, and nothing is made.
        SizeMismatchError
            If a length is negative.
        BackendUnavailableError
            If it is to lie on a GPU, and there is none.
        CollectiveTimeoutError
            If a rank does not arrive within the group's timeout.

        Notes
        -----
        Collective over the group; blocks. Being registered is part of a collective call, as the
        dtype is: all ranks pass the same place of the same array, or none does. Where there is no
        shared memory (one rank per node, or none left) it is an ordinary array on all ranks. On the
        device it is an ordinary array, too, and making it is local.
        """
        if device == "gpu":
            from mpidist.backends.availability import why_no_gpu

            reason = why_no_gpu()
            if reason is not None:
                raise BackendUnavailableError(f"empty on {self}: {reason}")
            return device_empty(shape, dtype)
        if device not in (None, "cpu"):
            raise UnsupportedOperationError(
                f"empty on {self}: device must be 'cpu' or 'gpu', got {device!r}"
            )
        memory = self._memory("empty", shape, dtype, self.transport.allocate, timeout)
        if memory is None:
            return np.empty(shape, dtype)
        return memory.view(dtype).reshape(shape)

    def shared(
        self,
        shape: int | Sequence[int],
        dtype: npt.DTypeLike = np.float32,
        *,
        timeout: Timeout = None,
    ) -> Array | None:
        """Make one array that all ranks of the group see, where they share memory.

        Parameters
        ----------
        shape : int or sequence of int
            The same on all ranks.
        dtype : dtype, optional
            The same on all ranks.
        timeout : float or datetime.timedelta, optional
            Seconds for this call; the group's when omitted.

        Returns
        -------
        Array or None
            Not initialised, and the same memory on every rank: what one writes, all read. None on
            all ranks where there is no such memory. It stays valid after `close`.

        Raises
        ------
        CollectiveMismatchError
            If the ranks ask for different numbers of bytes; on all of them, and nothing is made.
        SizeMismatchError
            If a length is negative.
        CollectiveTimeoutError
            If a rank does not arrive within the group's timeout.

        Notes
        -----
        Collective over the group; blocks. Usually asked of a `node_group`: over several nodes it is
        None. A rank may read what another has written when both have passed a `barrier` since, and
        write over what another has read likewise. Each rank provides an equal share of the pages.
        Collectives take it as any other array, and no two ranks may receive in one place of it.
        """
        memory = self._memory("shared", shape, dtype, self.transport.share, timeout)
        if memory is not None:
            return memory.view(dtype).reshape(shape)
        fresh = np.empty(shape, dtype)
        return fresh if self.size == 1 or not fresh.nbytes else None

    def register(self, descriptor: int, nbytes: int, *, timeout: Timeout = None) -> Array:
        """Register memory that another library has made, so that collectives work on it directly.

        Parameters
        ----------
        descriptor : int
            An open file of shared memory, such as one of ``memfd_create``, for reading and
            writing; each rank gives its own. It may be closed afterwards.
        nbytes : int
            Bytes at the beginning of the file, the same on all ranks.
        timeout : float or datetime.timedelta, optional
            Seconds for this call; the group's when omitted.

        Returns
        -------
        Array, shape (nbytes,), uint8
            This rank's memory. Any array in it counts as registered, also one that reaches it by
            a mapping of another library that exists at the time of the call.

        Raises
        ------
        BackendUnavailableError
            If the file of any rank is too short or cannot be opened by the other ranks of its
            node, or memory for it is missing. On all ranks, and nothing is registered.
        CollectiveMismatchError
            If the ranks give different numbers of bytes; on all of them, and nothing is registered.
        CollectiveTimeoutError
            If a rank does not arrive within the group's timeout.

        Notes
        -----
        Collective over the group; blocks. What `empty` says of its memory holds for this, too; on
        one rank per node it is ordinary memory. Call `unregister` before the memory is released:
        what lies at its addresses later would be taken for it.
        """
        make = partial(self.transport.register, descriptor)
        memory = self._memory("register", nbytes, np.uint8, make, timeout)
        return np.empty(0, np.uint8) if memory is None else memory

    def unregister(self, x: Array, *, timeout: Timeout = None) -> None:
        """Forget memory that `register` has registered.

        Parameters
        ----------
        x : Array
            Any contiguous array in it, such as the one that `register` returned; every rank gives
            one.
        timeout : float or datetime.timedelta, optional
            Seconds for this call; the group's when omitted.

        Raises
        ------
        BackendUnavailableError
            If the array of any rank is not in registered memory, or the arrays are in memory of
            different calls of `register`; on all ranks, and nothing changes.
        CollectiveTimeoutError
            If a rank does not arrive within the group's timeout.

        Notes
        -----
        Collective over the group; blocks. It waits for what is under way on the group. The arrays
        stay valid, as ordinary ones.
        """
        with self.operations.performing("unregister", timeout=timeout) as waiter:
            self.transport.unregister(x, waiter=waiter)

    def _memory(
        self,
        operation: str,
        shape: int | Sequence[int],
        dtype: npt.DTypeLike,
        make: Callable[..., Array | None],
        timeout: Timeout,
    ) -> Array | None:
        """Make bytes for an array of this shape; None for no bytes, or where there are none."""
        dtype = np.dtype(dtype)
        shape = tuple(map(index, np.atleast_1d(np.asarray(shape, object))))
        if any(length < 0 for length in shape):
            raise SizeMismatchError(f"{operation} on {self}: no array has the shape {shape}")
        nbytes = prod(shape) * dtype.itemsize
        what = f"{operation} {dtype}{list(shape)}"
        with self.operations.performing(what, timeout=timeout) as waiter:
            # A block has parts of one size: with another stride, ranks would overlap.
            own, sizes = np.array([min(nbytes, 2**63 - 1)]), np.empty(self.size, np.int64)
            self.transport.run(AllGather(own, sizes, (1,) * self.size), waiter=waiter)
            if (sizes != own).any():
                raise CollectiveMismatchError(
                    "the ranks ask for arrays of different sizes, and nothing has been made; all "
                    f"must give the same shape and dtype, here {shape} and {dtype}. Bytes by rank: "
                    f"{sizes.tolist()}"
                )
            return make(nbytes, waiter=waiter) if nbytes else None

    def _check_members(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Return different ranks of this group as plain numbers."""
        try:
            numbers = tuple(map(whole_number, ranks))
        except TypeError:
            numbers = ()
        valid = all(0 <= rank < self.size for rank in numbers)
        if not valid or len(set(numbers)) != len(numbers) or not numbers:
            raise InvalidRankError(
                f"new_group on {self}: ranks must be different ranks from 0 to {self.size - 1}, at "
                f"least one; got {ranks}. The ranks of a mask are numpy.flatnonzero(mask)"
            )
        return numbers

    def _check_color(self, color: int | None, key: int) -> None:
        """Raise unless every MPI library takes these for a split."""
        try:
            valid = (color is None or 0 <= index(color) < 2**31) and abs(index(key)) < 2**31
        except TypeError:
            valid = False
        if not valid:
            raise UnsupportedOperationError(
                f"split on {self}: color must be None or an integer from 0 to 2**31 - 1 and key an "
                f"integer below 2**31; got color {color!r}, key {key!r}"
            )

    # -- operations under way, and the end -----------------------------------------------------

    def called_at(self, site: Site) -> AbstractContextManager[None]:
        """Let records and errors say that a line of the user has called what this thread calls.

        For adapters whose own code calls the verbs, where the user's line is not on the stack: one
        that a framework's thread or hook calls.

        Parameters
        ----------
        site : Site
            File, line and function, from `mpidist.observe.recorder.site_of` for one; never a frame,
            which would keep the user's arrays alive.

        Returns
        -------
        context manager
            Around the calls, of this thread on this group.
        """
        return self._state.journal.called_at(site)

    def service(self, name: str, make: Callable[[], C]) -> C:
        """Return the service of this name, which the first call makes; see `Operations.service`."""
        return self.operations.service(name, make)

    def progress(self) -> None:
        """Drive what is under way as far as it can go now; local, never blocks.

        MPI makes no progress by itself: a loop that computes for long while operations are
        outstanding calls this now and then.
        """
        self.operations.progress()

    def close(self) -> None:
        """Finish what is under way within the deadline and release the group.

        Raises
        ------
        DistributedError
            If an operation failed, now or before, that no wait reported; the group is closed all
            the same.

        Notes
        -----
        Local, but waits for the group's outstanding operations and saves, if it has any. Closing
        twice is allowed; a broken group is not waited for.
        """
        if self._state.reason is not None:
            return
        failed = self.operations.finish()
        for group in self._closed_with:
            group.close()
        self.operations.release()
        if failed is not None:
            raise failed

    def print(self, *values: object, sep: str = " ") -> None:
        """Print one line that says which rank speaks.

        Parameters
        ----------
        *values : object
            As for the built-in.
        sep : str, optional
            Between the values.
        """
        # One write per line: the lines of several ranks may mix, but not their characters.
        text = sep.join(map(str, values))
        line = f"[{self.name} {self.rank}/{self.size}] {text}\n"
        print(line, end="", flush=True)  # noqa: T201  # this is what it is for
