"""The order in which a DDP's buckets lie: rank 0's gradients show it, or an earlier run did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mpidist.backends.work import Work
from mpidist.collectives import ibroadcast
from mpidist.parallel.data.gradients import ParameterGradients
from mpidist.parallel.data.reducer import GradientReducer

__all__ = ["BucketOrder"]


class BucketOrder:
    """The order in which rank 0's gradients came in the first step, and all ranks' buckets lie.

    [Note: order of arrival] The reverse of the order of the parameters is a guess at the order in
    which backward completes gradients. The first backward of a `DDP` outside `no_sync` shows the
    real one: rank 0's is broadcast beside the gradients, and when they are waited for the buckets
    are laid out anew in that order, in the same memory. What `Parameter.grad` returned before
    that, inside `no_sync`, must not be used any more; what it returns afterwards stays the same
    array. PyTorch does so, too. Beside a hook of the user's, which may keep something per bucket,
    the first layout stays.

    Parameters
    ----------
    reducer : GradientReducer
        Whose buckets.
    gradients : ParameterGradients
        Who moves the gradients from one layout to the next.
    fixed : bool
        Whether the first layout stays.

    Attributes
    ----------
    found : tuple of str or None
        The names in that order; None before it is known.

    References
    ----------
    Li et al. (2020), PyTorch Distributed: Experiences on Accelerating Data Parallel Training,
    section 3.2.3.
    """

    def __init__(
        self, reducer: GradientReducer, gradients: ParameterGradients, *, fixed: bool
    ) -> None:
        self.found: tuple[str, ...] | None = None
        self._names = tuple(reducer.grads)
        self._reducer = reducer
        self._gradients = gradients
        self._fixed = fixed
        self._coming: Work[Any] | None = None

    def start(self) -> None:
        """Send rank 0's order to all, if it is not known; 8 bytes per name; does not block."""
        if self._fixed or self.found is not None:
            return
        position = {name: i for i, name in enumerate(self._names)}
        places = np.array([position[name] for name in self._reducer.arrivals()], np.int64)
        self._coming = ibroadcast(places, self._reducer.group, root=0, out=places)

    def done(self) -> bool:
        """Whether what was started has come."""
        return self._coming is None or self._coming.done()

    def wait(self, timeout: float | None = None) -> None:
        """Wait for what was started."""
        if self._coming is not None:
            self._coming.wait(timeout)

    def settle(self) -> None:
        """Lay the buckets out in the order that has come, if one has."""
        if self._coming is not None:
            places = self._coming.wait()
            self._coming = None
            self.lay_out([self._names[place] for place in places.tolist()])

    def lay_out(self, order: Sequence[str] | None) -> None:
        """Lay the buckets out in this order for good; None: as at first, until one is found."""
        if not self._fixed:
            self._gradients.relayout(self._names[::-1] if order is None else order)
            self.found = None if order is None else tuple(order)

    def check(self, order: Any) -> None:
        """Raise ValueError unless it is None or holds every name once."""
        if order is None:
            return
        if not isinstance(order, (list, tuple)) or sorted(map(str, order)) != sorted(self._names):
            raise ValueError(
                "load_state_dict: the order of the gradients' buckets must hold the name of every "
                f"parameter once, or be None, got {order!r}; nothing was changed"
            )
