"""What wrote a checkpoint."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from mpidist.checkpoint import hdf5

__all__ = ["versions"]


@cache  # finding one's own reads files, and every save asks
def versions() -> Mapping[str, str]:
    """Return the versions of mpidist and of what it stands on."""
    try:
        own = version("mpidist")
    except PackageNotFoundError:  # run from a checkout
        own = "unknown"
    python = platform.python_version()
    return {"mpidist": own, "numpy": np.__version__, "python": python} | hdf5.versions()
