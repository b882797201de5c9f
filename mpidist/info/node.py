"""What the first rank of a node can tell of it: cores, memory, GPUs, and what others left there."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

from mpidist.backends.crossover_file import processor
from mpidist.backends.node.counters import supported
from mpidist.backends.node.shared_memory import DIRECTORY
from mpidist.info import nvml
from mpidist.info.facts import NodeFacts, SharedMemory
from mpidist.info.leftovers import find_leftovers

__all__ = ["look_at_node", "shared_memory"]


def look_at_node(ranks: Sequence[int]) -> NodeFacts:
    """Return the facts of this node.

    Parameters
    ----------
    ranks : sequence of int
        Those that share its memory.
    """
    driver = nvml.ask()
    return NodeFacts(
        host=platform.node(),
        ranks=ranks,
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        processor=processor(),
        cores=os.cpu_count() or 1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        direct=supported(),
        shared=shared_memory(DIRECTORY),
        gpus=driver.gpus,
        driver=driver.version,
        cuda=driver.cuda,
        leftovers=find_leftovers(DIRECTORY),
    )


def shared_memory(directory: Path) -> SharedMemory | None:
    """Return the size of a file system, or None if it is not there or nothing can be made in it."""
    try:
        disk = os.statvfs(directory)
    except OSError:
        return None
    if not os.access(directory, os.W_OK):
        return None
    total, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
    return SharedMemory(path=str(directory), total=total, free=free)
