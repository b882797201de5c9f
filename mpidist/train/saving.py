"""A run in a directory of checkpoints: room for it, saves beside the training, resumption."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mpidist import checkpoint
from mpidist._formatting import format_bytes
from mpidist._new_file import create_unique
from mpidist.checkpoint import CheckpointFuture, State
from mpidist.checkpoint.directory import absolute, check_same, partial, remove, set_aside, step_of
from mpidist.checkpoint.state import flatten
from mpidist.checkpoint.tools.pruning import statuses
from mpidist.collectives import broadcast_object
from mpidist.data import ShardedSampler
from mpidist.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMissingShardError,
    DistributedError,
)
from mpidist.group.group import ProcessGroup, check_group
from mpidist.optim import Optimizer
from mpidist.parallel import Pipeline, ShardedOptimizer, Strategy

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """All that changes while a model is trained.

    Parameters
    ----------
    model : DDP, FSDP or another Strategy, or Pipeline
        Parameters, buffers such as running statistics, and the order of the gradients' buckets.
    optimizer : Optimizer or ShardedOptimizer
        Its state and its count of steps.
    sampler : ShardedSampler
        Its position, and what the order of the samples depends on.

    Notes
    -----
    Random numbers are a function of seed, step and sample (`Mode`), so there is no state of them.
    """

    model: Strategy | Pipeline
    optimizer: Optimizer | ShardedOptimizer
    sampler: ShardedSampler

    def state(self) -> State:
        """Return it by name, for `checkpoint.save` and `checkpoint.load`.

        Returns
        -------
        mapping of str to Stateful
            The names do not depend on the kind of optimizer: a run that was saved with one that is
            sharded goes on with one that is not, and the other way round.
        """
        optimizer = self.optimizer
        model: Any = self.model
        if isinstance(optimizer, ShardedOptimizer) and not isinstance(model, Pipeline):
            model = optimizer.model_state
        return {
            "model": model,
            "optimizer": optimizer,
            "sampler": self.sampler,
        }

    def nbytes(self) -> int:
        """Return the bytes of the arrays in a checkpoint of the run, over all ranks.

        Of a pipeline, as if all of its ranks had as much as this one.
        """
        own = sum(
            math.prod(array.shape) * array.dtype.itemsize
            for array in flatten(self.state()).arrays.values()
        )
        return own * (self.model.group.size if isinstance(self.model, Pipeline) else 1)


class Checkpoints:
    """The directory in which a run is kept, to go on from there in another job.

    ::

        checkpoints = Checkpoints("runs/digits/checkpoints", world)
        if checkpoints.newest() is not None:
            checkpoints.load(run)
        ...
        checkpoints.save(run)
        ...
        checkpoints.wait()

    Parameters
    ----------
    directory : path
        Made if missing. All ranks of every job must see it.
    group : ProcessGroup
        The ranks of the run.
    keep : int, optional
        How many whole checkpoints stay; older ones are removed when another one is complete. See
        `mpidist.checkpoint.prune`.

    Attributes
    ----------
    directory : Path
        Absolute: it stays the same when the working directory changes.

    Raises
    ------
    ValueError
        If `keep` is less than 1.

    Notes
    -----
    Nothing in it depends on the number of ranks; any number may go on from it.
    """

    def __init__(
        self, directory: str | os.PathLike[str], group: ProcessGroup, *, keep: int = 3
    ) -> None:
        check_group(group, "Checkpoints")
        if keep < 1:
            raise ValueError(f"Checkpoints: keep must be at least 1, got {keep}")
        self.directory = absolute(directory)
        self._group = group
        self._keep = keep
        self._saving: CheckpointFuture | None = None
        self._reported: set[Path] = set()

    def newest(self) -> int | None:
        """Return the step of the newest complete checkpoint that rank 0 sees, or None.

        Raises
        ------
        CheckpointError
            On every rank, if rank 0 cannot look into the directory.
        CollectiveMismatchError
            On every rank, if their directories differ.

        Notes
        -----
        Collective over the group; blocks. An all_gather of 16 bytes and a small broadcast.
        """

        def look() -> int | None:
            newest = checkpoint.latest(self.directory)
            return None if newest is None else newest.step

        return self._by_rank_0(look)

    def space(self, run: Run, *, saves: int, anew: bool = False) -> int:
        """Return about how many bytes more than now the directory will have, at most.

        Parameters
        ----------
        run : Run
            What is to be saved.
        saves : int
            How many checkpoints of it will be saved. Only so many stay as `keep` says, and one
            more while it is written.
        anew : bool, optional
            Whether the checkpoints that are there will be removed before.

        Returns
        -------
        int
            Bytes, with 2 % and 64 KiB per rank for what is no array. For `check_space`.

        Notes
        -----
        Local. A directory that cannot be read counts as empty.
        """
        try:
            there = len(checkpoint.list(self.directory))
        except CheckpointError:  # which newest raises, on all ranks
            there = 0
        if anew:
            more = max(min(saves, self._keep + 1) - there, 0)
        else:
            more = min(saves, max(self._keep + 1 - there, 1))
        return more * (run.nbytes() * 102 // 100 + self._group.size * (64 << 10))

    def save(self, run: Run) -> None:
        """Copy a run, and write the copy while training goes on.

        Parameters
        ----------
        run : Run
            The run, between two optimizer steps.

        Raises
        ------
        CheckpointError
            On every rank, if this or an earlier one cannot be written; complete ones are as they
            were.

        Notes
        -----
        Collective over the group; blocks for the copy, and until an earlier save is complete. See
        `mpidist.checkpoint.save_async`.
        """
        self.wait()
        self._saving = checkpoint.save_async(
            self.directory, run.state(), self._group, step=run.optimizer.step_count
        )

    def progress(self) -> None:
        """Complete what was saved, if it can be done now; to be called after each step.

        Notes
        -----
        Does not block, but that rank 0 writes and syncs the manifest in it, once per checkpoint.
        That it could not be written is raised by the next `save` or `wait`, on all ranks at the
        same place: here they learn of it in different steps.
        """
        if self._saving is not None and self._saving.done() and not self._saving.failed:
            self.wait()

    def wait(self) -> None:
        """Return when what was saved is complete and on disk, and remove the oldest ones.

        Raises
        ------
        CheckpointError
            On every rank, if it cannot be written.

        Notes
        -----
        Collective over the group; blocks. Without a save under way it does nothing.
        """
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        saving.wait()
        if self._group.rank == 0:
            try:
                checkpoint.prune(self.directory, keep=self._keep)
                self._report_damage()
            except CheckpointError as error:  # too many are kept, and none is lost
                self._group.log.warning("%s", error)

    def _report_damage(self) -> None:
        """Warn once of each step that is damaged, and so does not count for `keep`."""
        for status in statuses(self.directory):
            if status.problem is not None and status.directory not in self._reported:
                self._reported.add(status.directory)
                self._group.log.warning("not counted among those that stay: %s", status.problem)

    def load(
        self, run: Run, *, step: int | str = "latest", fall_back: bool = False
    ) -> checkpoint.Checkpoint:
        """Put a run where it was when its newest checkpoint was saved, or an earlier one.

        Later steps than the loaded one are set aside: their directories get other names, such as
        ``step-000100.aside-1``, so that the run can reach these steps again, and a job after this
        one does not go on from them. One line in the log says so.

        Parameters
        ----------
        run : Run
            Made with the same arguments, on any number of ranks, and not yet trained.
        step : int or "latest", optional
            Which one; the newest complete one when omitted.
        fall_back : bool, optional
            Whether to take the newest one that is whole, where later ones are damaged.

        Returns
        -------
        Checkpoint
            The checkpoint that was loaded.

        Raises
        ------
        CheckpointNotFoundError, CheckpointCorruptError, CheckpointMissingShardError
            On every rank; see `mpidist.checkpoint.load`. With `fall_back` those of the newest one,
            if none is whole. Nothing has been set aside.
        CheckpointIncompatibleError
            On every rank, if the run is another one. Nothing has been set aside.

        Notes
        -----
        Collective over the group; blocks. Must be called with the same arguments on all ranks.
        """
        steps: list[int | str] = [step]
        if fall_back and step == "latest":
            steps += self._by_rank_0(
                lambda: [loaded.step for loaded in reversed(checkpoint.list(self.directory))][1:]
            )
        damage: list[CheckpointError] = []
        for candidate in steps:
            try:
                loaded = checkpoint.load(self.directory, run.state(), self._group, step=candidate)
            except (CheckpointCorruptError, CheckpointMissingShardError) as error:
                damage.append(error)
            else:
                self._by_rank_0(lambda: self._go_back(loaded, damage))  # noqa: B023  # called here
                return loaded
        raise damage[0]

    def _go_back(self, loaded: checkpoint.Checkpoint, damage: Sequence[CheckpointError]) -> None:
        """Set aside what is later than a step, on rank 0, and say so."""
        later = [saved for saved in checkpoint.list(self.directory) if saved.step > loaded.step]
        if not later:
            return
        names = ", ".join(set_aside(saved.directory).name for saved in later)
        why = f" because the newest one is damaged ({damage[0]})" if damage else ""
        self._group.log.warning(
            "GOING BACK to step %d of %s%s; later steps are set aside as %s: remove them when you "
            "need them no more",
            loaded.step,
            self.directory,
            why,
            names,
        )

    def whole(self) -> list[int]:
        """Return the steps of the checkpoints whose files are there and have their sizes.

        Returns
        -------
        list of int
            As rank 0 sees them, the one that was committed last at the end.

        Raises
        ------
        CheckpointError
            On every rank, if rank 0 cannot look into the directory.

        Notes
        -----
        Collective over the group; blocks. An all_gather of 16 bytes and a small broadcast.
        """
        return self._by_rank_0(
            lambda: [
                step_of(status.directory)
                for status in statuses(self.directory)
                if status.problem is None
            ]
        )

    def discard(self) -> None:
        """Remove all checkpoints: a run that begins anew must not be mixed with them.

        Raises
        ------
        CheckpointError
            On every rank, if rank 0 cannot remove them.

        Notes
        -----
        Collective over the group; blocks. An all_gather of 16 bytes and a small broadcast.
        """
        self.wait()

        def clear() -> None:
            complete = [saved.directory for saved in checkpoint.list(self.directory)]
            for directory in (*partial(self.directory), *complete):
                remove(directory)

        self._by_rank_0(clear)

    def _by_rank_0(self, action: Callable[[], T]) -> T:
        """Return on all ranks what rank 0 gets, or raise what it raises."""
        check_same(str(self.directory), self._group)
        outcome: tuple[DistributedError | None, T | None] = None, None
        if self._group.rank == 0:
            try:
                outcome = None, action()
            except DistributedError as error:
                outcome = error, None
        problem, result = broadcast_object(outcome, self._group)
        if problem is not None:
            raise problem
        return result  # type: ignore[no-any-return]


def check_space(needs: Mapping[Path, int], group: ProcessGroup) -> None:
    """Raise on all ranks unless rank 0 can write into directories that have enough space.

    Parameters
    ----------
    needs : mapping of Path to int
        For each directory the number of bytes that are to be written there. It is made if missing.
        Only the mapping of rank 0 counts.
    group : ProcessGroup
        The ranks that raise together.

    Raises
    ------
    OSError
        If a directory cannot be made or written to, or its file system has fewer bytes free. Its
        `filename` is the directory; its `strerror` names the bytes.

    Notes
    -----
    Collective over `group`; blocks. One small broadcast. Quotas, and what other programs write at
    the same time, are not seen.
    """
    problem: OSError | None = None
    if group.rank == 0:
        try:
            _check(needs)
        except OSError as error:
            problem = error
    raise_from_rank_0(problem, group)


def raise_from_rank_0(problem: OSError | None, group: ProcessGroup) -> None:
    """Raise an error of rank 0 on all ranks.

    Parameters
    ----------
    problem : OSError or None
        What happened on rank 0; on the others it does not count.
    group : ProcessGroup
        The ranks that raise together.

    Raises
    ------
    OSError
        On all ranks, if rank 0 has passed one.

    Notes
    -----
    Collective over `group`; blocks. One small broadcast.
    """
    problem = broadcast_object(problem, group)
    if problem is not None:
        raise problem


def _check(needs: Mapping[Path, int]) -> None:
    needed: dict[int, int] = {}  # by file system
    for directory, nbytes in needs.items():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _try_to_write(directory)
            system = directory.stat().st_dev
            free = shutil.disk_usage(directory).free
        except FileExistsError as error:
            raise _refusal(errno.ENOTDIR, "it is a file", directory, nbytes) from error
        except OSError as error:
            raise _refusal(error.errno, error.strerror, directory, nbytes) from error
        needed[system] = needed.get(system, 0) + nbytes
        if free < needed[system]:
            text = f"{os.strerror(errno.ENOSPC)}, {format_bytes(free)} free"
            raise _refusal(errno.ENOSPC, text, directory, needed[system])


def _try_to_write(directory: Path) -> None:
    """Write a small file and remove it: permissions alone do not say whether that works."""
    descriptor, path = create_unique(directory, "mpidist-space", ".tmp")
    try:
        os.write(descriptor, bytes(4096))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
        Path(path).unlink()


def _refusal(number: int | None, text: str | None, directory: Path, nbytes: int) -> OSError:
    return OSError(number, f"{text}; {format_bytes(nbytes)} needed", str(directory))
