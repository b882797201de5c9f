"""What the operations of a group share: transport, deadlines, records, what is pending, an error.

They need it, and it needs none of them: so a wait or a Work holds this, not the group.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from mpidist.backends.base import Backend
from mpidist.backends.verbs import AllReduce, Collective
from mpidist.backends.work import Work
from mpidist.errors import CollectiveMismatchError, GroupBrokenError
from mpidist.observe.recorder import Kind, Name, Recorder

if TYPE_CHECKING:
    from types import FrameType

    from mpidist._types import Array, ReduceOp
    from mpidist.backends.node.sums import Sum
    from mpidist.observe.recorder.recorder import Site
    from mpidist.observe.watch import Watch

__all__ = ["GroupState", "Journal", "PendingWork", "abandon_groups", "broken_states"]

T = TypeVar("T")

_REMEMBERED = 1024
"""Names that are remembered: a job may call with other counts at every step."""

_MANY = 32
"""Operations on host arrays that may be outstanding before a call polls them.

A poll costs about a tenth of a small operation: programs that wait for theirs should not pay it.
"""

_BROKEN: list[GroupState] = []
# The buffers of a broken group may still be written by the transport. They live here, with what
# the group has pending, until the process ends, and the exit handler sees that the job has to be
# aborted.


_STATES: weakref.WeakSet[GroupState] = weakref.WeakSet()
"""Of the groups, and of those of which the program has kept an operation only."""


def abandon_groups(transport: str, reason: str) -> None:
    """Let no group of a transport be used any more, in a process that is no rank of it.

    Parameters
    ----------
    transport : str
        The name of its backend.
    reason : str
        Why, for the error that every verb raises from now on.
    """
    for state in tuple(_STATES):
        if state.backend.name == transport and state.reason is None:
            state.reason = reason


def broken_states() -> Sequence[GroupState]:
    """Return those of the groups that an error has broken in this process."""
    return tuple(_BROKEN)


class Journal:
    """The records of one group.

    Parameters
    ----------
    recorder : Recorder
        Of this rank.
    name : str
        Of the group.
    identity : int
        Of the group, the same on all its ranks.
    """

    def __init__(self, recorder: Recorder, name: str, identity: int) -> None:
        self.begin = recorder.begin
        self.end = recorder.end
        self.wait = recorder.wait
        self.waited = recorder.waited
        self._recorder = recorder
        self._group = recorder.name_group(name, identity)
        self._names: dict[object, Name] = {}
        # By thread; in most programs there are none, and the recorder's own methods serve.
        self._sites: dict[int, int] = {}
        self._changing_sites = Lock()

    @contextmanager
    def called_at(self, site: Site) -> Iterator[None]:
        """Record what this thread begins, and waits for, as called at a site."""
        thread, number = get_ident(), self._recorder.site(site)
        with self._changing_sites:
            before = self._sites.get(thread)
            self._sites[thread] = number
            self.begin, self.wait = self._begin_at, self._wait_at
        try:
            yield
        finally:
            with self._changing_sites:
                if before is None:
                    del self._sites[thread]
                else:
                    self._sites[thread] = before
                if not self._sites:
                    self.begin, self.wait = self._recorder.begin, self._recorder.wait

    def _begin_at(self, name: Name, number: int, frame: FrameType) -> int:
        site = self._sites.get(get_ident())
        if site is None:  # of another thread
            return self._recorder.begin(name, number, frame)
        return self._recorder.begin_at(name, number, site)

    def _wait_at(self, sequence: int, frame: FrameType) -> None:
        site = self._sites.get(get_ident())
        if site is None:
            self._recorder.wait(sequence, frame)
        else:
            self._recorder.wait_at(sequence, site)

    def name(self, what: str, kind: Kind, alike: str | None = None) -> Name:
        """Return how operations of this name are recorded; see `Recorder.name`."""
        key = (what, kind)
        return self._names.get(key) or self._remember(
            key, self._recorder.name(what, self._group, kind, alike)
        )

    def name_collective(self, kind: Kind, collective: Collective) -> Name:
        """Return how a collective is recorded; see `Collective.describe`."""
        key = (kind, collective.key())
        name = self._names.get(key)
        if name is None:
            what = "i" * (kind is Kind.IMMEDIATE) + collective.describe()
            name = self._recorder.name(what, self._group, kind, on_device=collective.on_device)
            self._remember(key, name)
        return name

    def _remember(self, key: object, name: Name) -> Name:
        if len(self._names) >= _REMEMBERED:
            self._names.clear()
        self._names[key] = name
        return name

    def name_sum(self, prepared: Sum, call: AllReduce) -> Name:
        """Return the name of a blocking sum, and remember it with what is prepared for it."""
        prepared.name = name = self.name_collective(Kind.BLOCKING, call)
        return name

    def name_device_sum(self, x: Array, op: ReduceOp) -> Name:
        """Return the name of an all_reduce in place of a device array."""
        key = (x.dtype, x.shape, op)
        name = self._names.get(key)
        if name is None:
            call = AllReduce(x, x, op, shape=x.shape)
            name = self.name_collective(Kind.BLOCKING, call)
            self._remember(key, name)
        return name


class PendingWork(Work[T]):
    """An operation that a group has pending."""

    error: BaseException | None

    @abstractmethod
    def complete(self) -> bool:
        """Poll the transport's part, and finish when it is over; never raises."""


class GroupState:
    """What a group and its operations share.

    Parameters
    ----------
    backend : Backend
        The transport.
    watch : Watch
        Sees what the ranks of the world are doing.
    ranks : sequence of int
        The rank in the world of each member.
    name : str
        Of the group, for messages.
    timeout, warn_after : float
        Seconds after which a wait fails, and after which it is reported.
    identity : int
        The same on all ranks, and on no other group.

    Attributes
    ----------
    journal : Journal
        Writes the group's operations into the rank's recorder.
    outstanding : OrderedDict of PendingWork to None
        The operations under way, in the order in which `release` polls them.
    unseen : PendingWork or None
        An operation that failed and that no wait has reported.
    reason : str or None
        Why the group cannot be used any more.
    """

    def __init__(
        self,
        backend: Backend,
        watch: Watch,
        ranks: Sequence[int],
        *,
        name: str,
        timeout: float,
        warn_after: float,
        identity: int,
    ) -> None:
        self.backend = backend
        self.watch = watch
        self.rank = backend.rank
        self.size = backend.size
        self.ranks = tuple(ranks)
        self.name = name
        self.timeout = timeout
        self.warn_after = warn_after
        self.identity = identity
        self.journal = Journal(backend.recorder, name, identity)
        self.outstanding: OrderedDict[PendingWork[Any], None] = OrderedDict()
        self.unseen: PendingWork[Any] | None = None
        self.reason: str | None = None
        self._limit = _MANY
        _STATES.add(self)

    def __reduce_ex__(self, _: Any) -> NoReturn:
        """Refuse to be copied or pickled, and so with all that holds it."""
        self.refuse_copy()

    def refuse_copy(self) -> NoReturn:
        """Raise TypeError, and say what can be copied."""
        raise TypeError(
            f"{self} cannot be copied or pickled, nor can what holds it: it connects processes. "
            "Pass it on as it is, or make another with duplicate(); of a DDP copy its module, "
            "between two steps; of an optimizer its state_dict()"
        )

    def __repr__(self) -> str:
        """Return name, rank and size, as messages show them."""
        return f"group {self.name!r}, rank {self.rank} of {self.size}"

    # -- what is pending -------------------------------------------------------------------------

    def release(self, most: int) -> None:
        """Release finished operations, which hold their arrays: a program need not wait for them.

        Polls them in turn, also those behind one that lasts, until `most` in a row are not over.
        """
        outstanding, unfinished = self.outstanding, 0
        while unfinished < min(most, len(outstanding)):
            try:
                work = next(iter(outstanding))
                if work.complete():
                    unfinished = 0
                else:
                    outstanding.move_to_end(work)
                    unfinished += 1
            except (StopIteration, RuntimeError, KeyError):
                return  # another thread has begun or ended one: it looks after the others

    def release_many(self) -> None:
        """Do so where many are outstanding, and again when half as many more have begun.

        That makes two polls of an unfinished one for each that begins, and none in a program that
        waits for its operations.
        """
        if len(self.outstanding) >= self._limit:
            self.backend.progress()
            self.release(_MANY)
            self._limit = max(_MANY, len(self.outstanding) + _MANY // 2)

    def drive(self) -> None:
        """Make progress while this rank waits; local, never blocks."""
        self.backend.progress()
        if self.outstanding:
            self.release(1)

    def progress(self) -> None:
        """Drive all that is pending as far as it can go now; local, never blocks."""
        self.check_usable("progress")
        self.backend.progress()
        if self.backend.device is not None:
            self.backend.device.idle()
        for work in tuple(self.outstanding):
            work.complete()

    # -- errors ----------------------------------------------------------------------------------

    def check_usable(self, operation: str) -> None:
        """Raise if the group is closed or broken."""
        if self.reason is not None:
            raise GroupBrokenError(
                f"{operation} on {self}: the group cannot be used any more: {self.reason}"
            )

    def break_by(self, error: BaseException) -> None:
        """Make the group unusable: `error` has left its ranks at different places."""
        if self.reason is None:
            self.reason = str(error) or type(error).__name__
            _BROKEN.append(self)
            if self.backend.device is not None:
                self.backend.device.abandon(error)

    def add_operation(self, error: CollectiveMismatchError, operation: str) -> None:
        """Add operation and group to an error of the transport."""
        if self.reason is None:
            error.args = (f"{operation} on {self}: {error}",)
