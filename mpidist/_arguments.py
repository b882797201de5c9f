"""What arguments of the caller have to be, whoever takes them."""

from __future__ import annotations

from operator import index
from typing import Any

import numpy as np

__all__ = ["whole_number"]


def whole_number(value: Any) -> int:
    """Return an integer of any kind as a plain one.

    Parameters
    ----------
    value : int
        Or what stands for one: an integer of numpy, an array that holds one.

    Raises
    ------
    TypeError
        If it is a float, or a boolean: a mask is not a list of numbers.
    """
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"expected an integer, got the boolean {value}")
    return index(value)
