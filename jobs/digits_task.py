"""Handwritten digits, told apart by a small convolutional network."""

from __future__ import annotations

import gzip
from hashlib import sha256
from pathlib import Path

import numpy as np
from task import HELD_OUT, SPLIT_SEED, Defaults, Task

from mpidist.data import ArrayDataset, split_off
from mpidist.nn import Conv2d, Dropout, Flatten, Linear, MaxPool2d, Module, ReLU, Sequential

__all__ = ["DIGITS", "digits_model", "digits_task", "load_digits"]

DIGITS = Path(__file__).parent / "data" / "digits.csv.gz"
"""1,797 images of the UCI optical recognition set; origin and licence in data/README.md."""

_SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"


def load_digits(path: Path = DIGITS) -> ArrayDataset:
    """Read the digits and verify that they are the ones that shipped.

    Parameters
    ----------
    path : Path, optional
        The gzipped table.

    Returns
    -------
    ArrayDataset
        Inputs (1797, 1, 8, 8) float32, ink from 0 to 1; targets (1797,) int64, the digits.

    Raises
    ------
    ValueError
        If the file's SHA-256 is not the expected one.
    """
    packed = path.read_bytes()
    found = sha256(packed).hexdigest()
    if found != _SHA256:
        raise ValueError(
            f"{path}: SHA-256 is {found}, expected {_SHA256}; the file is damaged or another "
            "one: restore it with git checkout"
        )
    lines = gzip.decompress(packed).decode("ascii").splitlines()
    table = np.loadtxt(lines, delimiter=",", dtype=np.int64)
    images = table[:, :-1].reshape(-1, 1, 8, 8).astype(np.float32) / 16
    return ArrayDataset(images, table[:, -1].copy())


def digits_model(seed: int) -> Module:
    """Build the network: two convolutions, a pooling, two linear layers.

    Parameters
    ----------
    seed : int
        Draws the initial values.

    Returns
    -------
    Module
        From (batch, 1, 8, 8) to (batch, 10) float32.
    """
    rng = np.random.default_rng(seed)
    return Sequential(
        Conv2d(1, 16, 3, padding=1, rng=rng),
        ReLU(),
        Conv2d(16, 32, 3, padding=1, rng=rng),
        ReLU(),
        MaxPool2d(2),
        Flatten(),
        Linear(32 * 4 * 4, 64, rng=rng),
        ReLU(),
        Dropout(0.3),
        Linear(64, 10, rng=rng),
    )


def digits_task(seed: int) -> Task:
    """Return the task with a model initialised from `seed`."""
    train, held_out = split_off(load_digits(), HELD_OUT, seed=SPLIT_SEED)
    return Task(
        train=train,
        held_out=held_out,
        model=digits_model(seed),
        defaults=Defaults(epochs=30, batch_size=64, lr=3e-3),
        baseline=("guessing", float(np.log(10))),
    )
