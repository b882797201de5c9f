"""Initial values, drawn from a generator that the caller hands in, and their dtypes."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from mpidist._types import Array, DType

Rng: TypeAlias = np.random.Generator | int
"""A generator, or a seed for a new one."""

_FLOATS = frozenset(np.dtype(code) for code in "efd")


def parameter_dtype(layer: str, dtype: npt.DTypeLike) -> DType:
    """Return a parameter's dtype; ValueError unless it is float16, float32 or float64."""
    checked = np.dtype(dtype)
    if checked not in _FLOATS:
        # numpy has no arithmetic of bfloat16's own: each operation would give float32 and the
        # layers would differ in what they hand on. Complex gradients would need conjugates.
        raise ValueError(
            f"{layer}: expected parameters of float16, float32 or float64, got {checked}; keep "
            "them in float32 (gradients can still travel as bfloat16: Compression.BF16)"
        )
    return checked


def fan_in_uniform(rng: Rng, shape: tuple[int, ...], fan_in: int, dtype: npt.DTypeLike) -> Array:
    """Draw from the uniform distribution on +-1/sqrt(fan_in), the number of inputs of an output.

    Draws are made in float64 and then rounded, so that models of different dtypes made from the
    same seed begin alike.

    References
    ----------
    LeCun, Bottou, Orr, Mueller (1998), Efficient BackProp, section 4.6, for the scale;
    the uniform form with this bound is the default of several packages.
    """
    bound = 1.0 / np.sqrt(max(fan_in, 1))
    return np.random.default_rng(rng).uniform(-bound, bound, shape).astype(dtype)


def normal(rng: Rng, shape: tuple[int, ...], std: float, dtype: npt.DTypeLike) -> Array:
    """Draw from the normal distribution of mean 0, in float64, and round."""
    return np.random.default_rng(rng).normal(0.0, std, shape).astype(dtype)
