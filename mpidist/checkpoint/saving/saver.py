"""What a group keeps for its checkpoints, and the saves that it has in flight."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mpidist._arguments import seconds
from mpidist.checkpoint.directory import Checkpoint
from mpidist.checkpoint.format import hdf5
from mpidist.checkpoint.saving.commit import Save, Waitable, steps_of
from mpidist.checkpoint.saving.plan import Assignment, Declaration, Plan
from mpidist.checkpoint.saving.running import end_write
from mpidist.checkpoint.saving.staging import Staging
from mpidist.checkpoint.saving.worker import Worker
from mpidist.errors import CheckpointAsyncError, CheckpointError
from mpidist.group.group import ProcessGroup, check_group
from mpidist.job.hooks import end_companions_at_exit

__all__ = ["CheckpointFuture", "LastSave", "Saver", "saver_of"]


_PAUSE = 0.001
"""Seconds between two looks at a save that is waited for with a timeout."""


class CheckpointFuture:
    """A save under way; see `save_async`."""

    def __init__(self, saver: Saver, save: Save, *, beside: bool) -> None:
        self._saver = saver
        self._save = save
        self._beside = beside
        self._steps: Iterator[Waitable] = steps_of(save, saver.group)
        self._current: Waitable | None = None
        self._over = False
        self._error: Exception | None = None
        self.told = False

    @property
    def directory(self) -> Path:
        """Where it is being written; absolute, as it was when the save began."""
        return self._save.directory

    @property
    def failed(self) -> bool:
        """Whether it is over, and there is no checkpoint."""
        return self._error is not None

    def done(self) -> bool:
        """Drive the save as far as it goes now, and return whether it is over.

        Returns
        -------
        bool
            Whether `wait` will return, or raise, at once.

        Notes
        -----
        Does not block, but that rank 0 writes and syncs the manifest in it, once.
        """
        self._saver.progress()
        return self._over

    def drive(self) -> bool:
        """Take the save as far as it goes now, earlier ones being over; see `done`."""
        while not self._over:
            if self._current is not None and not self._current.done():
                return False
            self._advance()
        return True

    def wait(self, timeout: float | None = None) -> Checkpoint:
        """Return when the checkpoint is complete.

        Parameters
        ----------
        timeout : float, optional
            Seconds after which this rank gives up waiting. The save goes on then, and may be waited
            for again. When omitted, each of its steps has the group's.

        Returns
        -------
        Checkpoint
            On disk.

        Raises
        ------
        CheckpointAsyncError, CheckpointError
            If a rank could not write; on every rank, with the same words, from `save_async` and
            from `save`.
        CheckpointError
            On this rank, if it is not over after `timeout`.
        """
        if timeout is not None:
            self._give(seconds(timeout, f"save of {self.directory}: timeout", least=0.0))
        self.end()
        self.told = True
        if self._error is not None:
            raise self._error
        return Checkpoint(self._save.directory)

    def end(self) -> None:
        """Take the save to its end; keep for `wait` what it raises."""
        while not self._over:
            first = self._saver.pending[0]  # in order: their messages have the same tags
            if first._current is not None:
                first._current.wait()
            first._advance()

    def _give(self, timeout: float) -> None:
        """Raise if it is not over in time; by asking, for a message given up breaks the group."""
        deadline = time.monotonic() + timeout
        while not self.done():
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"save of {self.directory}: not over after {timeout:g} s. It goes on: wait "
                    "again, or longer"
                )
            time.sleep(_PAUSE)

    def _advance(self) -> None:
        """Take the next step, all that is waited for being over."""
        try:
            self._current = next(self._steps, None)
            self._over = self._current is None
        except Exception as error:  # noqa: BLE001  # raised by whoever waits, also later
            self._over = True
            failed = isinstance(error, CheckpointError) and self._beside
            self._error = CheckpointAsyncError(str(error)) if failed else error
        except BaseException as error:
            # Steps that have raised look like steps that have come to their end.
            self._over = True
            words = f"save of {self.directory} was interrupted by {type(error).__name__}"
            self._error = CheckpointError(f"{words}; nobody knows whether it is complete")
            raise
        finally:
            if self._over:
                self._saver.forget(self)


class LastSave(NamedTuple):
    """What the next save may use again, if all ranks hold what they held.

    Attributes
    ----------
    names : Declaration
        What this rank held, without the values.
    id : str
        Of the save that the plan was made for: the same plan on all ranks.
    assignment : Assignment
        What it wrote.
    plan : Plan or None
        On rank 0, who wrote what.
    """

    names: Declaration
    id: str
    assignment: Assignment
    plan: Plan | None


class Saver:
    """The saves of a group: its own communicator, its thread, what is in flight."""

    def __init__(self, group: ProcessGroup) -> None:
        hdf5.versions()  # imports h5py, whose exit handler takes parts of it away
        end_companions_at_exit()
        self.group = group.duplicate(f"{group.name}/checkpoint")
        self.worker = Worker("mpidist checkpoint")
        self.staging = Staging()
        self.pending: deque[CheckpointFuture] = deque()
        self.last: LastSave | None = None
        self._failed: deque[CheckpointFuture] = deque()

    def forget(self, future: CheckpointFuture) -> None:
        """Note that a save is over."""
        self.pending.remove(future)
        end_write(future.directory, complete=not future.failed)
        if future.failed:
            self._failed.append(future)

    def settle(self, most: int) -> None:
        """Wait until at most so many saves are in flight."""
        while len(self.pending) > most:
            self.pending[0].end()

    def raise_untold(self) -> None:
        """Raise what this rank's program has not been told of an earlier save."""
        while self._failed:
            future = self._failed.popleft()
            if not future.told:
                future.wait()

    def progress(self) -> None:
        """Drive what is in flight."""
        for future in tuple(self.pending):
            if not future.drive():
                return  # they end in order

    def close(self) -> None:
        """Wait for what is in flight."""
        try:
            self.settle(0)
        finally:
            self.worker.close()
            self.group.close()
        self.raise_untold()


def saver_of(group: ProcessGroup) -> Saver:
    """Return the saves of a group; collective when first called."""
    check_group(group, "checkpoint")
    return group.companion("checkpoint", lambda: Saver(group))
