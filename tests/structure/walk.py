"""Follow one call through the package, file by file.

::

    mpirun -n 2 python -m tests.structure.walk                 # how many files each call passes
    mpirun -n 2 python -m tests.structure.walk ddp.backward    # every function, as a tree
"""

from __future__ import annotations

import contextlib
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import FrameType

import numpy as np

import mpidist
from mpidist import checkpoint
from mpidist.nn import Linear, Mode, Sequential, cross_entropy
from mpidist.parallel import DDP

PACKAGE = Path(mpidist.__file__).parent


@dataclass(frozen=True)
class Step:
    """A call of one function of the package.

    Attributes
    ----------
    depth : int
        Functions between it and the first one, those of other packages included.
    file : str
        Its path in the package.
    function : str
        Its name.
    """

    depth: int
    file: str
    function: str


@dataclass(frozen=True)
class Walk:
    """The functions of the package that a call passes, in the order in which they begin."""

    steps: Sequence[Step]

    @property
    def files(self) -> list[str]:
        """The files, each where it is first entered."""
        return list(dict.fromkeys(step.file for step in self.steps))

    def up_to_exchanges(self) -> Walk:
        """Return the walk with each exchange with other ranks as one call."""
        kept: list[Step] = []
        for step in self.steps:
            if not (kept and kept[-1].file.startswith(EXCHANGES) and step.depth > kept[-1].depth):
                kept.append(step)
        return Walk(kept)

    def tree(self) -> Iterator[str]:
        """Yield a line per function, indented by depth; repetitions are counted."""
        for step, same in groupby(self.steps):
            times = len(list(same))
            repeated = f"  x{times}" if times > 1 else ""
            yield f"{'  ' * step.depth}{step.file}: {step.function}{repeated}"


EXCHANGES = ("backends/", "collectives/", "group/", "point_to_point/")
"""Files whose functions exchange something with the other ranks."""


def follow(call: Callable[[], object]) -> Walk:
    """Make a call, and return the functions of the package that this thread enters meanwhile."""
    prefix = f"{PACKAGE}/"
    steps: list[Step] = []
    depth = 0

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal depth
        if event == "call":
            code = frame.f_code
            if code.co_filename.startswith(prefix):
                steps.append(Step(depth, code.co_filename[len(prefix) :], code.co_name))
            depth += 1
        elif event == "return":
            depth -= 1

    previous, collecting = sys.getprofile(), gc.isenabled()
    gc.disable()  # a finalizer is no part of the call
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(previous)
        if collecting:
            gc.enable()
    first = min((step.depth for step in steps), default=0)
    return Walk([Step(step.depth - first, step.file, step.function) for step in steps])


def all_reduce(world: mpidist.ProcessGroup) -> Walk:
    """Follow a blocking sum of four numbers into a new array."""
    x = np.ones(4, np.float32)
    return _shortest(lambda: lambda: mpidist.all_reduce(x, world), world)


def ddp_backward(world: mpidist.ProcessGroup) -> Walk:
    """Follow a backward pass of two layers, which averages their gradients."""
    rng = np.random.default_rng(world.rank)
    x, target = rng.normal(size=(8, 64)).astype(np.float32), np.arange(8) % 10
    ddp = DDP(Sequential(Linear(64, 64, rng=0), Linear(64, 10, rng=1)), world)

    def passes() -> Callable[[], object]:
        y, ctx = ddp.forward(x, Mode(training=True, step=0, sample_offset=8 * world.rank))
        dy = cross_entropy(y, target)[1]
        for parameter in ddp.parameters():
            parameter.zero_grad()
        return lambda: ddp.backward(ctx, dy)

    return _shortest(passes, world)


def save(world: mpidist.ProcessGroup) -> Walk:
    """Follow the saving of one array that all ranks hold; an exchange counts as one call."""
    with _shared_directory(world) as path:
        steps = iter(range(10))
        state = {"x": np.zeros((100, 100))}
        walk = _shortest(
            lambda: lambda: checkpoint.save(path, state, world, step=next(steps)), world
        )
    return walk.up_to_exchanges()


def load(world: mpidist.ProcessGroup) -> Walk:
    """Follow the loading of that checkpoint; an exchange counts as one call."""
    with _shared_directory(world) as path:
        state = {"x": np.zeros((100, 100))}
        checkpoint.save(path, state, world, step=1)
        walk = _shortest(lambda: lambda: checkpoint.load(path, state, world), world)
    return walk.up_to_exchanges()


CALLS: Mapping[str, Callable[[mpidist.ProcessGroup], Walk]] = {
    "all_reduce": all_reduce,
    "ddp.backward": ddp_backward,
    "checkpoint.save": save,
    "checkpoint.load": load,
}
"""What can be followed, all ranks together."""


def _shortest(prepare: Callable[[], Callable[[], object]], world: mpidist.ProcessGroup) -> Walk:
    # What is made at the first call, or found to be there already at the second, is made by now.
    for _ in range(2):
        prepare()()
    walks = []
    for _ in range(3):  # on a busy machine the others are late at times
        call = prepare()
        mpidist.barrier(world)
        if world.rank == 0:
            time.sleep(0.05)  # it finds the others there, so that its walk depends on no race
        walks.append(follow(call))
    return min(walks, key=lambda walk: len(walk.files))


@contextlib.contextmanager
def _shared_directory(world: mpidist.ProcessGroup) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as own:
        yield Path(mpidist.broadcast_object(own, world))
        mpidist.barrier(world)


def main(names: Sequence[str]) -> None:
    """Print the walks of these calls, or how long all of them are."""
    with mpidist.init() as world:
        for name in names or CALLS:
            walk = CALLS[name](world)
            if world.rank == 0:
                print(f"{name}: {len(walk.steps)} calls, {len(walk.files)} files")
                if names:
                    print(*walk.tree(), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
