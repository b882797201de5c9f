"""`Precision`: the dtypes in which a sharded model computes, reduces gradients, and returns."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidist._types import Array, DType
from mpidist.arrays.namespaces import FLOATS, array_namespace, is_array
from mpidist.nn.module import Context
from mpidist.parallel.gradient_kernels import cast

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["Precision", "as_float", "inner_pass", "input_gradient"]


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtypes of an `FSDP`, beside that in which its model was built.

    Shards keep the dtype in which the model was built, so that the optimizer updates a float32
    parameter while the layers see, and ranks exchange, its rounded value.

    Parameters
    ----------
    parameters : dtype, optional
        What the layers see and compute with: float16, bfloat16, float32 or float64. The input of
        the model is cast to it, too. When omitted, that in which the model was built.
    reduction : dtype, optional
        In which gradients are added and exchanged; when omitted, the one of `parameters`.
    output : dtype, optional
        Of what forward returns; when omitted, whatever the model makes.

    Raises
    ------
    ValueError
        If a dtype is none of these four.

    Notes
    -----
    Values are rounded to nearest, and infinite where they are beyond the range of a dtype, which a
    `GradScaler` looks for. Sums over ranks of halves are rounded once, from float32. Arrays of
    other dtypes than these four, such as complex ones and tokens, are left as they are; so are the
    model's buffers.

    References
    ----------
    Micikevicius et al. (2018), Mixed Precision Training, section 3.1.

    Examples
    --------
    >>> Precision(parameters="bfloat16", reduction=np.float32)
    Precision(parameters=bfloat16, reduction=float32, output=None)
    """

    parameters: npt.DTypeLike | None = None
    reduction: npt.DTypeLike | None = None
    output: npt.DTypeLike | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            given = getattr(self, field.name)
            if given is not None:
                object.__setattr__(self, field.name, _float(field.name, given))

    def __repr__(self) -> str:
        """Return the names of the dtypes."""
        own = ", ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))
        return f"Precision({own})"

    def stored(self, dtype: DType) -> DType:
        """Return the dtype in which the layers see parameters that were built in `dtype`."""
        return _replaced(dtype, self.parameters)

    def reduced(self, dtype: DType) -> DType:
        """Return the dtype in which gradients of parameters that were built in `dtype` travel."""
        return _replaced(self.stored(dtype), self.reduction)

    def cast_input(self, x: Array) -> Array:
        """Return a model's input in the dtype of its parameters."""
        return as_float(x, self.parameters)

    def cast_output(self, y: Array) -> Array:
        """Return a model's output in the dtype that is asked for."""
        return as_float(y, self.output)

    def context(self, ctx: Context, x: Array, y: Array) -> Context:
        """Return what a forward pass leaves, with the dtypes of its input and its own output."""
        if self.parameters is None and self.output is None:
            return ctx
        return _CastContext(ctx, ctx.uses, getattr(x, "dtype", None), getattr(y, "dtype", None))


@dataclass(frozen=True, slots=True, eq=False)
class _CastContext(Context):
    """The context of a pass whose input or output were cast, and their dtypes before."""

    x: DType | None = None
    y: DType | None = None


def inner_pass(ctx: Context, dy: Array) -> tuple[Context, Array]:
    """Return the model's own context, and the gradient in the dtype of its own output."""
    return (ctx.saved, as_float(dy, ctx.y)) if isinstance(ctx, _CastContext) else (ctx, dy)


def input_gradient(ctx: Context, dx: Array) -> Array:
    """Return the gradient of an input in the dtype in which that was given."""
    return as_float(dx, ctx.x) if isinstance(ctx, _CastContext) else dx


def as_float(x: Array, dtype: npt.DTypeLike | None) -> Array:
    """Return an array of floats in a dtype: itself if it has it; and anything else as it is."""
    if dtype is None or not is_array(x) or _replaced(x.dtype, dtype) == x.dtype:
        return x
    out: Array = array_namespace(x).empty(x.shape, dtype)
    cast(x, out)
    return out


def _replaced(dtype: DType, by: Any) -> DType:
    return dtype if by is None or dtype not in FLOATS else np.dtype(by)


def _float(field: str, given: Any) -> DType:
    try:
        dtype: DType = np.dtype(given)
    except TypeError:
        dtype = np.dtype(object)
    if dtype not in FLOATS:
        raise ValueError(
            f"Precision: {field} must be float16, bfloat16, float32 or float64, got {given!r}"
        )
    return dtype
