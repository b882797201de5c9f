"""Paths that keep the meaning that they have at the call, and are the same on all ranks."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import xxhash

from mpidist.collectives import all_gather, all_gather_object
from mpidist.errors import CheckpointError, CollectiveMismatchError, UnsupportedOperationError
from mpidist.group import ProcessGroup

__all__ = ["absolute", "check_same"]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
"""What begins with a scheme. A `Path` made of ``s3://bucket`` has one slash left."""


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return a path that means the same after the working directory has changed.

    Symbolic links are kept: what they lead to may be named otherwise on another host.

    Parameters
    ----------
    path : path
        Of something in a file system.

    Returns
    -------
    Path
        Absolute.

    Raises
    ------
    UnsupportedOperationError
        If it is a URL, such as ``s3://bucket/run``.
    CheckpointError
        If it is relative, and the working directory is gone.
    """
    text = os.fsdecode(path)
    scheme = _URL.match(text)
    if scheme:
        raise UnsupportedOperationError(
            f"{text!r} is a URL, and checkpoints are kept in directories of a file system; give "
            f"the path of one that all ranks see (a local directory {scheme[1]}: is ./{text})"
        )
    try:
        return Path(text).absolute()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{text!r} is relative, and the working directory of this process has been removed; "
            "give an absolute path"
        ) from error


def check_same(what: str, group: ProcessGroup) -> None:
    """Raise on all ranks unless all have the same.

    Parameters
    ----------
    what : str
        What this rank has: a path, and what else has to be the same.
    group : ProcessGroup
        The ranks.

    Raises
    ------
    CollectiveMismatchError
        On every rank, with the same words, which name the first rank that differs from rank 0.

    Notes
    -----
    Collective over `group`; blocks. One all_gather of 16 bytes.
    """
    mine = np.frombuffer(xxhash.xxh3_128_digest(os.fsencode(what)), np.uint8)
    table = all_gather(mine, group).reshape(group.size, -1)
    if (table == table[0]).all():
        return
    told = all_gather_object(what, group)
    rank = next(rank for rank, other in enumerate(told) if other != told[0])
    raise CollectiveMismatchError(
        f"rank {rank} of group {group.name!r} has {told[rank]}, and rank 0 has {told[0]}; give all "
        "ranks the same arguments, with an absolute path where their working directories differ"
    )
