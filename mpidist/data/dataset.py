"""A data set that fits in memory."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from mpidist._types import Array
from mpidist.observe.regions import region


@dataclass(frozen=True, slots=True, eq=False)
class ArrayDataset:
    """Inputs and targets, one row of each per sample.

    Parameters
    ----------
    inputs : Array, shape (samples, ...)
        What the model is given.
    targets : Array, shape (samples, ...)
        What it should answer; each element is one target, so a text has one per position.

    Raises
    ------
    ValueError
        If the numbers of rows differ.
    """

    inputs: Array
    targets: Array

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(
                f"ArrayDataset: {len(self.inputs)} inputs but {len(self.targets)} targets; give "
                "one row of each per sample"
            )

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.inputs)

    @property
    def targets_per_sample(self) -> int:
        """Number of targets in a row; 1 where a sample has a single label."""
        return prod(self.targets.shape[1:])

    def take(self, indices: npt.NDArray[np.int64]) -> tuple[Array, Array]:
        """Return copies of some rows.

        Parameters
        ----------
        indices : Array, shape (n,) int64
            Which ones, in this order; `n` may be 0.

        Returns
        -------
        inputs : Array, shape (n, ...)
            Their inputs.
        targets : Array, shape (n, ...)
            Their targets.
        """
        with region("data"):
            return self.inputs[indices], self.targets[indices]


def split_off(data: ArrayDataset, part: float, *, seed: int) -> tuple[ArrayDataset, ArrayDataset]:
    """Split a data set into one to train on and a smaller one to judge by.

    Parameters
    ----------
    data : ArrayDataset
        All samples; not copied.
    part : float
        Share of the samples to hold out, in (0, 1); rounded to whole samples.
    seed : int
        Decides which samples are held out.

    Returns
    -------
    train : ArrayDataset
        The rest.
    held_out : ArrayDataset
        The part.

    Raises
    ------
    ValueError
        If either side would be empty.
    """
    count = round(len(data) * part)
    if not 0 < count < len(data):
        raise ValueError(
            f"split_off: holding out {part} of {len(data)} samples leaves one side empty"
        )
    # Raw keys, as in ShardedSampler: the split must not change with the version of numpy.
    keys = np.random.Philox(np.random.SeedSequence(seed)).random_raw(len(data))
    order = np.argsort(keys, kind="stable")
    train, held_out = np.sort(order[count:]), np.sort(order[:count])
    return ArrayDataset(*data.take(train)), ArrayDataset(*data.take(held_out))
