"""Create files that are new: nothing that stands there is followed, opened or overwritten.

A name in a directory that others can write may be a symbolic link that somebody has put there, or a
file that another process has just made. `os.O_EXCL` refuses both.
"""

from __future__ import annotations

import contextlib
import os

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_ATTEMPTS = 100
"""Random names that are tried; a second one is needed once in 4 billion files of one stem."""


def create(path: str | os.PathLike[str], *, mode: int = 0o600, replace: bool = False) -> int:
    """Create a file, and return its descriptor, for reading and writing; the caller closes it.

    The umask takes away from the permissions `mode`, which let the owner alone read when omitted.
    `replace` removes what stands under that name before: the name, never what it links to. Raises
    FileExistsError if there is something of that name, also a symbolic link without a target, or if
    somebody has put it there after the removal.
    """
    if replace:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108  # pathlib is a part of the import
    return os.open(path, _FLAGS, mode)


def create_unique(
    directory: str | os.PathLike[str], stem: str, suffix: str, *, mode: int = 0o600
) -> tuple[int, str]:
    """Create a file under a name that no other process uses, on whatever host it runs.

    Between stem and suffix stand a hyphen and eight random hexadecimal digits: containers may share
    host name, second and process number. Returns the descriptor, open for reading and writing,
    which the caller closes, and the path.
    """
    for _ in range(_ATTEMPTS):
        name = f"{stem}-{os.urandom(4).hex()}{suffix}"
        path = os.path.join(directory, name)  # noqa: PTH118  # pathlib is a part of the import
        try:
            return create(path, mode=mode), path
        except FileExistsError:
            continue
    raise FileExistsError(f"{_ATTEMPTS} random names {stem}-*{suffix} are taken in {directory!s}")
