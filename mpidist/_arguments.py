"""What arguments of the caller have to be, whoever takes them."""

from __future__ import annotations

from datetime import timedelta
from math import isfinite
from numbers import Real
from operator import index
from typing import Any

import numpy as np

from mpidist.errors import UnsupportedOperationError


def seconds(value: Any, what: str, *, least: float | None = None) -> float:
    """Return a duration in seconds: of a number, positive and finite, or a `datetime.timedelta`.

    `least` is the smallest that is taken, any above 0 when omitted. Raises
    UnsupportedOperationError, which begins with `what`, if it is anything else: no wait is without
    a deadline.
    """
    number = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(number, Real) and not isinstance(number, (bool, np.bool_)):
        number = float(number)
        if isfinite(number) and (number > 0 if least is None else number >= least):
            return number
    raise UnsupportedOperationError(
        f"{what} must be a positive number of seconds, or a datetime.timedelta; got {value!r}"
    )


def whole_number(value: Any) -> int:
    """Return an integer of any kind, or an array that holds one, as a plain integer.

    Raises TypeError if it is a float, or a boolean: a mask is not a list of numbers.
    """
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"expected an integer, got the boolean {value}")
    return index(value)
