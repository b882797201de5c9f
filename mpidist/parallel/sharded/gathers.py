"""`UnitGathers`: makes units whole for the passes of their modules, in one order on all ranks.

[Note: order of gathers] A gather needs all ranks, and a rank may pass over modules that others run.
So before each gather all ranks agree on what it is of: each says which stage it needs next, or that
its pass is over, and the one that comes first in the order is gathered. A rank that has asked for
another one takes part, and asks again. The order is that in which stages were gathered in the last
pass of the same kind; at first that of the units. Whatever ranks pass over, none waits for ever.
All know the same of what has been gathered, so they foresee the same: while a stage computes, the
next ones of the order are on their way into the other slots.

Agreeing is an all-reduce of 16 bytes. It is also the meeting after which what was foreseen is there
on all ranks of a node, and nobody reads what was there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from mpidist import env
from mpidist._types import LOR, MIN
from mpidist.collectives import all_reduce
from mpidist.errors import (
    CollectiveMismatchError,
    CollectiveTimeoutError,
    GroupBrokenError,
    PeerLostError,
    TransportError,
)
from mpidist.group import ProcessGroup
from mpidist.nn.module import Module
from mpidist.nn.surround import surround
from mpidist.parallel.sharded.gradients import UnitGradients
from mpidist.parallel.sharded.parameter_shards import SEALED, read_only
from mpidist.parallel.sharded.unit_store import UnitStore
from mpidist.parallel.sharded.units import Stage

__all__ = ["UnitGathers"]

_FATAL = (
    CollectiveMismatchError,
    CollectiveTimeoutError,
    GroupBrokenError,
    PeerLostError,
    TransportError,
)
"""Errors after which other ranks may not come to what this one would wait for."""

_OVER = np.iinfo(np.int64).max
"""What a rank asks for whose pass is over."""


class UnitGathers:
    """Gathers the stages of a `UnitStore` for the modules that need them.

    Parameters
    ----------
    module : Module
        The model.
    stages : sequence of Stage
        What is gathered together, and the modules that need it in their passes.
    store : UnitStore
        The parameters' slices, and the slots.
    group : ProcessGroup
        All ranks over which parameters are cut. A duplicate is made.
    prefetch : int
        How many stages are gathered ahead.

    Notes
    -----
    Collective over `group`; blocks. So are passes, and `whole`.
    """

    def __init__(
        self,
        module: Module,
        stages: Sequence[Stage],
        store: UnitStore,
        group: ProcessGroup,
        *,
        prefetch: int,
    ) -> None:
        self._named = dict(module.named_parameters())
        self._stages = stages
        self._store = store
        self._group = group
        self._prefetch = prefetch
        self._order = _GatherOrder(group.duplicate(f"{group.name}/order"), len(stages))
        self._surrounds = [
            surround(part, self._around(number), ("forward", "backward", "backward_input"))
            for number, stage in enumerate(stages)
            for part in stage.modules
        ]
        # MPI moves messages only while it is called; in backward each gradient is an occasion.
        self._surrounds += [
            surround(leaf, self._then_progress, ("forward",))
            for _, leaf in module.named_modules()
            if not any(leaf.named_children())
        ]
        self._current: int | None = None  # on which all ranks agreed last, in this pass
        self._open: dict[int, int] = {}  # how many passes of its modules are under way, by stage
        self._gradients: UnitGradients | None = None  # those of the pass
        self._whole = False
        self._poisons = bool(all_reduce(np.array(env.debug()), group, op=LOR))
        self._failure: str | None = None

    @contextmanager
    def within_pass(self, kind: str, gradients: UnitGradients | None) -> Iterator[None]:
        """Gather what the modules need, in a pass of the model.

        Parameters
        ----------
        kind : str
            Whose order is remembered.
        gradients : UnitGradients or None
            What is reduced in the pass, if something is: then other ranks cannot end theirs after
            an error in the one of this rank.
        """
        if self._failure is not None:
            raise RuntimeError(
                f"FSDP on {self._group}: an earlier pass failed half way ({self._failure}), so the "
                "ranks do not agree any more on what is gathered; end the job"
            )
        if self._whole:
            yield
            return
        self._gradients, self._current = gradients, None
        self._order.begin(kind)
        self._start_next()
        try:
            with ExitStack() as stack:
                for surrounded in self._surrounds:
                    stack.enter_context(surrounded)
                yield
        except BaseException as error:
            can_go_on = isinstance(error, Exception) and not isinstance(error, _FATAL)
            if can_go_on and gradients is None:
                self._end()
            else:
                self._failure = repr(error)
            raise
        self._end()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Have all parameters whole in memory of their own, and passes gather nothing."""
        if self._whole:
            yield
            return
        for name, view in self._store.gather_all().items():
            self._named[name].data = read_only(view)
        self._whole = True
        try:
            yield
        finally:
            self._whole = False
            for stage in range(len(self._stages)):
                self._seal(stage)

    def close(self) -> None:
        """Release the groups."""
        self._order.close()
        self._store.close()

    # -- a module's pass -----------------------------------------------------------------------

    def _around(self, stage: int) -> Callable[[str, Callable[[], Any]], Any]:
        def around(_: str, run: Callable[[], Any]) -> Any:
            self._unshard(stage)
            try:
                return run()
            finally:
                self._reshard(stage)

        return around

    def _then_progress(self, _: str, run: Callable[[], Any]) -> Any:
        result = run()
        self._store.progress()
        return result

    def _unshard(self, stage: int) -> None:
        if not self._open.get(stage):
            if self._open:
                (within,) = self._open
                raise RuntimeError(
                    f"FSDP on {self._group}: a module of unit '{self._stages[stage].name}' is run "
                    f"by one of unit '{self._stages[within].name}', which does not hold it; hold "
                    "it there as an attribute, so that the outer unit is whole meanwhile"
                )
            while self._current != stage:
                self._agree(stage)
            for name, view in self._store.views(stage).items():
                self._named[name].data = view
        self._open[stage] = self._open.get(stage, 0) + 1

    def _reshard(self, stage: int) -> None:
        self._open[stage] -= 1
        if not self._open[stage]:
            del self._open[stage]
            self._seal(stage)

    def _seal(self, stage: int) -> None:
        for name in self._store.names(stage):
            self._named[name].seal(SEALED)

    # -- all ranks -----------------------------------------------------------------------------

    def _agree(self, wanted: int | None) -> int | None:
        """Gather the stage that comes first of those that ranks want, and return it."""
        foreseen = self._order.next(1)
        for stage in foreseen:
            self._store.wait(stage)
        gradients = self._gradients
        agreed, sent = self._order.agree(wanted, 0 if gradients is None else gradients.sent)
        for stage in foreseen:
            if self._store.holds(stage):
                self._store.complete(stage)
        self._current = agreed
        if self._poisons:
            self._store.poison(self._needed())
        if agreed is not None:
            if not self._store.holds(agreed):
                self._store.start(agreed, {agreed})
            if not self._store.is_complete(agreed):
                self._store.wait_all()
            self._start_next()
        if gradients is not None:
            gradients.wait_only_for(None if agreed is None else sent)
        return agreed

    def _start_next(self) -> None:
        """Start to gather what comes next, in the order."""
        needed = self._needed()
        for stage in needed:
            if not self._store.holds(stage):
                self._store.start(stage, needed)

    def _needed(self) -> list[int]:
        """Return the stage that computes, and those to be gathered ahead of it."""
        current = [] if self._current is None else [self._current]
        return [*current, *self._order.next(self._prefetch)]

    def _end(self) -> None:
        """Take part in the gathers of others, until the pass is over on all ranks."""
        while self._agree(None) is not None:
            pass
        self._store.wait_all()
        self._order.end()


class _GatherOrder:
    """What all ranks have gathered in a pass, and what they gathered in the one before."""

    def __init__(self, group: ProcessGroup, count: int) -> None:
        self._group = group
        self._count = count
        self._last: dict[str, list[int]] = {}  # by kind of pass
        self._kind = ""
        self._before: list[int] = []
        self._now: list[int] = []
        self._position = 0  # in `_before`

    def begin(self, kind: str) -> None:
        """Begin a pass."""
        stages = range(self._count)
        guess = [*stages] if kind == "forward" else [*reversed(stages)]
        self._kind, self._now, self._position = kind, [], 0
        self._before = self._last.get(kind, guess)

    def end(self) -> None:
        """Remember the order of the pass that has ended."""
        self._last[self._kind] = self._now

    def next(self, count: int) -> list[int]:
        """Return the next different stages that are foreseen, at most so many."""
        return list(dict.fromkeys(self._before[self._position :]))[:count]

    def agree(self, wanted: int | None, sent: int) -> tuple[int | None, int]:
        """Return the stage that comes first of those that the ranks want, and the least `sent`.

        The stage is None where no rank wants one.
        """
        own = [_OVER if wanted is None else self._index_of(wanted), sent]
        first, sent = all_reduce(np.array(own, np.int64), self._group, op=MIN).tolist()
        if first == _OVER:
            return None, sent
        if first < len(self._before):
            self._position = first + 1
            stage = self._before[first]
        else:
            stage = first - len(self._before)
        self._now.append(stage)
        return stage, sent

    def _index_of(self, stage: int) -> int:
        """Return where a stage is in the order from here on; the others come behind."""
        try:
            return self._before.index(stage, self._position)
        except ValueError:
            return len(self._before) + stage

    def close(self) -> None:
        self._group.close()
