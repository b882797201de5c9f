"""`Mode`: all that a forward pass depends on except its input and the parameters."""

from __future__ import annotations

import dataclasses
import operator


@dataclasses.dataclass(frozen=True, slots=True)
class Mode:
    """How a forward pass is to be run.

    Parameters
    ----------
    training : bool
        Dropout drops and batch normalisation uses the batch's own statistics.
    seed : int, optional
        The run's seed for random layers.
    step : int, optional
        Number of the training step. The same step draws the same random numbers.
    sample_offset : int, optional
        Global index of this batch's first sample (its place in the batch joined over all
        ranks and micro-batches). Sample `i` of the batch has the global index
        ``sample_offset + i``.
    replay : bool, optional
        The same forward pass has been run before and is repeated to recompute what was not
        kept: it draws the same random numbers and changes no buffer.

    Raises
    ------
    TypeError
        If a number is not an integer; integers of numpy are.

    Notes
    -----
    Random numbers are a function of (seed, step, global sample index, layer) only, so a batch
    split over any number of ranks or micro-batches draws what the joined batch would have drawn.
    """

    training: bool
    seed: int = 0
    step: int = 0
    sample_offset: int = 0
    replay: bool = False

    def __post_init__(self) -> None:
        for name in ("seed", "step", "sample_offset"):
            # numpy's integers would overflow where Python's are cut to 64 bits.
            object.__setattr__(self, name, operator.index(getattr(self, name)))

    def shifted(self, samples: int) -> Mode:
        """Return the mode of a micro-batch that begins `samples` samples further on."""
        return dataclasses.replace(self, sample_offset=self.sample_offset + samples)

    def replayed(self) -> Mode:
        """Return this mode marked as a replay."""
        return dataclasses.replace(self, replay=True)


EVAL = Mode(training=False)
"""Evaluation depends on no seed, step or place. Training does, so it has no such constant: used in
a loop it would draw the same dropout mask in every step and on every rank."""
