"""One operation over several sizes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from mpidist.bench.options import effort, tell_progress
from mpidist.bench.report import Row, bus_factor
from mpidist.bench.times import Series, measure
from mpidist.group import ProcessGroup

__all__ = ["rows_over"]


def rows_over(
    sizes: Sequence[int],
    make: Callable[[int], Sequence[Series]],
    world: ProcessGroup,
    *,
    operation: str,
    options: argparse.Namespace,
) -> list[Row]:
    """Measure what `make` returns for each size.

    Parameters
    ----------
    sizes : sequence of int
        In bytes.
    make : callable
        ``make(nbytes)`` returns the series to measure at a size; collective over `world`.
    world : ProcessGroup
        The ranks taking part.
    operation : str
        For the rows.
    options : Namespace
        With what `add_effort` adds.

    Returns
    -------
    list of Row
        One per size and series, the same on all ranks.

    Notes
    -----
    Collective over `world`; blocks. Tells the first rank's standard error how far it is.
    """
    factor = bus_factor(operation, world.size)
    rows = []
    for nbytes in sizes:
        times = measure(make(nbytes), world, effort=effort(options))
        tell_progress(world, operation, nbytes)
        rows += [
            Row(operation=operation, series=name, nbytes=nbytes, times=each, bus_factor=factor)
            for name, each in times.items()
        ]
    return rows
