"""`reshard`: the checkpoint of any number of ranks, as any other number would have saved it."""

from __future__ import annotations

import os

from mpidist.checkpoint.directory import Checkpoint, find
from mpidist.checkpoint.loading.reading import check_files
from mpidist.checkpoint.tools.building import build
from mpidist.checkpoint.tools.sources import Progress, Reader, unheard

__all__ = ["reshard"]


def reshard(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    num_ranks: int,
    *,
    step: int | str = "latest",
    progress: Progress = unheard,
) -> Checkpoint:
    """Write a checkpoint anew, split evenly over another number of ranks.

    Parameters
    ----------
    src : path
        Directory of checkpoints to read from.
    dst : path
        Directory of checkpoints to write to; made if missing. Another one than `src`, for the step
        stays the same.
    num_ranks : int
        Ranks of the new checkpoint. It has as many files, with the boxes that `save` would write if
        each of so many ranks held all arrays whole.
    step : int or "latest", optional
        Which one.
    progress : callable, optional
        Is told now and then how many more bytes are done, of `Checkpoint.nbytes`.

    Returns
    -------
    Checkpoint
        The new one, complete and on disk: with the step, metadata and values of the old one, and
        the versions of what has written it now.

    Raises
    ------
    CheckpointNotFoundError
        If there is none in `src`.
    CheckpointCorruptError, CheckpointMissingShardError
        If a file of it is damaged, cut off or missing: all digests are compared.
    CheckpointError
        If `dst` has a complete checkpoint of this step, or cannot be written.
    InvalidWorldSizeError
        If `num_ranks` is less than 1.

    Notes
    -----
    Local: without any group. Loading does not need it: a checkpoint loads on any number of ranks.
    Memory: some blocks of at most 8 MiB, whatever the arrays' sizes, and the manifest. A kill
    leaves a directory without a manifest, which is no checkpoint.
    """
    checkpoint = find(src, step)
    manifest = checkpoint.manifest
    check_files(checkpoint.directory, manifest)
    with Reader(checkpoint) as reader:
        return build(
            dst,
            reader.sources(),
            manifest.values,
            step=checkpoint.step,
            num_ranks=num_ranks,
            metadata=manifest.metadata,
            crossovers=manifest.crossovers,
            progress=progress,
        )
