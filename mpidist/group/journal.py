"""What a group writes into its rank's recorder: operations by names that are made once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import TYPE_CHECKING

from mpidist._types import ReduceOp
from mpidist.backends.verbs import AllReduce, Collective
from mpidist.observe.recorder import Kind, Name, Recorder

if TYPE_CHECKING:
    from types import FrameType

    from mpidist._types import Array
    from mpidist.backends.node.sums import Sum
    from mpidist.observe.recorder.recorder import Site

__all__ = ["Journal"]

_REMEMBERED = 1024
"""Names that are remembered: a job may call with other counts at every step."""


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

    def name_sum(self, prepared: Sum, x: Array, op: ReduceOp) -> Name:
        """Return the name of an all_reduce in place of a 1-D array, and remember it there."""
        call = AllReduce(x, x, op, shape=x.shape)
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
