"""The process environment: the only module that reads it.

Evidence of a launcher means that some program started this process as one rank of several. It is
read from variables that the launchers set for each rank, never from ``SLURM_NTASKS``: inside a
batch script plain ``python`` sees the job's task count there although it is one process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

__all__ = [
    "Evidence",
    "cache_directory",
    "crossovers",
    "debug",
    "dump_directory",
    "launcher_evidence",
    "omp_num_threads",
    "ranks_per_node",
    "store_evidence",
]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a launcher left in the environment.

    Attributes
    ----------
    launcher : str
        Who set it, for messages.
    variable : str
        The variable that was found.
    size : int or None
        Number of ranks that it promises; None where the launcher does not say.
    """

    launcher: str
    variable: str
    size: int | None

    @property
    def several(self) -> bool:
        """Whether more than one rank is promised."""
        return self.size is not None and self.size > 1


def _integer(variable: str) -> int | None:
    try:
        return int(os.environ[variable])
    except (KeyError, ValueError):
        return None


def launcher_evidence() -> Evidence | None:
    """Return what says that an MPI launcher started this process, or None.

    Returns
    -------
    Evidence or None
        The variable that promises the most ranks: a job step of Slurm with several tasks counts
        although the PMI of a single task stands beside it.
    """
    found = []
    for launcher, variable in (
        ("Open MPI's mpirun", "OMPI_COMM_WORLD_SIZE"),
        ("a PMI launcher (MPICH's mpirun, srun --mpi=pmi2)", "PMI_SIZE"),
        ("srun", "SLURM_STEP_NUM_TASKS"),
    ):
        size = _integer(variable)
        # A Slurm step of one task is the batch script itself, or a lone process: no evidence.
        if size is not None and (size > 1 or launcher != "srun"):
            found.append(Evidence(launcher, variable, size))
    if not found and "PMIX_RANK" in os.environ:
        found.append(Evidence("a PMIx launcher", "PMIX_RANK", None))
    return max(found, key=lambda evidence: evidence.size or 0, default=None)


def store_evidence() -> Evidence | None:
    """Return what RANK and WORLD_SIZE say, the variables of plain processes, or None."""
    rank, size = _integer("RANK"), _integer("WORLD_SIZE")
    if rank is None or size is None:
        return None
    return Evidence("RANK and WORLD_SIZE", "WORLD_SIZE", size)


def crossovers() -> str | None:
    """Return ``MPIDIST_CROSSOVERS``: sizes as text, or the path of a file; None if not set."""
    return os.environ.get("MPIDIST_CROSSOVERS") or None


def debug() -> bool:
    """Whether ``MPIDIST_DEBUG`` asks for all collectives to be compared before they begin."""
    return os.environ.get("MPIDIST_DEBUG", "0") not in ("", "0")


def dump_directory() -> str:
    """Return where reports go as JSON: ``MPIDIST_DUMP``, or the current directory."""
    return os.environ.get("MPIDIST_DUMP") or "."


def cache_directory() -> str:
    """Return the directory for what can be measured again, as XDG says; it may begin with ``~``."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return f"{base}/mpidist"


def ranks_per_node() -> int | None:
    """Return ``MPIDIST_RANKS_PER_NODE``: pretend that nodes have this many ranks, for tests."""
    return _integer("MPIDIST_RANKS_PER_NODE")


def omp_num_threads() -> str:
    """Return ``OMP_NUM_THREADS``, or nothing where it is not set."""
    return os.environ.get("OMP_NUM_THREADS", "")
