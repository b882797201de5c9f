"""Checkpoints: one HDF5 file per rank and a manifest; saved by N ranks, loaded by M.

::

    from mpidist import checkpoint

    state = {"model": model, "optimizer": optimizer, "sampler": sampler, "epoch": epoch}
    checkpoint.save("runs/a", state, world, step=100)
    ...
    found = checkpoint.load("runs/a", state, world)  # the newest one, on any number of ranks
    epoch = found.values["epoch"]
"""

from __future__ import annotations

from mpidist.checkpoint.directory import Checkpoint, latest, list  # noqa: A004
from mpidist.checkpoint.loading.load import load, load_full
from mpidist.checkpoint.saving.save import CheckpointFuture, save, save_async
from mpidist.checkpoint.state import State, Stateful
from mpidist.checkpoint.tools.pruning import prune
from mpidist.checkpoint.tools.resharding import reshard
from mpidist.checkpoint.tools.verifying import verify

__all__ = [
    "Checkpoint",
    "CheckpointFuture",
    "State",
    "Stateful",
    "latest",
    "list",
    "load",
    "load_full",
    "prune",
    "reshard",
    "save",
    "save_async",
    "verify",
]
