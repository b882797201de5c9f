"""`Dropout`, whose mask is a function of (seed, step, global sample index, layer)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mpidist._types import Array
from mpidist.arrays.namespaces import is_device
from mpidist.arrays.shards import Part
from mpidist.nn.layer_kernels import philox_at_least
from mpidist.nn.mode import Mode
from mpidist.nn.module import Context, ParameterFree

_WORD = 2**64 - 1


class Dropout(ParameterFree):
    """Zeroes elements at random in training, and scales the others up to keep the mean.

    Parameters
    ----------
    p : float
        Probability that an element is zeroed, 0 <= p < 1.

    Attributes
    ----------
    part : Part or None
        Which elements of the last axis the input has; None: all of them.

    Raises
    ------
    ValueError
        If `p` is outside that range.

    Notes
    -----
    The first axis is the samples'. See `dropout_mask` for what the draw depends on. The same
    `Dropout` object used twice in one forward pass draws the same mask twice: make two. The
    layer's number among the leaves of the model it was built into is `layer_index`. Where the input
    has only a part of the features of a sample, `part` says which, and those are drawn as they
    would be within the whole; on the host.

    References
    ----------
    Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov (2014), Dropout: A Simple Way to
    Prevent Neural Networks from Overfitting, section 4; here scaled in training instead.
    """

    draws_by_index = True
    elementwise_blocks = 1

    def __init__(self, p: float) -> None:
        if not 0.0 <= p < 1.0:
            raise ValueError(f"Dropout: expected 0 <= p < 1, got {p}")
        self.p = p
        self.part: Part | None = None

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Map `x` (batch, ...) elementwise; `x` itself outside training.

        Raises
        ------
        RuntimeError
            If the layer has no `layer_index` to draw by, and is to draw.
        """
        if not mode.training or self.p == 0.0:
            return x, Context(None)
        if self.layer_index is None:
            raise RuntimeError(
                "Dropout: the layer has no layer_index to draw its mask by, since it was made "
                "without its constructor; call relabel() on the outermost module"
            )
        mask = self._draw(x, mode, self.layer_index)
        return self._apply(x, mask), Context(mask)

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        """Apply the forward pass's mask and scale to `dy`."""
        return (dy if ctx.saved is None else self._apply(dy, ctx.saved)), None

    def _draw(self, x: Array, mode: Mode, layer_index: int) -> Array:
        if self.part is not None:
            shape = (*x.shape[:-1], *self.part.shape)
            return self.part.of(dropout_mask(shape, self.p, mode, layer_index))
        if not is_device(x):
            return dropout_mask(x.shape, self.p, mode, layer_index)
        # The same words, by the generator's formula: the host would draw for longer than a step
        # takes there.
        key, counter = (mode.seed, layer_index), (mode.step, mode.sample_offset)
        return philox_at_least(_threshold(self.p), key, counter, like=x)

    def _apply(self, x: Array, mask: Array) -> Array:
        y: Array = x * (1.0 / (1.0 - self.p))
        y *= mask
        return y


def dropout_mask(
    shape: tuple[int, ...], p: float, mode: Mode, layer_index: int
) -> npt.NDArray[np.bool_]:
    """Draw which elements of a batch of this shape stay; the first axis counts samples.

    Returns
    -------
    Array, shape `shape`, bool
        On the host. `Dropout` draws the same on a device.

    Notes
    -----
    Each sample has its own stream of Philox: key (seed, layer), counter (0, 0, step, sample).
    Raw words are used, since numpy promises their stability and not that of distributions.

    References
    ----------
    Salmon, Moraes, Dror, Shaw (2011), Parallel Random Numbers: As Easy as 1, 2, 3, section 3.3.
    """
    samples, size = shape[0], int(np.prod(shape[1:]))
    key = np.array([mode.seed & _WORD, layer_index & _WORD], dtype=np.uint64)
    philox = np.random.Philox(key=key)
    state: Any = philox.state  # setting the state is ten times quicker than a new generator
    state["state"]["counter"][2] = mode.step & _WORD
    threshold = _threshold(p)
    mask = np.empty((samples, size), dtype=np.bool_)
    for i in range(samples):
        state["state"]["counter"][3] = (mode.sample_offset + i) & _WORD
        philox.state = state
        raw: Array = philox.random_raw((size + 1) // 2)
        np.greater_equal(raw.astype("<u8", copy=False).view("<u4")[:size], threshold, out=mask[i])
    return mask.reshape(shape)


def _threshold(p: float) -> np.uint32:
    """Return the least 32-bit word that lets an element stay."""
    word: np.uint32 = np.uint32(min(round(p * 2**32), 2**32 - 1))
    return word
