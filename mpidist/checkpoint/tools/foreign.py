"""What the files of other packages have in common, to which checkpoints are exported."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import IO

from mpidist._new_file import create_unique
from mpidist.arrays.boxes import Box
from mpidist.arrays.namespaces import as_bytes
from mpidist.checkpoint.directory import Checkpoint
from mpidist.checkpoint.format.files import naming, publish, write_at
from mpidist.checkpoint.format.manifest import JSON, StoredArray, decode, encode
from mpidist.checkpoint.loading.units import runs_of
from mpidist.checkpoint.tools.sources import Progress, Reader, Source
from mpidist.errors import CheckpointCorruptError

__all__ = ["Foreign", "copy_array", "described", "description", "new_file"]


@dataclass(frozen=True)
class Foreign:
    """What a file of another package holds.

    Attributes
    ----------
    sources : mapping of str to Source
        Its arrays, by name, to be read while the file is open.
    values : mapping of str to JSON value
        What is no array, if mpidist has exported it.
    metadata : JSON value
        As given to `save`; of files of others what they say of themselves.
    step : int or None
        As given to `save`.
    """

    sources: Mapping[str, Source]
    values: Mapping[str, JSON] = field(default_factory=dict)
    metadata: JSON = None
    step: int | None = None


def description(checkpoint: Checkpoint, **more: JSON) -> str:
    """Return, as JSON, what a checkpoint says that is no array."""
    manifest = checkpoint.manifest
    return json.dumps(
        {
            "step": manifest.step,
            "created": manifest.created,
            "versions": dict(manifest.versions),
            "metadata": encode(manifest.metadata),
            "values": encode(dict(manifest.values)),
            **more,
        },
        allow_nan=False,
    )


def described(text: str | bytes, sources: Mapping[str, Source], path: Path) -> Foreign:
    """Return what a file holds that has such a description."""
    try:
        told = json.loads(text)
        values = dict(decode(told["values"]).items())
        return Foreign(sources, values, decode(told["metadata"]), index(told["step"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointCorruptError(
            f"{path}: what mpidist wrote into it beside the arrays is damaged: "
            f"{type(error).__name__}: {error}; export it anew"
        ) from error


@contextmanager
def new_file(path: Path, nbytes: int) -> Iterator[IO[bytes]]:
    """Have a file written under a temporary name; it gets its own, synced, if nothing is raised.

    Parameters
    ----------
    path : Path
        Of the file; must not be there.
    nbytes : int
        Least size of the complete file, for errors.

    Yields
    ------
    binary file
        What to write; nobody else writes to it.
    """
    with naming(path.parent):
        descriptor, name = create_unique(path.parent, path.name, ".tmp", mode=0o666)
    part = Path(name)
    try:
        with naming(part, nbytes), os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def copy_array(
    reader: Reader, name: str, array: StoredArray, descriptor: int, byte: int, progress: Progress
) -> None:
    """Write the elements of an array side by side into a file, in C order, little-endian.

    Parameters
    ----------
    reader : Reader
        Of its checkpoint.
    name : str
        Of the array.
    array : StoredArray
        What it is.
    descriptor : int
        Of the file.
    byte : int
        Where its first element goes.
    progress : callable
        Is told how many more bytes are written.
    """
    for unit, data in reader.units(name, Box.whole(array.shape)):
        region = unit.region.placed_in(array.boxes[unit.number].box)
        place, flat = 0, as_bytes(data)
        for first, count in runs_of(region, array.shape):
            nbytes = count * array.dtype.itemsize
            write_at(descriptor, flat[place : place + nbytes], byte + first * array.dtype.itemsize)
            place += nbytes
        progress(data.nbytes)
