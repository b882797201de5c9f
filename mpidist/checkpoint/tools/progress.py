"""A bar on a terminal for long work on files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mpidist.checkpoint.tools.sources import Progress, unheard

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(nbytes: int | None, name: str, *, show: bool) -> Iterator[Progress]:
    """Show how many bytes are done, on standard error.

    Parameters
    ----------
    nbytes : int or None
        How many there are, if that is known.
    name : str
        Before the bar.
    show : bool
        Whether it is wanted. It is shown on a terminal only, and where tqdm is installed.

    Yields
    ------
    callable
        To be told how many more are done.
    """
    if not (show and sys.stderr.isatty()):
        yield unheard
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield unheard
        return
    with tqdm(
        total=nbytes,
        desc=name,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        file=sys.stderr,
        dynamic_ncols=True,
    ) as bar:
        yield bar.update
