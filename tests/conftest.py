"""Fixtures and plugins of the whole suite."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

if sys.dont_write_bytecode:
    # As container images like to have it. A thousand processes would each compile all modules.
    sys.dont_write_bytecode = False
    cache = Path(__file__).parents[1] / ".pytest_cache" / "pycache"
    sys.pycache_prefix = os.environ.setdefault("PYTHONPYCACHEPREFIX", str(cache))
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

pytest_plugins = [
    "tests._ranks.plugin",
    "tests.nccl_stub.fixtures",
    "tests.devices",
    "tests.tiers",
]


def pytest_collection_finish() -> None:
    """Keep the collector away from what lives as long as the run: tests call it often."""
    gc.freeze()
