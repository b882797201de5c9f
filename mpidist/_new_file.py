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
    """Create a file, and return its descriptor, open for reading and writing.

    Parameters
    ----------
    path : str or path-like
        The file. A symbolic link there counts as a file, whether its target exists or not.
    mode : int, optional
        Permissions, of which the process's umask takes away. Readable by the owner alone when
        omitted.
    replace : bool, optional
        Whether to remove what stands under that name before: the name, never what it links to.

    Returns
    -------
    int
        The descriptor; the caller closes it.

    Raises
    ------
    FileExistsError
        If there is something of that name, also if somebody has put it there after the removal.
    OSError
        If the file cannot be made.
    """
    if replace:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108  # pathlib is a part of the import
    return os.open(path, _FLAGS, mode)


def create_unique(
    directory: str | os.PathLike[str], stem: str, suffix: str, *, mode: int = 0o600
) -> tuple[int, str]:
    """Create a file under a name that no other process uses, on whatever host it runs.

    Parameters
    ----------
    directory : str or path-like
        Directory, which has to exist.
    stem, suffix : str
        How the name begins and ends. Eight random hexadecimal digits stand between them, after a
        hyphen: containers may share host name, second and process number.
    mode : int, optional
        Permissions, as for `create`.

    Returns
    -------
    (int, str)
        The descriptor, open for reading and writing, which the caller closes; and the path.

    Raises
    ------
    OSError
        If the file cannot be made.
    """
    for _ in range(_ATTEMPTS):
        name = f"{stem}-{os.urandom(4).hex()}{suffix}"
        path = os.path.join(directory, name)  # noqa: PTH118  # pathlib is a part of the import
        try:
            return create(path, mode=mode), path
        except FileExistsError:
            continue
    raise FileExistsError(f"{_ATTEMPTS} random names {stem}-*{suffix} are taken in {directory!s}")
