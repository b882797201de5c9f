"""A job that saves checkpoints until it is killed; `tests.soaks.checkpoints.kills` does it."""

from __future__ import annotations

import mmap
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

import mpidist
from mpidist import checkpoint
from mpidist.arrays.shards import ShardedArray
from mpidist.group import ProcessGroup
from mpidist.usage import RankArgumentParser
from tests.soaks.checkpoints.calls import Call, Perform, intercepted
from tests.soaks.checkpoints.states import Contents, Cut

__all__ = ["KEEP", "MARK_BYTES", "MOST", "main", "mark_of"]

KEEP = 3
"""So many checkpoints stay when the job prunes."""

MOST = 300
"""Steps after which a job that nobody has killed ends."""

MARK_BYTES = 128

_PAUSE = 0.002
"""Most seconds before and after each call that touches a file: a kill comes more often there."""


class Log:
    """What a rank tells, so that it is known however the rank ends.

    A line is in the file when the call has returned, and a mark is in memory that belongs to a
    file: neither is lost by a kill.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._lines = os.open(directory / f"rank-{rank}.log", flags)
        path = directory / f"rank-{rank}.mark"
        path.write_bytes(bytes(MARK_BYTES))
        with path.open("r+b") as file:
            self._mark = mmap.mmap(file.fileno(), MARK_BYTES)
        self.begin("starting")

    def tell(self, line: str) -> None:
        """Append a line."""
        os.write(self._lines, f"{line}\n".encode())

    def mark(self, where: str) -> None:
        """Note where this rank is."""
        text = f"{self.activity}: {where}".encode()[:MARK_BYTES]
        self._mark[:] = text.ljust(MARK_BYTES, b"\0")

    def begin(self, activity: str) -> None:
        """Note what this rank does from now on."""
        self.activity = activity
        self.mark("no file touched yet")


def mark_of(path: Path) -> str:
    """Return where a rank was when it last noted it."""
    return path.read_bytes().rstrip(b"\0").decode(errors="replace")


def _kind(file: str) -> str:
    """Return what a file is, without the step and the rank."""
    parts = Path(file).parts
    if not parts:
        return "the directory of all steps"
    if len(parts) == 1:
        return "the directory of a step"
    return "the rank's file" if parts[-1].startswith("rank-") else parts[-1].removesuffix(".tmp")


class Killer:
    """The hook that marks each call, makes it slower, and may be the end of the rank.

    Parameters
    ----------
    log : Log
        Where to.
    fatal : int
        At which call, from 1, the rank kills itself: before an odd one, after an even one; 0 for
        none.
    kill : callable
        Does it.
    """

    def __init__(self, log: Log, fatal: int, kill: Callable[[], None]) -> None:
        self._log = log
        self._fatal = fatal
        self._calls = count(1)  # several threads may touch files at once
        self._kill = kill

    def __call__(self, call: Call, perform: Perform, args: tuple[Any, ...]) -> Any:
        what = f"{call.name} of {_kind(call.file)}"
        if not self._log.activity.startswith(("save", "prune")):
            return perform()
        fatal = next(self._calls) == self._fatal
        self._log.mark(f"before {what}")
        if fatal and self._fatal % 2:
            self._kill()
        time.sleep(random.uniform(0, _PAUSE))
        self._log.mark(f"in {what}")
        try:
            return perform()
        finally:
            self._log.mark(f"after {what}")
            if fatal and not self._fatal % 2:
                self._kill()
            time.sleep(random.uniform(0, _PAUSE))


def _resume(directory: Path, contents: Contents, world: ProcessGroup, cut: Cut, log: Log) -> int:
    """Load the newest checkpoint and compare it; return its step, or 0."""
    log.begin("load")
    there = np.array([0 if checkpoint.latest(directory) is None else 1])
    if not mpidist.broadcast(there, world).item():
        return 0
    state = contents.empty(world.rank, cut)
    found = checkpoint.load(directory, state, world)
    contents.check_rank(found.step, world.rank, cut, state, found.values)
    log.tell(f"loaded {found.step}")
    return found.step


def _save(directory: Path, step: int, contents: Contents, world: ProcessGroup, log: Log) -> None:
    """Save a step, every second one beside the program, which spoils its arrays at once."""
    cut = Cut(world.size, step)
    log.begin("computing")
    state = contents.state(step, world.rank, cut)
    if step % 2:
        log.begin("save")
        checkpoint.save(directory, state, world, step=step)
    else:
        log.begin("save_async")
        future = checkpoint.save_async(directory, state, world, step=step)
        for value in state.values():
            for piece in value.pieces.values() if isinstance(value, ShardedArray) else [value]:
                if isinstance(piece, np.ndarray):
                    piece[...] = 0
        for _ in range(step % 7):
            future.done()
            time.sleep(0.001)
        future.wait()
    log.tell(f"committed {step}")


def run(directory: Path, log: Log, world: ProcessGroup, seed: int) -> None:
    """Go on from the newest checkpoint of a directory, and save step after step.

    Parameters
    ----------
    directory : Path
        Of the checkpoints.
    log : Log
        What has been done is told here.
    world : ProcessGroup
        All ranks.
    seed : int
        Of the contents.
    """
    contents = Contents("few", seed)
    begin = _resume(directory, contents, world, Cut(world.size, world.size), log)
    for step in range(begin + 1, begin + MOST):
        _save(directory, step, contents, world, log)
        if step % 5 == 0 and world.rank == 0:
            log.begin("prune")
            checkpoint.prune(directory, keep=KEEP)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = RankArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="of the checkpoints")
    parser.add_argument("log", type=Path, help="where each rank tells what it has done")
    parser.add_argument("--seed", type=int, default=0, help="of the contents")
    parser.add_argument("--rank", type=int, default=0, help="which kills itself")
    parser.add_argument("--fatal", type=int, default=0, help="at which call that touches a file")
    parser.add_argument("--all", action="store_true", help="it kills all ranks")
    options = parser.parse_args(arguments)
    with mpidist.init(timeout=60.0) as world:
        log = Log(options.log, world.rank)
        log.tell(f"process {os.getpid()}")
        mpidist.barrier(world)

        def kill() -> None:
            if options.all:
                for file in options.log.glob("rank-*.log"):
                    pid = int(file.read_text().split()[1])
                    if pid != os.getpid():
                        with suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

        fatal = options.fatal if options.rank == world.rank else 0
        try:
            with intercepted(options.directory, Killer(log, fatal, kill)):
                run(options.directory, log, world, options.seed)
        except BaseException:
            log.tell(f"wrong {traceback.format_exc()!r}")
            raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
