"""`Metrics`: numbers of a step or an epoch, averaged over all ranks."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpidist._types import SUM, Array
from mpidist.arrays.namespaces import is_device
from mpidist.collectives import all_gather_object, all_reduce
from mpidist.group.group import ProcessGroup, check_group

__all__ = ["Metrics"]


class Metrics:
    """Weighted means of named numbers over samples and ranks.

    ::

        metrics.add("loss", loss, weight=len(x))
        metrics.add("accuracy", (y.argmax(1) == target).mean(), weight=len(x))
        print(metrics.reduce())        # {'accuracy': 0.97, 'loss': 0.11}, equal on all ranks

    Parameters
    ----------
    group : ProcessGroup
        The ranks whose numbers are averaged.
    """

    def __init__(self, group: ProcessGroup) -> None:
        check_group(group, "Metrics")
        self._group = group
        self._sums: dict[str, tuple[Any, float]] = {}
        self._names: tuple[str, ...] | None = None

    def add(self, name: str, value: float | Array, weight: float = 1) -> None:
        """Add a number to the mean `name`.

        Parameters
        ----------
        name : str
            What the number measures, such as ``"loss"``.
        value : float or Array of shape ()
            The number, for example a mean over `weight` samples. Ignored if `weight` is 0, so
            that the mean over no samples, a NaN, does no harm. One on a device is added up there,
            and `reduce` waits for the sum.
        weight : float, optional
            How much it counts, not negative.

        Raises
        ------
        ValueError
            If `weight` is negative or not finite, or the name was not there at the first `reduce`.

        Notes
        -----
        Local.
        """
        if not 0 <= weight < float("inf"):
            raise ValueError(
                f"Metrics: weight of '{name}' must be finite and not negative: {weight}"
            )
        if self._names is not None and name not in self._names:
            raise ValueError(
                f"Metrics: '{name}' is new; the names are agreed at the first reduce(), so that "
                f"later ones cost one all-reduce: {', '.join(self._names)}. Use a second Metrics"
            )
        total, weights = self._sums.get(name, (0.0, 0.0))
        if weight:
            number: Any = value
            number = number.astype(np.float64) if is_device(value) else float(value)
            self._sums[name] = (total + number * weight, weights + weight)
        else:
            self._sums[name] = (total, weights)

    def reduce(self) -> dict[str, float]:
        """Return the means over all ranks, and begin anew.

        Returns
        -------
        dict of str to float
            In the order of the names; the same on all ranks. NaN where all weights were 0.

        Notes
        -----
        Collective over the group; blocks. One all-reduce of 16 bytes per name in float64. The
        first call also agrees on the names, in one exchange of objects: a name that only some
        ranks have added counts.
        """
        if self._names is None:
            everyone = all_gather_object(sorted(self._sums), self._group)
            self._names = tuple(sorted(set().union(*everyone)))
        sums = [self._sums.get(name, (0.0, 0.0)) for name in self._names]
        pairs = [(float(total), weight) for total, weight in sums]
        totals = all_reduce(np.array(pairs, np.float64).reshape(-1, 2), self._group, op=SUM)
        self._sums = {}
        return {
            name: float(total / weight) if weight else float("nan")
            for name, (total, weight) in zip(self._names, totals, strict=True)
        }
