"""A run on disk: what it needs to go on, kept by one rank in one file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mpidist._types import Array
from mpidist.collectives import broadcast, broadcast_object
from mpidist.data import ShardedSampler
from mpidist.errors import (
    CheckpointError,
    CheckpointIncompatibleError,
    CheckpointNotFoundError,
)
from mpidist.group import ProcessGroup
from mpidist.optim import Optimizer
from mpidist.parallel import DDP, ShardedOptimizer, full_state_dict
from mpidist.parallel.ddp import BUCKET_ORDER
from mpidist.train.run_file import read_file, write_file

__all__ = ["Run", "SavedRun"]

_MODEL, _OPTIMIZER = "model/", "optimizer/"

_Content: TypeAlias = tuple[dict[str, Any], dict[str, Array]]
"""JSON values and arrays, by name."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """All that changes while a model is trained.

    Parameters
    ----------
    model : DDP
        Parameters, buffers such as running statistics, and the order of the gradients' buckets.
    optimizer : Optimizer or ShardedOptimizer
        Its state and its count of steps.
    sampler : ShardedSampler
        Its position, and what the order of the samples depends on.

    Notes
    -----
    Random numbers are a function of seed, step and sample (`Mode`), so there is no state of them.
    """

    model: DDP
    optimizer: Optimizer | ShardedOptimizer
    sampler: ShardedSampler


class SavedRun:
    """The place on disk where a run is kept, to go on from there in another job.

    ::

        saved = SavedRun(Path("runs/digits"), world)
        if saved.exists():
            saved.load(run)
        ...
        saved.save(run)

    Parameters
    ----------
    directory : Path
        Made if missing. It must be one that rank 0 of every job sees.
    group : ProcessGroup
        The ranks of the run.

    Attributes
    ----------
    path : Path
        The file in it: an .npz that ``numpy.load`` opens, with whole arrays.

    Notes
    -----
    Nothing in it depends on the number of ranks; any number may go on from it. Only the last save
    is kept. It replaces the one before when it is complete and on disk: a job that is killed at any
    instant leaves one of the two.

    Rank 0 writes and reads, the others wait, and a `ShardedOptimizer`'s whole state is gathered on
    every rank. Checkpoints of one file per rank, for models where that takes too long, will have
    these four methods.
    """

    def __init__(self, directory: Path, group: ProcessGroup) -> None:
        self.path = directory / "save.npz"
        self._group = group

    def exists(self) -> bool:
        """Return whether rank 0 sees a save.

        Notes
        -----
        Collective over the group; blocks. One small broadcast.
        """
        found = self.path.is_file() if self._group.rank == 0 else None
        return bool(broadcast_object(found, self._group))

    def discard(self) -> None:
        """Remove the save, if there is one: a run that begins anew must not be mixed with it.

        Notes
        -----
        Collective over the group; blocks. One small broadcast.
        """
        self._on_first_rank("discard", lambda: self.path.unlink(missing_ok=True))

    def save(self, run: Run) -> None:
        """Write the run, replacing the save before.

        Parameters
        ----------
        run : Run
            Between two steps.

        Raises
        ------
        CheckpointError
            On every rank, if rank 0 cannot write it; the save before is still there.

        Notes
        -----
        Collective over the group; blocks until it is on disk. A `ShardedOptimizer` is gathered, one
        all_gather per array of state; else one small broadcast. Signals that a `StopSignal` handles
        do not disturb it.
        """
        values, arrays = _state(run, ranks=self._group.size)
        self._on_first_rank("save", lambda: write_file(self.path, values, arrays))

    def load(self, run: Run) -> None:
        """Put the run where it was when it was saved.

        Parameters
        ----------
        run : Run
            Made with the same arguments, on any number of ranks, and not yet trained.

        Raises
        ------
        CheckpointNotFoundError
            On every rank, if rank 0 sees none.
        CheckpointCorruptError
            On every rank, if it is cut off or damaged, which its digest shows, or something else.
        CheckpointIncompatibleError
            On every rank, if the model, the kind of optimizer, the data set's size, the batch size
            or the seed is another one.

        Notes
        -----
        Collective over the group; blocks. One broadcast per array.
        """
        content: _Content | None = None
        problem: CheckpointError | None = None
        if self._group.rank == 0:
            try:
                content = read_file(self.path)
            except OSError as error:
                kind = CheckpointNotFoundError if not self.path.exists() else CheckpointError
                problem = kind(
                    f"load: rank 0 of {self._group.name!r} cannot read {self.path}: {error}; name "
                    "the directory of a run, or begin anew"
                )
            except CheckpointError as error:
                problem = error
        problem = broadcast_object(problem, self._group)
        if problem is not None:
            raise problem
        values, arrays = self._spread(content)
        try:
            _restore(run, values, arrays)
        except ValueError as error:
            raise CheckpointIncompatibleError(
                f"load: {self.path} is of another run: {error}; make the model, the optimizer and "
                "the sampler with the arguments of that run"
            ) from error

    def _on_first_rank(self, what: str, action: Callable[[], None]) -> None:
        """Let rank 0 do it, and all ranks know whether it succeeded."""
        problem = None
        if self._group.rank == 0:
            try:
                action()
            except OSError as error:
                problem = f"{type(error).__name__}: {error}"
        problem = broadcast_object(problem, self._group)
        if problem is not None:
            raise CheckpointError(
                f"{what}: rank 0 of {self._group.name!r} could not write {self.path}: {problem}; "
                "an earlier save is still there; look for room and rights on that disk"
            )

    def _spread(self, content: _Content | None) -> _Content:
        """Give what rank 0 has read to all."""
        values, arrays = content or ({}, {})
        kinds = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        values, kinds = broadcast_object((values, kinds), self._group)
        for name, (shape, dtype) in kinds.items():
            array = arrays.get(name)
            array = np.empty(shape, dtype) if array is None else array
            arrays[name] = broadcast(array, self._group, out=array)
        return values, arrays


def _state(run: Run, *, ranks: int) -> _Content:
    """Return the run as JSON values and as whole arrays; collective if the optimizer is sharded."""
    optimizer = run.optimizer
    if isinstance(optimizer, ShardedOptimizer):
        state = full_state_dict(optimizer)
    else:
        state = optimizer.state_dict()
    numbers = {key: value for key, value in state.items() if not isinstance(value, np.ndarray)}
    arrays = {_MODEL + name: array for name, array in run.model.module.state_dict().items()}
    arrays |= {_OPTIMIZER + key: state[key] for key in state.keys() - numbers.keys()}
    values = {
        "step": optimizer.step_count,
        "ranks": ranks,
        "sampler": run.sampler.state_dict(),
        "order": run.model.order,
        "optimizer": numbers,
    }
    return values, arrays


def _restore(run: Run, values: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Undo `_state`; what does not fit raises ValueError before a parameter has changed."""
    run.sampler.load_state_dict(values["sampler"])
    model = {**_below(_MODEL, arrays), BUCKET_ORDER: values["order"]}
    run.model.check_state_dict(model)
    run.optimizer.load_state_dict(values["optimizer"] | _below(_OPTIMIZER, arrays))
    if isinstance(run.optimizer, ShardedOptimizer):
        run.optimizer.model_state.load_state_dict(model)
    else:
        run.model.load_state_dict(model)


def _below(prefix: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
