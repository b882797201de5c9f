"""One file with numbers and arrays: written whole or not at all, verified when it is read."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mpidist._types import Array
from mpidist.errors import CheckpointCorruptError

__all__ = ["read_file", "write_file"]

_FORMAT = "mpidist whole run, version 1"
_HEADER, _DIGEST, _ARRAY = "header", "sha256", "array/"


def write_file(path: Path, values: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Replace a file; whoever is killed at any instant leaves the old one or the new one.

    Parameters
    ----------
    path : Path
        An .npz file: ``numpy.load`` reads it, no pickles. Its directory is made if missing.
    values : mapping of str to JSON value
        Numbers, texts, lists and mappings of them.
    arrays : mapping of str to Array
        Host arrays of any dtype.

    Raises
    ------
    OSError
        If it cannot be written; what was there still is.

    Notes
    -----
    Local. A second file beside `path` is written, synced and renamed, and then the directory is
    synced: after a return the new file survives a loss of power. The name of the second file is
    fixed, so that a killed writer's is overwritten by the next one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    dtypes = {name: str(array.dtype) for name, array in arrays.items()}
    header = json.dumps({"format": _FORMAT, "values": values, "dtypes": dtypes}, allow_nan=False)
    plain = {name: _plain(array) for name, array in arrays.items()}
    members = {_ARRAY + name: array for name, array in plain.items()}
    members[_HEADER] = np.frombuffer(header.encode(), np.uint8)
    members[_DIGEST] = np.frombuffer(_digest(header.encode(), plain), np.uint8)
    try:
        with part.open("wb") as file:
            _write(file, members)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)  # a full disk has room for others again
        raise
    _sync_directory(path.parent)


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Read what `write_file` wrote.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    values : dict of str to JSON value
        As given.
    arrays : dict of str to Array
        As given.

    Raises
    ------
    OSError
        If there is none, or it may not be read.
    CheckpointCorruptError
        If it is cut off or damaged, or something else.

    Notes
    -----
    Local. Nothing in the file is executed, whoever wrote it.
    """
    with path.open("rb") as opened:
        try:
            raw, header, plain, expected = _read(opened)
        except Exception as error:  # a damaged archive may raise anything
            raise CheckpointCorruptError(
                f"{path} is not, or not all of, what mpidist.train wrote here (expected the format "
                f"{_FORMAT!r}): {type(error).__name__}: {error}; take another save, or begin anew"
            ) from error
    found = _digest(raw, plain)
    if found != expected:
        raise CheckpointCorruptError(
            f"{path} is damaged: expected SHA-256 {expected.hex()[:16]}..., its contents have "
            f"{found.hex()[:16]}...; take another save, or begin anew"
        )
    return header["values"], {
        name: array.view(_dtype(header["dtypes"][name])) for name, array in plain.items()
    }


def _read(file: BinaryIO) -> tuple[bytes, Any, dict[str, Array], bytes]:
    """Return the header's bytes, what they say, the arrays as they are kept, and the digest."""
    with np.load(file, allow_pickle=False) as members:
        raw = members[_HEADER].tobytes()
        header = json.loads(raw)
        if header["format"] != _FORMAT:
            raise ValueError(f"its format is {header['format']!r}")
        plain = {name: members[_ARRAY + name] for name in header["dtypes"]}
        return raw, header, plain, members[_DIGEST].tobytes()


def _write(file: BinaryIO, members: Mapping[str, Array]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in members.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(array: Array) -> Array:
    """Return the array in C order, as unsigned integers if .npy knows no name of its dtype."""
    array = np.require(array, requirements="C")
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "V" else array


def _dtype(name: str) -> np.dtype[Any]:
    import ml_dtypes  # noqa: F401  # teaches numpy the name bfloat16

    return np.dtype(name)


def _digest(header: bytes, arrays: Mapping[str, Array]) -> bytes:
    """Return the SHA-256 of the header, and of the shape and bytes of each array."""
    digest = hashlib.sha256(header)
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape} {arrays[name].dtype}".encode())
        digest.update(arrays[name].reshape(-1).data)
    return digest.digest()
