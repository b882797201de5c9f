"""Run a function on every rank of a simulated job."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, Generic, TypeVar

from mpidist.backends.simulated.backend import SimulatedBackend
from mpidist.backends.simulated.faults import DeliveryMode, Faults, JobAborted, RankDied
from mpidist.backends.simulated.network import Network
from mpidist.errors import CollectiveTimeoutError, GroupBrokenError, PeerLostError
from mpidist.group import ProcessGroup

T = TypeVar("T")

_GRACE = 0.5
"""Seconds that the other ranks have after one has failed, before they are ended."""

_MARGIN = 1.0
"""Seconds by which the groups' own deadline, whose error says more, comes before the run's."""

_CONSEQUENCES = (PeerLostError, GroupBrokenError, CollectiveTimeoutError)
"""What a rank raises because another one has failed."""


def run_ranks(
    size: int,
    fn: Callable[..., T],
    *args: Any,
    mode: DeliveryMode = DeliveryMode.EAGER,
    faults: Faults | None = None,
    seed: int = 0,
    ranks_per_node: int | None = None,
    node_memory: bool = False,
    timeout: float = 30.0,
) -> list[T]:
    """Call ``fn(group, *args)`` on `size` ranks, each of them a thread of this process.

    Parameters
    ----------
    size : int
        Number of ranks, at least 1.
    fn : callable
        What each rank does; its first argument is the rank's `ProcessGroup`, which is closed when
        it returns.
    *args : Any
        More arguments, the same objects on all ranks.
    mode : DeliveryMode, optional
        When messages are delivered; see `DeliveryMode`.
    faults : Faults, optional
        What goes wrong; calls and messages are counted from the beginning of `fn`.
    seed : int, optional
        Of the delays in `faults`.
    ranks_per_node : int, optional
        Pretend that so many consecutive ranks share a node; all when omitted.
    node_memory : bool, optional
        Whether ranks of a node compare their calls and sum in shared memory, as the processes of a
        node do, and have registered memory. When omitted all goes by messages.
    timeout : float, optional
        Seconds; of the groups, and, with a second added, of the whole run.

    Returns
    -------
    list
        What `fn` returned, by rank; None for a rank whose death was injected.

    Raises
    ------
    TimeoutError
        If a rank did not end in time; the message shows where each one is.
    Exception
        What the first rank, in the order of ranks, raised; an error that only tells of another
        rank's failure comes last. The other ranks' errors stand in its notes.

    Notes
    -----
    Never hangs: once a rank has failed, or the time is over, the others are ended from within
    their next call of the group.

    Examples
    --------
    >>> run_ranks(3, lambda group: group.rank * 10)
    [0, 10, 20]
    """
    network = Network(
        size, mode=mode, seed=seed, ranks_per_node=ranks_per_node, node_memory=node_memory
    )
    begin = threading.Barrier(size, action=lambda: network.inject(faults or Faults()))

    def body(rank: int) -> T:
        backend = SimulatedBackend(network, rank)
        group = ProcessGroup.over(backend, timeout=timeout, warn_after=max(timeout, 60.0))
        begin.wait(timeout)
        with group:
            return fn(group, *args)

    ranks = [_Rank(rank, body) for rank in range(size)]
    for rank in ranks:
        rank.thread.start()
    try:
        late = _join(ranks, timeout + _MARGIN)
    finally:
        # Does nothing to ranks that have ended; the others end at their next call.
        network.abort(1)
    for rank in ranks:
        rank.thread.join(_MARGIN)
    _raise_first(ranks, late)
    return [rank.result for rank in ranks]


class _Rank(Generic[T]):
    """One rank: its thread, and what came of it."""

    def __init__(self, number: int, body: Callable[[int], T]) -> None:
        self.number = number
        self.result: Any = None
        self.error: BaseException | None = None
        self._body = body
        # Daemons: a rank that hangs outside mpidist must not keep the process from ending.
        self.thread = threading.Thread(target=self._run, name=f"rank-{number}", daemon=True)

    def _run(self) -> None:
        try:
            self.result = self._body(self.number)
        except RankDied:
            pass
        except BaseException as error:  # noqa: BLE001  # raised again by the caller of run_ranks
            self.error = error

    def stack(self) -> str:
        """Return where this rank is, innermost call last."""
        frame = sys._current_frames().get(self.thread.ident or 0)
        lines = traceback.format_stack(frame) if frame is not None else ["  it has ended\n"]
        return f"rank {self.number}:\n{''.join(lines)}"


def _join(ranks: Sequence[_Rank[Any]], timeout: float) -> str:
    """Wait for all ranks, and return where those are that did not come in time."""
    deadline = monotonic() + timeout
    failed = False
    while alive := [rank for rank in ranks if rank.thread.is_alive()]:
        if not failed and any(rank.error is not None for rank in ranks):
            failed = True
            deadline = min(deadline, monotonic() + _GRACE)
        if monotonic() >= deadline:
            if failed:
                return ""
            stacks = "\n".join(rank.stack() for rank in alive)
            names = ", ".join(str(rank.number) for rank in alive)
            return f"run_ranks: rank {names} did not end within {timeout:g} s\n{stacks}"
        alive[0].thread.join(0.02)
    return ""


def _remoteness(error: BaseException | None) -> int:
    """Return how far an error is from the cause: the cause itself, a consequence, or the end."""
    if isinstance(error, JobAborted):
        return 2
    return int(isinstance(error, _CONSEQUENCES))


def _raise_first(ranks: Sequence[_Rank[Any]], late: str) -> None:
    """Raise the error that says most, with the others noted."""
    failed = [rank for rank in ranks if rank.error is not None]
    failed.sort(key=lambda rank: (_remoteness(rank.error), rank.number))
    first: BaseException | None = TimeoutError(late) if late else None
    if first is None and failed:
        first = failed.pop(0).error
    if first is None:
        return
    notes = getattr(first, "__notes__", [])
    # `add_note` begins with Python 3.11; pytest shows the attribute on 3.10 too.
    first.__notes__ = [  # type: ignore[attr-defined]
        *notes,
        *(f"rank {rank.number} raised {rank.error!r}" for rank in failed),
    ]
    raise first
