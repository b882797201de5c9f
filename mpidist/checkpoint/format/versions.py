"""What wrote a checkpoint."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache

import numpy as np

from mpidist import __version__
from mpidist.checkpoint.format import hdf5

__all__ = ["versions"]


@cache  # every save asks
def versions() -> Mapping[str, str]:
    """Return the versions of mpidist and of what it stands on."""
    python = platform.python_version()
    return {"mpidist": __version__, "numpy": np.__version__, "python": python} | hdf5.versions()
