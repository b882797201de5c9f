"""Python's own help texts, predicted byte by byte by a small transformer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from task import HELD_OUT, SPLIT_SEED, Defaults, Task

from mpidist.data import ArrayDataset, split_off
from mpidist.nn import (
    GELU,
    CausalSelfAttention,
    Embedding,
    LayerNorm,
    Linear,
    Module,
    PositionEmbedding,
    Residual,
    Sequential,
)

__all__ = ["load_text", "text_model", "text_task", "unigram_entropy", "windows"]

BYTES = 256
WINDOW = 64
"""Bytes that a sample has, and that the model can look back on."""


def load_text() -> npt.NDArray[np.uint8]:
    """Return the English text of `pydoc_data.topics` as bytes.

    Returns
    -------
    Array, shape (bytes,) uint8
        All topics, one after the other. They quote each other at length; a paragraph that has
        come before is left out, so that nothing held out stands in the training samples too.

    Raises
    ------
    RuntimeError
        If this Python came without the text.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RuntimeError(
            "--task text reads pydoc_data.topics of the standard library, which this Python "
            "lacks; install the distribution's full Python, or use --task digits"
        ) from error
    paragraphs = (p.strip("\n") for name in sorted(topics) for p in topics[name].split("\n\n"))
    unique = dict.fromkeys(p for p in paragraphs if p.strip())
    return np.frombuffer("\n\n".join(unique).encode("utf-8"), np.uint8)


def unigram_entropy(text: npt.NDArray[np.uint8]) -> float:
    """Return the entropy of the bytes taken one by one, in nats per byte.

    Parameters
    ----------
    text : Array, shape (bytes,) uint8
        Any text.

    Returns
    -------
    float
        The least loss of a model that knows how frequent each byte is and looks at nothing else.
    """
    counts = np.bincount(text, minlength=BYTES)
    share = counts[counts > 0] / len(text)
    return float(-(share * np.log(share)).sum())


def windows(text: npt.NDArray[np.uint8], length: int) -> ArrayDataset:
    """Cut a text into samples that do not overlap.

    Parameters
    ----------
    text : Array, shape (bytes,) uint8
        Any text of more than `length` bytes.
    length : int
        Bytes per sample.

    Returns
    -------
    ArrayDataset
        Inputs (samples, length) int64; targets of the same shape, each the byte that follows.
    """
    count = (len(text) - 1) // length
    numbers = text.astype(np.int64)
    inputs = numbers[: count * length].reshape(count, length)
    targets = numbers[1 : count * length + 1].reshape(count, length)
    return ArrayDataset(inputs, targets)


def text_model(seed: int, *, dim: int = 64, heads: int = 4, blocks: int = 2) -> Module:
    """Build a transformer of pre-normalised blocks.

    Parameters
    ----------
    seed : int
        Draws the initial values.
    dim : int, optional
        Numbers per position.
    heads : int, optional
        Attention heads per block; divides `dim`.
    blocks : int, optional
        Attention and a two-layer network, each.

    Returns
    -------
    Module
        From (batch, time) int64 to (batch, time, 256) float32; time is at most 64.

    References
    ----------
    Vaswani et al. (2017), Attention is all you need, section 3.
    Xiong et al. (2020), On layer normalization in the transformer architecture, figure 1b.
    """
    rng = np.random.default_rng(seed)
    body: list[Module] = []
    for _ in range(blocks):
        attention = CausalSelfAttention(dim, heads, rng=rng)
        network = (Linear(dim, 4 * dim, rng=rng), GELU(), Linear(4 * dim, dim, rng=rng))
        body += [
            Residual(Sequential(LayerNorm(dim), attention)),
            Residual(Sequential(LayerNorm(dim), *network)),
        ]
    return Sequential(
        Embedding(BYTES, dim, rng=rng),
        PositionEmbedding(WINDOW, dim, rng=rng),
        *body,
        LayerNorm(dim),
        Linear(dim, BYTES, rng=rng),
    )


def text_task(seed: int) -> Task:
    """Return the task with a model initialised from `seed`."""
    text = load_text()
    train, held_out = split_off(windows(text, WINDOW), HELD_OUT, seed=SPLIT_SEED)
    return Task(
        train=train,
        held_out=held_out,
        model=text_model(seed),
        defaults=Defaults(epochs=3, batch_size=16, lr=6e-3),
        baseline=("unigram entropy", unigram_entropy(text)),
    )
