"""Checkpoints as files of safetensors, and such files as checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from mpidist._optional import require
from mpidist._types import Array, DType
from mpidist.arrays.boxes import Box
from mpidist.arrays.namespaces import BFLOAT16
from mpidist.checkpoint.directory import Checkpoint
from mpidist.checkpoint.format.files import write_at
from mpidist.checkpoint.tools.foreign import Foreign, copy_array, described, description
from mpidist.checkpoint.tools.sources import Progress, Reader
from mpidist.errors import (
    CheckpointCorruptError,
    CheckpointIncompatibleError,
    UnsupportedOperationError,
)

__all__ = ["open_safetensors", "write_safetensors"]

_KEY = "mpidist"
"""Of what is no array, in the metadata of such a file: texts by name."""

_TO_NAME: dict[DType, str] = {
    np.dtype(np.bool_): "BOOL",
    **{np.dtype(f"{kind.lower()}{n // 8}"): f"{kind}{n}" for kind in "IU" for n in (8, 16, 32, 64)},
    **{np.dtype(f"f{n // 8}"): f"F{n}" for n in (16, 32, 64)},
    BFLOAT16: "BF16",
    np.dtype(np.complex64): "C64",
}
_TO_DTYPE = {name: dtype for dtype, name in _TO_NAME.items()}


def write_safetensors(
    checkpoint: Checkpoint, path: Path, file: IO[bytes], progress: Progress
) -> None:
    """Write a checkpoint as one file of safetensors; parameters as of `write_npz`.

    Raises
    ------
    UnsupportedOperationError
        If an array has a dtype or a name that the format has not.

    Notes
    -----
    Not with its library, which wants all arrays in memory at once. The format is: the length of a
    header, 8 bytes; the header, JSON; the arrays, one behind the other.
    """
    arrays = checkpoint.arrays
    unknown = [
        f"{name} ({array.dtype})"
        for name, array in arrays.items()
        if array.dtype not in _TO_NAME or name == "__metadata__"
    ]
    if unknown:
        raise UnsupportedOperationError(
            f"safetensors cannot keep {', '.join(unknown[:5])} of {checkpoint.directory}; export "
            "to .npz, which can"
        )
    del path
    # As its library sorts them: whatever is in front of an array has elements of its length.
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {_KEY: description(checkpoint)}}
    place, places = 0, {}
    for name in names:
        array = arrays[name]
        places[name] = place
        header[name] = {
            "dtype": _TO_NAME[array.dtype],
            "shape": array.shape,
            "data_offsets": (place, place + array.nbytes),
        }
        place += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    front = np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)
    begin = write_at(file.fileno(), front, 0)
    with Reader(checkpoint) as reader:
        for name in names:
            copy_array(reader, name, arrays[name], file.fileno(), begin + places[name], progress)


@contextmanager
def open_safetensors(path: Path) -> Iterator[Foreign]:
    """Open a file of safetensors.

    Raises
    ------
    BackendUnavailableError
        If safetensors is not installed.
    CheckpointCorruptError
        If it is no such file, or damaged.
    CheckpointIncompatibleError
        If an array has a dtype that mpidist has not.
    """
    library = require("safetensors", extra="safetensors", purpose="import from safetensors")
    try:
        opened = library.safe_open(path, framework="numpy")
    except library.SafetensorError as error:
        raise CheckpointCorruptError(
            f"{path} is no file of safetensors, or is damaged: {error}"
        ) from error
    with opened as file:
        sources = {name: _Tensor(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
        unknown = [f"{name} ({s.kind})" for name, s in sources.items() if s.kind not in _TO_DTYPE]
        if unknown:
            raise CheckpointIncompatibleError(
                f"{path}: a checkpoint cannot keep {', '.join(unknown[:5])}; convert it first"
            )
        texts = file.metadata() or {}
        if _KEY in texts:
            yield described(texts[_KEY], sources, path)
        else:
            yield Foreign(sources, metadata=texts or None)


class _Tensor:
    """An array of such a file: a `Source`."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor
        self.kind = str(tensor.get_dtype())
        self.shape = tuple(tensor.get_shape())

    @property
    def dtype(self) -> DType:
        """Of the array."""
        return _TO_DTYPE[self.kind]

    def read(self, box: Box) -> Array:
        """Return the elements of a part."""
        part: Array = np.asarray(self._tensor[box.slices])
        return part
