"""Which samples a rank sees in which step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mpidist._arguments import whole_number
from mpidist.arrays.boxes import split_evenly

_FIXED = ("num_samples", "batch_size", "seed", "shuffle", "drop_last")


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One rank's share of the batch of one step.

    Attributes
    ----------
    indices : Array, shape (n,) int64
        Samples of the data set that this rank takes; `n` may be 0.
    global_size : int
        Samples in the joined batch of all ranks, at least 1: the denominator of an exact mean.
    sample_offset : int
        Position in the order of the epoch of the first of `indices`. It does not depend on the
        number of ranks; `Mode` takes it, so that random numbers do not either.
    """

    indices: npt.NDArray[np.int64]
    global_size: int
    sample_offset: int


class ShardedSampler:
    """Cut a data set into joined batches, and each of them into one share per rank.

    Parameters
    ----------
    num_samples : int
        Size of the data set, at least 1.
    rank, size : int
        This rank, and the number of ranks.
    batch_size : int
        Samples per step over all ranks together. Shares differ by at most one sample, and a rank
        has none where a joined batch has fewer samples than there are ranks.
    seed : int, optional
        Not negative. Order of epoch `e` is a function of (`seed`, `e`), the same on all ranks.
    shuffle : bool, optional
        Whether the order is random; else it is the data set's own.
    drop_last : bool, optional
        Whether to leave out the last joined batch of an epoch if it is not full.

    Raises
    ------
    ValueError
        If a number is out of its range, or `drop_last` leaves no batch.

    Notes
    -----
    Local: no rank asks another. In each step the shares of the ranks, in the order of the ranks,
    are the joined batch, and this is the same for every number of ranks. All ranks make the same
    number of steps.

    Iterating gives what is left of the current epoch and then moves to the next one. The position
    moves before a batch is handed out, so a `state_dict` taken while working on a batch counts it
    as done. Iterating again after leaving the loop early continues behind the last batch.

    Examples
    --------
    >>> sampler = ShardedSampler(5, rank=1, size=2, batch_size=4, shuffle=False)
    >>> for batch in sampler:
    ...     print(batch.indices, batch.global_size, batch.sample_offset)
    [2 3] 4 2
    [] 1 5
    """

    def __init__(
        self,
        num_samples: int,
        *,
        rank: int,
        size: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        _check_arguments(num_samples, rank, size, batch_size, seed)
        # Plain integers and booleans, so that the state can be written as JSON.
        self.num_samples = whole_number(num_samples)
        self.rank = whole_number(rank)
        self.size = whole_number(size)
        self.batch_size = whole_number(batch_size)
        self.seed = whole_number(seed)
        self.shuffle = bool(shuffle)
        self.drop_last = bool(drop_last)
        self._epoch = 0
        self._step = 0  # of the epoch: batches already handed out
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"ShardedSampler: drop_last leaves no batch of {batch_size} among {num_samples} "
                "samples; lower batch_size or keep the last batch"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches of a whole epoch, the same on all ranks."""
        full, rest = divmod(self.num_samples, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    @property
    def epoch(self) -> int:
        """Number of the epoch of the batch handed out last, or of the first one to come."""
        return self._epoch

    def __len__(self) -> int:
        """Return the number of batches that iterating gives now."""
        return self.steps_per_epoch - self._step

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's share of each batch left in the epoch."""
        order = self._order()
        while self._step < self.steps_per_epoch:
            step = self._step
            self._step += 1
            yield self._share(order, step)
        self._epoch, self._step = self._epoch + 1, 0

    def state_dict(self) -> dict[str, int | bool]:
        """Return the position and what it depends on, as JSON values.

        Returns
        -------
        dict of str to (int or bool)
            Epoch, step in the epoch, and the arguments that decide the order. Neither rank nor
            size: any number of ranks may go on from here.
        """
        state: dict[str, int | bool] = {key: getattr(self, key) for key in _FIXED}
        over = self._step == self.steps_per_epoch
        state["epoch"] = self._epoch + over
        state["step"] = 0 if over else self._step
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position that `state_dict` gave, on this number of ranks.

        Parameters
        ----------
        state : mapping
            As returned by `state_dict`.

        Raises
        ------
        ValueError
            If something is missing, it belongs to another data set, batch size, seed or order, or
            the position is none; nothing has been changed then.
        """
        missing = [key for key in (*_FIXED, "epoch", "step") if key not in state]
        if missing:
            raise ValueError(
                f"ShardedSampler.load_state_dict: the state lacks {missing}; give what state_dict "
                "of a sampler returned"
            )
        for key in _FIXED:
            if state[key] != getattr(self, key):
                raise ValueError(
                    f"ShardedSampler.load_state_dict: {key} is {getattr(self, key)} here and "
                    f"{state[key]} in the state; make the sampler with the same arguments"
                )
        epoch, step = int(state["epoch"]), int(state["step"])
        if epoch < 0 or not 0 <= step < self.steps_per_epoch:
            raise ValueError(
                "ShardedSampler.load_state_dict: expected an epoch of at least 0 and a step in "
                f"[0, {self.steps_per_epoch}), got epoch {epoch}, step {step}; use skip_to to go "
                "on from a step counted over all epochs"
            )
        self._epoch, self._step = epoch, step

    def skip_to(self, step: int) -> None:
        """Continue as if `step` batches had been handed out since the beginning.

        Parameters
        ----------
        step : int
            Counted over all epochs, at least 0.

        Raises
        ------
        ValueError
            If it is negative.
        """
        if step < 0:
            raise ValueError(f"ShardedSampler.skip_to: step must not be negative, got {step}")
        self._epoch, self._step = divmod(whole_number(step), self.steps_per_epoch)

    def _order(self) -> npt.NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(self.num_samples)
        # Sorting raw keys instead of Generator.permutation: numpy promises that the streams of its
        # bit generators never change, and nothing about the methods of Generator (NEP 19), and a
        # run may be resumed under another numpy.
        bits = np.random.Philox(np.random.SeedSequence([self.seed, self._epoch]))
        return np.argsort(bits.random_raw(self.num_samples), kind="stable")

    def _share(self, order: npt.NDArray[np.int64], step: int) -> Batch:
        start = step * self.batch_size
        joined = order[start : start + self.batch_size]
        offset, count = split_evenly(len(joined), self.size)[self.rank]
        return Batch(joined[offset : offset + count], len(joined), start + offset)


def _check_arguments(num_samples: int, rank: int, size: int, batch_size: int, seed: int) -> None:
    for name, value in (("num_samples", num_samples), ("size", size), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"ShardedSampler: {name} must be at least 1, got {value}")
    if not 0 <= rank < size:
        raise ValueError(f"ShardedSampler: rank must lie in [0, size={size}), got {rank}")
    if seed < 0:
        raise ValueError(f"ShardedSampler: seed must not be negative, got {seed}")
