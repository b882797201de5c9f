"""What a load reads over what it needs, where other ranks hold the arrays than saved them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mpidist._types import SUM, Array
from mpidist.backends.simulated.backend import SimulatedBackend
from mpidist.backends.simulated.network import Network
from mpidist.bench.disk import Counter
from mpidist.bench.layouts import DIM0, DIM1, FLAT, LAYOUTS, REPLICATED, Model, memory_of
from mpidist.bench.report import Target
from mpidist.checkpoint import load, save
from mpidist.collectives import all_reduce, barrier
from mpidist.group import ProcessGroup

__all__ = ["CASES", "Case", "reads_of_ranks", "reads_of_simulated_ranks"]

_MOST = 1.05


@dataclass(frozen=True, slots=True)
class Case:
    """A save by some ranks, and a load by others.

    Attributes
    ----------
    saved, loaded : int
        Numbers of ranks.
    before, after : str
        How they hold the arrays; see `LAYOUTS`.
    """

    saved: int
    loaded: int
    before: str
    after: str

    @property
    def words(self) -> str:
        """What it is, for a table."""
        if self.before == self.after:
            return f"{self.before}, {self.saved} ranks -> {self.loaded}"
        return f"{self.before} of {self.saved} ranks -> {self.after} of {self.loaded}"


CASES = (
    Case(4, 3, DIM0, DIM0),
    Case(4, 8, DIM0, DIM0),
    Case(4, 6, DIM0, DIM0),
    Case(4, 4, DIM0, DIM1),
    Case(4, 3, DIM1, DIM0),
    Case(4, 3, FLAT, FLAT),
    Case(4, 3, REPLICATED, DIM0),
    Case(4, 3, DIM0, REPLICATED),
)
"""For simulated ranks, each on a node of its own."""


def reads_of_ranks(world: ProcessGroup, model: Model, directory: Path) -> list[Target]:
    """Save on all ranks, load in other layouts, and count; collective."""
    whole = model.whole()
    found = []
    for number, after in enumerate(LAYOUTS):
        path = directory / f"ranks-{number}"
        case = Case(world.size, world.size, DIM0, after)
        _save(world, model, whole, case, path)
        counter = Counter()
        _load(world, model, whole, case, path, counter)
        asked = int(all_reduce(np.array(counter.asked), world, op=SUM))
        copies = world.num_nodes if after == REPLICATED else 1
        found.append(_target(f"read, {case.words}", asked, copies * model.nbytes))
    return found


def reads_of_simulated_ranks(model: Model, directory: Path) -> list[Target]:
    """Do the same with threads that take themselves for nodes; in this process alone."""
    whole = model.whole()
    found = []
    for number, case in enumerate(CASES):
        path = directory / f"simulated-{number}"
        _simulated(case.saved, partial(_save, model=model, whole=whole, case=case, path=path))
        counter, nothing = Counter(), Counter()
        there = partial(_load, model=model, whole=whole, case=case, path=path, counter=nothing)
        counter.counting(partial(_simulated, case.loaded, there))
        copies = case.loaded if case.after == REPLICATED else 1
        words = f"read, {case.words}, simulated, a node each"
        found.append(_target(words, counter.asked, copies * model.nbytes))
    return found


def _target(what: str, asked: int, needed: int) -> Target:
    detail = f"{asked / 2**20:.2f} MiB read, {needed / 2**20:.2f} MiB needed"
    return Target(what=what, value=asked / needed, bound=_MOST, most=True, detail=detail)


def _save(
    group: ProcessGroup, model: Model, whole: Mapping[str, Array], case: Case, path: Path
) -> None:
    save(path, model.held(whole, case.before, group.rank, group.size), group, step=0)


def _load(
    group: ProcessGroup,
    model: Model,
    whole: Mapping[str, Array],
    case: Case,
    path: Path,
    counter: Counter,
) -> None:
    right = model.held(whole, case.after, group.rank, group.size)
    state = model.held(whole, case.after, group.rank, group.size)
    for memory in memory_of(state):
        memory.fill(0)
    barrier(group)
    counter.counting(lambda: load(path, state, group))
    if not all(map(np.array_equal, memory_of(state), memory_of(right))):
        raise RuntimeError(f"bench checkpoint: {case.words}: load did not give what was saved")


def _simulated(size: int, call: Callable[[ProcessGroup], Any]) -> None:
    """Call a function on so many ranks, which are threads and take themselves for nodes."""
    network = Network(size, ranks_per_node=1)

    def body(rank: int) -> None:
        backend = SimulatedBackend(network, rank)
        with ProcessGroup.over(backend, timeout=60.0, warn_after=60.0) as group:
            call(group)

    with ThreadPoolExecutor(size) as pool:
        list(pool.map(body, range(size)))
