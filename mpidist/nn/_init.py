"""Initial values, drawn from a generator that the caller hands in."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from mpidist._types import Array

__all__ = ["Rng", "fan_in_uniform", "normal"]

Rng: TypeAlias = np.random.Generator | int
"""A generator, or a seed for a new one."""


def fan_in_uniform(rng: Rng, shape: tuple[int, ...], fan_in: int, dtype: npt.DTypeLike) -> Array:
    """Draw from the uniform distribution on +-1/sqrt(fan_in).

    Parameters
    ----------
    rng : numpy.random.Generator or int
        Source. Draws are made in float64 and then rounded, so that models of different dtypes
        made from the same seed begin alike.
    shape : tuple of int
        Shape of the result.
    fan_in : int
        Inputs per output.
    dtype : dtype
        Of the result.

    Returns
    -------
    Array, shape `shape`
        On the host.

    References
    ----------
    LeCun, Bottou, Orr, Mueller (1998), Efficient BackProp, section 4.6, for the scale;
    the uniform form with this bound is the default of several packages.
    """
    bound = 1.0 / np.sqrt(max(fan_in, 1))
    return np.random.default_rng(rng).uniform(-bound, bound, shape).astype(dtype)


def normal(rng: Rng, shape: tuple[int, ...], std: float, dtype: npt.DTypeLike) -> Array:
    """Draw from the normal distribution of mean 0 and standard deviation `std`.

    Parameters
    ----------
    rng : numpy.random.Generator or int
        Source; draws are made in float64 and then rounded.
    shape : tuple of int
        Shape of the result.
    std : float
        Standard deviation.
    dtype : dtype
        Of the result.

    Returns
    -------
    Array, shape `shape`
        On the host.
    """
    return np.random.default_rng(rng).normal(0.0, std, shape).astype(dtype)
